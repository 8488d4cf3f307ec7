"""Self-audit: a clean run is valid, and each thing that can spoil one is named, and it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.results import CLASSIC, PASSED, SETTLED, measured, reasons, trials_of

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import NOT_VERIFIED
from batchbench.reports.validity import audit
from batchbench.workloads import Workload

Spoil = Callable[[list[Recording]], list[Recording]]


def test_a_clean_run_is_valid() -> None:
    assert reasons() == []


def test_a_clean_run_is_valid_without_verification_and_without_knowing_the_load() -> None:
    assert reasons(trials_of("static", foreign=None), verification=NOT_VERIFIED) == []


def test_a_simulation_is_valid() -> None:
    ran = Batcher("static", SimulatedEngine(), 8).serve(CLASSIC, Watch())
    assert audit(CLASSIC, {"static": [ran]}, NOT_VERIFIED, WarmUp(0, True, None, None), None) == []


# What spoils the whole run


def test_an_interrupted_run_is_suspect() -> None:
    assert reasons(stopped="interrupted after 1 of 4 pairs") == ["interrupted after 1 of 4 pairs"]


def test_wrong_outputs_are_suspect() -> None:
    (found,) = reasons(verification=replace(PASSED, identical=30, wrong=2))
    assert found == "2 requests got wrong tokens"


def test_numerical_ties_are_not_suspect() -> None:
    assert reasons(verification=replace(PASSED, identical=30, numerical_ties=2)) == []


def test_a_warm_up_that_had_not_settled_is_suspect() -> None:
    (found,) = reasons(warm_up=WarmUp(10, False, -0.17, 10_000_000))
    assert "warm-up had not settled" in found
    assert "-17%" in found
    assert "10 rounds" in found


def test_a_warm_up_says_what_it_watched() -> None:
    changing = WarmUp(10, False, 57.79, 10_000_000)
    for served, watched in ((False, "the median step"), (True, "the median E2E latency of its")):
        (found,) = reasons(warm_up=changing, served=served)
        assert watched in found


# What spoils the trials of one strategy


@pytest.mark.parametrize(("share", "suspect"), [(0.02, False), (0.05, True)])
def test_time_outside_the_steps_is_suspect(share: float, suspect: bool) -> None:
    found = reasons(trials_of("static", share=share))
    assert found == ["static: 5.0% of the time passed outside the steps"] * suspect


@pytest.mark.parametrize(
    ("change", "expected"),
    [(1.05, None), (0.95, None), (1.3, "slower"), (0.7, "faster")],
)
def test_drift_from_the_first_trials_to_the_last_is_suspect(
    change: float, expected: str | None
) -> None:
    steps = (1e7, 1e7, 1e7 * change, 1e7 * change)
    found = reasons([measured("static", i, step_ns=step) for i, step in enumerate(steps)])
    if expected is None:
        assert found == []
        return
    (reason,) = found
    assert reason == f"static: its trials became 30% {expected} from first to last"


def test_drift_compares_the_medians_of_the_halves() -> None:
    steps = (1.1e7, 1e7, 1e7, 1.1e7, 1e7, 2e7, 1.05e7)
    assert reasons([measured("static", i, step_ns=step) for i, step in enumerate(steps)]) == []
    steps = (1e7, 1e7, 1e7, 1.4e7)
    (found,) = reasons([measured("static", i, step_ns=step) for i, step in enumerate(steps)])
    assert "became 20% slower" in found


@pytest.mark.parametrize(("cores", "suspect"), [(0.1, False), (0.7, True)])
def test_a_foreign_load_is_suspect(cores: float, suspect: bool) -> None:
    trials = [*trials_of("static")[:3], measured("static", 3, foreign=cores)]
    assert reasons(trials) == ["static: other processes kept 0.7 cores busy"] * suspect


def test_counters_that_differ_between_trials_are_suspect() -> None:
    trials = trials_of("static")
    other = measured("static", 3, order="longest-first")
    scaled = other.step_ends_ns * trials[0].duration_ns // other.duration_ns
    starts = np.concatenate([[0], scaled])[other.first_steps]
    other = replace(other, ends_ns=scaled, spans=replace(other.spans, start_ns=starts))
    assert reasons([*trials[:3], other]) == [
        "static: counters differ between trials of a closed workload"
    ]


def test_texts_may_end_early_where_they_may() -> None:
    workload = replace(CLASSIC, stop_at_eos=True)
    fewer = Workload.of("as produced", [[7] * 7] * 32, [100 if i < 1 else 10 for i in range(32)])
    trials = [measured("continuous", i, workload=fewer) for i in range(4)]
    assert audit(workload, {"continuous": trials}, PASSED, SETTLED, None) == []


def test_counters_may_differ_where_requests_come_over_time() -> None:
    workload = replace(CLASSIC, due_ns=CLASSIC.due_ns + 1)
    orders = ("fifo", "longest-first", "fifo")
    trials = [measured("continuous", i, order=order) for i, order in enumerate(orders)]
    assert len({trial.num_steps for trial in trials}) == 2
    assert audit(workload, {"continuous": trials}, PASSED, SETTLED, None) == []


def test_outputs_that_differ_between_trials_are_suspect() -> None:
    trials = trials_of("static")
    tokens = trials[2].tokens
    assert tokens is not None
    trials[2] = replace(trials[2], tokens=np.where(np.arange(len(tokens)) == 5, 999, tokens))
    assert reasons(trials) == ["static: outputs differ between trials"]


# Laws that a log may break


def with_first(column: str, change: int) -> Spoil:
    """Change a column of the first request in the first trial."""

    def spoil(trials: list[Recording]) -> list[Recording]:
        log = trials[0].requests
        values = getattr(log, column).copy()
        values[0] += change
        return [replace(trials[0], requests=replace(log, **{column: values})), *trials[1:]]

    return spoil


def nobody_waited(trials: list[Recording]) -> list[Recording]:
    """Logs that forget who was waiting."""
    return [replace(t, spans=replace(t.spans, waiting=t.spans.waiting * 0)) for t in trials]


@pytest.mark.parametrize(
    ("spoil", "law"),
    [
        (with_first("output_tokens", -1), "the log is wrong: tokens are not conserved"),
        (with_first("first", 200), "the log is wrong: not every request was served"),
        (with_first("released", -1), "the log is wrong: not every request was served"),
        (with_first("released", 1), "the log is wrong: slot-steps do not add up"),
        (nobody_waited, "Little's law is off by"),
    ],
)
def test_a_log_that_breaks_a_law_is_suspect(spoil: Spoil, law: str) -> None:
    (found,) = reasons(spoil(trials_of("static")))
    assert found.startswith("static: ")
    assert law in found


def test_every_reason_is_told() -> None:
    found = reasons(
        trials_of("static", share=0.05, foreign=1.0),
        warm_up=WarmUp(10, False, 0.2, 10_000_000),
        stopped="interrupted after 1 of 4 pairs",
    )
    assert len(found) == 4
