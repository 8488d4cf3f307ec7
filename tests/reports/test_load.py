"""Under load: late loops show, known mistakes of others are not made, theory and schedule agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laws import STEP_NS, Config, Ledger, ending_early, serve, workload_of
from support.replay import replay
from support.results import PASSED, SETTLED

from batchbench.batching import bench as local
from batchbench.batching import session as conducting
from batchbench.batching.batcher import Batcher
from batchbench.batching.dry_run import estimate
from batchbench.batching.engines import VirtualClock
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.experiment import Experiment, ServingSpec, TrialsSpec
from batchbench.batching.models import ModelSpec
from batchbench.batching.plan import Plan
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.reports import metrics, time_budget
from batchbench.reports.formats.terminal import sentence
from batchbench.reports.latency import by_length, gaps_ms, length_classes, stalls, tpot_ms, ttft_ms
from batchbench.reports.output import write_folder
from batchbench.reports.result import load_result, make_result, remake_result
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.statistics import paired_ratio
from batchbench.reports.validity import audit
from batchbench.workloads import Workload, make_workload
from batchbench.workloads.spec import WorkloadSpec

# A loop that is late


class Dawdling(Watch):
    """Takes some steps' time for itself after every step."""

    def __init__(self, engine: SimulatedEngine, steps: float) -> None:
        self._clock, self._takes = engine.clock, round(steps * STEP_NS)

    def progressed(self, progress: Progress) -> None:
        self._clock.wait_until(self._clock.now() + self._takes)


class Sleepy(VirtualClock):
    """Wakes five steps late, but while the engine computes."""

    computing = False

    def wait_until(self, t: int) -> None:
        super().wait_until(t if self.computing else t + 5 * STEP_NS)


class Oversleeping(SimulatedEngine):
    """Its clock is sleepy."""

    def __init__(self) -> None:
        super().__init__(STEP_NS)
        self.clock: Sleepy = Sleepy()

    def run(self, plan: Plan) -> int:
        self.clock.computing = True
        steps = super().run(plan)
        self.clock.computing = False
        return steps


OVER_TIME = workload_of([(3, 12, 137)] * 60)


def as_measured(recording: Recording) -> Recording:
    """The same trial, as if a real clock had told its times."""
    header = replace(recording.header, simulated=False)
    tokens = np.zeros(recording.requests.output_tokens.sum(), np.int32)
    return replace(
        recording, header=header, ends_ns=recording.step_ends_ns, step_ns=None, tokens=tokens
    )


def reasons(workload: Workload, recording: Recording) -> list[str]:
    """Return the reasons of the audit for a run of one trial."""
    return audit(workload, {"continuous": [as_measured(recording)]}, PASSED, SETTLED, None)


def dawdled(workload: Workload, steps: float) -> Recording:
    """Served by a loop that takes so many steps' time for itself after each."""
    engine = SimulatedEngine(STEP_NS)
    return Batcher("continuous", engine, 4).serve(workload, Dawdling(engine, steps))


def test_a_slow_loop_shows_as_lag_and_stamps_the_run_suspect() -> None:
    assert reasons(OVER_TIME, dawdled(OVER_TIME, 0)) == []
    slow = dawdled(OVER_TIME, 2)
    lag = time_budget.arrival_lag_ms(slow)
    assert lag is not None
    assert 0 < lag.mean() * 1e6 <= 2 * STEP_NS
    assert lag.max() * 1e6 == 2 * STEP_NS
    said = " ".join(reasons(OVER_TIME, slow))
    assert "arrivals were noticed" in said
    assert "of the time passed outside the steps" in said


def test_the_rate_that_counts_is_the_one_that_the_user_asked() -> None:
    """A schedule of another rate is suspect even where the loop keeps to it."""
    ran = {"continuous": [as_measured(dawdled(OVER_TIME, 0))]}
    rate = time_budget.rate_of(OVER_TIME.due_ns)
    assert rate is not None
    for share, suspect in ((1.04, False), (0.96, False), (1.18, True), (0.85, True)):
        said = audit(OVER_TIME, ran, PASSED, SETTLED, None, share * rate)
        assert len(said) == suspect
        if suspect:
            assert said == [
                f"continuous: requests arrived at {rate:.3g}/s instead of {share * rate:.3g}/s"
            ]


@pytest.mark.parametrize(
    "options",
    [
        {"request_rate": 60.0, "queue_size": 48},
        {"request_rate": 60.0, "queue_size": 2, "burstiness": 0.01},
        {"request_rate": 60.0, "queue_size": 3, "arrivals": "constant"},
        {"arrivals": "ramp:from=20,to=100", "queue_size": 5},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_drawn_schedule_has_the_rate_asked(options: Mapping[str, Any], seed: int) -> None:
    spec = WorkloadSpec(**options, seed=seed)
    made = make_workload(spec, batch_size=4, vocab_size=100, encode=None)
    assert time_budget.rate_of(made.due_ns) == pytest.approx(60, rel=1e-6)


def test_a_late_server_does_not_slow_the_arrivals_and_pays_for_its_lateness() -> None:
    quick, slow = dawdled(OVER_TIME, 0), dawdled(OVER_TIME, 2)
    assert slow.requests.due_ns.tolist() == quick.requests.due_ns.tolist()
    assert slow.requests.due_ns.tolist() == OVER_TIME.due_ns.tolist()
    assert (ttft_ms(slow) >= ttft_ms(quick)).all()
    assert ttft_ms(slow).sum() > 2 * ttft_ms(quick).sum()


def test_who_comes_during_a_step_is_not_late() -> None:
    """Nobody joins a step that has begun: batching, and no lag."""
    workload = workload_of([(1, 9, 0), (1, 2, STEP_NS // 2)])
    lag = time_budget.arrival_lag_ms(dawdled(workload, 0))
    assert lag is not None
    assert lag.tolist() == [0, 0]


def test_a_clock_that_oversleeps_shows_as_lag() -> None:
    workload = workload_of([(1, 2, 100 * STEP_NS)] * 12)
    recording = Batcher("continuous", Oversleeping(), 4).serve(workload, Watch())
    lag = time_budget.arrival_lag_ms(recording)
    assert lag is not None
    assert (lag * 1e6).round().tolist() == [5 * STEP_NS] * 12
    assert "5e-05 ms late" in " ".join(reasons(workload, recording))


def test_deliberate_waiting_for_a_batch_to_fill_is_no_lag() -> None:
    recording = serve(OVER_TIME, Config("static", 8, max_wait_ns=25 * STEP_NS))
    assert len(recording.waits.step)
    lag = time_budget.arrival_lag_ms(recording)
    assert lag is not None
    assert not lag.any()
    assert reasons(OVER_TIME, recording) == []


def test_arrivals_slower_than_asked_are_suspect() -> None:
    recording = dawdled(OVER_TIME, 0)
    faster = replace(OVER_TIME, due_ns=OVER_TIME.due_ns // 2)
    (reason,) = reasons(faster, recording)
    assert reason.startswith("continuous: requests arrived at")
    closed_loop = replace(faster, max_concurrency=4)  # which slows its requests on purpose
    assert reasons(closed_loop, recording) == []


# Mistakes that others made


def stalled_by_a_prefill() -> Recording:
    """One request decodes; after 10 of its 20 tokens nine prompts come, one after the other."""
    rows = [(2, 20, 0), (7, 1, 10 * STEP_NS), *[(7, 1, STEP_NS)] * 8]
    return serve(workload_of(rows), Config("continuous", 2))


def test_ttft_is_not_counted_into_itl() -> None:
    """vllm-project/vllm#7242"""
    workload = workload_of([(3, 4, 0)] * 8)
    recording = serve(workload, Config("static", 2))
    assert ttft_ms(recording).max() > 10 * STEP_NS / 1e6
    gaps = gaps_ms(recording)
    assert gaps.values.tolist() == [STEP_NS / 1e6]
    assert gaps.count == 8 * 3


def test_gaps_are_not_averaged_within_a_request_so_that_stalls_vanish() -> None:
    """vllm-project/guidellm#1145"""
    recording = stalled_by_a_prefill()
    gaps = gaps_ms(recording)
    assert gaps.max == 10 * STEP_NS / 1e6
    assert tpot_ms(recording)[0] < 2 * STEP_NS / 1e6
    assert metrics.summary([recording])["p99_itl_ms"] > 5 * STEP_NS / 1e6  # type: ignore[operator]


def test_tpot_is_divided_by_the_tokens_that_were_produced() -> None:
    """sgl-project/sglang#10746"""
    workload = ending_early(workload_of([(3, 50, 0)]))
    recording = serve(workload, Config("continuous", 1), engine=Ledger(1, {0: 5}))
    assert recording.requests.output_tokens.tolist() == [5]
    assert tpot_ms(recording).tolist() == [STEP_NS / 1e6]


def test_lengths_are_those_generated_and_not_those_of_text_tokenised_again() -> None:
    """CentML/flexible-inference-bench#66"""
    recording = as_measured(serve(workload_of([(3, 5, 0), (2, 9, 0)]), Config("continuous", 2)))
    same_token = replace(recording, tokens=np.zeros(14, np.int32))  # any text of it is shorter
    found = metrics.summary([same_token])
    assert found["total_output_tokens"] == 14
    assert found["total_input_tokens"] == 5


def test_there_is_a_warm_up_and_it_is_in_no_trial(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """vllm-project/vllm#26943"""
    served: list[str] = []
    serve_it = local.Batcher.serve

    def note(batcher: Batcher, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        served.append(workload.name)
        return serve_it(batcher, workload, watch, trial=trial)

    monkeypatch.setattr(local.Batcher, "serve", note)
    experiment = Experiment(
        workload=WorkloadSpec(queue_size=3, long_tokens=4, short_tokens=2),
        model=ModelSpec(model=str(checkpoint), device="cpu", dtype="float32"),
        serving=ServingSpec(batch_size=2),
        trials=TrialsSpec(trials=1, verify="none"),
    )
    outcome = conducting.conduct(experiment)
    warm = [name for name in served if name.startswith("beginning of")]
    assert served[: len(warm)] == warm
    assert len(warm) == outcome.warm_up.rounds >= 2
    small = ["smaller batches"] * 2  # once to set libraries up, once to time
    assert served[len(warm) :] == [*small, *[outcome.workload.name] * 2]
    for (recording,) in outcome.recordings.values():
        assert recording.header.workload["name"] == outcome.workload.name


def test_the_spread_of_throughput_is_that_of_trials_and_not_of_single_gaps() -> None:
    """vllm-project/guidellm#602"""
    workload = workload_of([(3, 9, 0), (3, 40, 0), (3, 2, 0)])
    trials = [
        Batcher("static", SimulatedEngine(STEP_NS + i), 1).serve(workload, Watch()) for i in (0, 1)
    ]
    found = metrics.summary(trials)
    assert not [name for name in found if "throughput" in name and name.split("_")[0] in ("std",)]
    # An interval needs trials: one, however many gaps it has, has none.
    one, two = ([metrics.summary([t])["output_throughput"] for t in trials[:n]] for n in (1, 2))
    for rates in (one, two):
        ratio = paired_ratio(rates, rates)
        assert ratio is not None
        assert ratio.low is None


# Goodput


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 1.0}, [True, True, False, False]),
        ({"e2el": 4.0}, [True, True, False, True]),
        ({"tpot": 0.99}, [False, True, False, True]),
        ({"ttft": 1.0, "tpot": 0.99}, [False, True, False, False]),
        ({"ttft": 100.0, "tpot": 100.0, "e2el": 100.0}, [True] * 4),
    ],
)
def test_goodput_counts_the_requests_that_meet_all_limits(
    limits: dict[str, float], good: list[bool]
) -> None:
    """Two at a time, a step a millisecond; of one token there is no TPOT to be too long."""
    workload = workload_of([(1, 3, 0), (1, 1, 0), (1, 4, 0), (1, 1, 0)])
    recording = Batcher("static", SimulatedEngine(UNIT_NS), 2).serve(workload, Watch())
    found = metrics.summary([recording], limits)
    assert found["slo_attainment"] == sum(good) / 4
    assert found["request_goodput"] == sum(good) / (recording.duration_ns / 1e9)
    pooled = metrics.summary([recording] * 3, limits)
    assert pooled["slo_attainment"] == found["slo_attainment"]
    assert pooled["request_goodput"] == found["request_goodput"]


# Fairness


@pytest.mark.parametrize(
    ("lengths", "classes"),
    [
        ([5, 5], [(5, 5)]),
        ([9, 1, 4, 1], [(1, 1), (4, 4), (9, 9)]),
        (range(1, 101), [(1, 25), (26, 50), (51, 75), (76, 100)]),
        ([1] * 90 + list(range(2, 12)), [(1, 1), (2, 11)]),
        ([*range(1, 10), *[50] * 90], [(1, 50)]),
    ],
)
def test_classes_of_lengths_are_quarters_where_lengths_are_many(
    lengths: Sequence[int], classes: list[tuple[int, int]]
) -> None:
    assert length_classes(np.array(lengths)) == classes


def test_slow_down_is_1_for_who_is_alone() -> None:
    recording = serve(workload_of([(3, 7, 0), (3, 20, 100 * STEP_NS)]), Config("continuous", 4))
    rows = by_length([recording], [(7, 7), (20, 20)])
    assert [row["mean_slowdown"] for row in rows] == pytest.approx([1, 1])
    assert [row["requests"] for row in rows] == [1, 1]


def test_static_batching_delays_the_short_ones_and_continuous_nobody_much() -> None:
    workload = workload_of([(3, 100 if i % 8 == 0 else 10, 0) for i in range(32)])
    static, continuous = (
        by_length([serve(workload, Config(policy, 8))], [(10, 10), (100, 100)])
        for policy in ("static", "continuous")
    )
    for class_static, class_continuous in zip(static, continuous, strict=True):
        assert class_continuous["mean_slowdown"] < class_static["mean_slowdown"]  # type: ignore[operator]


# Stalls


def test_a_stall_names_the_step_that_caused_it_and_what_it_did() -> None:
    workload = workload_of([(2, 9, 0), (5, 2, 35), (4, 2, 0)])
    recording = serve(workload, Config("continuous", 3))
    (stall,) = stalls([recording])
    assert stall == {
        "trial": 0,
        "gap_ms": 2 * STEP_NS / 1e6,
        "requests": 1,
        "start_ms": 4 * STEP_NS / 1e6,
        "step": 4,
        "cause": "prefill of 2 requests, 9 tokens",
    }


def test_a_stall_names_the_longest_step_of_its_gap() -> None:
    recording = as_measured(stalled_by_a_prefill())
    ends = recording.step_ends_ns.copy()
    ends[14:] += 5 * STEP_NS  # one of the prefills takes six times as long
    starts = recording.spans.start_ns.copy()
    starts[recording.first_steps > 14] += 5 * STEP_NS
    slow = replace(recording, ends_ns=ends, spans=replace(recording.spans, start_ns=starts))
    worst = stalls([slow])[0]
    assert (worst["step"], worst["cause"]) == (14, "prefill of 1 request, 7 tokens")
    assert worst["gap_ms"] == 15 * STEP_NS / 1e6


def test_a_stall_of_the_loop_is_not_blamed_on_a_step() -> None:
    recording = as_measured(serve(workload_of([(2, 9, 0)]), Config("continuous", 1, "fifo")))
    steps = recording.num_steps
    spans = replace(
        recording.spans,
        steps=np.ones(steps, np.int64),
        start_ns=np.arange(steps) * STEP_NS + np.where(np.arange(steps) >= 5, 90 * STEP_NS, 0),
        decoding=np.minimum(np.arange(steps), 1),
        waiting=np.zeros(steps, np.int64),
        chunks=(np.arange(steps) == 0).astype(np.int64),
    )
    paused = replace(recording, spans=spans, ends_ns=spans.start_ns + STEP_NS)
    (stall,) = stalls([paused])
    assert (stall["step"], stall["cause"]) == (None, "time outside the steps")


def test_without_a_long_gap_there_is_no_stall() -> None:
    assert stalls([serve(workload_of([(3, 9, 0)] * 8), Config("static", 4))]) == []
    assert stalls([serve(workload_of([(3, 1, 0)] * 8), Config("static", 4))]) == []


def test_of_many_stalls_the_longest_are_told() -> None:
    recording = serve(workload_of([(1, 3 + i % 5, 0) for i in range(90)]), Config("continuous", 3))
    found = stalls([recording, recording])
    told = [stall["gap_ms"] for stall in found]
    assert len(told) == 5
    assert told == sorted(told, reverse=True)
    assert told[0] == gaps_ms(recording).max


# What is said beforehand


def over_time(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, due_ns: Sequence[int], **workload: Any
) -> Experiment:
    """An experiment on the tiny checkpoint whose requests come at these times."""
    made = Workload.of("over time", [[1, 2]] * len(due_ns), [4] * len(due_ns), due_ns=due_ns)
    made = replace(made, **workload)
    monkeypatch.setattr(local, "make_workload", lambda spec, **settings: made)
    return Experiment(
        model=ModelSpec(model=str(checkpoint), device="cpu", dtype="float32"),
        serving=ServingSpec(batch_size=2),
        trials=TrialsSpec(trials=1),
    )


def test_requests_over_time_are_served_verified_and_reported(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    experiment = over_time(monkeypatch, checkpoint, [5_000_000 * i for i in range(12)])
    outcome = conducting.conduct(experiment)
    assert outcome.verification.passed
    for (recording,) in outcome.recordings.values():
        assert recording.requests.due_ns.tolist() == outcome.workload.due_ns.tolist()
        assert recording.duration_ns >= 55_000_000
        again = replay(recording, prefill="mixed")
        assert again.requests.last.tolist() == recording.requests.last.tolist()
    result = make_result(outcome, GoalsSpec(slo=("ttft:60000",)))
    assert result.data["workload"]["arrival_rate"] == pytest.approx(200)
    summary = result.data["strategies"]["continuous"]["summary"]
    assert summary["slo_attainment"] == 1
    assert sentence(result).startswith("at 200 req/s, p99 TTFT was ")
    write_folder(tmp_path, result)
    assert remake_result(load_result(tmp_path)).data == result.data


def test_a_closed_loop_is_served_and_made_again(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    experiment = over_time(monkeypatch, checkpoint, [0] * 9, max_concurrency=3)
    outcome = conducting.conduct(experiment)
    for (recording,) in outcome.recordings.values():
        ends = np.sort(recording.step_ends_ns[recording.requests.last])
        due = recording.requests.due_ns
        assert (due[:3] == 0).all()
        assert (due[3:] >= ends[:6]).all()
    result = make_result(outcome)
    assert result.data["workload"]["max_concurrency"] == 3
    assert result.data["workload"]["arrival_rate"] is None
    assert "at most 3 at once" in result.title
    write_folder(tmp_path, result)
    assert remake_result(load_result(tmp_path)).data == result.data


def test_a_round_is_expected_to_take_as_long_as_its_requests_need_to_come(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    experiment = over_time(monkeypatch, checkpoint, [0, 100 * 10**9])
    limited = replace(experiment, trials=TrialsSpec(trials=1, max_time=5.0))
    with pytest.raises(UsageError, match="--max-time 5: one pair of trials takes about 200 s"):
        conducting.conduct(limited)


def test_an_estimate_counts_the_time_in_which_requests_come(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    experiment = over_time(monkeypatch, checkpoint, [0, 100 * 10**9])
    said = "\n".join(estimate(experiment, Watch()).lines())
    assert "static about 8, continuous about 8 forward passes" in said
    assert "200 s for all trials, with waits for requests" in said
    simulated = "\n".join(estimate(replace(experiment, simulated=True), Watch()).lines())
    assert "static 8, continuous 8 forward passes" in simulated


# Theory

REQUESTS, MEAN = 20_000, 128


@pytest.mark.parametrize("slots", [8, 32])
def test_static_over_continuous_steps_tends_to_the_harmonic_number(slots: int) -> None:
    """The longest of B exponential lengths is H_B times their mean, on average.

    The ratio's standard error, of R requests: a batch's longest varies by π/√6 means at most, and
    there are R / B of them; the mean of all lengths varies by 1/√R. Besides, continuous batching
    ends with slots that run empty: (H_B − 1) of R / B means at most.
    """
    rng = np.random.Generator(np.random.Philox(0))
    lengths = np.ceil(rng.exponential(MEAN, REQUESTS)).astype(np.int64)
    workload = workload_of([(1, int(n), 0) for n in lengths])
    static, continuous = (
        serve(workload, Config(policy, slots, prefill="mixed")).num_steps
        for policy in ("static", "continuous")
    )
    harmonic = sum(1 / k for k in range(1, slots + 1))
    batches = REQUESTS / slots
    error = np.hypot(np.pi / np.sqrt(6) / np.sqrt(batches) / harmonic, 1 / np.sqrt(REQUESTS))
    tail = (harmonic - 1) / batches
    rounding = 1 / MEAN
    ratio = static / continuous / harmonic
    assert 1 - 3 * error - tail - rounding <= ratio <= 1 + 3 * error + rounding
    # Where each admission stalls the rest, less of it is left.
    separate = serve(workload, Config("continuous", slots)).num_steps
    stalls_of_all = separate - continuous
    assert 0.7 * REQUESTS < stalls_of_all < REQUESTS
