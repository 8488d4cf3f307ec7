"""Verdicts of verification, with a reference that finds the deviations that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.outputs import recording_of

from batchbench.batching.recording import Recording
from batchbench.batching.verification import (
    NOT_VERIFIED,
    Deviation,
    Finding,
    Remembered,
    Verification,
    verify,
)
from batchbench.workloads import Workload

some = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("gap", "tolerance"), [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (math.nan, math.nan)]
)
def test_a_gap_that_is_no_number_is_no_tie(gap: float, tolerance: float) -> None:
    assert not Deviation(0, gap, tolerance).is_tie


def test_a_gap_as_large_as_the_tolerance_is_a_tie() -> None:
    assert Deviation(0, 0.5, 0.5).is_tie
    assert not Deviation(0, math.nextafter(0.5, 1), 0.5).is_tie


# The book-keeping, with a reference that says what it is told


class Told:
    """Finds the deviations that it is told of, and remembers what it was asked."""

    name = "told"

    def __init__(self, *deviations: Deviation) -> None:
        self._deviations = deviations
        self.asked: list[tuple[list[int], list[int]]] = []

    def deviations(
        self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: object = None
    ) -> Sequence[Deviation]:
        self.asked.append((prompt.tolist(), output.tolist()))
        return [d for d in self._deviations if d.index < len(output)]


TIE, FAULT = Deviation(1, 0.25, 0.5), Deviation(2, 0.75, 0.5)


def same_prompts(*lengths: int) -> tuple[Workload, Recording]:
    """Requests of one prompt that all say 10, 11, 12, …, for so many tokens."""
    workload = Workload.of("alike", [[1, 2]] * len(lengths), lengths)
    return workload, recording_of(workload, [range(10, 10 + n) for n in lengths])


def test_requests_of_one_prompt_share_one_reference() -> None:
    workload, recording = same_prompts(3, 6, 1, 6, 2)
    reference = Told()
    assert verify(workload, [recording] * 4, reference).identical == 5
    assert reference.asked == [([1, 2], [10, 11, 12, 13, 14, 15])]


def test_other_prompts_and_other_outputs_have_references_of_their_own() -> None:
    workload = Workload.of("unlike", [[1, 2], [1, 3], [1, 2], [1]], [2, 2, 2, 3])
    said = [[10, 11], [10, 11], [10, 12], [2, 10, 11]]
    reference = Told()
    verify(workload, [recording_of(workload, said)], reference)
    asked = sorted(zip([[1, 2], [1, 3], [1, 2], [1]], said, strict=True))
    assert sorted(reference.asked) == asked


def test_only_what_a_request_said_is_held_against_it() -> None:
    workload, recording = same_prompts(1, 2, 3)
    found = verify(workload, [recording], Told(TIE, FAULT))
    assert (found.identical, found.numerical_ties, found.wrong) == (1, 1, 1)
    verdicts = [(f.request, f.verdict, f.index, f.gap) for f in found.findings]
    assert verdicts == [(1, "numerical tie", 1, 0.25), (2, "wrong", 2, 0.75)]
    assert found.max_logit_gap == 0.75


def test_a_request_counts_once_with_its_worst_verdict() -> None:
    workload = Workload.of("four", [[1], [2], [3], [4]], [3, 3, 3, 3])
    right, tie, wrong = [7, 7, 7], [7, 8, 7], [7, 7, 9]

    class ByOutput(Told):
        def deviations(
            self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: object = None
        ) -> Sequence[Deviation]:
            return [TIE] * int(output[1] == 8) + [FAULT] * int(output[2] == 9)

    trials = [[right, right, wrong, tie], [right, tie, tie, wrong], [right, right, right, right]]
    recordings = [
        recording_of(workload, said, strategy)
        for said in trials
        for strategy in ("static", "continuous")
    ]
    found = verify(workload, recordings, ByOutput())
    assert found.requests_checked == 4
    assert (found.identical, found.numerical_ties, found.wrong) == (1, 1, 2)
    assert found.reference == "told"
    assert found.passed is False


def test_a_fault_is_told_once_for_all_trials() -> None:
    workload, recording = same_prompts(3)
    found = verify(workload, [recording] * 5, Told(FAULT))
    reason = (
        "output token 2 is not the model's own choice, whose logit is 0.75 higher: "
        "more than the 0.5 that the precision may cause"
    )
    assert found.findings == (Finding(0, "static", "wrong", 2, 0.75, 0.5, reason),)


def test_a_tie_is_told_by_its_first_deviation() -> None:
    workload, recording = same_prompts(3)
    found = verify(workload, [recording], Told(TIE, Deviation(2, 0.125, 0.5)))
    reason = (
        "output token 1 is not the model's own choice, whose logit is 0.25 higher: "
        "less than the 0.5 that the precision may cause"
    )
    assert found.findings == (Finding(0, "static", "numerical tie", 1, 0.25, 0.5, reason),)


def test_what_is_wrong_is_told_before_a_tie_that_stands_in_front() -> None:
    workload, recording = same_prompts(3)
    [finding] = verify(workload, [recording], Told(TIE, FAULT)).findings
    assert (finding.verdict, finding.index) == ("wrong", 2)


def test_logits_that_are_no_numbers_are_wrong_and_have_no_gap() -> None:
    workload, recording = same_prompts(2)
    found = verify(workload, [recording], Told(Deviation(1, math.nan, 0.5)))
    reason = "the model's logits at output token 1 are not finite numbers"
    assert found.findings == (Finding(0, "static", "wrong", 1, None, None, reason),)
    assert (found.wrong, found.max_logit_gap) == (1, 0.0)


@pytest.mark.parametrize(("said", "stands_at"), [(3, 3), (7, 5)])
def test_a_wrong_number_of_tokens_is_told_where_the_outputs_part(said: int, stands_at: int) -> None:
    workload = Workload.of("two", [[1], [2]], [5, 5])
    recording = recording_of(workload, [[7] * 5, [7] * said], "continuous")
    reason = f"{said} output tokens instead of 5"
    found = verify(workload, [recording], Told())
    assert found.findings == (Finding(1, "continuous", "wrong", stands_at, None, None, reason),)


def test_a_finding_is_told_of_each_strategy_that_it_was_found_in() -> None:
    workload = Workload.of("one", [[1]], [3])
    recordings = [recording_of(workload, [[7] * 3], name) for name in ("static", "continuous")]
    found = verify(workload, recordings, Told(FAULT))
    assert [finding.strategy for finding in found.findings] == ["static", "continuous"]


def test_where_nothing_deviates_the_largest_gap_is_nought() -> None:
    workload, recording = same_prompts(2, 3)
    found = verify(workload, [recording], Told())
    assert found == Verification(2, 2, 0, 0, "told", 0.0)
    assert found.passed is True


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ([5, 6, 0], False),  # ends with the end of text
        ([5, 6, 7, 8, 9], False),  # as many as were asked for
        ([5, 6, 7, 8, 0], False),  # both
        ([5, 6], True),  # no reason to end
        ([5, 0, 7], True),  # went on after the end
        ([5, 6, 7, 8, 9, 0], True),  # more than were asked for
    ],
)
def test_a_text_ends_where_it_ends_or_where_it_must(said: list[int], wrong: bool) -> None:
    workload = Workload.of("ends", [[1]], [5], stop_at_eos=True)
    found = verify(workload, [recording_of(workload, [said])], Told(), eos=[0, 299])
    assert (found.wrong == 1) is wrong


def test_an_end_of_text_ends_nothing_unless_asked_to() -> None:
    workload = Workload.of("goes on", [[1]], [4])
    assert verify(workload, [recording_of(workload, [[5, 0, 0, 7]])], Told(), eos=[0]).passed
    assert not verify(workload, [recording_of(workload, [[5, 0]])], Told(), eos=[0]).passed


@some
@given(st.integers(1, 60), st.integers(1, 70))
def test_a_limit_checks_so_many_requests_spread_over_the_queue(count: int, limit: int) -> None:
    workload = Workload.of("alike", [[1]] * count, [3] * count)
    recording = recording_of(workload, [[7, 7, 7]] * count)
    found = verify(workload, [recording], Told(FAULT), limit=limit)
    checked = [f.request for f in found.findings]  # all that are checked are wrong
    assert found.requests_checked == found.wrong == len(checked) == min(limit, count)
    if len(checked) > 1:
        assert (checked[0], checked[-1]) == (0, count - 1)
        gaps = np.diff(checked)
        assert gaps.max() - gaps.min() <= 1


def test_without_a_limit_every_request_is_checked() -> None:
    workload, recording = same_prompts(*[3] * 9)
    assert verify(workload, [recording], Told()).requests_checked == 9


def test_nothing_checked_is_nothing_passed() -> None:
    workload, recording = same_prompts(3, 3)
    reference = Told(FAULT)
    found = verify(workload, [recording], reference, limit=0)
    assert found is NOT_VERIFIED
    assert found == Verification(0, 0, 0, 0, None, None, ())
    assert found.passed is None
    assert not reference.asked


def test_an_output_that_overflows_is_computed_once_and_one_that_begins_it_alone() -> None:
    """An overflow at the end of the longer output may spoil all positions before it."""

    class Overflowing(Told):
        def deviations(
            self, prompt: NDArray[np.int32], output: NDArray[np.int32], stream: object = None
        ) -> Sequence[Deviation]:
            super().deviations(prompt, output)
            return [Deviation(0, math.nan, 0.5)] if len(output) > 4 else []

    workload, recording = same_prompts(6, 3, 6)
    reference = Overflowing()
    found = verify(workload, [recording], reference)
    assert (found.identical, found.wrong) == (1, 2)
    assert [len(output) for _, output in reference.asked] == [6, 3]


def test_a_reference_that_remembers_is_asked_once_for_each_prompt_and_output() -> None:
    reference = Told(TIE, FAULT)
    remembered = Remembered(reference)
    assert remembered.name == "told"
    asked = [([1, 2], [10, 11]), ([1, 2], [10, 11, 12]), ([1], [10, 11])]
    for _ in range(2):
        for prompt, output in asked:
            arrays = np.array(prompt, np.int32), np.array(output, np.int32)
            expected = [d for d in (TIE, FAULT) if d.index < len(output)]
            assert remembered.deviations(*arrays) == expected
    assert reference.asked == asked
