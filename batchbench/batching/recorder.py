"""The recorder: writes the log of a trial from plans alone, and takes times from the engine."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.plan import Plan
from batchbench.batching.recording import (
    ChunkLog,
    GrowthLog,
    Header,
    Ints,
    Recording,
    RequestLog,
    SpanLog,
    WaitLog,
)
from batchbench.workloads import Request, Workload


@dataclass(frozen=True, eq=False)
class Steps:
    """What an engine tells of the steps that it ran since it was last asked.

    ``start_ns`` is one a call of ``run``; ``ends_ns`` one a step (or ``step_ns`` one a call, in
    simulation, with the ``growth`` of its steps); ``tokens`` is ``[steps, slots]``, defined where
    a slot was computed. ``computed`` are the forward passes of the model, counted where it is
    called, which should be one a step.
    """

    start_ns: Ints
    ends_ns: Ints | None = None
    step_ns: Ints | None = None
    tokens: NDArray[np.int32] | None = None
    growth: GrowthLog | None = None
    computed: int | None = None


class Recorder:
    """Writes the log of one trial from plans alone."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        # Arrays of machine integers: a million requests leave millions of rows.
        self._due, self._slot, self._admitted, self._started, self._first, self._last = (
            array("q", [-1]) * len(workload) for _ in range(6)
        )
        self._released = array("q", [-1]) * len(workload)
        self._occupant: dict[int, int] = {}  # slot -> index of the request
        self._spans, self._chunks, self._waits = (array("q") for _ in range(3))
        self.steps = 0
        self.waited_ns = 0

    def launched(self, plan: Plan, steps: int, waiting: int) -> None:
        """``steps`` passes of ``plan`` were launched while ``waiting`` requests waited."""
        for slot in plan.released:
            self._released[self._occupant.pop(slot)] = self.steps
        for request, slot in plan.admitted:
            index = request.index
            self._due[index] = request.due_ns
            self._slot[index], self._admitted[index] = slot, self.steps
            self._occupant[slot] = index
        for request, _, start, stop in plan.chunks:
            index = request.index
            if start == 0:
                self._started[index] = self.steps
            if stop == request.prompt_tokens:
                self._first[index] = self.steps
            self._chunks.extend((index, start, stop))
        self._spans.extend((steps, len(plan.slots), waiting, len(plan.chunks)))
        self.steps += steps

    def waited(self, start_ns: int, until_ns: int, end_ns: int, waiting: int) -> None:
        """Nothing was computed from ``start_ns`` to ``end_ns``, while ``waiting`` waited."""
        self.waited_ns += end_ns - start_ns
        self._waits.extend((self.steps, start_ns, until_ns, end_ns, waiting))

    def finished(self, request: Request) -> None:
        """``request`` got its last token in the last step launched."""
        self._last[request.index] = self.steps - 1

    def recording(self, header: Header, ran: Steps) -> Recording:
        """The log, with the times and tokens that the engine tells."""
        for index in self._occupant.values():
            self._released[index] = self.steps
        spans, chunks, waits = (
            np.array(log, np.int64).reshape(-1, width)
            for log, width in ((self._spans, 4), (self._chunks, 3), (self._waits, 5))
        )
        span_log = SpanLog(*np.insert(spans, 1, ran.start_ns, axis=1).T.copy())
        produced, tokens = self._workload.output_tokens, None
        if ran.tokens is not None:
            produced, tokens = self._tokens(span_log, ran.tokens)
        requests = RequestLog(
            due_ns=np.array(self._due),
            prompt_tokens=self._workload.prompt_tokens,
            output_tokens=produced,
            slot=np.array(self._slot),
            admitted=np.array(self._admitted),
            started=np.array(self._started),
            first=np.array(self._first),
            last=np.array(self._last),
            released=np.array(self._released),
        )
        return Recording(
            header,
            requests,
            span_log,
            ChunkLog(*chunks.T.copy()),
            WaitLog(*waits.T.copy()),
            ran.ends_ns,
            ran.step_ns,
            tokens,
            ran.growth,
        )

    def _tokens(self, spans: SpanLog, by_step: NDArray[np.int32]) -> tuple[Ints, NDArray[np.int32]]:
        """Number and values of each request's tokens, picked out of ``[steps, slots]``."""
        decodes = np.repeat(spans.decoding > 0, spans.steps)
        picked = [
            by_step[token_steps(decodes, first, last), slot]
            for first, last, slot in zip(self._first, self._last, self._slot, strict=True)
        ]
        counts = np.array([len(tokens) for tokens in picked], np.int64)
        return counts, np.concatenate(picked)


def token_steps(decodes: NDArray[np.bool_], first: int, last: int) -> Ints:
    """Steps in which a request got its tokens.

    Its first, and from then on every step in which anybody decodes (``decodes``, ``[steps]``):
    running requests are computed together or, in a prefill of others, not at all.
    """
    later = np.flatnonzero(decodes[first + 1 : last + 1]) + first + 1
    return np.concatenate([[first], later])
