"""Replay: the admissions and releases of a Recording, served again step by step.

Who waits when requests come over time depends on the machine's speed, so two runs differ. What
must not differ is what the scheduler makes of given decisions: with the recorded ones it takes the
recorded steps, on any machine and in simulation.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.policies import View
from batchbench.batching.progress import Watch
from batchbench.batching.recording import ChunkLog, Recording, RequestLog
from batchbench.workloads import Request, Workload


class _Recorded:
    """Admits whoever is due, and releases slots at the recorded steps."""

    def __init__(self, log: RequestLog) -> None:
        order = np.argsort(log.admitted, kind="stable")
        self._stays: dict[int, list[tuple[int, int]]] = {}  # slot: steps admitted and released
        for slot, admitted, released in np.stack(
            [log.slot[order], log.admitted[order], log.released[order]], 1
        ).tolist():
            self._stays.setdefault(slot, []).append((admitted, released))

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """Return all requests, each due at the first step that held a slot for it."""
        return view.waiting[:], None

    def release(self, view: View) -> Iterable[int]:
        """Slots whose latest occupant was gone by now; time counts steps."""
        step = view.now // UNIT_NS
        return [slot for slot in view.finished if self._released(slot, step) <= step]

    def _released(self, slot: int, step: int) -> int:
        stays = self._stays[slot]
        return stays[bisect.bisect_left(stays, (step, 0)) - 1][1]


def replay(recording: Recording, *, prefill: str, max_batched_tokens: int = 2048) -> Recording:
    """Serve the recorded requests again in simulation, with the recorded decisions.

    Takes the settings under which it was recorded. The steps are the recorded ones, and every
    request is due when it was admitted; requests keep their index.
    """
    log = recording.requests
    # Who came in at one step came in the order of the pieces of prompts.
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
