"""Engines: what runs a Plan. Each owns its KV cache and the last token of every slot."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from batchbench.batching.plan import Plan
from batchbench.batching.recording import Steps
from batchbench.workloads import Workload


class Clock(Protocol):
    """Time of one trial; the engine brings it along."""

    def restart(self) -> None:
        """A new trial begins: it is 0 now."""

    def now(self) -> int:
        """Nanoseconds since the start of the trial."""

    def wait_until(self, t: int) -> None:
        """Return when ``now() >= t``."""


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._zero = time.perf_counter_ns()

    @property
    def zero_ns(self) -> int:
        """What ``time.perf_counter_ns`` told when the trial began."""
        return self._zero

    def now(self) -> int:
        return time.perf_counter_ns() - self._zero

    def wait_until(self, t: int) -> None:
        while (left := t - self.now()) > 0:
            time.sleep(left / 1e9)


class VirtualClock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self._now = 0

    def restart(self) -> None:
        self._now = 0

    def now(self) -> int:
        return self._now

    def wait_until(self, t: int) -> None:
        self._now = max(self._now, t)


class Engine(Protocol):
    """Computes plans and tells when each step ended."""

    @property
    def clock(self) -> Clock:
        """The clock of the trial: the wall's, or a virtual one."""

    @property
    def simulated(self) -> bool:
        """Whether time is virtual and no model runs."""

    @property
    def pads_prompts(self) -> bool:
        """Whether prompts that are computed together are all computed as long as the longest."""

    def begin(self, workload: Workload) -> None:
        """A new trial: forget everything, and set the clock to 0."""

    def run(self, plan: Plan) -> int:
        """Compute up to ``plan.repeat`` passes; the number of steps launched, at least 1."""

    def stopped(self, plan: Plan) -> Collection[int]:
        """Slots of ``plan`` whose last token ends its text; waits for that token."""

    def wait(self) -> None:
        """Return when all that was launched is computed."""

    def collect(self) -> Steps:
        """Wait for all that was launched, and tell times and tokens of the whole trial."""
