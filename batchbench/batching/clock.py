"""Clocks: the wall's, and a virtual one that counts integers.

Both tell nanoseconds since the start of the trial. Floats added one by one differ from floats
added at once, and with them who has arrived; integers do not.
"""

from __future__ import annotations

import time
from typing import Protocol


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
