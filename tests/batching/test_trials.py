"""Trials of a fast device: servings that fill a trial, and the warm-up that meets every shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import CLASSIC, PASSED, measured, reasons, result_of, shown, trials_of

from batchbench.batching import trials
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.recording_file import load_recording, save_recording
from batchbench.batching.trials import (
    MOST_SERVINGS,
    WarmUp,
    least_trial_s,
    middle_of,
    observe,
    servings_for,
    servings_note,
    warm_up_whole,
)
from batchbench.batching.verification import Deviation, Finding, verify
from batchbench.reports import metrics
from batchbench.reports.validity import audit
from batchbench.workloads import Workload

WARM = WarmUp(3, True, 0.0, 10_000_000, 0.5)


@dataclass
class Canned:
    """A strategy that serves as fast as it is told, and logs the workloads that it was given."""

    steps_ns: Iterator[float]
    name: str = "continuous"
    given: list[Workload] = field(default_factory=list)

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        self.given.append(workload)
        return measured(self.name, trial, step_ns=next(self.steps_ns), workload=workload)


def with_token(recording: Recording, index: int, token: int = 999) -> Recording:
    assert recording.tokens is not None
    return replace(
        recording,
        tokens=np.where(np.arange(len(recording.tokens)) == index, token, recording.tokens),
    )


# Servings


@given(duration_s=st.floats(1e-6, 100), trial_s=st.floats(0.1, 3))
def test_servings_are_odd_and_fill_a_trial(duration_s: float, trial_s: float) -> None:
    count = servings_for(duration_s, trial_s)
    assert count % 2 == 1
    assert count * duration_s >= trial_s or count == MOST_SERVINGS
    assert (count - 2) * duration_s < trial_s
    assert (count == 1) >= (duration_s >= trial_s)


@pytest.mark.parametrize(
    ("needs", "max_time", "expected"),
    [
        ((), None, 1.0),
        ((2.0,), None, 2.2),
        ((0.0,), None, 1.0),
        ((2.0,), 4.0, 0.5),
        ((), 80.0, 1.0),
    ],
)
def test_a_trial_is_as_long_as_a_counter_needs_and_as_the_time_allows(
    needs: Sequence[float], max_time: float | None, expected: float
) -> None:
    class Needs:
        name, range_j = "made up", None

        def __init__(self, least_s: float) -> None:
            self.least_s = least_s

        def read_j(self) -> float:
            return 0.0

    assert least_trial_s([Needs(s) for s in needs], max_time, 8) == pytest.approx(expected)


def test_the_serving_of_median_duration_is_the_trial() -> None:
    """Its steps, its counters and its tokens are those of the workload, served once."""
    paces = [1e7, 3e7, 2e7, 1.5e7, 9e7]
    strategy = Canned(iter(paces))
    trial = observe(strategy, CLASSIC, Watch(), 3, servings=5)
    once = measured("continuous", step_ns=2e7)
    assert trial.duration_ns == once.duration_ns
    assert trial.header.trial == 3
    assert trial.header.about["servings"] == 5
    assert metrics.counters(trial) == metrics.counters(once)
    assert trial.others == ()
    assert trial.tokens is not None
    assert once.tokens is not None
    assert trial.tokens.tolist() == once.tokens.tolist()
    assert strategy.given == [CLASSIC] * 5
    assert "servings" not in observe(Canned(iter([1e7])), CLASSIC, Watch()).header.about


def test_energy_is_that_of_one_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rising:
        name, range_j, least_s, joules = "made up", None, 0.0, 0.0

        def read_j(self) -> float:
            self.joules += 6.0
            return self.joules

    trial = observe(Canned(iter([1e7] * 3)), CLASSIC, Watch(), energy=[Rising()], servings=3)
    assert trial.header.about["energy_joules"] == 2.0
    clocks = {"sm": 1980, "memory": 2619}
    monkeypatch.setattr(trials, "gpu_clock_mhz", lambda uuid: clocks if uuid == "abc" else None)
    trial = observe(Canned(iter([1e7])), CLASSIC, Watch(), gpu="abc")
    assert trial.header.about["gpu_clock_mhz"] == clocks


def test_other_tokens_of_a_serving_are_kept_for_verification() -> None:
    first, middle, last = (measured("continuous", step_ns=ns) for ns in (1e7, 2e7, 3e7))
    trial, facts = middle_of([with_token(last, 5), first, middle])
    assert trial.duration_ns == middle.duration_ns
    assert len(trial.others) == 1
    assert facts["differing_requests"] == [0]
    assert facts["steps_vary"] is False

    class Alone:
        """The model itself, which would not have said 999."""

        name = "alone"

        def deviations(self, prompt: Any, output: Any, stream: Any = None) -> Sequence[Deviation]:
            return [Deviation(int(i), 1.0, 0.1) for i in np.flatnonzero(output == 999)]

    found = verify(CLASSIC, [trial], Alone())
    assert (found.requests_checked, found.wrong) == (32, 1)
    assert (found.findings[0].request, found.findings[0].strategy) == (0, "continuous")
    renamed = replace(trial, header=replace(trial.header, strategy="graph"))
    assert verify(CLASSIC, [renamed], Alone()).findings[0].strategy == "graph"


def test_servings_that_differ_in_their_steps_are_suspect() -> None:
    other = measured("continuous", order="longest-first")
    once = measured("continuous")
    assert other.num_steps != once.num_steps
    assert middle_of([once, other, once])[1]["steps_vary"] is True
    four = trials_of("static")
    about = {**four[0].header.about, "steps_vary": True}
    four[0] = replace(four[0], header=replace(four[0].header, about=about))
    assert reasons(four) == ["static: counters differ between trials of a closed workload"]


def test_a_file_keeps_what_is_known_of_all_servings(tmp_path: Path) -> None:
    recording = measured("continuous")
    trial, facts = middle_of([recording, with_token(recording, 5), recording])
    header = replace(trial.header, about={**trial.header.about, **facts})
    file = tmp_path / "0-0.npz"
    file.write_bytes(save_recording(replace(trial, header=header)))
    again = load_recording(file)
    assert again.header.about["servings"] == 3
    assert again.header.about["differing_requests"] == [0]
    assert again.others == ()


# Outputs that differ

TIE = Finding(0, "static", "numerical tie", 5, 0.1, 0.2, "close")


@pytest.mark.parametrize("within", [False, True], ids=["between trials", "between servings"])
@pytest.mark.parametrize(
    ("findings", "suspect"),
    [
        ((TIE,), False),
        ((), True),
        ((replace(TIE, request=1),), True),
        ((replace(TIE, strategy="continuous"),), True),
        ((replace(TIE, verdict="wrong"),), True),
    ],
    ids=["a tie", "not checked", "a tie of another", "a tie elsewhere", "wrong"],
)
def test_outputs_may_differ_where_verification_calls_it_a_tie(
    findings: tuple[Finding, ...], suspect: bool, within: bool
) -> None:
    four = trials_of("static")
    if within:
        about = {**four[2].header.about, "differing_requests": [0]}
        four[2] = replace(four[2], header=replace(four[2].header, about=about))
    else:
        four[2] = with_token(four[2], 5)
    verification = replace(PASSED, numerical_ties=1, identical=31, findings=findings)
    found = reasons(four, verification=verification)
    assert found == ["static: outputs differ between trials"] * suspect


def test_texts_that_end_at_different_tokens_differ() -> None:
    lengths = [100 if i % 8 == 0 else 10 for i in range(32)]
    short = Workload.of("as produced", [[7] * 7] * 32, [*lengths[:31], 9])
    four = [*trials_of("static")[:3], measured("static", 3, workload=short)]
    workload = replace(CLASSIC, stop_at_eos=True)
    assert audit(workload, {"static": four}, PASSED, WARM, None) == [
        "static: outputs differ between trials"
    ]
    tie = replace(PASSED, findings=(replace(TIE, request=31),))
    assert audit(workload, {"static": four}, tie, WARM, None) == []


# The warm-up


class Notes(Watch):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def test_the_whole_workload_is_served_before_the_trials_and_timed_the_second_time() -> None:
    """340 steps of 1 ms: the first serving took three times as long, since it loaded kernels."""
    continuous, static = Canned(iter([3e6, 1e6])), Canned(iter([3e6, 1e6]), "static")
    watch = Notes()
    warm_up, servings = warm_up_whole(
        [static, continuous], CLASSIC, WARM, watch, least_steps_s=0.85, trial_s=1.0
    )
    assert static.given == continuous.given == [CLASSIC, CLASSIC]
    steps = {name: measured(name).num_steps for name in ("static", "continuous")}
    expected = {name: servings_for(count / 1e3, 1.0) for name, count in steps.items()}
    assert servings == expected
    assert watch.notes == [
        f"a trial serves the workload {expected['static']} times (static), "
        f"{expected['continuous']} times (continuous): the serving of median duration counts"
    ]
    assert warm_up.duration_s is not None
    assert warm_up.duration_s >= 0.5
    assert replace(warm_up, duration_s=0.5) == WARM


def test_servings_of_which_no_tokens_are_known_have_a_median_too() -> None:
    """A plug-in may not report tokens."""
    served = [replace(measured("continuous", step_ns=ns), tokens=None) for ns in (3e7, 1e7, 2e7)]
    trial, facts = middle_of(served)
    assert trial.duration_ns == served[2].duration_ns
    assert (trial.others, facts["differing_requests"]) == ((), [])


def test_a_note_names_strategies_that_are_served_several_times() -> None:
    assert servings_note({"static": 1, "continuous": 3}) == (
        "a trial serves the workload 3 times (continuous): the serving of median duration counts"
    )
    assert servings_note({"static": 1}) is servings_note({}) is None


def test_a_trial_that_is_long_enough_is_served_once() -> None:
    watch = Notes()
    strategy = Canned(iter([1e8]))
    _, servings = warm_up_whole([strategy], CLASSIC, WARM, watch, least_steps_s=0.85, trial_s=1.0)
    assert (servings, watch.notes, len(strategy.given)) == ({}, [], 1)


def test_of_a_long_workload_only_the_beginning_is_served() -> None:
    """680 tokens in 8 slots take 85 steps of 1 s, of which 10 s are affordable."""
    strategy = Canned(iter([1e9]))
    _, servings = warm_up_whole([strategy], CLASSIC, WARM, Watch(), least_steps_s=85.0, trial_s=1.0)
    (piece,) = strategy.given
    assert servings == {}
    assert len(piece) == 32 * 10 // 85
    assert piece.output_tokens.tolist() == CLASSIC.output_tokens[: len(piece)].tolist()
    assert not piece.due_ns.any()


@pytest.mark.parametrize(("last_s", "waits"), [(9, True), (11, False)])
def test_requests_that_come_over_long_are_there_at_once_in_the_warm_up(
    last_s: int, waits: bool
) -> None:
    due = np.linspace(0, last_s * 1e9, 32).astype(np.int64)
    strategy = Canned(iter([1e7, 1e7]))
    timed = replace(CLASSIC, due_ns=due)
    warm_up_whole([strategy], timed, WARM, Watch(), least_steps_s=0.85, trial_s=1.0)
    assert bool(strategy.given[0].due_ns.any()) is waits
    assert len(strategy.given[0]) == 32


# The result


def test_a_reader_learns_that_a_trial_served_the_workload_several_times() -> None:
    def often(policy: str, servings: int) -> list[Recording]:
        return [
            replace(r, header=replace(r.header, about={**r.header.about, "servings": servings}))
            for r in trials_of(policy)
        ]

    result = result_of({"static": often("static", 5), "continuous": often("continuous", 13)})
    assert [data["servings"] for data in result.data["strategies"].values()] == [5, 13]
    text = " ".join(shown(result, 120).split())
    assert (
        "a trial serves the workload 5 times (static), 13 times (continuous): the serving of "
        "median duration counts"
    ) in text
    assert "a trial serves" not in shown(result_of(), 120)
    assert all("servings" not in data for data in result_of().data["strategies"].values())
