"""Moments of a trial: the state of every slot at a time, as a pure function of its log."""

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
from batchbench.reports.formats.terminal import as_fast
from batchbench.reports.metrics import typical_trial
from batchbench.reports.occupancy import Holdings, Levels, levels_of
from batchbench.reports.result import Result

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

EMPTY, PROMPT, RUNNING, HELD = range(4)
"""States of a slot: empty; its prompt is computed; it yields tokens; held by a finished request."""

FRAMES_PER_SECOND = 20

_LASTS_S = 12.0

_RATE_OVER = 1 / 16
"""Share of the longest trial over which tokens per second are counted."""


@dataclass(frozen=True, eq=False)
class SlotState:
    """One strategy at a moment. Columns are ``[slots]``; ``request`` is −1 in an empty slot."""

    name: str
    now_ns: int  # the moment, or the end of the trial after it
    over: bool
    state: Ints  # EMPTY, PROMPT, RUNNING or HELD
    request: Ints
    tokens: Ints  # output tokens of the slot's request so far
    output_tokens: Ints  # and when it is done
    held: Ints  # decode steps since it was done
    waiting: int  # requests that are due and not in a slot
    finished: int
    requests: int
    tokens_per_s: float  # of late; after the end, of the whole trial

    @property
    def busy(self) -> int:
        """Slots whose request is not done."""
        return int(np.isin(self.state, (PROMPT, RUNNING)).sum())


@dataclass(frozen=True, eq=False)
class Frame:
    """All strategies at one moment."""

    t_ns: int
    end_ns: int  # of the longest trial
    states: tuple[SlotState, ...]


@dataclass(frozen=True, eq=False)
class TrialReplay:
    """One trial, prepared to be shown at any moment."""

    name: str
    recording: Recording

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.recording.header.slots

    @property
    def end_ns(self) -> int:
        """Time of the last token."""
        return self.recording.duration_ns

    @cached_property
    def holdings(self) -> Holdings:
        """When each request held its slot."""
        return Holdings.of(self.recording)

    @cached_property
    def _levels(self) -> Levels:
        return levels_of(self.recording)

    @cached_property
    def _due(self) -> Ints:
        return np.sort(np.minimum(self.recording.requests.due_ns, self.holdings.admitted))

    @cached_property
    def _ends(self) -> tuple[Ints, Ints]:
        """Times at which requests are done, ascending, and all tokens of those done before each."""
        order = np.argsort(self.holdings.done, kind="stable")
        tokens = np.cumsum(self.recording.requests.output_tokens[order])
        return self.holdings.done[order], np.concatenate([[0], tokens])

    @cached_property
    def _decodes_before(self) -> Ints:
        """Decode steps before each span, ``[spans]``."""
        spans = self.recording.spans
        decodes = np.where(spans.decoding > 0, spans.steps, 0)
        return np.cumsum(decodes) - decodes

    def _decodes_to(self, steps: Ints) -> Ints:
        """Count the decode steps up to and including each of these."""
        span = self.recording.spans_of(steps)
        within = steps - self.recording.first_steps[span] + 1
        return self._decodes_before[span] + within * (self.recording.spans.decoding[span] > 0)

    def _progress(self, requests: Indices, t_ns: int) -> tuple[Ints, Ints]:
        """Return the tokens of each admitted request at a time, and decode steps since its end."""
        step = int(self.recording.step_at(np.array([t_ns]))[0]) - 1  # the last that has ended
        if step < 0 or not len(requests):
            return np.zeros(len(requests), np.int64), np.zeros(len(requests), np.int64)
        r = self.recording.requests
        first, last = r.first[requests], np.minimum(r.last[requests], step)
        decodes = self._decodes_to(last)
        tokens = 1 + decodes - self._decodes_to(np.minimum(first, last))
        tokens = np.where(first <= step, np.minimum(tokens, r.output_tokens[requests]), 0)
        return tokens, self._decodes_to(np.full(len(requests), step)) - decodes

    def _inside(self, t_ns: int) -> Indices:
        """Return the requests that hold a slot, in the order of admission."""
        admitted = self.holdings.admitted
        inside = np.flatnonzero((admitted <= t_ns) & (t_ns < self.holdings.freed))
        return inside[np.argsort(admitted[inside], kind="stable")]

    def tokens_at(self, t_ns: int) -> int:
        """Count the output tokens so far."""
        done, tokens = self._ends
        inside = self._inside(t_ns)
        running = inside[self.holdings.done[inside] > t_ns]
        finished = int(tokens[np.searchsorted(done, t_ns, side="right")])
        return finished + int(self._progress(running, t_ns)[0].sum())

    def at(self, t_ns: int, window_ns: int) -> SlotState:
        """Return the state at a moment; tokens per second are those of the last ``window_ns``."""
        over, now = t_ns >= self.end_ns, min(t_ns, self.end_ns)
        # At the very end a slot that is held is held for no other request.
        inside = self._inside(now) if not over else np.empty(0, np.intp)
        held_by, r = self.holdings, self.recording.requests
        state, tokens, output, held = (np.zeros(self.slots, np.int64) for _ in range(4))
        request, slot = np.full(self.slots, -1), r.slot[inside]
        request[slot], output[slot] = inside, r.output_tokens[inside]
        tokens[slot], held[slot] = self._progress(inside, now)
        before = [now < held_by.first[inside], now < held_by.done[inside]]
        state[slot] = np.select(before, [PROMPT, RUNNING], HELD)
        arrived, admitted, finished = (
            int(np.searchsorted(at, now, side="right"))
            for at in (self._due, np.sort(held_by.admitted), self._ends[0])
        )
        since = 0 if over else max(now - window_ns, 0)
        passed_s = max(now - since, 1) / 1e9
        return SlotState(
            name=self.name,
            now_ns=now,
            over=over,
            state=state,
            request=request,
            tokens=tokens,
            output_tokens=output,
            held=held,
            waiting=arrived - admitted,
            finished=finished,
            requests=len(r.slot),
            tokens_per_s=(self.tokens_at(now) - self.tokens_at(since) * (since > 0)) / passed_s,
        )

    def levels(self, until_ns: int, columns: int, end_ns: int) -> tuple[Floats, Floats]:
        """Return the shares of slots that run, and that are held, in equal parts of a time.

        Means over each of the ``columns`` parts of ``end_ns``; NaN in parts after ``until_ns`` or
        the trial's end.
        """
        edges, levels = np.linspace(0, end_ns, columns + 1), self._levels
        later = edges[:-1] >= min(until_ns, self.end_ns)
        running, held = (
            np.interp(edges, levels.edges_ns, [0.0, *np.cumsum(level * np.diff(levels.edges_ns))])
            for level in (levels.running, levels.finished)
        )
        width = end_ns / columns * self.slots
        return (
            np.where(later, np.nan, np.diff(running) / width),
            np.where(later, np.nan, np.diff(held) / width),
        )


@dataclass(frozen=True, eq=False)
class Replay:
    """A result's trials side by side: of each strategy the one of median duration."""

    title: str
    trials: tuple[TrialReplay, ...]

    @classmethod
    def of(cls, result: Result) -> Replay:
        """Return the replay of a result, without strategies that log no steps.

        Raises:
            UsageError: no strategy logs any.
        """
        typical = {name: typical_trial(trials) for name, trials in result.recordings.items()}
        trials = tuple(TrialReplay(name, r) for name, r in typical.items() if r.has_steps)
        if not trials:
            raise UsageError(f"{', '.join(typical)} schedules for itself, so no slots are known")
        return cls(result.title, trials)

    @property
    def end_ns(self) -> int:
        """End of the longest trial."""
        return max(trial.end_ns for trial in self.trials)

    @property
    def in_steps(self) -> bool:
        """True where time only counts steps."""
        return all(trial.recording.in_steps for trial in self.trials)

    def spell(self, ns: float) -> str:
        """Return a time with its unit, with as many decimals at all times."""
        if self.in_steps:
            return f"{ns / UNIT_NS:,.0f} steps"
        unit, name = (1e9, "s") if self.end_ns >= 1e9 else (1e6, "ms")
        longest = self.end_ns / unit
        decimals = 2 if longest < 100 else 1 if longest < 1000 else 0
        return f"{ns / unit:,.{decimals}f} {name}"

    def frame_at(self, t_ns: int) -> Frame:
        """Return all strategies at ``t_ns`` from the start of their trials."""
        window = int(self.end_ns * _RATE_OVER)
        return Frame(t_ns, self.end_ns, tuple(trial.at(t_ns, window) for trial in self.trials))

    @cached_property
    def longest_output(self) -> int:
        """Most output tokens of a request."""
        return max(int(t.recording.requests.output_tokens.max()) for t in self.trials)

    @property
    def verdict(self) -> str:
        """The last line: ``continuous was 3.08× as fast as static``."""
        first, last = self.trials[0], self.trials[-1]
        if first is last:
            return f"{last.name} done after {self.spell(last.end_ns)}"
        return as_fast(first.end_ns / last.end_ns, last.name, first.name)


def usual_speed(replay: Replay) -> float:
    """Return the seconds of a trial per second at which a replay takes about 12 s.

    True speed if that takes 10 to 15 s.
    """
    end_s = replay.end_ns / 1e9
    return 1.0 if 10 <= end_s <= 15 else float(f"{end_s / _LASTS_S:.2g}")


def moments(replay: Replay, speed: float, clock: Clock) -> Iterator[int]:
    """Yield the times to show, from 0 to the end, each when ``clock`` reaches it.

    Where drawing is too slow for all of them, some are left out.
    """
    clock.restart()
    period = 10**9 // FRAMES_PER_SECOND
    while (t_ns := int(clock.now() * speed)) < replay.end_ns:
        yield t_ns
        clock.wait_until((clock.now() // period + 1) * period)
    yield replay.end_ns
