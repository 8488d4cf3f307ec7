"""Replay of a Recording's decisions, and a Recording whose equal spans are joined.

With timed arrivals, the requests that wait depend on the machine's speed, so two runs differ. The
steps that the scheduler takes for given decisions must not: with the recorded decisions it takes
the recorded steps, on any machine and in simulation.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.policies import View
from batchbench.batching.progress import Watch
from batchbench.batching.recording import ChunkLog, GrowthLog, Ints, Recording, RequestLog, SpanLog
from batchbench.workloads import Request, Workload


class _Recorded:
    """Admits every request that is due, and releases slots at the recorded steps."""

    def __init__(self, log: RequestLog) -> None:
        order = np.argsort(log.admitted, kind="stable")
        self._stays: dict[int, list[tuple[int, int]]] = {}  # slot: steps admitted and released
        for slot, admitted, released in np.stack(
            [log.slot[order], log.admitted[order], log.released[order]], 1
        ).tolist():
            self._stays.setdefault(slot, []).append((admitted, released))

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[:], None

    def release(self, view: View) -> Iterable[int]:
        step = view.now // UNIT_NS  # every step takes one unit of time
        return [slot for slot in view.finished if self._released(slot, step) <= step]

    def _released(self, slot: int, step: int) -> int:
        stays = self._stays[slot]
        return stays[bisect.bisect_left(stays, (step, 0)) - 1][1]


def replay(recording: Recording, *, prefill: str, max_batched_tokens: int = 2048) -> Recording:
    """Serve the recorded requests again in simulation, with the recorded decisions.

    The settings must be those of the recording. Every request is due when it was admitted, and
    keeps its index.
    """
    log = recording.requests
    # Requests admitted at one step come in the order of their chunks.
    seated = recording.chunks.request[recording.chunks.start == 0]
    workload = Workload(
        name="replay",
        seed=0,
        prompt_ids=np.zeros(log.prompt_tokens.sum(), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(log.prompt_tokens[seated])]),
        output_tokens=log.output_tokens[seated],
        due_ns=log.admitted[seated] * UNIT_NS,
    )
    batcher = Batcher(
        recording.header.strategy,
        SimulatedEngine(),
        recording.header.slots,
        prefill=prefill,
        max_batched_tokens=max_batched_tokens,
        max_repeat=1,
        policy=_Recorded(log),
    )
    again = batcher.serve(workload, Watch(), trial=recording.header.trial)
    place = np.argsort(seated)
    columns = {name: getattr(again.requests, name)[place] for name in RequestLog.__annotations__}
    chunks = ChunkLog(seated[again.chunks.request], again.chunks.start, again.chunks.stop)
    return replace(again, requests=RequestLog(**columns), chunks=chunks)


def join_spans(recording: Recording) -> Recording:
    """Return a simulation with those spans joined that continue each other.

    The result does not depend on how often the loop decided.
    """
    if recording.step_ns is None:
        raise ValueError("the steps of a span are known to be equal only in a simulation")
    s, cost, growth = recording.spans, recording.step_ns, recording.growth
    if not len(s.steps):
        return recording
    equal = (s.decoding[1:] == s.decoding[:-1]) & (s.waiting[1:] == s.waiting[:-1])
    equal &= (s.chunks[1:] == 0) & (s.chunks[:-1] == 0)
    equal &= s.start_ns[1:] == recording.span_ends_ns[:-1]
    equal &= _continues(s.steps, cost, growth)
    begins = np.flatnonzero(np.concatenate([[True], ~equal]))
    spans = SpanLog(
        steps=np.add.reduceat(s.steps, begins),
        start_ns=s.start_ns[begins],
        decoding=s.decoding[begins],
        waiting=s.waiting[begins],
        chunks=s.chunks[begins],
    )
    growth = None if growth is None else growth.of(begins)
    return replace(recording, spans=spans, step_ns=cost[begins], growth=growth)


def _continues(steps: Ints, step_ns: Ints, growth: GrowthLog | None) -> NDArray[np.bool_]:
    """Return True for each span whose steps cost what further steps of the span before would."""
    if growth is None:
        same: NDArray[np.bool_] = step_ns[1:] == step_ns[:-1]
        return same
    first = 1000 * step_ns + growth.rest_ps
    equal: NDArray[np.bool_] = first[1:] == (first + steps * growth.growth_ps)[:-1]
    equal &= growth.growth_ps[1:] == growth.growth_ps[:-1]
    equal &= growth.beyond_ps[1:] == growth.after(steps)[:-1] % 1000
    return equal
