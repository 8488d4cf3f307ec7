"""When each step began and ended: the host's clock, or CUDA events read at the end."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from batchbench.batching.clock import WallClock
from batchbench.batching.recording import Ints


class Timer(Protocol):
    """Notes the start of each run of steps and the end of each step."""

    def begin(self) -> None:
        """A new trial; sets the clock to 0."""

    def run_begins(self) -> None:
        """The first step of a run is about to be launched."""

    def step_launched(self) -> None:
        """A step was launched."""

    def settle(self) -> None:
        """Return when all steps that were launched are done."""

    def times(self) -> tuple[Ints, Ints]:
        """Starts, one a run, and ends, one a step, in ns since ``begin``; waits for the device."""


class HostTimer:
    """For devices that are done when the call returns, or that are waited for (MPS)."""

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock = clock
        self._wait = torch.mps.synchronize if device.type == "mps" else None

    def begin(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        if self._wait:
            self._wait()
        self._clock.restart()

    def run_begins(self) -> None:
        self._starts.append(self._clock.now())

    def step_launched(self) -> None:
        if self._wait:
            self._wait()
        self._ends.append(self._clock.now())

    def settle(self) -> None:
        """Nothing: they are."""

    def times(self) -> tuple[Ints, Ints]:
        return np.array(self._starts, np.int64), np.array(self._ends, np.int64)


class CudaTimer:
    """Events in the stream: nothing waits for the device while steps are launched.

    The host runs at most :data:`AHEAD` runs of steps ahead, so that progress and Ctrl-C stay
    close to what the device does.
    """

    AHEAD = 2

    def __init__(self, clock: WallClock, device: torch.device) -> None:
        self._clock, self._device = clock, device

    def begin(self) -> None:
        self._starts: list[torch.cuda.Event] = []
        self._ends: list[torch.cuda.Event] = []
        self._run_ends: list[torch.cuda.Event] = []
        torch.cuda.synchronize(self._device)
        self._zero = self._event()
        torch.cuda.synchronize(self._device)
        self._clock.restart()

    def run_begins(self) -> None:
        if self._ends:
            self._run_ends.append(self._ends[-1])
            if len(self._run_ends) > self.AHEAD:
                self._run_ends[-self.AHEAD - 1].synchronize()
        self._starts.append(self._event())

    def step_launched(self) -> None:
        self._ends.append(self._event())

    def settle(self) -> None:
        if self._ends:
            self._ends[-1].synchronize()

    def times(self) -> tuple[Ints, Ints]:
        torch.cuda.synchronize(self._device)
        return self._since_zero(self._starts), self._since_zero(self._ends)

    def _since_zero(self, events: list[torch.cuda.Event]) -> Ints:
        return np.array([round(self._zero.elapsed_time(e) * 1e6) for e in events], np.int64)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def make_timer(clock: WallClock, device: torch.device) -> Timer:
    """The timer that fits the device."""
    return CudaTimer(clock, device) if device.type == "cuda" else HostTimer(clock, device)
