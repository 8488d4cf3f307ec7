"""Two trials worked out by hand: every figure that is derived of them.

Three requests of 3, 2 and 4 prompt tokens ask for 3, 1 and 2 tokens; 2 slots, 10 ns a step.

    continuous  step 0 reads prompts 0 and 1; 1 is done. Step 1 reads prompt 2, and 0 stalls.
                Step 2 decodes 0 and 2; 2 is done. Step 3 decodes 0, which is done.
    static      step 0 reads prompts 0 and 1; 1 is done and held. Steps 1 and 2 decode both.
                Step 3 reads prompt 2, and step 4 decodes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.laws import Config, serve, workload_of
from support.occupancy import occupancy

from batchbench.batching.recording import Header, Recording
from batchbench.reports import metrics
from batchbench.reports.latency import (
    Latencies,
    describe_step,
    e2el_ms,
    gaps_ms,
    median_step_ms,
    queue_ms,
    stalls,
    tpot_ms,
    ttft_ms,
    within,
)
from batchbench.workloads import Workload

ROWS = [(3, 3, 0), (2, 1, 0), (4, 2, 0)]
NAN = float("nan")
NS = 1e-6  # in ms

close = functools.partial(pytest.approx, rel=1e-12, abs=0)


def trial(policy: str, **about: object) -> Recording:
    recording = serve(workload_of(ROWS), Config(policy, 2))
    header = replace(recording.header, about={**recording.header.about, **about})
    return replace(recording, header=header)


CONTINUOUS, STATIC = trial("continuous"), trial("static")
BOTH = {"continuous": CONTINUOUS, "static": STATIC}


@pytest.mark.parametrize(
    ("name", "queue", "ttft", "tpot", "e2el"),
    [
        ("continuous", [0, 0, 10], [10, 10, 20], [15, NAN, 10], [40, 10, 30]),
        ("static", [0, 0, 30], [10, 10, 40], [10, NAN, 10], [30, 10, 50]),
    ],
)
def test_latencies_of_each_request(
    name: str, queue: list[float], ttft: list[float], tpot: list[float], e2el: list[float]
) -> None:
    trial = BOTH[name]
    for values, found in (
        (queue, queue_ms(trial)),
        (ttft, ttft_ms(trial)),
        (tpot, tpot_ms(trial)),
        (e2el, e2el_ms(trial)),
    ):
        assert (found / NS).tolist() == close(values, nan_ok=True)


def test_latencies_count_from_the_time_at_which_a_request_was_due() -> None:
    """One slot until 30 ns for the first, which leaves the second waiting from 5 ns on."""
    late = serve(workload_of([(3, 3, 0), (2, 2, 5)]), Config("continuous", 1))
    assert (queue_ms(late) / NS).tolist() == close([0, 25])
    assert (ttft_ms(late) / NS).tolist() == close([10, 35])
    assert (e2el_ms(late) / NS).tolist() == close([30, 45])
    assert (tpot_ms(late) / NS).tolist() == close([10, 10])


@pytest.mark.parametrize(("name", "gaps"), [("continuous", [10, 10, 20]), ("static", [10] * 3)])
def test_gaps_between_tokens(name: str, gaps: list[float]) -> None:
    found = gaps_ms(BOTH[name])
    assert found.count == len(gaps)
    assert found.mean() == close(np.mean(gaps) * NS)
    assert found.max == close(max(gaps) * NS)


def test_pooled_latencies_are_those_of_all_trials() -> None:
    pooled = Latencies.of(CONTINUOUS, STATIC)
    counts = (pooled.queue.count, pooled.ttft.count, pooled.tpot.count)
    assert (*counts, pooled.itl.count, pooled.e2el.count) == (6, 6, 4, 6, 6)
    means = (pooled.queue.mean(), pooled.ttft.mean(), pooled.tpot.mean(), pooled.itl.mean())
    values = (40 / 6, 100 / 6, 45 / 4, 70 / 6)
    assert means == close([value * NS for value in values])
    assert pooled.e2el.mean() == close(170 / 6 * NS)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, [True, True, True]),
        ({"ttft": 10}, [True, True, False]),
        ({"ttft": 9}, [False, False, False]),
        ({"tpot": 10}, [False, True, True]),
        ({"e2el": 30}, [False, True, True]),
        ({"ttft": 20, "tpot": 12, "e2el": 29}, [False, True, False]),
        ({"ttft": 10, "e2el": 99}, [True, True, False]),
    ],
)
def test_a_request_meets_a_limit_that_it_just_reaches(
    limits: Mapping[str, int], good: list[bool]
) -> None:
    ms = {name: ttft_ms(CONTINUOUS)[0] * limit / 10 for name, limit in limits.items()}
    assert within(CONTINUOUS, ms).tolist() == good


def test_counters() -> None:
    assert metrics.counters(CONTINUOUS) == {
        "forward_passes": 4,
        "prefill_passes": 2,
        "mixed_passes": 0,
        "decode_passes": 2,
        "prefill_tokens": 9,
        "padded_prefill_tokens": 10,
        "slot_steps": 8,
        "useful_slot_steps": 6,
        "prompt_slot_steps": 0,
        "finished_slot_steps": 0,
        "empty_slot_steps": 1,
        "idle_slot_steps": 1,
        "stalled_slot_steps": 1,
        "kv_tokens_peak": 9,
    }
    assert metrics.counters(STATIC) == {
        "forward_passes": 5,
        "prefill_passes": 2,
        "mixed_passes": 0,
        "decode_passes": 3,
        "prefill_tokens": 9,
        "padded_prefill_tokens": 10,
        "slot_steps": 10,
        "useful_slot_steps": 6,
        "prompt_slot_steps": 0,
        "finished_slot_steps": 2,
        "empty_slot_steps": 2,
        "idle_slot_steps": 4,
        "stalled_slot_steps": 0,
        "kv_tokens_peak": 7,
    }


def test_counters_of_pieces_of_prompts_beside_a_request_that_decodes() -> None:
    """A pass computes 4 tokens: the prompt of 7 takes 3 and 3 and, beside 1 that decodes, 1."""
    config = Config("continuous", 2, prefill="mixed", max_batched_tokens=4)
    counters = metrics.counters(serve(workload_of([(1, 4, 0), (7, 1, 0)]), config))
    assert {name: count for name, count in counters.items() if count} == {
        "forward_passes": 4,
        "prefill_passes": 1,
        "mixed_passes": 2,
        "decode_passes": 1,
        "prefill_tokens": 8,
        "padded_prefill_tokens": 6 + 3 + 1,
        "slot_steps": 8,
        "useful_slot_steps": 5,
        "prompt_slot_steps": 2,
        "empty_slot_steps": 1,
        "idle_slot_steps": 1,
        "kv_tokens_peak": 10,
    }


def test_occupancy() -> None:
    found = occupancy(STATIC)
    assert (found.start_s * 1e9).tolist() == close([0, 10, 20, 30, 40])
    assert (found.end_s * 1e9).tolist() == close([10, 20, 30, 40, 50])
    assert found.running.tolist() == [2, 1, 1, 1, 1]
    assert found.finished.tolist() == [0, 1, 1, 0, 0]
    assert found.waiting.tolist() == [1, 1, 1, 0, 0]


def test_a_summary() -> None:
    found = metrics.summary([trial("continuous", energy_joules=3.0)], {"ttft": 15 * NS})
    figures = [NAN if value is None else value for value in found.values()]
    assert figures[:12] == close(
        [40e-9, 3, 9, 6, 3 / 40e-9, 6 / 40e-9, 15 / 40e-9, 3.0, 0.5, NAN, 2 / 40e-9, 2 / 3],
        nan_ok=True,
    )
    assert list(found)[:12] == [
        "duration",
        "completed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "energy_joules",
        "joules_per_output_token",
        "floor_share",
        "request_goodput",
        "slo_attainment",
    ]
    statistics = ("mean", "median", "std", "p90", "p99", "p99.9")
    latencies = ("queue", "ttft", "tpot", "itl", "e2el")
    assert list(found)[12:-4] == [f"{s}_{name}_ms" for name in latencies for s in statistics]
    assert found["median_ttft_ms"] == close(10 * NS)
    assert found["p99.9_ttft_ms"] is None
    assert list(found)[-4:] == [
        "arrival_rate",
        "mean_arrival_lag_ms",
        "p99_arrival_lag_ms",
        "max_arrival_lag_ms",
    ]
    assert list(found.values())[-4:] == [None] * 4


def test_a_summary_of_several_trials() -> None:
    trials = [trial("continuous", energy_joules=3.0), trial("static", energy_joules=5.0)]
    found = metrics.summary(trials, {"ttft": 15 * NS})
    assert found["duration"] == close(45e-9)
    assert found["request_throughput"] == close(3 / 45e-9)
    assert found["energy_joules"] == 4.0
    assert found["mean_e2el_ms"] == close(170 / 6 * NS)
    assert found["request_goodput"] == close(2 / 45e-9)
    assert found["slo_attainment"] == close(4 / 6)
    assert metrics.summary(trials)["slo_attainment"] is None
    assert metrics.summary(trials)["request_goodput"] is None


def test_energy_is_told_where_each_trial_counted_it() -> None:
    counted = [trial("static", energy_joules=joules) for joules in (2.0, 9.0, 3.0)]
    assert metrics.summary(counted)["energy_joules"] == 3.0
    assert metrics.summary([*counted, STATIC])["energy_joules"] is None
    assert metrics.summary([trial("static", energy_joules=None)])["energy_joules"] is None
    assert metrics.summary([STATIC])["joules_per_output_token"] is None


def test_the_share_of_the_floor_is_the_median_of_the_trials_that_have_one() -> None:
    reading = {"dtype": "?", "weight_bytes": 9, "step_weight_bytes": 9, "kv_token_bytes": 1}
    slow, fast = (
        trial("continuous", memory={"bytes_per_s": speed, "reading": reading})
        for speed in (1e9, 2e9)
    )
    share = metrics.summary([slow])["floor_share"]
    assert share == close((9 + 9) / 1e9 / 10e-9)  # of 3 + 1 and 4 + 1 cached tokens
    assert metrics.summary([slow, CONTINUOUS, fast])["floor_share"] == close(share * 0.75)
    assert metrics.summary([CONTINUOUS])["floor_share"] is None


def test_the_typical_trial_is_the_median_one_or_the_shorter_of_the_middle_two() -> None:
    trials = [serve(workload_of([(1, n, 0)]), Config("static", 1)) for n in (4, 1, 3, 2)]
    assert metrics.typical_trial(trials) is trials[3]
    assert metrics.typical_trial(trials[:3]) is trials[2]
    assert metrics.typical_trial(trials[:1]) is trials[0]


def test_the_arrivals_of_trials_are_their_median_rate_and_all_of_their_lags() -> None:
    trials = [
        serve(workload_of([(1, 1, gap) for gap in gaps]), Config("continuous", 1))
        for gaps in ([0, 15, 15, 15], [0, 40, 40, 40], [0, 20, 20, 20])
    ]
    found = metrics.summary(trials)
    assert found["arrival_rate"] == close(3 / 60e-9)
    rates = [metrics.summary([each])["arrival_rate"] for each in trials]
    assert rates == close([3 / 45e-9, 3 / 120e-9, 3 / 60e-9])
    assert found["max_arrival_lag_ms"] is not None


def test_a_request_without_a_last_token_is_not_complete() -> None:
    requests = replace(STATIC.requests, last=np.array([2, 0, -1]))
    assert metrics.summary([replace(STATIC, requests=requests)])["completed"] == 2
    assert metrics.summary([STATIC])["completed"] == 3


def test_without_steps_every_request_is_complete() -> None:
    workload = Workload.of("two", [[1, 2], [3]], [2, 1])
    header = Header("remote", 0, 2, False, {})
    recording = Recording.of_tokens(
        header, workload, [[5, 6], [7]], [[10, 40], [20]], [0, 5], np.array([0, 4])
    )
    found = metrics.summary([recording])
    assert (found["completed"], found["total_output_tokens"]) == (2, 3)
    assert found["duration"] == close(40e-9)
    assert gaps_ms(recording).count == 1
    assert gaps_ms(recording).mean() == close(30 * NS)
    assert stalls([recording]) == []


@pytest.mark.parametrize(
    ("ends", "step_ns"),
    [
        ([[10, 40, 140], [20, 60]], 40),  # gaps of 30, 100 and 40
        ([[10, 10, 140], [20, 20]], 32.5),  # most gaps are 0: TPOTs of 65 and 0
    ],
)
def test_without_steps_a_typical_gap_stands_for_a_step(
    ends: list[list[int]], step_ns: float
) -> None:
    header = Header("remote", 0, 2, False, {})
    workload = Workload.of("two", [[1], [2]], [3, 2])
    trial = Recording.of_tokens(
        header, workload, [[5, 6, 7], [8, 9]], ends, [0, 0], np.array([0, 0])
    )
    assert median_step_ms(trial) == close(step_ns * NS)


def test_without_steps_and_gaps_a_typical_ttft_stands_for_a_step() -> None:
    header = Header("remote", 0, 2, False, {})
    workload = Workload.of("three", [[1]] * 3, [1] * 3)
    trial = Recording.of_tokens(
        header, workload, [[5], [6], [7]], [[10], [20], [90]], [0] * 3, np.array([0] * 3)
    )
    assert median_step_ms(trial) == close(20 * NS)


def stall(**changed: object) -> dict[str, Any]:
    return {
        "trial": 0,
        "gap_ms": close(20 * NS),
        "requests": 1,
        "start_ms": close(10 * NS),
        "step": 1,
        "cause": "prefill of 1 request, 4 tokens",
        **changed,
    }


def test_a_stall_names_the_step_that_took_most_of_the_gap() -> None:
    assert stalls([CONTINUOUS]) == [stall()]
    assert stalls([STATIC]) == []
    assert stalls([STATIC, CONTINUOUS, CONTINUOUS]) == [stall(trial=1), stall(trial=2)]
    assert stalls([CONTINUOUS] * 9) == [stall(trial=n) for n in range(5)]


def test_what_steps_do() -> None:
    assert [describe_step(CONTINUOUS, step) for step in range(4)] == [
        "prefill of 2 requests, 5 tokens",
        "prefill of 1 request, 4 tokens",
        "decode of 2 slots",
        "decode of 1 slot",
    ]
    config = Config("continuous", 2, prefill="mixed", max_batched_tokens=4)
    mixed = serve(workload_of([(1, 4, 0), (7, 1, 0)]), config)
    assert describe_step(mixed, 2) == "prefill of 1 request, 1 token + decode of 1 slot"
