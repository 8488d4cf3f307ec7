"""The cost of a step: integers that add up, plans and logs that agree, fits that find it again."""

from __future__ import annotations

import functools
import json
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.costs import costs, run
from support.laws import Config, configs, law, workload_of, workloads
from support.replay import join_spans

from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.batching.step_cost import PS, KnownCost, Passes, StepCost
from batchbench.batching.trials import SMALL_STEPS, small_batches
from batchbench.errors import UsageError
from batchbench.reports.prediction import (
    FEWEST_STEPS,
    StepSample,
    beyond,
    changes_of,
    counts_of,
    fit_cost,
    known_cost,
    quality_of,
    small_batches_of,
    spent_of,
)
from batchbench.workloads import Workload

TRUE = StepCost(10_000.0, 700.3, 12.7, 90.4, 450.0, host_ns=1_500.0)

policies = functools.partial(configs, policies=("static", "continuous", "support.laws:Patient"))


def measured(recording: Recording, noise: float = 0.0, seed: int = 0) -> Recording:
    """The same trial as a machine would have logged it, each step off by a share."""
    rng = np.random.default_rng(seed)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    gaps = starts - np.concatenate([[0], ends[:-1]])
    spent = ((ends - starts) * rng.lognormal(0, noise, len(ends))).round().astype(np.int64)
    new_ends = np.cumsum(spent + gaps)
    new_starts = new_ends - spent
    return replace(
        recording,
        header=replace(recording.header, simulated=False),
        spans=replace(recording.spans, start_ns=new_starts[recording.first_steps]),
        ends_ns=new_ends,
        step_ns=None,
        growth=None,
    )


def varied(seed: int, requests: int = 40) -> Workload:
    """A closed workload of many lengths."""
    rng = np.random.default_rng(seed)
    return workload_of(
        [(int(rng.integers(1, 30)), int(rng.integers(1, 60)), 0) for _ in range(requests)]
    )


# Passes in a row


@given(st.integers(1, 10**6), st.integers(0, 10**4), st.integers(1, 10**9))
@law
def test_passes_until_a_time_are_the_fewest_that_reach_it(
    first: int, growth: int, time: int
) -> None:
    passes = Passes(first, growth, 10**9)
    count = passes.until_ps(time)
    assert passes.total_ps(count) >= time
    assert count == 1 or passes.total_ps(count - 1) < time


@given(st.integers(1, 10**6), st.integers(0, 10**4), st.integers(0, 40))
@law
def test_passes_at_once_cost_what_they_cost_one_by_one(first: int, growth: int, count: int) -> None:
    one_by_one = sum(first + i * growth for i in range(count))
    assert Passes(first, growth, count).total_ps(count) == one_by_one


# Recordings of fitted simulations


@pytest.mark.parametrize("max_repeat", [1, 3])
@given(workload=workloads(), config=policies(), cost=costs)
@law
def test_how_many_passes_are_planned_at_once_does_not_show(
    max_repeat: int, workload: Workload, config: Config, cost: StepCost
) -> None:
    at_once = run(workload, config, cost)
    shortened = run(workload, config, cost, max_repeat=max_repeat)
    assert shortened.step_ends_ns.tolist() == at_once.step_ends_ns.tolist()
    assert shortened.step_starts_ns.tolist() == at_once.step_starts_ns.tolist()
    one, other = join_spans(shortened), join_spans(at_once)
    for log in ("requests", "spans", "chunks", "waits", "growth"):
        if getattr(other, log) is None:
            assert getattr(one, log) is None
            continue
        for column in fields(getattr(other, log)):
            ours, theirs = (getattr(getattr(r, log), column.name) for r in (one, other))
            assert ours.tolist() == theirs.tolist(), f"{log}.{column.name}"


@given(workload=workloads(), config=policies(), cost=costs)
@law
def test_each_step_costs_what_its_plan_computes(
    workload: Workload, config: Config, cost: StepCost
) -> None:
    recording = run(workload, config, cost)
    spent = recording.step_ends_ns - recording.step_starts_ns
    told = spent_of(cost, counts_of(recording))
    # Coefficients count in whole picoseconds, a step's time ends in whole nanoseconds.
    rounding = 2 + counts_of(recording)[:, 2] / PS
    assert (np.abs(spent - told) <= rounding).all()


@given(workload=workloads(), config=policies())
@law
def test_the_host_takes_its_time_once_for_each_new_decision(
    workload: Workload, config: Config
) -> None:
    recording = run(workload, config, StepCost(10.0, host_ns=7.0))
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    outside = (starts - np.concatenate([[0], ends[:-1]])).sum()
    waited = (recording.waits.end_ns - recording.waits.start_ns).sum()
    assert outside - waited == 7 * changes_of(recording)


def test_a_step_grows_with_the_longest_request_and_not_while_a_held_one_is_longest() -> None:
    workload = workload_of([(50, 2, 0), (3, 90, 0)])
    recording = run(workload, Config("static", 2), StepCost(100.0, cached_ns=1.0))
    spent = (recording.step_ends_ns - recording.step_starts_ns)[1:]
    # The first is done after one decode, at 51 tokens; the other overtakes it at its 49th.
    assert spent[:48].tolist() == [100 + 2 * 51] * 48
    assert np.diff(spent[48:]).tolist() == [2] * 40


def test_a_saved_recording_keeps_how_its_steps_grow(tmp_path: object) -> None:
    recording = run(varied(1), Config("continuous", 4), TRUE)
    file = tmp_path / "r.npz"  # type: ignore[operator]
    file.write_bytes(save_recording(recording))
    again = load_recording(file)
    assert again.growth is not None
    assert again.step_ends_ns.tolist() == recording.step_ends_ns.tolist()


# Fits


def test_a_fit_finds_the_coefficients_that_made_the_times() -> None:
    trials = [
        measured(run(varied(i), Config(policy, slots), TRUE))
        for i, (policy, slots) in enumerate([("static", 8), ("continuous", 8), ("continuous", 3)])
    ]
    found = fit_cost(StepSample.of(trials))
    for name, true in TRUE.as_dict().items():
        if name != "bends":
            assert getattr(found, name) == pytest.approx(true, rel=0.05), name
    held_out = quality_of(StepSample.of(trials))
    assert held_out["r2"] is not None
    assert held_out["r2"] > 0.99
    assert abs(held_out["total_error"]) < 0.01


def test_steps_in_which_something_else_ran_do_not_bend_the_line() -> None:
    trials = [measured(run(varied(i), Config("continuous", 8), TRUE), 0.05, i) for i in range(4)]
    rng = np.random.default_rng(0)
    hit = []
    for trial in trials:
        assert trial.ends_ns is not None
        late = np.where(rng.random(len(trial.ends_ns)) < 0.02, 200_000, 0).cumsum()
        ends = trial.ends_ns + late
        starts = trial.spans.start_ns + np.concatenate([[0], late[:-1]])[trial.first_steps]
        hit.append(replace(trial, ends_ns=ends, spans=replace(trial.spans, start_ns=starts)))
    clean, found = fit_cost(StepSample.of(trials)), fit_cost(StepSample.of(hit))
    assert found.row_ns / found.step_ns == pytest.approx(clean.row_ns / clean.step_ns, rel=0.3)
    # What they took is still part of the whole.
    work = StepSample.of(hit)
    assert spent_of(found, work.counts).sum() == pytest.approx(work.spent_ns.sum(), rel=0.05)


def test_what_the_steps_cannot_tell_apart_is_left_to_the_constant() -> None:
    workload = workload_of([(5, 40, 0)] * 8)
    found = fit_cost(
        StepSample.of([measured(run(workload, Config("static", 8, prefill="mixed"), TRUE))])
    )
    assert found.row_ns * 8 < 0.02 * found.step_ns


def test_a_fit_on_static_predicts_continuous() -> None:
    workload = varied(7, 60)
    trials = [measured(run(workload, Config("static", 8), TRUE), 0.05, i) for i in range(3)]
    truth = run(workload, Config("continuous", 8), TRUE)
    known, _ = known_cost("static", trials)
    told = run(workload, Config("continuous", 8), known.cost)
    assert told.requests.last.tolist() == truth.requests.last.tolist()
    assert told.duration_ns == pytest.approx(truth.duration_ns, rel=0.05)


def test_too_few_steps_teach_nothing() -> None:
    trial = measured(run(workload_of([(1, FEWEST_STEPS - 2, 0)]), Config("static", 1), TRUE))
    with pytest.raises(UsageError, match="too few measured steps"):
        known_cost("short", [trial])


def test_a_simulation_teaches_nothing() -> None:
    with pytest.raises(UsageError, match="not of a simulation"):
        known_cost("simulated", [run(varied(0), Config("static", 8), TRUE)])


def test_going_beyond_what_was_seen_is_said() -> None:
    known = KnownCost("seen", TRUE, (1, 2, 3, 4), 30, 20)
    near = run(workload_of([(3, 9, 0)] * 8), Config("static", 4), TRUE)
    assert beyond(known, [near]) == []
    far = run(workload_of([(9, 40, 0)] * 16), Config("static", 8), TRUE)
    rows, prompt, longest = beyond(known, [near, far])
    assert "up to 8 rows" in rows
    assert "up to 72 prompt tokens" in prompt
    assert "up to 49 tokens" in longest


# Fewer rows than static batching computes

BENT = replace(TRUE, row_ns=0.0, bends=((4, 900.0), (16, 2_500.0)))
"""Up to four rows cost nothing more, and then each costs more than those before."""

CLASSIC = workload_of([(7, 40 if i % 32 == 0 else 10, 0) for i in range(64)])


def small_steps(slots: int, cost: StepCost) -> list[list[int]]:
    """The steps that a warm-up would have timed."""
    piece = small_batches(CLASSIC, slots, CLASSIC.max_total_tokens, SMALL_STEPS)
    assert piece is not None
    return small_batches_of([measured(run(piece, Config("continuous", slots), cost))])


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
def test_full_batches_and_a_few_smaller_ones_predict_continuous(prefill: str) -> None:
    static, continuous = (Config(name, 32, prefill=prefill) for name in ("static", "continuous"))
    trials = [measured(run(CLASSIC, static, BENT), 0.05, i) for i in range(3)]
    truth = run(CLASSIC, continuous, BENT)

    without, _ = known_cost("static", trials)
    told = run(CLASSIC, continuous, without.cost)
    assert told.duration_ns > 1.3 * truth.duration_ns
    assert beyond(without, [told])[0] == (
        "1–3 rows decode together (the fit saw no step of 1–31 rows)"
    )

    known, quality = known_cost("static", trials, small_steps(32, BENT))
    told = run(CLASSIC, continuous, known.cost)
    assert told.duration_ns == pytest.approx(truth.duration_ns, rel=0.05)
    assert known.rows == (0, 1, 2, 4, 8, 16, 32)
    assert beyond(known, [told]) == []
    assert quality["steps"] == sum(trial.num_steps for trial in trials)


def test_a_pass_of_prompts_alone_still_costs_a_pass() -> None:
    """No step has so few rows that it could tell a pass from its first row."""
    trials = [measured(run(CLASSIC, Config("static", 32), BENT), 0.02, i) for i in range(3)]
    known, _ = known_cost("static", trials, small_steps(32, BENT))
    assert known.cost.row_ns == 0
    assert known.cost.step_ns == pytest.approx(BENT.step_ns, rel=0.2)


def test_smaller_batches_teach_the_same_where_rows_cost_alike() -> None:
    trials = [measured(run(CLASSIC, Config("static", 32), TRUE), 0.02, i) for i in range(3)]
    known, _ = known_cost("static", trials, small_steps(32, TRUE))
    for rows in (1, 3, 8, 20, 32):
        ours, theirs = (c.step_ns + c.rows_ns(rows) for c in (known.cost, TRUE))
        assert ours == pytest.approx(theirs, rel=0.1)


def test_a_cost_with_bends_comes_back_from_its_record() -> None:
    assert StepCost.of(json.loads(json.dumps(BENT.as_dict()))) == BENT
    earlier = {name: value for name, value in BENT.as_dict().items() if name != "bends"}
    assert StepCost.of(earlier) == replace(BENT, bends=())
    assert BENT.scaled(2).rows_ns(20) == 2 * BENT.rows_ns(20) == 2 * (12 * 900 + 4 * 2_500)


@given(
    slots=st.integers(1, 70),
    max_len=st.integers(2, 90),
    steps=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
@law
def test_smaller_batches_halve_down_to_one_row_and_fit(
    slots: int, max_len: int, steps: int, lengths: list[int]
) -> None:
    workload = workload_of([(length, 1, 0) for length in lengths])
    piece = small_batches(workload, slots, max_len, steps)
    if piece is None:
        assert slots == 1 or max_len < 3
        return
    assert piece.max_total_tokens <= max_len
    assert len(piece) == slots // 2
    rows = counts_of(run(piece, Config("continuous", slots), TRUE))[:, 1]
    decoded = [int(n) for n in rows if n]
    assert decoded == sorted(decoded, reverse=True)
    halves = [slots >> i for i in range(1, slots.bit_length())]
    assert list(dict.fromkeys(decoded)) == halves[: len(set(decoded))]
    if max_len > 16 + 1 + 6 * len(halves):
        assert set(decoded) == set(halves)
        assert len(decoded) == steps * len(halves)


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(1, 50), min_size=1))
@law
def test_rows_that_were_never_near_any_that_was_fitted_are_told(
    seen: set[int], decoding: set[int]
) -> None:
    known = KnownCost("seen", TRUE, tuple(sorted(seen)), 10**6, 10**6)
    recording = run(workload_of([(1, 2, 0)]), Config("static", 1), TRUE)
    rows = SimpleNamespace(decoding=np.array(sorted(decoding)), chunks=recording.spans.chunks)
    log = SimpleNamespace(requests=recording.requests, chunks=recording.chunks, spans=rows)
    told = beyond(known, [log])  # type: ignore[list-item]
    positive = sorted(n for n in seen if n)

    def near(rows: int) -> bool:
        below = max((n for n in positive if n <= rows), default=0)
        above = min((n for n in positive if n >= rows), default=None)
        return above is not None and (rows == above or above <= 2 * below + 1)

    assert bool(told) == (not all(map(near, decoding)))
