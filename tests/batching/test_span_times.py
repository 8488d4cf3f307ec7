"""Times of logs that are made up: every one is what a walk over the steps, in integers, gives."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law
from support.replay import join_spans

from batchbench.batching import recording as module
from batchbench.batching.recording import (
    ChunkLog,
    GrowthLog,
    Header,
    Recording,
    RequestLog,
    SpanLog,
    WaitLog,
)
from batchbench.workloads import Workload

some = settings(law, max_examples=60)


@dataclass(frozen=True)
class Span:
    """A run of steps: the first costs ``step_ps``, each more than the last by ``growth_ps``."""

    steps: int
    step_ps: int
    growth_ps: int = 0
    beyond_ps: int = 0  # by which the first begins after its whole nanosecond
    gap_ns: int = 0  # since the span before
    decoding: int = 1
    waiting: int = 0
    chunks: int = 0

    def ends_ps(self) -> list[int]:
        """End of each step, after the span's start."""
        ends, now = [], self.beyond_ps
        for step in range(self.steps):
            now += self.step_ps + step * self.growth_ps
            ends.append(now)
        return ends


spans = st.builds(
    Span,
    steps=st.integers(1, 6),
    step_ps=st.sampled_from([1000, 2000, 5300]),
    growth_ps=st.sampled_from([0, 0, 7, 1600]),
    beyond_ps=st.sampled_from([0, 0, 1, 999]),
    gap_ns=st.sampled_from([0, 0, 3]),
    decoding=st.integers(1, 2),
    waiting=st.integers(0, 1),
)
logs = st.lists(spans, min_size=1, max_size=6)
whole = st.lists(
    st.builds(
        Span,
        steps=st.integers(1, 6),
        step_ps=st.sampled_from([1000, 2000]),
        gap_ns=st.sampled_from([0, 0, 3]),
        decoding=st.integers(1, 2),
    ),
    min_size=1,
    max_size=6,
)
"""Spans in which every step costs the same whole nanoseconds."""


def walk(log: list[Span]) -> tuple[list[int], list[int], list[int]]:
    """Number of the span, start and end of each step, in ns."""
    numbers, starts, ends, now = [], [], [], 0
    for number, span in enumerate(log):
        begin = now + span.gap_ns
        of_span = [begin + ps // 1000 for ps in span.ends_ps()]
        numbers += [number] * span.steps
        starts += [begin, *of_span[:-1]]
        ends += of_span
        now = of_span[-1]
    return numbers, starts, ends


def recording_of(log: list[Span], kind: str = "growing") -> Recording:
    """A recording whose ends are a formula, or ``measured``."""
    numbers, starts, ends = walk(log)
    first = [numbers.index(number) for number in range(len(log))]

    def column(values: list[int]) -> np.ndarray:
        return np.array(values, np.int64)

    growth = GrowthLog(
        column([span.beyond_ps for span in log]),
        column([span.step_ps % 1000 for span in log]),
        column([span.growth_ps for span in log]),
    )
    none = column([])
    return Recording(
        Header("made up", 0, 2, True, {}),
        RequestLog(*[none] * len(fields(RequestLog))),
        SpanLog(
            steps=column([span.steps for span in log]),
            start_ns=column([starts[step] for step in first]),
            decoding=column([span.decoding for span in log]),
            waiting=column([span.waiting for span in log]),
            chunks=column([span.chunks for span in log]),
        ),
        ChunkLog(none, none, none),
        WaitLog(none, none, none, none, none),
        column(ends) if kind == "measured" else None,
        None if kind == "measured" else column([span.step_ps // 1000 for span in log]),
        None,
        growth if kind == "growing" else None,
    )


@pytest.mark.parametrize("kind", ["growing", "measured"])
@given(log=logs)
@some
def test_times_of_steps_are_those_of_a_walk(kind: str, log: list[Span]) -> None:
    numbers, starts, ends = walk(log)
    recording, steps = recording_of(log, kind), np.arange(len(ends))
    assert recording.measured is (kind == "measured")
    assert recording.num_steps == len(ends)
    assert type(recording.num_steps) is int
    assert recording.first_steps.tolist() == [numbers.index(n) for n in range(len(log))]
    assert recording.spans_of(steps).tolist() == numbers
    assert recording.step_ends_ns.tolist() == recording.ends_of(steps).tolist() == ends
    assert {recording.ends_of(steps).dtype, recording.starts_of(steps).dtype} == {steps.dtype}
    assert recording.step_starts_ns.tolist() == recording.starts_of(steps).tolist() == starts
    assert recording.ends_of(steps[::-2]).tolist() == ends[::-2]
    assert recording.starts_of(steps[::-2]).tolist() == starts[::-2]
    last = [len(numbers) - 1 - numbers[::-1].index(n) for n in range(len(log))]
    assert recording.span_ends_ns.tolist() == [ends[step] for step in last]


@pytest.mark.parametrize("kind", ["growing", "measured"])
@given(log=logs)
@some
def test_steps_at_times_are_those_of_a_walk(kind: str, log: list[Span]) -> None:
    _, starts, ends = walk(log)
    recording, times = recording_of(log, kind), range(max(ends) + 4)
    over = recording.step_at(np.array(times))
    assert over.tolist() == [sum(end <= t for end in ends) for t in times]
    assert over.dtype == np.int64
    under_way = [[e for s, e in zip(starts, ends, strict=True) if s < t < e] for t in times]
    free = [max(found, default=t) for t, found in zip(times, under_way, strict=True)]
    assert recording.free_from(np.array(times)).tolist() == free


@pytest.mark.parametrize("block", [1, 3, None])
@pytest.mark.parametrize("kind", ["growing", "measured", "whole"])
@given(data=st.data(), skip=st.integers(0, 2))
@some
def test_step_times_are_those_of_a_walk(
    kind: str, block: int | None, data: st.DataObject, skip: int
) -> None:
    log = data.draw(whole if kind == "whole" else logs)
    numbers, starts, ends = walk(log)
    recording = recording_of(log, kind)
    chosen = [n for n in range(len(log)) if data.draw(st.booleans())]
    with pytest.MonkeyPatch.context() as patch:
        if block is not None:
            patch.setattr(module, "BLOCK", block)
        parts = list(recording.step_times(np.array(chosen, np.int64), skip))
        all_spans = list(recording.step_times(skip=skip))
        unskipped = list(recording.step_times(np.array(chosen, np.int64)))
    if block is not None:  # equal steps share a row, however many they are
        assert all(len(part.step) <= block for part in parts[1:])
    for found, spans, skipped in (
        (parts, chosen, skip),
        (all_spans, range(len(log)), skip),
        (unskipped, chosen, 0),
    ):
        expected = [
            (step, number, end - start)
            for step, (number, start, end) in enumerate(zip(numbers, starts, ends, strict=True))
            if number in spans and step - numbers.index(number) >= skipped
        ]
        rows = [
            (step, span, ns)
            for part in found
            for span, first, count, ns in zip(
                part.span, part.step, part.count, part.ns, strict=True
            )
            for step in range(first, first + count)
        ]
        assert sorted(rows) == expected


@given(log=whole)
@some
def test_whole_spans_are_one_row_each(log: list[Span]) -> None:
    [rows, *rest] = recording_of(log, "whole").step_times()
    assert rows.count.tolist() == [span.steps for span in log]
    assert not any(len(part.step) for part in rest)


def table(recording: Recording) -> list[tuple[int, ...]]:
    """Return the log of each step."""
    s = recording.spans
    rows = [np.repeat(c, s.steps).tolist() for c in (s.decoding, s.waiting, s.chunks)]
    times = recording.step_starts_ns.tolist(), recording.step_ends_ns.tolist()
    return list(zip(*rows, *times, strict=True))


def cut(span: Span, at: int) -> list[Span]:
    """The span as two, of which the second goes on where the first ends."""
    if not 0 < at < span.steps:
        return [span]
    before = replace(span, steps=at)
    after = replace(
        span,
        steps=span.steps - at,
        step_ps=span.step_ps + at * span.growth_ps,
        beyond_ps=before.ends_ps()[-1] % 1000,
        gap_ns=0,
    )
    return [before, after]


@pytest.mark.parametrize("kind", ["growing", "whole"])
@given(data=st.data())
@some
def test_a_span_that_was_cut_is_merged_again(kind: str, data: st.DataObject) -> None:
    of_kind = {"growing": logs, "whole": whole}[kind]
    # Neighbours differ in what they do, so that only the cuts can be merged.
    log = [replace(span, decoding=n) for n, span in enumerate(data.draw(of_kind), 1)]
    pieces = [part for span in log for part in cut(span, data.draw(st.integers(0, 6)))]
    merged, whole_log = join_spans(recording_of(pieces, kind)), recording_of(log, kind)
    assert table(merged) == table(whole_log)
    for name in ("spans", "growth"):
        one, other = (getattr(each, name) for each in (merged, whole_log))
        if other is not None:
            for column in fields(other):
                values = getattr(one, column.name).tolist(), getattr(other, column.name).tolist()
                assert values[0] == values[1]
    assert merged.step_ns is not None
    assert whole_log.step_ns is not None
    assert merged.step_ns.tolist() == whole_log.step_ns.tolist()


FIRST = Span(2, 5300, 7, 1)
NEXT = cut(replace(FIRST, steps=5), 2)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"gap_ns": 1},
        {"decoding": 2},
        {"waiting": 1},
        {"chunks": 1, "steps": 1},
        {"step_ps": NEXT.step_ps + 1},
        {"step_ps": NEXT.step_ps + 1000},
        {"growth_ps": 8},
        {"beyond_ps": NEXT.beyond_ps + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_spans_that_do_not_go_on_alike_stay_apart(change: dict[str, Any]) -> None:
    assert len(join_spans(recording_of([FIRST, NEXT])).spans.steps) == 1
    other = replace(NEXT, **change)
    apart = recording_of([FIRST, other])
    assert table(join_spans(apart)) == table(apart)
    assert len(join_spans(apart).spans.steps) == 2
    if "chunks" in change:
        swapped = recording_of([replace(other, chunks=1), NEXT])
        assert len(join_spans(swapped).spans.steps) == 2


def test_equal_steps_of_another_cost_stay_apart() -> None:
    log = [Span(2, 1000), Span(3, 2000), Span(1, 2000)]
    assert join_spans(recording_of(log, "whole")).spans.steps.tolist() == [2, 4]


def test_nothing_is_merged_of_nothing_and_a_measured_trial_is_refused() -> None:
    empty = recording_of([], "growing")
    assert join_spans(empty) is empty
    with pytest.raises(ValueError, match="only in a simulation"):
        join_spans(recording_of([FIRST], "measured"))


def requested(tokens: list[int] | None) -> Recording:
    """Two requests, of three and two tokens, in five steps of 1 ns."""
    columns = {
        "due_ns": [0, 1],
        "prompt_tokens": [3, 4],
        "output_tokens": [3, 2],
        "slot": [0, 1],
        "admitted": [0, 1],
        "started": [0, 2],
        "first": [0, 3],
        "last": [2, 4],
        "released": [3, 5],
    }
    requests = RequestLog(**{name: np.array(values) for name, values in columns.items()})
    produced = None if tokens is None else np.array(tokens, np.int32)
    return replace(recording_of([Span(5, 1000)], "whole"), requests=requests, tokens=produced)


def test_times_and_tokens_of_requests() -> None:
    recording = requested([7, 8, 9, 5, 6])
    assert recording.admitted_ns.tolist() == [0, 1]
    assert recording.started_ns.tolist() == [0, 2]
    assert recording.first_token_ns.tolist() == [1, 4]
    assert recording.last_token_ns.tolist() == [3, 5]
    assert recording.duration_ns == 5
    assert type(recording.duration_ns) is int
    assert recording.token_offsets.tolist() == [0, 3, 5]
    assert [recording.tokens_of(i).tolist() for i in range(2)] == [[7, 8, 9], [5, 6]]
    with pytest.raises(ValueError, match="no model ran"):
        requested(None).tokens_of(0)


def test_time_is_only_counted_in_a_simulation_without_costs() -> None:
    counted = requested(None)
    assert counted.in_steps is True
    for change in ({"simulated": False}, {"about": {"cost": {}}}):
        header = replace(counted.header, **change)
        assert replace(counted, header=header).in_steps is False


def test_a_strategy_that_shows_no_steps() -> None:
    workload = Workload.of("two", [[1, 2], [3]], [2, 1], due_ns=[0, 4])
    header = Header("remote", 0, 2, False, {})
    given_times = ([[5, 6], [7]], [[10, 40], [20]], [0, 6])
    recording = Recording.of_tokens(header, workload, *given_times)
    assert (recording.has_steps, recording.measured, recording.num_steps) == (False, False, 0)
    assert (recording.step_ns, recording.growth, recording.header) == (None, None, header)
    assert recording.requests.due_ns.tolist() == [0, 4]
    assert recording.requests.prompt_tokens.tolist() == [2, 1]
    assert recording.requests.output_tokens.tolist() == [2, 1]
    for name in ("slot", "admitted", "started", "first", "last", "released"):
        assert getattr(recording.requests, name).tolist() == [-1, -1]
    for log in (recording.spans, recording.chunks, recording.waits):
        assert all(len(getattr(log, column.name)) == 0 for column in fields(log))
    assert recording.span_ends_ns.tolist() == []
    assert recording.admitted_ns.tolist() == recording.started_ns.tolist() == [0, 6]
    assert recording.first_token_ns.tolist() == [10, 20]
    assert recording.last_token_ns.tolist() == [40, 20]
    assert recording.duration_ns == 40
    assert [recording.tokens_of(i).tolist() for i in range(2)] == [[5, 6], [7]]
    assert recording.tokens is not None
    assert recording.token_ends_ns is not None
    assert recording.begun_ns is not None
    dtypes = [recording.tokens.dtype, recording.token_ends_ns.dtype, recording.begun_ns.dtype]
    assert dtypes == [np.int32, np.int64, np.int64]
    later = Recording.of_tokens(header, workload, *given_times, np.array([1, 5]))
    assert later.requests.due_ns.tolist() == [1, 5]


@pytest.mark.parametrize(
    ("tokens", "ends_ns"), [([[5, 6], []], [[1, 2], []]), ([[5, 6], [7]], [[1], [2, 3]])]
)
def test_each_request_needs_a_token_and_a_time_for_each(
    tokens: list[list[int]], ends_ns: list[list[int]]
) -> None:
    workload = Workload.of("two", [[1], [2]], [2, 1])
    with pytest.raises(ValueError, match="at least one token, and a time for each"):
        Recording.of_tokens(Header("remote", 0, 2, False, {}), workload, tokens, ends_ns, [0, 0])
