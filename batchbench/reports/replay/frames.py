"""What a trial looked like at a moment: the state of every slot, as a pure function of its log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.engines import Clock
from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.batching.recording import Ints, Recording
from batchbench.errors import UsageError
from batchbench.reports.metrics import typical_trial
from batchbench.reports.result import Result

EMPTY, PROMPT, RUNNING, HELD = range(4)
"""What a slot is doing: nothing; a prompt; yielding tokens; kept by a request that is done."""

_RATE_OVER = 1 / 16
"""Tokens a second are told over this share of the longest trial."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One strategy at a moment. Columns are ``[slots]``; ``request`` is −1 in an empty slot."""

    name: str
    now_ns: int  # the moment, or the end of the trial where that is over
    over: bool
    state: Ints  # EMPTY, PROMPT, RUNNING or HELD
    request: Ints
    tokens: Ints  # that the slot's request has
    asked: Ints  # that it will have
    held: Ints  # steps that decoded since it was done
    waiting: int  # requests that are due and not in a slot
    finished: int
    requests: int
    tokens_per_s: float  # of late; over all of the trial where that is over

    def count(self, state: int) -> int:
        """Slots in a state."""
        return int((self.state == state).sum())


@dataclass(frozen=True, eq=False)
class Frame:
    """All strategies at one moment."""

    t_ns: int
    end_ns: int  # of the longest trial
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, eq=False)
class Reel:
    """One trial, prepared to be looked at at any moment."""

    name: str
    recording: Recording

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.recording.header.slots

    @property
    def end_ns(self) -> int:
        """When its last token is there."""
        return self.recording.duration_ns

    @cached_property
    def admitted(self) -> Ints:
        """Start of the first step in which each request holds its slot, ``[requests]``."""
        return self.recording.admitted_ns

    @cached_property
    def first(self) -> Ints:
        """When each request has its first token."""
        return self.recording.ends_of(self.recording.requests.first)

    @cached_property
    def done(self) -> Ints:
        """When each request has its last token."""
        return self.recording.ends_of(self.recording.requests.last)

    @cached_property
    def freed(self) -> Ints:
        """When each request's slot is free again."""
        return self.recording.ends_of(self.recording.requests.released - 1)

    @cached_property
    def _due(self) -> Ints:
        return np.sort(np.minimum(self.recording.requests.due_ns, self.admitted))

    @cached_property
    def _sorted(self) -> tuple[Ints, Ints, Ints]:
        """Times of admission and of the end, ascending, and tokens of those done by then."""
        order = np.argsort(self.done, kind="stable")
        tokens = np.cumsum(self.recording.requests.output_tokens[order])
        return np.sort(self.admitted), self.done[order], np.concatenate([[0], tokens])

    @cached_property
    def _decodes_before(self) -> Ints:
        """Steps that decode before each span, ``[spans]``."""
        s = self.recording.spans
        decoding = np.where(s.decoding > 0, s.steps, 0)
        return np.cumsum(decoding) - decoding

    def _decodes_to(self, steps: Ints) -> Ints:
        """Steps that decode up to and with each of these."""
        span = self.recording.spans_of(steps)
        within = steps - self.recording.first_steps[span] + 1
        return self._decodes_before[span] + within * (self.recording.spans.decoding[span] > 0)

    def _last_step(self, t_ns: int) -> int:
        """Number of the last step that has ended; −1 before the first."""
        return int(self.recording.step_at(np.array([t_ns]))[0]) - 1

    def _tokens(self, requests: NDArray[np.intp], step: int) -> Ints:
        """Tokens that each of some admitted requests has after ``step``."""
        r = self.recording.requests
        if step < 0:
            return np.zeros(len(requests), np.int64)
        first = r.first[requests]
        until = np.minimum(step, r.last[requests])
        count = 1 + self._decodes_to(until) - self._decodes_to(np.minimum(first, until))
        return np.where(first <= step, np.minimum(count, r.output_tokens[requests]), 0)

    def _held(self, requests: NDArray[np.intp], step: int) -> Ints:
        """Steps after the last of each of some requests that decoded, up to ``step``."""
        if not len(requests) or step < 0:
            return np.zeros(len(requests), np.int64)
        last = np.minimum(self.recording.requests.last[requests], step)
        return self._decodes_to(np.full(len(requests), step)) - self._decodes_to(last)

    def _inside(self, t_ns: int) -> NDArray[np.intp]:
        """Requests that hold a slot, in the order in which they came in."""
        found = np.flatnonzero((self.admitted <= t_ns) & (t_ns < self.freed))
        return found[np.argsort(self.admitted[found], kind="stable")]

    def tokens_at(self, t_ns: int) -> int:
        """Output tokens that are there."""
        _, done, tokens = self._sorted
        inside = self._inside(t_ns)
        running = inside[self.done[inside] > t_ns]
        finished = int(tokens[np.searchsorted(done, t_ns, side="right")])
        return finished + int(self._tokens(running, self._last_step(t_ns)).sum())

    def at(self, t_ns: int, window_ns: int) -> Scene:
        """The trial at a moment; tokens a second are those of the last ``window_ns``."""
        over = t_ns >= self.end_ns
        now = min(t_ns, self.end_ns)
        # What is held at the very end is held for nobody.
        inside = self._inside(now) if not over else np.empty(0, np.intp)
        slot = self.recording.requests.slot[inside]
        request, tokens, asked, held, state = (np.zeros(self.slots, np.int64) for _ in range(5))
        request[:] = -1
        request[slot] = inside
        tokens[slot] = self._tokens(inside, self._last_step(now))
        asked[slot] = self.recording.requests.output_tokens[inside]
        held[slot] = self._held(inside, self._last_step(now))
        state[slot] = np.select([now < self.first[inside], now < self.done[inside]], [1, 2], HELD)
        admitted, done, _ = self._sorted
        arrived, came_in, finished = (
            int(np.searchsorted(at, now, side="right")) for at in (self._due, admitted, done)
        )
        since = 0 if over else max(now - window_ns, 0)
        passed_s = max(now - since, 1) / 1e9
        return Scene(
            name=self.name,
            now_ns=now,
            over=over,
            state=state,
            request=request,
            tokens=tokens,
            asked=asked,
            held=held,
            waiting=arrived - came_in,
            finished=finished,
            requests=len(admitted),
            tokens_per_s=(self.tokens_at(now) - self.tokens_at(since) * (since > 0)) / passed_s,
        )

    def levels(
        self, until_ns: int, columns: int, end_ns: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of the slots that run, and that are held, in ``columns`` equal parts of a time.

        Means over each part of ``end_ns``; NaN in parts after ``until_ns`` or the trial's end.
        """
        edges = np.linspace(0, end_ns, columns + 1)
        came_in, done, freed = (
            _passed(at, edges) for at in (self.admitted, self.done, np.minimum(self.freed, end_ns))
        )
        later = edges[:-1] >= min(until_ns, self.end_ns)
        width = end_ns / columns * self.slots
        running, held = (np.diff(area) / width for area in (came_in - done, done - freed))
        return np.where(later, np.nan, running), np.where(later, np.nan, held)


def _passed(at: Ints, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nanoseconds that have passed since these times, summed, up to each edge."""
    at = np.sort(at)
    before = np.searchsorted(at, edges, side="right")
    sums = np.concatenate([[0], np.cumsum(at, dtype=np.float64)])
    passed: NDArray[np.float64] = before * edges - sums[before]
    return passed


@dataclass(frozen=True, eq=False)
class Film:
    """A result's trials side by side: of each strategy the one of median duration."""

    title: str
    reels: tuple[Reel, ...]

    @classmethod
    def of(cls, result: Result) -> Film:
        """The film of a result, without strategies that show no steps.

        Raises:
            UsageError: none of them does.
        """
        typical = {name: typical_trial(trials) for name, trials in result.recordings.items()}
        reels = tuple(Reel(name, trial) for name, trial in typical.items() if trial.has_steps)
        if not reels:
            raise UsageError(f"{', '.join(typical)} schedules for itself, so no slots are known")
        return cls(result.title, reels)

    @property
    def end_ns(self) -> int:
        """When the last strategy is done."""
        return max(reel.end_ns for reel in self.reels)

    @property
    def in_steps(self) -> bool:
        """Whether time counts steps: a simulation in which every step costs one unit."""
        return all(reel.recording.in_steps for reel in self.reels)

    def spell(self, ns: float) -> str:
        """A time with its unit."""
        if self.in_steps:
            return f"{ns / UNIT_NS:,.0f} steps"
        end_s = self.end_ns / 1e9
        unit, name = (1e9, "s") if end_s >= 1 else (1e6, "ms")
        decimals = 2 if end_s * 1e9 / unit < 100 else 1 if end_s * 1e9 / unit < 1000 else 0
        return f"{ns / unit:,.{decimals}f} {name}"

    def frame_at(self, t_ns: int) -> Frame:
        """All strategies at ``t_ns`` from the start of their trials."""
        window = int(self.end_ns * _RATE_OVER)
        scenes = tuple(reel.at(t_ns, window) for reel in self.reels)
        return Frame(t_ns, self.end_ns, scenes)

    @cached_property
    def longest_output(self) -> int:
        """Most tokens of a request."""
        return max(int(reel.recording.requests.output_tokens.max()) for reel in self.reels)

    @property
    def verdict(self) -> str:
        """What it came to: ``continuous was 3.08× faster``."""
        first, last = self.reels[0], self.reels[-1]
        if first is last:
            return f"{last.name} done after {self.spell(last.end_ns)}"
        ratio = first.end_ns / last.end_ns
        how = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
        return f"{last.name} was {how} than {first.name}"


FRAMES_A_SECOND = 20
_LASTS_S = 12.0


def usual_speed(film: Film) -> float:
    """Seconds of the trial that pass in a second, so that all of it lasts about 12 s.

    True speed where that lasts 10 to 15 s.
    """
    speed = film.end_ns / 1e9 / _LASTS_S
    return 1.0 if 10 <= film.end_ns / 1e9 <= 15 else float(f"{speed:.2g}")


def moments(film: Film, speed: float, clock: Clock) -> Iterator[int]:
    """The times to show, from 0 to the end, each when it has come on ``clock``.

    Where drawing is too slow for all of them, some are left out.
    """
    clock.restart()
    period = 10**9 // FRAMES_A_SECOND
    while (t_ns := int(clock.now() * speed)) < film.end_ns:
        yield t_ns
        clock.wait_until((clock.now() // period + 1) * period)
    yield film.end_ns


def frame_at(result: Result, t_ns: int) -> Frame:
    """The strategies of a result side by side, ``t_ns`` after the start of their trials."""
    return Film.of(result).frame_at(t_ns)
