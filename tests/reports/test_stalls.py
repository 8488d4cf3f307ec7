"""Stalls: the longest gaps are those that a walk over every pair of successive tokens finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import Config, configs, serve, steps_with_tokens, workloads

from batchbench.batching.recording import Recording
from batchbench.reports.latency import describe_step, gaps_ms, stalls
from batchbench.workloads import Workload


def timed(recording: Recording, steps_ns: Sequence[int], pauses_ns: Sequence[int]) -> Recording:
    """Return the trial with these durations of steps and pauses before spans, used in turn."""
    starts, ends, now, step = [], [], 0, 0
    for span, count in enumerate(recording.spans.steps.tolist()):
        now += pauses_ns[span % len(pauses_ns)]
        starts.append(now)
        for _ in range(count):
            now += steps_ns[step % len(steps_ns)]
            ends.append(now)
            step += 1
    return replace(
        recording,
        spans=replace(recording.spans, start_ns=np.array(starts)),
        ends_ns=np.array(ends),
        step_ns=None,
        growth=None,
    )


def walked(recording: Recording) -> list[dict[str, Any]]:
    """Return the stalls of a trial, found by walking over the tokens of every request."""
    ends = recording.step_ends_ns.tolist()
    spans = recording.spans
    starts = [
        start if nth == 0 else None
        for start, count in zip(spans.start_ns.tolist(), spans.steps.tolist(), strict=True)
        for nth in range(count)
    ]
    requests = Counter(pair for steps in steps_with_tokens(recording) for pair in pairwise(steps))
    lengths = {pair: ends[pair[1]] - ends[pair[0]] for pair in requests}
    if not requests:
        return []
    median = np.percentile([lengths[pair] / 1e6 for pair in requests.elements()], 50)
    longest = sorted(lengths, key=lambda pair: (-lengths[pair], pair[0]))
    rows = []
    for first, last in longest[:5]:
        if lengths[first, last] < 1.5 * median * 1e6:
            break
        spent = {}
        for step in range(first + 1, last + 1):
            start = starts[step]
            spent[step] = ends[step] - (ends[step - 1] if start is None else start)
        slowest = max(spent, key=lambda step: (spent[step], -step))
        outside = lengths[first, last] - sum(spent.values())
        is_outside = outside > spent[slowest]
        rows.append(
            {
                "trial": 0,
                "gap_ms": lengths[first, last] / 1e6,
                "requests": requests[first, last],
                "start_ms": ends[first] / 1e6,
                "step": None if is_outside else slowest,
                "cause": "time outside the steps"
                if is_outside
                else describe_step(recording, slowest),
            }
        )
    return rows


lengths_ns = st.lists(st.sampled_from([2, 3, 4, 5, 6, 7, 40, 90]), min_size=1, max_size=11)


@given(workloads(), configs(), lengths_ns, st.lists(st.integers(0, 60), min_size=1, max_size=7))
def test_stalls_are_what_a_walk_over_all_tokens_finds(
    workload: Workload, config: Config, steps_ns: list[int], pauses_ns: list[int]
) -> None:
    recording = timed(serve(workload, config), steps_ns, pauses_ns)
    assert stalls([recording]) == walked(recording)


ALONE = Workload.of("one", [[1]], [4])


def one_request(*steps_ns: int, pauses_ns: Sequence[int] = (0,)) -> Recording:
    return timed(serve(ALONE, Config("continuous", 1)), steps_ns, pauses_ns)


def test_a_gap_of_exactly_one_and_a_half_medians_is_a_stall() -> None:
    slow, median = 3_000_000, 2_000_000  # ns
    assert [s["gap_ms"] for s in stalls([one_request(1, median, median, slow)])] == [3.0]
    assert stalls([one_request(1, median, median, slow - 1)]) == []


def test_a_step_that_takes_as_long_as_all_time_outside_the_steps_is_the_cause() -> None:
    request = Workload.of("two", [[1], [1]], [5, 3], due_ns=[0, 0])
    recording = timed(serve(request, Config("continuous", 2)), [1, 2, 2, 50, 2], [0, 0, 50])
    (stall,) = stalls([recording])
    assert stall["gap_ms"] == pytest.approx(100e-6)
    assert (stall["step"], stall["cause"]) == (3, "decode of 1 slot")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([1], "prefill of 1 request, 1 token"),
        ([2], "prefill of 1 request, 2 tokens"),
        ([1, 1], "prefill of 2 requests, 2 tokens"),
        ([700, 500], "prefill of 2 requests, 1,200 tokens"),
    ],
)
def test_the_work_of_a_step_in_words(prompts: list[int], words: str) -> None:
    workload = Workload.of("some", [[1] * n for n in prompts], [2] * len(prompts))
    recording = serve(workload, Config("continuous", 2))
    assert describe_step(recording, 0) == words
    assert describe_step(recording, 1) == f"decode of {len(prompts)} slot{'s' * (len(prompts) > 1)}"


@given(workloads(), configs(), lengths_ns)
def test_gaps_are_those_between_all_successive_tokens(
    workload: Workload, config: Config, steps_ns: list[int]
) -> None:
    recording = timed(serve(workload, config), steps_ns, [0])
    ends = recording.step_ends_ns
    walked = [ends[b] - ends[a] for s in steps_with_tokens(recording) for a, b in pairwise(s)]
    gaps = gaps_ms(recording)
    assert gaps.count == len(walked)
    if walked:
        assert gaps.mean() == pytest.approx(np.mean(walked) / 1e6)
        assert gaps.percentile(99) == pytest.approx(np.percentile(walked, 99) / 1e6)
