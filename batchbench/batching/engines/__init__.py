"""Engines run plans. Each owns its KV cache and the last token of every slot."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from batchbench.batching.plan import Plan
from batchbench.batching.recording import Steps
from batchbench.workloads import Workload


class Clock(Protocol):
    """The time of one trial; it belongs to the engine."""

    def restart(self) -> None:
        """Begin a new trial: now is 0."""

    def now(self) -> int:
        """Return nanoseconds since the start of the trial."""

    def wait_until(self, t: int) -> None:
        """Return when ``now() >= t``."""


_SPIN_NS = 200_000  # end of a wait without sleep: a sleep ends 60 to 100 µs late


class WallClock:
    """Real time; ``zero_ns`` is ``time.perf_counter_ns`` at the start of the trial."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.zero_ns = time.perf_counter_ns()

    def now(self) -> int:
        return time.perf_counter_ns() - self.zero_ns

    def wait_until(self, t: int) -> None:
        while (left := t - _SPIN_NS - self.now()) > 0:
            time.sleep(left / 1e9)
        while self.now() < t:
            pass


class VirtualClock:
    """Time that passes only in :meth:`wait_until`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._now = 0

    def now(self) -> int:
        return self._now

    def wait_until(self, t: int) -> None:
        self._now = max(self._now, t)


class Engine(Protocol):
    """Compute plans, and report when each step ended."""

    @property
    def clock(self) -> Clock:
        """The clock of the trial, real or virtual."""

    @property
    def simulated(self) -> bool:
        """True if time is virtual and no model runs."""

    @property
    def pads_prompts(self) -> bool:
        """True if prompts computed together are padded to the longest."""

    def begin(self, workload: Workload) -> None:
        """Begin a new trial: empty the cache, and set the clock to 0."""

    def run(self, plan: Plan) -> int:
        """Launch up to ``plan.repeat`` passes; return the number launched, at least 1."""

    @property
    def looks_late(self) -> bool:
        """True if :meth:`stopped` is better asked after the next plan was launched."""

    def stopped(self, plan: Plan, *, late: bool = False) -> Collection[int]:
        """Wait for the tokens of ``plan``; return its slots whose token ends the text.

        ``plan`` is the last one that was run, or if ``late`` the one before it.
        """

    def done(self) -> int:
        """Return the number of passes of the trial known to be computed, without waiting."""

    def wait(self) -> None:
        """Return when all launched passes are computed."""

    def collect(self) -> Steps:
        """Wait for all launched passes; return times and tokens of the whole trial."""
