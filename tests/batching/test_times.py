"""Times within a span, which only the Recording derives; spans may be split anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.costs import costs, run, with_listed_ends
from support.laws import Config, configs, law, workload_of, workloads
from support.occupancy import occupancy

from batchbench.batching import recording as module
from batchbench.batching.recording import Recording, SpanLog
from batchbench.batching.step_cost import StepCost
from batchbench.reports import metrics
from batchbench.reports.latency import by_length, length_classes, stalls
from batchbench.reports.metrics import decode_steps, full_kv_tokens
from batchbench.reports.prediction import changes_of, counts_of
from batchbench.reports.replay.frames import TrialReplay
from batchbench.reports.time_budget import (
    arrival_lag_ms,
    arrival_rate,
    host_share,
    littles_law,
    time_budget,
)
from batchbench.studies.capacity.search import queue_growth
from batchbench.workloads import Workload

POLICIES = ("static", "static-fixed", "static-bucketed", "static-oracle", "continuous")

some = settings(law, max_examples=60)


@pytest.mark.parametrize(
    ("cached_ns", "mean_ms", "p99_ms"),
    [(0.0, 1.0, 1.0), (100.0, 1.164, 1.320), (1000.0, 2.640, 4.200)],
)
@pytest.mark.parametrize("max_repeat", [None, 1])
def test_gaps_grow_with_the_cache(
    cached_ns: float, mean_ms: float, p99_ms: float, max_repeat: int | None
) -> None:
    """The mean step of eight rows with up to 405 tokens is 1 ms + 8 × 205 × 1 µs."""
    workload = workload_of([(5, 400, 0)] * 8)
    cost = StepCost(1e6, cached_ns=cached_ns)
    found = metrics.summary([run(workload, Config("static", 8), cost, max_repeat=max_repeat)])
    assert found["mean_itl_ms"] == pytest.approx(mean_ms, rel=1e-9)
    assert found["mean_tpot_ms"] == pytest.approx(mean_ms, rel=1e-9)
    assert found["p99_itl_ms"] == pytest.approx(p99_ms, rel=2e-3)


def test_a_replay_is_never_ahead() -> None:
    """Equal steps would be 53 too many with one slot and 5 µs per cached token."""
    recording = run(workload_of([(5, 400, 0)]), Config("static", 1), StepCost(1e6, cached_ns=5e3))
    reel, ends = TrialReplay("mine", recording), recording.step_ends_ns
    for step in range(0, 400, 7):
        for t, tokens in ((ends[step] - 1, step), (ends[step], step + 1)):
            assert reel.at(int(t), 1).tokens.tolist() == [tokens % 400]
            assert reel.tokens_at(int(t)) == tokens


@pytest.mark.parametrize("measured", [False, True])
@given(workload=workloads(), config=configs(policies=POLICIES), cost=costs, part=st.floats(0, 1.1))
@some
def test_steps_at_times_are_those_that_a_list_of_all_steps_shows(
    measured: bool, workload: Workload, config: Config, cost: StepCost, part: float
) -> None:
    recording = run(workload, config, cost)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    recording = with_listed_ends(recording) if measured else recording
    near = np.concatenate([starts, ends, ends - 1, ends + 1, [int(part * ends[-1])]])
    times = near[near >= 0]
    assert recording.step_at(times).tolist() == [int((ends <= t).sum()) for t in times]
    free = []
    for t in times.tolist():
        under_way = np.flatnonzero((starts < t) & (t < ends))
        free.append(int(ends[under_way[0]]) if len(under_way) else t)
    assert recording.free_from(times).tolist() == free


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@given(workload=workloads(), config=configs(policies=POLICIES), cost=costs, skip=st.integers(0, 2))
@some
def test_step_times_are_those_of_each_step(
    measured: bool, block: int, workload: Workload, config: Config, cost: StepCost, skip: int
) -> None:
    recording = run(workload, config, cost)
    took = recording.step_ends_ns - recording.step_starts_ns
    recording = with_listed_ends(recording) if measured else recording
    chosen = np.arange(0, len(recording.spans.steps), 2)
    expected = {
        step: (span, took[step])
        for span in chosen.tolist()
        for step in range(
            int(recording.first_steps[span]) + skip,
            int(recording.first_steps[span] + recording.spans.steps[span]),
        )
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        for part in recording.step_times(chosen, skip):
            rows = zip(
                *(c.tolist() for c in (part.span, part.step, part.count, part.ns)), strict=True
            )
            for span, first, count, ns in rows:
                for step in range(first, first + count):
                    assert step not in found
                    found[step] = (span, ns)
    assert found == expected


def cut(recording: Recording) -> Recording:
    """Return the same trial with a span for each step."""
    s = recording.spans
    each = {column.name: np.repeat(getattr(s, column.name), s.steps) for column in fields(s)}
    spans = SpanLog(
        **each
        | {"steps": np.ones(recording.num_steps, np.int64), "start_ns": recording.step_starts_ns}
    )
    return replace(with_listed_ends(recording), spans=spans)


def everything(recording: Recording, limits_ms: Mapping[str, float]) -> dict[str, Any]:
    """Return everything that is derived from a trial."""
    classes = length_classes(recording.requests.output_tokens)
    reel = TrialReplay("mine", recording)
    lag = arrival_lag_ms(recording)
    end = recording.duration_ns
    steps = decode_steps(recording)
    return {
        "summary": metrics.summary([recording], limits_ms),
        "counters": metrics.counters(recording),
        "fairness": by_length([recording], classes),
        "stalls": stalls([recording]),
        "lag": None if lag is None else lag.tolist(),
        "rate": arrival_rate(recording),
        "host": host_share(recording),
        "little": pytest.approx(littles_law(recording), abs=1e-12),
        "account": time_budget(recording),
        "growth": queue_growth(recording),
        "decode steps": (steps.took_ns.tolist(), steps.rows.tolist()),
        "cached": full_kv_tokens(recording),
        "scenes": [
            {name: np.asarray(value).tolist() for name, value in vars(scene).items()}
            for scene in (reel.at(t, end // 16) for t in range(0, end + 3, max(end // 97, 1)))
        ],
        "levels": [each.tolist() for each in reel.levels(end, 7, end)],
        "occupancy": [column.tolist() for column in vars(occupancy(recording)).values()],
        "work": counts_of(recording).tolist(),
        "changes": changes_of(recording),
    }


@given(workload=workloads(), config=configs(policies=POLICIES, waits=(0, 25)), cost=costs)
@settings(law, max_examples=200)
def test_how_many_steps_are_planned_at_once_changes_no_metric(
    workload: Workload, config: Config, cost: StepCost
) -> None:
    at_once = run(workload, config, cost)
    limits = {"ttft": at_once.duration_ns / 3e6, "tpot": cost.step_ns / 5e5}
    expected = everything(at_once, limits)
    for other in (run(workload, config, cost, max_repeat=1), cut(at_once)):
        found = everything(other, limits)
        for name, value in expected.items():
            assert found[name] == value, name
