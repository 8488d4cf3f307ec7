"""A lane: one strategy that serves its workload over and over, a few steps at a time.

What is compared takes turns on the machine, so that whatever else it does falls on all alike. A
lane stops between two steps and waits there, its batch half served, until its next turn.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from batchbench.batching.batcher import Batcher
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.reports.metrics import counters
from batchbench.reports.result import output_digest
from batchbench.studies.gate.turns import Turn
from batchbench.workloads import Workload

KERNEL_BYTES = 16 << 20
"""Hashed by the calibration kernel: 10 ms or more on any core of today."""


@dataclass(frozen=True)
class Known:
    """What an earlier process learnt of a lane: steps of a trial, and what one takes."""

    steps: int
    step_ns: float


class Lane:
    """Serves one closed workload again and again.

    Every trial must do the work of the first, which is held against it each time that one ends:
    ``varied`` names what differed, a fault of ours. ``work`` is None before the first has ended.
    """

    def __init__(self, batcher: Batcher, workload: Workload, known: Known | None = None) -> None:
        self._batcher, self._workload = batcher, workload
        self._trial = 0
        self.work: Mapping[str, Any] | None = None
        self.varied: str | None = None
        self.known = known or self._learn()
        self._begin()

    def turn(self, steps: int) -> Turn:
        """Run so many steps, over the ends of trials where need be."""
        kernel_ns = run_kernel()
        if self._left == 0:
            self._end()
        timed = wall = cpu = 0
        todo = steps
        if self._done:  # the first pass of a trial is timed, cold as it is: it prefills
            self._advance(1)
            todo -= 1
        while todo:
            if self._left == 0:
                self._end()  # the next trial is set up between the times that count
            now = min(todo, self._left)
            began, began_cpu = time.perf_counter_ns(), time.process_time_ns()
            self._advance(now)
            wall += time.perf_counter_ns() - began
            cpu += time.process_time_ns() - began_cpu
            timed, todo = timed + now, todo - now
        return Turn(timed, wall, cpu, kernel_ns)

    def _learn(self) -> Known:
        """Serve once."""
        first = self._batcher.serve(self._workload, Watch(), trial=self._trial)
        self.work = work_of(first)
        return Known(first.num_steps, first.duration_ns / max(first.num_steps, 1))

    def _begin(self) -> None:
        gc.collect()
        self._serving: Generator[int, int | None, Recording] = self._batcher.paced(
            self._workload, Watch(), trial=self._trial
        )
        self._done = next(self._serving)
        self._left = self.known.steps

    def _advance(self, steps: int) -> None:
        """Run so many steps of the trial, and wait until they are computed."""
        goal = self._done + steps
        while self._done < goal:
            self._done = self._serving.send(goal - self._done)
        self._batcher.engine.wait()
        self._left = self.known.steps - self._done

    def _end(self) -> None:
        """Close the trial, and begin the next."""
        try:
            self._serving.send(None)
        except StopIteration as done:
            self._hold_against_first(work_of(done.value))
        else:
            self.varied = "forward_passes"  # it takes more steps than it did
        self._trial += 1
        self._begin()

    def _hold_against_first(self, now: Mapping[str, Any]) -> None:
        self.work = self.work or now
        other = [name for name, value in self.work.items() if now[name] != value]
        self.varied = self.varied or (other[0] if other else None)


def work_of(recording: Recording) -> dict[str, Any]:
    """The counters of a trial, flat, and the digest of its outputs."""
    told: Mapping[str, Any] = counters(recording) if recording.has_steps else {}
    if (computed := recording.header.about.get("computed_passes")) is not None:
        told = {**told, "computed_passes": computed}
    return {**told, "output_digest": output_digest(recording)}


def run_kernel() -> int:
    """The calibration kernel: nanoseconds that it took.

    It hashes the same bytes on whatever side it runs and knows nothing of batchbench or torch, so
    that where it differs, something but them makes the difference.
    """
    began = time.perf_counter_ns()
    hashlib.blake2b(_KERNEL).digest()
    return time.perf_counter_ns() - began


_KERNEL = bytes(KERNEL_BYTES)
