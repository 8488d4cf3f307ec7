"""Metrics: every figure equals what plain Python finds in the expanded steps of the same trial."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import STEP_NS, Config, configs, law, serve, workload_of, workloads
from support.occupancy import occupancy
from support.replay import replay

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.plan import Plan
from batchbench.batching.policies import POLICIES as BY_NAME
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording, Steps
from batchbench.reports import metrics
from batchbench.reports import time_budget as timekeeping
from batchbench.reports.latency import Latencies, e2el_ms, gaps_ms, queue_ms, tpot_ms, ttft_ms
from batchbench.reports.replay.frames import PROMPT, TrialReplay
from batchbench.reports.statistics import Distribution
from batchbench.reports.time_budget import time_budget
from batchbench.workloads import Request, Workload

KINDS = ("useful", "prompt", "finished", "empty", "stalled")
LATENCIES = ("queue", "ttft", "tpot", "itl", "e2el")


POLICIES = ("static", "continuous", "support.laws:Lazy", "support.laws:Patient")


@dataclass
class Step:
    """One forward pass, as the engine saw it: what each slot did."""

    start: int
    end: int
    kinds: Counter[str] = field(default_factory=Counter)
    chunks: list[int] = field(default_factory=list)  # sizes
    decodes: bool = False
    cached: int = 0  # tokens in the cache after it


class Witness(SimulatedEngine):
    """Writes down, step by step and slot by slot, all that plans ask for; knows no Recorder.

    With ``uneven`` no two steps cost the same and time passes between calls, as on a real clock.
    ``stops`` gives the number of tokens after which a request's text ends. With ``late`` that is
    told after the next pass, which computes nothing for such a request.
    """

    def __init__(
        self,
        slots: int,
        uneven: bool = False,
        stops: dict[int, int] | None = None,
        late: bool = False,
    ):
        super().__init__(10)
        self.looks_late = late
        self.slots, self.uneven, self.stops = slots, uneven, stops or {}

    def begin(self, workload: Workload) -> None:
        super().begin(workload)
        self.log: list[Step] = []
        self.token_times: dict[int, list[int]] = {}
        self.held: dict[int, Request] = {}
        self.cached: dict[int, int] = {}

    def run(self, plan: Plan) -> int:
        now = self.clock.now() + (3 * len(self.log) % 7 if self.uneven else 0)
        costs = [10 + 5 * (i % 3) * self.uneven for i in range(len(self.log), len(self.log) + 10)]
        steps = plan.repeat if not self.uneven else min(plan.repeat, len(costs))
        if plan.until is not None:  # up to the first that ends at or after it
            ends = np.cumsum([costs[i % 10] for i in range(steps)]) + now
            steps = min(steps, int((ends < plan.until).sum()) + 1)
        self._starts.append(now)
        self.before = self._over()
        for slot in plan.released:
            del self.held[slot], self.cached[slot]
        for request, slot in plan.admitted:
            self.held[slot], self.cached[slot] = request, 0
        for i in range(steps):
            self._pass(plan, Step(now, now := now + costs[i % 10]))
        self.clock.wait_until(now)
        return steps

    def _pass(self, plan: Plan, step: Step) -> None:
        doing: dict[int, str] = {}
        for chunk in plan.chunks:
            assert self.held[chunk.slot] is chunk.request
            self.cached[chunk.slot] = chunk.stop
            step.chunks.append(chunk.stop - chunk.start)
            doing[chunk.slot] = "useful" if chunk.stop == chunk.request.prompt_tokens else "prompt"
        for slot, growing in zip(plan.slots.tolist(), plan.growing.tolist(), strict=True):
            step.decodes = True
            if self.looks_late and self._done(self.held[slot]):
                continue
            self.cached[slot] += growing
            if growing:
                doing[slot] = "useful"
        for slot in range(self.slots):
            kind = doing.get(slot) or self._idling(slot)
            step.kinds[kind] += 1
            if kind == "useful":
                times = self.token_times.setdefault(self.held[slot].index, [])
                times.append(step.end)
        step.cached = sum(self.cached.values())
        self.log.append(step)

    def _idling(self, slot: int) -> str:
        if slot not in self.held:
            return "empty"
        return "finished" if self._done(self.held[slot]) else "stalled"

    def _done(self, request: Request) -> bool:
        produced = len(self.token_times.get(request.index, []))
        return produced == self.stops.get(request.index, request.output_tokens)

    def stopped(self, plan: Plan, *, late: bool = False) -> list[int]:
        computed = plan.slots.tolist() + [chunk.slot for chunk in plan.chunks]
        return [slot for slot in computed if slot in (self.before if late else self._over())]

    def _over(self) -> list[int]:
        return [slot for slot, request in self.held.items() if self._done(request)]

    def collect(self) -> Steps:
        if not self.uneven and not self.stops:
            starts = np.array(self._starts, np.int64)
            return Steps(starts, step_ns=np.full(len(starts), 10, np.int64))
        ends = np.array([step.end for step in self.log], np.int64)
        tokens = np.zeros((len(ends), self.slots), np.int32)
        return Steps(np.array(self._starts, np.int64), ends, tokens=tokens)


def witnessed(
    workload: Workload,
    config: Config,
    uneven: bool = False,
    stops: dict[int, int] | None = None,
    late: bool = False,
) -> tuple[Witness, Recording]:
    """Serve a workload; what the engine saw, and what the Recorder wrote."""
    engine = Witness(config.slots, uneven, stops, late)
    batcher = Batcher(
        config.policy,
        engine,
        config.slots,
        order=config.order,
        prefill=config.prefill,
        max_batched_tokens=config.max_batched_tokens,
        max_wait_ns=config.max_wait_ns,
    )
    return engine, batcher.serve(workload, Watch())


some = settings(law, max_examples=80)
runs = given(workloads(), configs(policies=POLICIES), st.booleans())
CLASSIC = workload_of([(7, 100 if i % 8 == 0 else 10, 0) for i in range(32)])


def expanded(found: Distribution) -> list[float]:
    """Each value as often as it was observed."""
    return np.repeat(found.values, found.weights).tolist()


# Latencies


@some
@runs
def test_ttft_and_e2e_are_first_and_last_token_after_arrival(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    times = [engine.token_times[r.index] for r in workload]
    due = recording.requests.due_ns.tolist()
    assert ttft_ms(recording).tolist() == [
        (t[0] - d) / 1e6 for t, d in zip(times, due, strict=True)
    ]
    assert e2el_ms(recording).tolist() == [
        (t[-1] - d) / 1e6 for t, d in zip(times, due, strict=True)
    ]


@some
@runs
def test_tpot_is_time_after_the_first_token_by_tokens_after_it(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    found = tpot_ms(recording).tolist()
    for request, tpot in zip(workload, found, strict=True):
        times = engine.token_times[request.index]
        if len(times) == 1:
            assert np.isnan(tpot)
        else:
            assert tpot == pytest.approx((times[-1] - times[0]) / 1e6 / (len(times) - 1))


@some
@runs
def test_itl_pools_every_gap_of_every_request(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    gaps = [
        (later - sooner) / 1e6
        for times in engine.token_times.values()
        for sooner, later in pairwise(times)
    ]
    assert expanded(gaps_ms(recording)) == sorted(gaps)


@some
@runs
def test_statistics_are_numpys_of_the_expanded_values(
    workload: Workload, config: Config, uneven: bool
) -> None:
    _, recording = witnessed(workload, config, uneven)
    found = metrics.summary([recording])
    latencies = Latencies.of(recording)
    for name in LATENCIES:
        values = expanded(getattr(latencies, name))
        if not values:
            assert found[f"mean_{name}_ms"] is None
            continue
        expected = {
            f"mean_{name}_ms": np.mean(values),
            f"std_{name}_ms": np.std(values),
            f"median_{name}_ms": np.median(values),
            f"p90_{name}_ms": np.percentile(values, 90),
            f"p99_{name}_ms": np.percentile(values, 99),
        }
        assert {key: found[key] for key in expected} == pytest.approx(
            expected, rel=1e-12, abs=1e-15
        )


@some
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=9))
def test_a_weighted_distribution_is_its_expanded_list(rows: list[tuple[int, int]]) -> None:
    values, weights = np.array(rows).T
    found = Distribution.of(values, weights)
    every = np.repeat(values, weights)
    assert found.count == len(every)
    if not found.count:
        assert (found.mean(), found.std(), found.percentile(50)) == (None, None, None)
        return
    assert found.mean() == pytest.approx(every.mean())
    assert found.std() == pytest.approx(every.std())
    for q in (0, 1, 25, 50, 90, 99, 99.9, 100):
        assert found.percentile(q) == pytest.approx(np.percentile(every, q))


def test_pooling_counts_every_observation_of_every_trial() -> None:
    one = Distribution.of(np.array([1.0, 3.0]), np.array([2, 1]))
    other = Distribution.of(np.array([2.0, 3.0]))
    assert expanded(Distribution.pooled([one, other])) == [1.0, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(("requests", "told"), [(999, False), (1000, True)])
def test_p999_is_null_below_a_thousand_values(requests: int, told: bool) -> None:
    recording = serve(workload_of([(1, 2, 0)] * requests), Config("continuous", 16))
    found = metrics.summary([recording])
    for name in LATENCIES:
        assert (found[f"p99.9_{name}_ms"] is not None) is told
        assert found[f"p99_{name}_ms"] is not None
    values = np.sort(ttft_ms(recording))
    if told:
        assert found["p99.9_ttft_ms"] == pytest.approx(np.percentile(values, 99.9))


# Durations and throughputs


@some
@runs
def test_duration_and_throughputs_are_totals_by_the_last_token(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    found = metrics.summary([recording])
    duration = max(times[-1] for times in engine.token_times.values()) / 1e9
    inputs = sum(r.prompt_tokens for r in workload)
    outputs = sum(len(times) for times in engine.token_times.values())
    assert found["duration"] == duration
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (inputs, outputs)
    assert found["completed"] == len(engine.token_times) == len(workload)
    assert found["request_throughput"] == len(workload) / duration
    assert found["output_throughput"] == outputs / duration
    assert found["total_token_throughput"] == (inputs + outputs) / duration


def test_a_summary_has_the_median_duration_and_pooled_latencies() -> None:
    trials = [
        Batcher("continuous", SimulatedEngine(cost), 8).serve(CLASSIC, Watch())
        for cost in (10, 11, 40)
    ]
    found = metrics.summary(trials)
    assert found["duration"] == trials[1].duration_ns / 1e9
    assert found["output_throughput"] == 680 / (trials[1].duration_ns / 1e9)
    pooled = np.concatenate([ttft_ms(trial) for trial in trials])
    assert found["mean_ttft_ms"] == pytest.approx(pooled.mean())
    assert found["p99_ttft_ms"] == pytest.approx(np.percentile(pooled, 99))


@some
@given(workloads(most=5), configs())
def test_what_has_no_meaning_is_null_and_never_nan(workload: Workload, config: Config) -> None:
    _, recording = witnessed(workload, config)
    json.dumps(metrics.summary([recording]), allow_nan=False)


def test_requests_of_one_token_have_a_ttft_and_no_gaps() -> None:
    found = metrics.summary([serve(workload_of([(3, 1, 0)] * 5), Config("continuous", 2))])
    for name in ("tpot", "itl"):
        assert {found[f"{what}_{name}_ms"] for what in ("mean", "median", "std", "p99")} == {None}
    assert found["mean_ttft_ms"] == found["mean_e2el_ms"] is not None


# Counters


def naive_counters(engine: Witness) -> dict[str, int]:
    """The counters, by looking at each slot in each step."""
    log = engine.log
    kinds = {kind: sum(step.kinds[kind] for step in log) for kind in KINDS}
    return {
        "forward_passes": len(log),
        "prefill_passes": sum(bool(step.chunks) and not step.decodes for step in log),
        "mixed_passes": sum(bool(step.chunks) and step.decodes for step in log),
        "decode_passes": sum(not step.chunks for step in log),
        "prefill_tokens": sum(sum(step.chunks) for step in log),
        "padded_prefill_tokens": sum(
            len(step.chunks) * max(step.chunks, default=0) for step in log
        ),
        "slot_steps": len(log) * engine.slots,
        **{f"{kind}_slot_steps": count for kind, count in kinds.items()},
        "idle_slot_steps": kinds["finished"] + kinds["empty"],
        "kv_tokens_peak": max(step.cached for step in log),
    }


@law
@runs
def test_counters_are_what_each_slot_did_in_each_step(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    assert metrics.counters(recording) == naive_counters(engine)


@some
@given(
    workloads(timed=False),
    configs(policies=POLICIES),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_texts_that_end_early_are_counted_as_far_as_they_go(
    workload: Workload, config: Config, random: random.Random, late: bool
) -> None:
    stops = {r.index: random.randint(1, r.output_tokens) for r in workload}
    ending = replace(workload, stop_at_eos=True)
    engine, recording = witnessed(ending, config, stops=stops, late=late)
    found = metrics.summary([recording])
    assert metrics.counters(recording) == naive_counters(engine)
    assert found["total_output_tokens"] == sum(stops.values())
    gaps = [(b - a) / 1e6 for times in engine.token_times.values() for a, b in pairwise(times)]
    assert expanded(gaps_ms(recording)) == sorted(gaps)


@some
@runs
def test_the_five_kinds_add_up(workload: Workload, config: Config, uneven: bool) -> None:
    found = metrics.counters(witnessed(workload, config, uneven)[1])
    assert sum(found[f"{kind}_slot_steps"] for kind in KINDS) == found["slot_steps"]
    assert min(found.values()) >= 0


def test_counters_of_the_classic_workload() -> None:
    static = metrics.counters(serve(CLASSIC, Config("static", 8)))
    continuous = metrics.counters(serve(CLASSIC, Config("continuous", 8)))
    assert (static["forward_passes"], static["slot_steps"]) == (400, 3200)
    assert (static["prefill_passes"], static["useful_slot_steps"]) == (4, 680)
    assert (static["finished_slot_steps"], static["empty_slot_steps"]) == (2520, 0)
    assert (continuous["forward_passes"], continuous["useful_slot_steps"]) == (132, 680)
    assert static["prefill_tokens"] == continuous["prefill_tokens"] == 7 * 32
    assert static["kv_tokens_peak"] == (7 + 99) + 7 * (7 + 9)


@pytest.mark.parametrize(
    ("policy", "stalled", "empty"),
    # One token of the budget of 16 goes to the first request while it decodes or is held.
    [("static", 60, 0), ("static-fixed", 60, 0), ("continuous", 57, 57)],
)
def test_a_batch_that_waits_for_the_budget_stalls_in_its_slots(
    policy: str, stalled: int, empty: int
) -> None:
    long = workload_of([(10, 4, 0), (900, 4, 0), (10, 4, 0)])
    recording = serve(long, Config(policy, 3, prefill="mixed", max_batched_tokens=16))
    found = metrics.counters(recording)
    assert (found["stalled_slot_steps"], found["empty_slot_steps"]) == (stalled, empty)
    assert not recording.spans.waiting.any()
    assert recording.requests.admitted.tolist() == [0, 0, 0]
    parts = time_budget(recording)
    assert parts.stalled_s > 0
    assert (parts.empty_s > 0) == (empty > 0)
    # It waits to be computed: that is queue time, as before.
    third = int(recording.requests.started[2])
    assert third > 50
    assert queue_ms(recording).tolist() == [0, 0, third * STEP_NS / 1e6]
    assert timekeeping.littles_law(recording) == pytest.approx(0, abs=1e-12)
    scene = TrialReplay("mine", recording).at(20 * STEP_NS, STEP_NS)
    assert (scene.waiting, scene.request[2], scene.state[2]) == (0, 2, PROMPT)


# Occupancy


@some
@runs
def test_occupancy_is_what_the_slots_hold_in_each_step(
    workload: Workload, config: Config, uneven: bool
) -> None:
    engine, recording = witnessed(workload, config, uneven)
    found = occupancy(recording)
    running = [config.slots - s.kinds["empty"] - s.kinds["finished"] for s in engine.log]
    assert found.running.tolist() == running
    assert found.finished.tolist() == [s.kinds["finished"] for s in engine.log]
    assert found.start_s.tolist() == [s.start / 1e9 for s in engine.log]
    assert found.end_s.tolist() == [s.end / 1e9 for s in engine.log]


def test_host_share_is_the_time_in_which_no_step_is_under_way() -> None:
    engine, recording = witnessed(CLASSIC, Config("continuous", 8), uneven=True)
    busy = sum(step.end - step.start for step in engine.log)
    assert timekeeping.host_share(recording) == pytest.approx(1 - busy / engine.log[-1].end)
    assert timekeeping.host_share(serve(CLASSIC, Config("continuous", 8))) == 0


# Little's law


@some
@given(workloads(timed=False), configs(policies=POLICIES[:3]), st.booleans())
def test_littles_law_holds_exactly_when_all_are_there_at_the_start(
    workload: Workload, config: Config, uneven: bool
) -> None:
    _, recording = witnessed(workload, config, uneven)
    assert timekeeping.littles_law(recording) == pytest.approx(0, abs=1e-12)


@law
@given(workloads(), configs(policies=POLICIES, waits=(0, 15, 40)))
def test_littles_law_holds_exactly_also_when_requests_come_over_time(
    workload: Workload, config: Config
) -> None:
    """A request that arrives during a step is noticed at its end and counted from its due time."""
    _, recording = witnessed(workload, config)
    assert timekeeping.littles_law(recording) == pytest.approx(0, abs=1e-12)


# Arrivals


@law
@given(workloads(), configs(policies=(*POLICIES, *BY_NAME), waits=(0, 15, 40)), st.booleans())
def test_replaying_the_recorded_admissions_gives_the_same_steps(
    workload: Workload, config: Config, uneven: bool
) -> None:
    """The waiting requests depend on the machine's speed; the replayed steps do not."""
    _, recording = witnessed(workload, config, uneven)
    again = replay(recording, prefill=config.prefill, max_batched_tokens=config.max_batched_tokens)
    for name in ("slot", "admitted", "started", "first", "last", "released", "output_tokens"):
        column, other = getattr(again.requests, name), getattr(recording.requests, name)
        assert column.tolist() == other.tolist(), name
    for name in ("request", "start", "stop"):
        assert getattr(again.chunks, name).tolist() == getattr(recording.chunks, name).tolist()
    for name in ("decoding", "chunks"):
        found, expected = (
            np.repeat(getattr(r.spans, name), r.spans.steps).tolist() for r in (again, recording)
        )
        assert found == expected, name
    assert metrics.counters(again) == metrics.counters(recording)


@law
@given(workloads(), configs(policies=POLICIES, waits=(0, 15, 40)))
def test_on_a_virtual_clock_no_arrival_is_noticed_late(workload: Workload, config: Config) -> None:
    _, recording = witnessed(workload, config)
    lag = timekeeping.arrival_lag_ms(recording)
    if not recording.requests.due_ns.any():
        assert lag is None
        return
    assert lag is not None
    assert lag.tolist() == [0] * len(workload)
    asked = timekeeping.rate_of(recording.requests.due_ns)
    assert timekeeping.arrival_rate(recording) == asked


@some
@given(workloads(), configs(policies=POLICIES, waits=(0, 15, 40)))
def test_waiting_is_no_work_of_the_host(workload: Workload, config: Config) -> None:
    engine, recording = witnessed(workload, config)
    assert timekeeping.host_share(recording) == 0
    waits = recording.waits
    assert (waits.end_ns == waits.until_ns).all()
    busy = sum(step.end - step.start for step in engine.log)
    assert busy + (waits.end_ns - waits.start_ns).sum() == recording.duration_ns


@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_littles_law_finds_a_spoiled_log(policy: str) -> None:
    recording = serve(CLASSIC, Config(policy, 8))
    spans, requests = recording.spans, recording.requests
    nobody_waited = replace(recording, spans=replace(spans, waiting=spans.waiting * 0))
    all_came_later = replace(requests, due_ns=requests.due_ns + recording.duration_ns // 10)
    for spoiled in (nobody_waited, replace(recording, requests=all_came_later)):
        assert abs(timekeeping.littles_law(spoiled)) > 0.05
