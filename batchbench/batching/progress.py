"""Progress of a run, reported to a watch. A library call without a watch is silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchbench.batching.plan import Plan
from batchbench.errors import OutOfTimeError


@dataclass
class Progress:
    """The progress of one trial."""

    strategy: str
    trial: int
    slots: int
    requests: int
    done: int = 0
    slots_in_use: int = 0
    steps: int = 0
    tokens: int = 0
    now_ns: int = 0
    idle_until_ns: int | None = None  # the time before which nothing can be computed

    def advance(self, plan: Plan, launched: int, finished: int, now_ns: int) -> None:
        """Count ``launched`` passes of ``plan``."""
        self.idle_until_ns = None
        growing = int(np.count_nonzero(plan.growing))
        self.done += finished
        self.slots_in_use = growing + len(plan.chunks)
        self.steps += launched
        self.tokens += growing * launched + sum(chunk.yields for chunk in plan.chunks)
        self.now_ns = now_ns

    def idle(self, now_ns: int, until_ns: int) -> None:
        self.slots_in_use = 0
        self.now_ns, self.idle_until_ns = now_ns, until_ns


class Watch:
    """The observer of a run; this base class shows nothing, and displays override its methods."""

    def note(self, line: str) -> None:
        """Receive a line that the user should read."""

    def phase(self, name: str) -> None:
        """Receive the name of the phase that begins: loading, warming up, verifying."""

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        """Receive the start of a trial; ``trial`` counts from 0."""

    def progressed(self, progress: Progress) -> None:
        """Receive the progress after some steps."""

    def idles(self, progress: Progress) -> None:
        """Receive notice that nothing can be computed before ``progress.idle_until_ns``."""

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        """Receive the end of a trial."""


class Limited(Watch):
    """Pass every report on to ``watch``; raise OutOfTimeError when ``clock`` is at ``until``.

    If waits take ``real`` time on that clock, one that would end too late raises at once.
    """

    def __init__(
        self, watch: Watch, until: float, clock: Callable[[], float], *, real: bool
    ) -> None:
        self._watch, self._until, self._clock, self._real = watch, until, clock, real
        for name in ("note", "phase", "trial_begins", "trial_ends"):
            setattr(self, name, getattr(watch, name))

    def progressed(self, progress: Progress) -> None:
        self._watch.progressed(progress)
        self._check(0.0)

    def idles(self, progress: Progress) -> None:
        self._watch.idles(progress)
        until_ns = progress.idle_until_ns if self._real else None
        self._check(0.0 if until_ns is None else (until_ns - progress.now_ns) / 1e9)

    def _check(self, ahead_s: float) -> None:
        if self._clock() + ahead_s > self._until:
            raise OutOfTimeError("the time is up during a trial")
