"""Comparing two versions: the laws of its verdicts, and every question that it must refuse."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.documents import comparable, fenced, matches
from support.laws import law
from support.program import Call, caller
from support.results import KINDS, clean, measured, result_of, simulated

import batchbench
from batchbench.batching import policies
from batchbench.batching.policies import Continuous, View
from batchbench.errors import UsageError
from batchbench.reports.result import Result, output_digest
from batchbench.reports.statistics import Verdict
from batchbench.studies.gate.compare import Run, Runs, compare_versions, load_runs
from batchbench.studies.gate.evidence import (
    Answer,
    Evidence,
    Gate,
    Kind,
    MetricQuery,
    compare_counts,
)
from batchbench.studies.gate.spec import METRICS, CompareSpec, parse_condition
from batchbench.workloads import Request

MIRRORED = {Verdict.SLOWER: Verdict.FASTER, Verdict.FASTER: Verdict.SLOWER}


def side(*results: Mapping[str, Any], label: str = "base") -> Runs:
    """Results' data as the runs of one version."""
    return Runs(label, [Run(f"{label}/{i}", data) for i, data in enumerate(results)])


def gate_of(base: Runs | Result, new: Runs | Result, **asked: Any) -> Gate:
    """Return the gate of two versions."""
    two = [
        each if isinstance(each, Runs) else side(each.data, label=label)
        for each, label in ((base, "base"), (new, "new"))
    ]
    return compare_versions(two[0], two[1], CompareSpec(**asked), "batchbench compare base new")


def found(gate: Gate, name: str) -> Evidence:
    """The one piece of evidence of a name."""
    (each,) = [each for each in gate.evidence if each.name == name]
    return each


def paced(paces: Mapping[str, Sequence[float]], data: Mapping[str, Any] | None = None) -> Any:
    """A result's data whose trials take as many times as long, strategy by strategy."""
    changed = deepcopy(dict(clean().data if data is None else data))
    for name, factors in paces.items():
        strategy = changed["strategies"][name]
        strategy["trials"] = [
            _paced(trial, factor) for trial, factor in zip(strategy["trials"], factors, strict=True)
        ]
    return changed


def _paced(trial: Mapping[str, Any], factor: float) -> dict[str, Any]:
    def of(name: str, value: Any) -> Any:
        if value is None or not (name in METRICS or name == "duration"):
            return value
        return value / factor if name.endswith("throughput") else value * factor

    return {name: of(name, value) for name, value in trial.items()}


def runs_of(
    count: int, seed: int, *, static: float = 1.0, continuous: float = 1.0, scatter: float = 0.005
) -> Runs:
    """Runs whose processes and trials scatter, and whose strategies take so many times as long."""
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(count):
        paces = {}
        for name, pace in (("static", static), ("continuous", continuous)):
            process = pace * math.exp(rng.normal(0, scatter))
            paces[name] = (process * np.exp(rng.normal(0, 0.003, 4))).tolist()
        results.append(paced(paces))
    return side(*results, label=f"seed-{seed}")


def with_facts(data: Mapping[str, Any], part: str, **facts: Any) -> Any:
    """The data with other facts in one of its parts."""
    return {**data, part: {**data[part], **facts}}


def stamped(data: Mapping[str, Any]) -> Any:
    """The data as of a run that cannot be believed."""
    reasons = ["other processes kept 1.5 cores busy"]
    return {**data, "validity": {"status": "suspect", "reasons": reasons}}


# Work

names = st.sampled_from(list(clean().data["strategies"]["static"]["counters"]))
strategies = st.sampled_from(["static", "continuous"])


def counted(data: Mapping[str, Any], strategy: str, name: str, by: int) -> Any:
    """The data with a count that is so much more."""
    changed = deepcopy(dict(data))
    changed["strategies"][strategy]["counters"][name] += by
    return changed


@settings(law)
@given(strategies, names, st.integers(-50, 50).filter(bool))
def test_any_count_that_changes_fails_and_is_named(strategy: str, name: str, by: int) -> None:
    gate = gate_of(side(clean().data), side(counted(clean().data, strategy, name, by)))
    (failed,) = gate.failures
    assert failed.name == f"{strategy}.{name}"
    assert failed.verdict is Verdict.CHANGED
    assert f"{'grew' if by > 0 else 'fell'} by {abs(by)}" in gate.sentence
    assert gate.exit_code(strict=False) == 1


def test_fewer_passes_are_allowed_only_where_asked_and_where_nothing_is_worse() -> None:
    fewer = counted(clean().data, "continuous", "forward_passes", -3)
    fewer = counted(fewer, "continuous", "decode_passes", -3)
    assert gate_of(side(clean().data), side(fewer)).answer is Answer.FAILED
    allowed = gate_of(side(clean().data), side(fewer), allow_improvement=True)
    assert allowed.failures == []
    assert found(allowed, "continuous.forward_passes").verdict is Verdict.CHANGED
    worse = counted(fewer, "continuous", "idle_slot_steps", 1)
    gate = gate_of(side(clean().data), side(worse), allow_improvement=True)
    assert len(gate.failures) == 3
    elsewhere = counted(fewer, "static", "idle_slot_steps", 1)
    gate = gate_of(side(clean().data), side(elsewhere), allow_improvement=True)
    assert [each.name for each in gate.failures] == ["static.idle_slot_steps"]


@pytest.mark.parametrize("name", ["useful_slot_steps", "prefill_tokens"])
def test_fewer_useful_tokens_are_no_improvement(name: str) -> None:
    fewer = counted(clean().data, "continuous", name, -1)
    gate = gate_of(side(clean().data), side(fewer), allow_improvement=True)
    assert [each.metric for each in gate.failures] == [name]


def test_other_parts_of_the_same_number_of_passes_are_no_improvement() -> None:
    moved = counted(clean().data, "continuous", "mixed_passes", -1)
    gate = gate_of(side(clean().data), side(moved), allow_improvement=True)
    assert [each.metric for each in gate.failures] == ["mixed_passes"]


def with_another_token() -> Result:
    """The clean result, but for one token of one request."""
    trial = clean().recordings["continuous"][0]
    assert trial.tokens is not None
    tokens = trial.tokens.copy()
    tokens[17] += 1
    data = deepcopy(dict(clean().data))
    strategy = data["strategies"]["continuous"]
    strategy["output_digest"] = output_digest(replace(trial, tokens=tokens))
    return Result(data, clean().recordings)


def test_any_token_that_changes_fails() -> None:
    gate = gate_of(clean(), with_another_token(), allow_improvement=True)
    assert [each.name for each in gate.failures] == ["continuous.outputs"]
    assert "continuous.outputs differ" in gate.sentence


@pytest.mark.parametrize(
    ("part", "facts"),
    [
        ("model", {"dtype": "bfloat16"}),
        ("environment", {"cpu": "another"}),
        ("environment", {"packages": {"torch": "2.99"}}),
        ("model", {"execution": "graph"}),
    ],
    ids=str,
)
def test_where_a_tie_may_fall_otherwise_tokens_fail_nothing(
    part: str, facts: dict[str, Any]
) -> None:
    new = with_facts(with_another_token().data, part, **facts)
    gate = gate_of(side(clean().data), side(new))
    assert gate.failures == []
    outputs = found(gate, "continuous.outputs")
    assert (outputs.verdict, outputs.gated) == (Verdict.CHANGED, False)
    assert any("nearly tied" in note for note in gate.notes)


def work(closed: bool = True, simulated: bool = False, **counts: int | None) -> dict[str, Any]:
    """The parts of a result that hold the work."""
    strategies = {
        name: {"counters": None if n is None else {"forward_passes": n}, "output_digest": "abc"}
        for name, n in counts.items()
    }
    workload, model = {"closed": closed}, {"dtype": "float32"}
    return {
        "strategies": strategies, "workload": workload, "model": model, "simulated": simulated
    }  # fmt: skip


def test_work_is_compared_on_plain_data() -> None:
    told = compare_counts(work(static=400), work(static=403), alike=True)
    assert [(e.name, e.verdict, e.fails) for e in told] == [
        ("static.forward_passes", Verdict.CHANGED, True),
        ("static.outputs", Verdict.SAME, False),
    ]
    assert told[0].why == "grew by 3 (+0.8%)"
    assert (told[0].base, told[0].new, told[0].change) == (400, 403, pytest.approx(0.0075))


def test_who_waits_for_timed_arrivals_is_an_observation() -> None:
    (counted_, _) = compare_counts(work(False, static=4), work(False, static=5), alike=True)
    assert (counted_.verdict, counted_.fails, counted_.gated) == (Verdict.CHANGED, False, False)
    clock = {"closed": False, "simulated": True}
    (counted_, _) = compare_counts(work(**clock, static=4), work(**clock, static=5), alike=True)
    assert counted_.fails
    (counted_, _) = compare_counts(work(**clock, static=4), work(**clock, static=5), alike=False)
    assert not counted_.fails


def test_a_strategy_without_steps_is_noted_and_one_that_lost_them_fails() -> None:
    (told, _) = compare_counts(work(own=None), work(own=None), alike=True)
    assert (told.verdict, told.gated) == (Verdict.UNKNOWN, False)
    (told, _) = compare_counts(work(own=4), work(own=None), alike=True)
    assert told.fails
    with pytest.raises(UsageError, match="strategy own: the base has it"):
        compare_counts(work(own=4), work(static=4), alike=True)


def test_a_count_of_one_version_only_is_told_and_fails_nothing() -> None:
    new = work(static=4)
    new["strategies"]["static"]["counters"]["novelties"] = 1
    told = compare_counts(work(static=4), new, alike=True)
    assert [(e.metric, e.verdict, e.gated) for e in told[:2]] == [
        ("forward_passes", Verdict.SAME, True),
        ("novelties", Verdict.UNKNOWN, False),
    ]


class Late(Continuous):
    """Continuous batching that lets newcomers in a step after their slots were free."""

    def __init__(self, max_wait_ns: int) -> None:
        self._waited = False

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        self._waited = bool(view.running) and view.free > 0 and not self._waited
        return ((), None) if self._waited else super().admit(view)


def test_a_batcher_that_is_a_step_late_shows_in_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"queue_size": 24, "batch_size": 4, "output_tokens": "3:9"}
    base = batchbench.simulate(**asked)
    monkeypatch.setitem(policies.POLICIES, "continuous", Late)
    gate = gate_of(base, batchbench.simulate(**asked))
    late = found(gate, "continuous.forward_passes")
    assert late.fails
    assert late.change is not None
    assert late.change > 0
    assert not found(gate, "static.forward_passes").fails


# Speed


@pytest.mark.parametrize("make", KINDS)
def test_a_result_is_no_worse_than_itself(make: Callable[[], Result]) -> None:
    result = make()
    gate = gate_of(result, result)
    assert gate.failures == []
    assert {e.verdict for e in gate.evidence} <= {Verdict.SAME, Verdict.UNKNOWN}
    valid, closed = not result.data["validity"]["reasons"], result.data["workload"]["closed"]
    if valid and closed:
        assert gate.answer is Answer.PASSED
    assert (gate.settings, gate.environment) == ([], [])


factors = st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4)


@settings(law, max_examples=30)
@given(factors, factors, st.integers(0, 99))
def test_sides_that_change_places_mirror_every_verdict(
    static: list[float], continuous: list[float], seed: int
) -> None:
    base = runs_of(4, seed)
    new = side(*(paced({"static": static, "continuous": continuous}, r.data) for r in base.runs))
    new = Runs("new", [Run(f"new/{i}", run.data) for i, run in enumerate(new.runs)])
    forth, back = gate_of(base, new), gate_of(new, base)
    assert [e.name for e in forth.evidence] == [e.name for e in back.evidence]
    for one, other in zip(forth.evidence, back.evidence, strict=True):
        assert other.verdict is MIRRORED.get(one.verdict, one.verdict)
        if one.kind is not Kind.WORK:
            assert one.change is not None
            assert other.change is not None
            assert (1 + one.change) * (1 + other.change) == pytest.approx(1)


def test_a_loss_of_twelve_percent_from_four_runs_is_called_and_from_one_is_not() -> None:
    slow = {"static": 1.12, "continuous": 1.12}
    gate = gate_of(runs_of(4, 1, scatter=0.003), runs_of(4, 2, scatter=0.003, **slow))
    told = found(gate, "continuous.output_throughput")
    assert (told.verdict, told.gated, told.samples) == (Verdict.SLOWER, False, (4, 4))
    assert told.change == pytest.approx(-0.107, abs=0.01)
    assert gate.answer is not Answer.FAILED  # times of two sessions only warn …
    assert any(
        note.startswith("Warning: static.output_throughput is slower") for note in gate.notes
    )
    asked = {"fail_if": ("continuous.output_throughput < -5%",)}
    gate = gate_of(runs_of(4, 1, scatter=0.003), runs_of(4, 2, scatter=0.003, **slow), **asked)
    assert [e.name for e in gate.failures] == ["continuous.output_throughput"]  # … unless asked
    gate = gate_of(runs_of(1, 1), runs_of(1, 2, **slow), **asked)
    told = found(gate, "continuous.output_throughput")
    assert (told.verdict, told.fails) == (Verdict.UNKNOWN, False)
    assert told.why == "is too uncertain from 1 run per side"
    assert told.needed is not None
    assert re.fullmatch(r"\d+ runs per side", told.needed)
    assert gate.answer is Answer.UNKNOWN
    assert told.needed in gate.sentence


def test_a_loss_of_one_strategy_alone_fails_by_the_speed_up() -> None:
    base, new = runs_of(8, 1), runs_of(8, 2, continuous=1.15)
    gate = gate_of(base, new)
    assert [e.name for e in gate.failures] == ["continuous.speedup"]
    both = gate_of(base, runs_of(8, 2, static=1.15, continuous=1.15))
    assert both.failures == []
    assert found(both, "continuous.speedup").verdict is Verdict.SAME


def test_a_pass_hidden_from_the_plans_shows_in_time_alone() -> None:
    """As by an engine that computes one pass in eight twice, where nobody counts its calls."""
    paces = {"static": [1.0] * 4, "continuous": [1.125] * 4}
    base = runs_of(6, 3)
    new = Runs("new", [Run(f"new/{i}", paced(paces, r.data)) for i, r in enumerate(base.runs)])
    gate = gate_of(base, new)
    assert {e.verdict for e in gate.of(Kind.WORK)} == {Verdict.SAME}
    assert [e.name for e in gate.failures] == ["continuous.speedup"]


def test_a_pass_that_the_model_computes_beside_the_plans_is_counted() -> None:
    data = deepcopy(dict(clean().data))
    for strategy in data["strategies"].values():
        strategy["computed_passes"] = strategy["counters"]["forward_passes"]
    new = deepcopy(data)
    new["strategies"]["continuous"]["computed_passes"] += 1
    assert gate_of(side(data), side(data)).answer is Answer.PASSED
    (failed,) = gate_of(side(data), side(new)).failures
    assert failed.name == "continuous.computed_passes"
    told = found(gate_of(side(data), side(clean().data)), "continuous.computed_passes")
    assert (told.verdict, told.why) == (Verdict.UNKNOWN, "was not counted by the new version")


def test_the_share_of_the_floor_is_compared_of_each_strategy_and_gates_where_asked() -> None:
    def with_shares(scale: float) -> Any:
        data = deepcopy(dict(clean().data))
        for name, strategy in data["strategies"].items():
            for i, trial in enumerate(strategy["trials"]):
                trial["floor_share"] = scale * (0.5 + 0.01 * i) * (name == "static" or scale)
        return data

    gate = gate_of(side(with_shares(1.0)), side(with_shares(0.7)))
    for name in ("static", "continuous"):
        told = found(gate, f"{name}.floor_share")
        assert (told.kind, told.gated) == (Kind.RATIO, False)
        assert told.change is not None
        assert told.change < -0.2
    asked = gate_of(side(with_shares(1.0)), side(with_shares(0.3)), fail_if=("floor_share < -10%",))
    assert {e.name for e in asked.failures} == {"static.floor_share", "continuous.floor_share"}
    assert asked.answer is Answer.FAILED


def test_one_process_is_never_called_lightly() -> None:
    """Equal code raises no alarm if its processes scatter as documented."""
    spread = METRICS["speedup"].between
    for seed in range(0, 120, 2):
        base, new = (runs_of(1, seed + i, scatter=spread / 2**0.5) for i in range(2))
        assert gate_of(base, new).failures == []


def test_the_effect_that_could_have_been_found_is_found() -> None:
    base = runs_of(5, 1)
    told = found(gate_of(base, runs_of(5, 2)), "continuous.speedup")
    assert told.smallest is not None
    assert 0.05 < told.smallest < 0.5  # a share of the speed-up
    calls = 0
    for seed in range(40):
        loss = 1 / (1 - 1.1 * told.smallest)
        new = runs_of(5, 100 + seed, continuous=loss)
        calls += gate_of(runs_of(5, 300 + seed), new).answer is Answer.FAILED
    assert calls >= 20


def test_metrics_that_gate_share_the_error() -> None:
    base, new = runs_of(5, 1), runs_of(5, 2, continuous=1.105, static=1.0)
    alone = found(gate_of(base, new), "continuous.speedup")
    assert alone.p_value is not None
    confidence = 1 - 1.5 * alone.p_value  # enough for one metric, too little for each of two
    assert gate_of(base, new, confidence=confidence).failures != []
    asked = {"fail_if": ("static.duration > 5%",), "confidence": confidence}
    assert found(gate_of(base, new, **asked), "continuous.speedup").fails is False


def test_p_alone_fails_nothing() -> None:
    base, new = (
        runs_of(8, seed, continuous=pace, scatter=1e-5) for seed, pace in ((1, 1), (2, 1.03))
    )
    told = found(gate_of(base, new), "continuous.speedup")
    assert told.low is not None
    assert told.high is not None
    assert told.low < told.high < -0.02
    assert told.verdict is Verdict.SAME
    assert found(gate_of(base, new, floor=1.0), "continuous.speedup").fails
    asked = {"fail_if": ("speedup < -1%",)}  # takes the place of the floor
    assert found(gate_of(base, new, **asked), "continuous.speedup").fails


def test_a_gain_fails_where_it_was_asked_for_and_the_gate_says_that_it_is_one() -> None:
    asked = {"fail_if": ("output_throughput > 5%",)}
    quicker = runs_of(5, 2, static=0.8, continuous=0.8, scatter=0.003)
    gate = gate_of(runs_of(5, 1, scatter=0.003), quicker, **asked)
    assert {e.metric for e in gate.failures} == {"output_throughput"}
    slower = runs_of(5, 2, static=1.3, continuous=1.3, scatter=0.003)
    gate = gate_of(runs_of(5, 1, scatter=0.003), slower, **asked)
    assert gate.failures == []
    assert any("fails on an improvement" in note for note in gate.notes)


def test_simulations_are_compared_exactly() -> None:
    base = batchbench.simulate(queue_size=24)
    gate = gate_of(base, batchbench.simulate(queue_size=24, prefill="separate"))
    told = found(gate, "continuous.speedup")
    assert told.change == told.low == told.high
    assert [v.name for v in gate.settings] == ["prefill"]
    gate = gate_of(simulated(), simulated())
    assert gate.answer is Answer.PASSED
    assert "-0.0%" not in gate.sentence


# Environments


def test_unlike_environments_are_compared_on_work_and_their_differences_listed() -> None:
    base, new = runs_of(5, 1), runs_of(5, 2, continuous=1.3, static=1.2)
    other = side(*(with_facts(r.data, "environment", cpu="another") for r in new.runs), label="new")
    gate = gate_of(base, other)
    assert gate.answer is Answer.PASSED  # on its work
    times = gate.of(Kind.TIME)
    assert {(e.verdict, e.gated, e.change) for e in times} == {(Verdict.UNKNOWN, False, None)}
    assert [v.name for v in gate.environment] == ["cpu"]
    assert any("differ in cpu (none, another)" in note for note in gate.notes)
    told = found(gate, "continuous.speedup")
    assert (told.verdict, told.gated) == (Verdict.UNKNOWN, False)
    assert told.change is not None
    gate = gate_of(base, other, allow_environment_mismatch=True)
    assert [e.name for e in gate.failures] == ["continuous.speedup"]
    assert {e.verdict for e in gate.of(Kind.TIME)} == {Verdict.UNKNOWN}


@pytest.mark.parametrize(
    ("condition", "also", "way"),
    [
        ("output_throughput < -5%", {}, "compare ratios such as speedup"),
        ("output_throughput < -5%", {"allow_environment_mismatch": True}, "ratios"),
        ("speedup < -5%", {}, "or give --allow-environment-mismatch"),
    ],
)
def test_a_condition_that_unlike_environments_cannot_answer_is_refused(
    condition: str, also: dict[str, Any], way: str
) -> None:
    other = with_facts(clean().data, "environment", packages={"torch": "9"}, threads=3)
    with pytest.raises(UsageError, match=f"differ in threads .none, 3., torch .none, 9.; .*{way}"):
        gate_of(side(clean().data), side(other), fail_if=(condition,), **also)


@pytest.mark.parametrize("fact", ["hostname", "os", "git_commit", "memory_bytes", "gpu_uuid"])
def test_what_no_time_depends_on_refuses_nothing(fact: str) -> None:
    other = side(with_facts(clean().data, "environment", **{fact: "another"}))
    assert gate_of(side(clean().data), other).answer is Answer.PASSED


def test_a_later_patch_of_python_is_alike_and_another_version_is_not() -> None:
    for version, answer in (("3.11.9", True), ("3.12.1", False)):
        other = side(with_facts(clean().data, "environment", python=version))
        gate = gate_of(side(clean().data), other)
        assert found(gate, "continuous.speedup").gated is answer


# Suspect


def test_a_suspect_result_is_compared_on_its_work_alone() -> None:
    suspect = stamped(clean().data)
    gate = gate_of(side(clean().data), side(suspect, label="new"))
    assert gate.answer is Answer.UNKNOWN
    for each in gate.evidence:
        if each.kind is not Kind.WORK:
            assert each.verdict is Verdict.UNKNOWN
            assert each.why == (
                "was not compared: new is marked suspect: other processes kept 1.5 cores busy"
            )
    assert "marked suspect" in gate.sentence
    slower = counted(suspect, "static", "forward_passes", 1)
    assert gate_of(side(clean().data), side(slower)).answer is Answer.FAILED


def test_of_several_runs_the_suspect_ones_count_for_work_alone() -> None:
    base = runs_of(5, 1)
    new = [run.data for run in runs_of(5, 2).runs]
    wild = stamped(paced({"static": [9.0] * 4, "continuous": [1.0] * 4}))
    gate = gate_of(base, side(*new, wild, label="new"))
    told = found(gate, "continuous.speedup")
    assert told.samples == (5, 5)
    assert any("1 of 6 runs of new are marked suspect" in note for note in gate.notes)
    gate = gate_of(base, side(*new, counted(wild, "static", "decode_passes", 1), label="new"))
    assert [e.name for e in gate.failures] == ["static.decode_passes"]


# Conditions

GOOD = {
    "output_throughput < -5%": (None, "output_throughput", True, 0.05),
    "output_throughput<-5%": (None, "output_throughput", True, 0.05),
    " continuous.p99_ttft_ms > +10 % ": ("continuous", "p99_ttft_ms", False, 0.1),
    "my.policies:Mine.p99.9_itl_ms >= 2.5%": ("my.policies:Mine", "p99.9_itl_ms", False, 0.025),
    "speedup < −1%": (None, "speedup", True, 0.01),
    "duration > 250%": (None, "duration", False, 2.5),
}


@pytest.mark.parametrize("text", GOOD)
def test_a_condition_is_read(text: str) -> None:
    read = parse_condition(text)
    strategy, metric, falls, share = GOOD[text]
    assert (read.strategy, read.metric.name, read.falls) == (strategy, metric, falls)
    assert read.share == pytest.approx(share)
    floor = MetricQuery(read.metric, "static", read.share, True, read).log_floor
    assert math.expm1(-floor if falls else floor) == pytest.approx(-share if falls else share)


BAD = {
    "output_throughput": "must be a metric, < or >, and a change in percent",
    "output_throughput < -5": "must be a metric",
    "output_throughput < five%": "must be a metric",
    "< -5%": "must be a metric",
    "": "must be a metric",
    "throughput < -5%": "there is no metric throughput; similar ones are output_throughput,",
    "ttft > 5%": "similar ones are median_ttft_ms, p99_ttft_ms",
    "continuous.p99_ttft > 5%": "similar ones are p99_ttft_ms",
    "output_thruput < -5%": "similar ones are output_throughput",
    "zzz < -5%": "there is no metric zzz; there are speedup, efficiency, floor_share, output",
    "forward_passes > 1%": "is an exact count; any change of it fails",
    "duration < 5%": "a fall is < and a negative percentage; write 'duration < -5%'",
    "duration > -5%": "a rise is > and a positive percentage; write 'duration > 5%'",
    "speedup < -0%": "any noise is a change of more than 0 %",
    "speedup < -100%": "nothing falls by 100 % or more",
}


@pytest.mark.parametrize("text", BAD)
def test_a_condition_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(BAD[text])) as error:
        CompareSpec(fail_if=(text,))
    assert str(error.value).startswith(f"--fail-if '{text}': ")


def test_a_condition_twice_is_refused_and_one_each_way_is_not() -> None:
    with pytest.raises(UsageError, match="has the same metric and direction"):
        CompareSpec(fail_if=("speedup < -5%", "speedup < -6%"))
    both = ("speedup < -5%", "speedup > 5%")
    gate = gate_of(runs_of(5, 1), runs_of(5, 2, continuous=1.3), fail_if=both)
    assert [e.fails for e in gate.evidence if e.metric == "speedup"] == [True, False]


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        (
            "notebook.duration > 5%",
            "only static and continuous can have duration; name such a strategy",
        ),
        ("static.speedup < -5%", "in these results, only continuous can have speedup; name such"),
        ("request_goodput < -5%", "base holds no request_goodput"),
        ("p99.9_ttft_ms > 5%", "base holds no p99.9_ttft_ms"),
    ],
)
def test_a_condition_on_what_the_results_do_not_hold_is_refused(condition: str, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        gate_of(clean(), clean(), fail_if=(condition,))


# Files: the program, and every kind of spoiled input


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """The command line in a folder with the results ``base`` and ``new``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("base", "new"):
        put(tmp_path / name, clean().data)

    return caller(monkeypatch, capsys)


def put(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write a result's data where compare looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(data))
    return folder


def test_results_are_found_as_folders_as_files_and_as_folders_of_several(
    program: Call, tmp_path: Path
) -> None:
    assert program("compare", "base", "new", "--quiet")[0] == 0
    assert program("compare", "base/result.json", "new", "--quiet")[0] == 0
    for i, run in enumerate(runs_of(4, 1).runs):
        put(tmp_path / "many" / f"run-{i}", run.data)
    assert [run.label for run in load_runs(Path("many")).runs][:1] == ["many/run-0"]
    code, out, err = program("compare", "base", "many", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["new"]["facts"]["runs"] == "4"
    assert told["typed"] == "batchbench compare base many"


def test_a_change_ends_with_1_and_what_was_typed_is_told(program: Call, tmp_path: Path) -> None:
    put(tmp_path / "new", counted(clean().data, "continuous", "forward_passes", 3))
    code, out, err = program("compare", "base", "new", "--fail-if", "speedup < -9%")
    assert (code, err) == (1, "")
    assert "FAILED: continuous.forward_passes grew by 3" in out
    assert "batchbench compare base new --fail-if 'speedup < -9%'" in out


def torn(data: Any) -> str:
    """Half of it."""
    text = json.dumps(data)
    return text[: len(text) // 2]


def spoil(**changes: Any) -> Callable[[Any], str]:
    """The data with other values at its top."""
    return lambda data: json.dumps({**data, **changes})


def inside(*path: str, value: Any) -> Callable[[Any], str]:
    """The data with another value deep in it; None takes it out."""

    def change(data: Any) -> str:
        changed = deepcopy(dict(data))
        inner = functools.reduce(lambda at, key: at[key], path[:-1], changed)
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return json.dumps(changed)

    return change


def first_nan(data: Any) -> str:
    """Return JSON with a duration that is not a number."""
    return re.sub(r'"duration": [\d.e-]+', '"duration": NaN', json.dumps(data), count=1)


SPOILED: dict[str, tuple[Callable[[Any], str], str]] = {
    "torn": (torn, "new/result.json: is not readable JSON"),
    "empty": (lambda data: "", "new/result.json: is not readable JSON"),
    "nan": (first_nan, "NaN is not JSON"),
    "nested": (lambda data: "[" * 100_000, "new/result.json: is not readable JSON"),
    "list": (lambda data: "[]", "new/result.json: is not a result of batchbench"),
    "schema": (spoil(schema_version=99), "has schema version 99, this batchbench reads 1"),
    "baseline": (
        lambda data: '{"schema_version": 1, "kind": "baseline"}',
        "is a baseline; give it to batchbench check --baseline",
    ),
    "part": (inside("strategies", value=None), "is not a complete result"),
    "strategy": (
        inside("strategies", "continuous", value=None),
        "new: has the strategies static, and base has static, continuous; run both with the",
    ),
    "workload": (
        inside("workload", "digest", value="0" * 64),
        "new: has a different workload from base: prompts, lengths or arrival times differ; run",
    ),
    "model": (
        inside("model", "name", value="distilgpt2"),
        "new: has the model distilgpt2, and base has gpt2; run both with the same --model",
    ),
    "simulation": (spoil(simulated=True), "new: is a simulation, and base was measured"),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_spoiled_input_gets_its_line_and_2(
    how: str, several: bool, program: Call, tmp_path: Path
) -> None:
    change, message = SPOILED[how]
    (tmp_path / "new" / "result.json").write_text(change(clean().data))
    base, new = "base", "new"
    if several:
        (tmp_path / "set").mkdir()
        (tmp_path / "new").rename(tmp_path / "set" / "new")
        (tmp_path / "base").rename(tmp_path / "set" / "base")
        put(tmp_path / "alone", paced({"static": [1.1] * 4}))
        base, new = "alone", "set"
        message = re.sub(r"\b(new|base)\b", r"set/\1", message)
    code, out, err = program("compare", base, new)
    assert (code, out) == (2, "")
    assert err.startswith("batchbench: ")
    assert message in err
    assert err.count("\n") == 1


def test_where_there_is_no_result_it_says_what_to_give(program: Call, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.txt").write_text("not a result")
    for path, message in {
        "nothing": "nothing: holds no result.json, nor do the folders in it; give a folder that",
        "nowhere": "nowhere: no such folder",
        "notes.txt": "notes.txt: is not a result.json",
        "base/other.json": "base/other.json: no such",
        "x" * 5000: "cannot be read: file name too long",
    }.items():
        for words in (("base", path), (path, "base")):
            code, out, err = program("compare", *words)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert message in err


def test_other_weights_are_another_model_and_the_same_in_another_format_are_not(
    program: Call, tmp_path: Path
) -> None:
    data = with_facts(clean().data, "model", weights_digest="a" * 64)
    put(tmp_path / "base", data)
    put(tmp_path / "new", with_facts(data, "model", weights_digest="b" * 64))
    code, _, err = program("compare", "base", "new")
    assert code == 2
    assert (
        "new: has the weights bbbbbbbbbbbb, and base has aaaaaaaaaaaa; run both with the same"
        in err
    )
    put(tmp_path / "new", with_facts(data, "model", weights_digest="b" * 64, dtype="bfloat16"))
    assert program("compare", "base", "new", "--quiet")[0] == 0


def test_the_setting_that_makes_it_another_workload_is_named() -> None:
    base, new = (batchbench.simulate(queue_size=size) for size in (24, 25))
    with pytest.raises(UsageError, match="--queue-size differs: 24 and 25"):
        gate_of(base, new)


def test_runs_of_a_side_must_be_of_one_experiment_each_measured_once(
    program: Call, tmp_path: Path
) -> None:
    put(tmp_path / "set" / "a", clean().data)
    put(tmp_path / "set" / "b", clean().data)
    _, _, err = program("compare", "base", "set")
    assert "set/b: holds the same measurement as set/a, which would count twice" in err
    config = deepcopy(dict(clean().data["config"]))
    config["serving"]["batch_size"] = 9
    put(tmp_path / "set" / "b", {**paced({"static": [1.1] * 4}), "config": config})
    code, _, err = program("compare", "base", "set")
    assert code == 2
    assert "set/b: is not of the same experiment as set/a: --batch-size differs: 8 and 9;" in err


def test_runs_that_disagree_are_no_base_and_a_bad_new_version(
    program: Call, tmp_path: Path
) -> None:
    put(tmp_path / "set" / "a", clean().data)
    odd = counted(paced({"static": [1.1] * 4}), "static", "forward_passes", 1)
    put(tmp_path / "set" / "b", odd)
    code, _, err = program("compare", "set", "base")
    assert code == 2
    assert "set/b: its static.forward_passes is 401, and 400 in set/a; runs of one version" in err
    code, out, _ = program("compare", "base", "set", "--quiet")
    assert code == 1
    assert out.startswith("FAILED: static.forward_passes grew by 1")


# What is shown


def test_the_page_shows_what_the_program_says(program: Call) -> None:
    page = Path(batchbench.__file__).parents[1] / "docs" / "comparing.md"
    shown = 0
    for block in fenced(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            words = command.split()
            assert words[0] == "batchbench"
            _, out, err = program(*words[1:])
            assert err == ""
            if output.strip():
                shown += 1
                expected, said = comparable(output), comparable(out)
                assert expected == said or matches(expected, said), out
    assert shown


def test_a_result_without_pairs_still_has_its_times() -> None:
    alone = result_of({"static": [measured("static")]})
    gate = gate_of(alone, alone)
    assert gate.of(Kind.RATIO) == []
    assert found(gate, "static.duration").verdict is Verdict.SAME
