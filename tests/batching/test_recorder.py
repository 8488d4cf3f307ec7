"""The recorder, driven by hand: what it logs of two passes, a wait and a pass of two repeats."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from batchbench.batching.plan import Chunk, Plan
from batchbench.batching.recording import GrowthLog, Header, Recorder, Recording, Steps, token_steps
from batchbench.workloads import Request, Workload

WORKLOAD = Workload.of("three", [[1, 2, 3], [4], [5, 6]], [3, 1, 2], due_ns=[0, 0, 90])
FIRST, SECOND, _ = WORKLOAD
HEADER = Header("by hand", 0, 2, False, {})


def plan(
    chunks: tuple[Chunk, ...] = (),
    slots: tuple[int, ...] = (),
    released: tuple[int, ...] = (),
    admitted: tuple[tuple[Request, int], ...] = (),
) -> Plan:
    rows = np.array(slots, np.int64)
    return Plan(chunks, rows, rows, rows, released, 1, None, admitted)


def recorded(ran: Steps) -> tuple[Recorder, Recording]:
    """The first request is read in two pieces, the second beside it; the third never comes."""
    recorder = Recorder(WORKLOAD)
    both = ((FIRST, 1), (SECOND._replace(due_ns=4), 0))
    recorder.launched(plan((Chunk(FIRST, 1, 0, 2),), admitted=both), 1, 1)
    recorder.launched(plan((Chunk(FIRST, 1, 2, 3), Chunk(SECOND, 0, 0, 1))), 1, 0)
    recorder.finished(SECOND)
    recorder.waited(20, 27, 28, 2)
    recorder.waited(30, 33, 35, 0)
    recorder.launched(plan(slots=(1,), released=(0,)), 2, 5)
    recorder.finished(FIRST)
    return recorder, recorder.recording(HEADER, ran)


def columns(log: Any) -> dict[str, list[int]]:
    return {column.name: getattr(log, column.name).tolist() for column in fields(log)}


MEASURED = Steps(
    np.array([0, 10, 35]),
    ends_ns=np.array([9, 19, 40, 44]),
)


def test_what_is_logged() -> None:
    recorder, recording = recorded(MEASURED)
    assert (recorder.steps, recorder.waited_ns) == (4, 13)
    assert recording.header is HEADER
    assert columns(recording.requests) == {
        "due_ns": [0, 4, -1],
        "prompt_tokens": [3, 1, 2],
        "output_tokens": [3, 1, 2],
        "slot": [1, 0, -1],
        "admitted": [0, 0, -1],
        "started": [0, 1, -1],
        "first": [1, 1, -1],
        "last": [3, 1, -1],
        "released": [4, 2, -1],
    }
    assert columns(recording.spans) == {
        "steps": [1, 1, 2],
        "start_ns": [0, 10, 35],
        "decoding": [0, 0, 1],
        "waiting": [1, 0, 5],
        "chunks": [1, 2, 0],
    }
    assert columns(recording.chunks) == {
        "request": [0, 0, 1],
        "start": [0, 2, 0],
        "stop": [2, 3, 1],
    }
    assert columns(recording.waits) == {
        "step": [2, 2],
        "start_ns": [20, 30],
        "until_ns": [27, 33],
        "end_ns": [28, 35],
        "waiting": [2, 0],
    }
    assert recording.ends_ns is MEASURED.ends_ns
    assert (recording.step_ns, recording.growth, recording.tokens) == (None, None, None)
    for log in (recording.requests, recording.spans, recording.chunks, recording.waits):
        for column in fields(log):
            values = getattr(log, column.name)
            assert values.dtype == np.int64
            assert values.flags.c_contiguous


def test_a_simulation_tells_the_costs_of_its_steps() -> None:
    zeros = np.zeros(3, np.int64)
    ran = Steps(MEASURED.start_ns, step_ns=zeros + 9, growth=GrowthLog(zeros, zeros, zeros))
    _, recording = recorded(ran)
    assert recording.step_ns is ran.step_ns
    assert recording.growth is ran.growth
    assert recording.ends_ns is None


def test_tokens_are_picked_out_of_the_steps_that_yield_them() -> None:
    """While the third request is read, the first stalls: that step yields no token of it."""
    workload = Workload.of("three", [[1, 2, 3], [4], [5]], [9, 9, 9])
    first, second, third = workload
    recorder = Recorder(workload)
    both = ((first, 1), (second, 0))
    recorder.launched(plan((Chunk(first, 1, 0, 2),), admitted=both), 1, 0)
    recorder.launched(plan((Chunk(first, 1, 2, 3), Chunk(second, 0, 0, 1))), 1, 0)
    recorder.finished(second)
    recorder.launched(plan((Chunk(third, 0, 0, 1),), (), (0,), ((third, 0),)), 1, 0)
    recorder.finished(third)
    recorder.launched(plan(slots=(1,), released=(0,)), 2, 0)
    recorder.finished(first)
    by_step = [[-1, -1], [71, 81], [91, -7], [-1, 82], [-1, 83]]
    ran = Steps(np.arange(4), ends_ns=np.arange(1, 6), tokens=np.array(by_step, np.int32))
    recording = recorder.recording(HEADER, ran)
    assert recording.requests.output_tokens.tolist() == [3, 1, 1]
    assert recording.requests.output_tokens.dtype == np.int64
    assert recording.tokens is not None
    assert recording.tokens.dtype == np.int32
    assert recording.tokens.tolist() == [81, 82, 83, 71, 91]


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(0, 5, [0, 2, 3, 5]), (2, 3, [2, 3]), (3, 3, [3]), (1, 2, [1, 2]), (3, 4, [3])],
)
def test_a_token_comes_with_the_first_step_and_each_later_one_that_decodes(
    first: int, last: int, steps: list[int]
) -> None:
    decodes = np.array([True, False, True, True, False, True])
    found = token_steps(decodes, first, last)
    assert found.tolist() == steps
    assert found.dtype == np.int64
