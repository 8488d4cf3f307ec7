"""Moments of a trial: the state of every slot at a time, as a pure function of its log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchbench.batching.engines import Clock
from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.batching.recording import Ints, Recording
from batchbench.errors import UsageError
from batchbench.reports.formats.terminal import as_fast
from batchbench.reports.latency import Decodes
from batchbench.reports.metrics import typical_trial
from batchbench.reports.occupancy import Holdings, Levels, levels_of
from batchbench.reports.result import Result
from batchbench.reports.statistics import Floats
from batchbench.reports.text import joined

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
        return int(np.isin(self.state, (PROMPT, RUNNING)).sum())


@dataclass(frozen=True, eq=False)
class Frame:
    t_ns: int
    end_ns: int  # of the longest trial
    states: tuple[SlotState, ...]


@dataclass(frozen=True, eq=False)
class TrialReplay:
    name: str
    recording: Recording

    @property
    def slots(self) -> int:
        return self.recording.header.slots

    @property
    def end_ns(self) -> int:
        return self.recording.duration_ns

    @cached_property
    def _parts(self) -> tuple[Holdings, Levels, Decodes]:
        recording = self.recording
        return Holdings.of(recording), levels_of(recording), Decodes.of(recording)

    def _progress(self, t_ns: int) -> tuple[Ints, Ints]:
        """Return tokens at a time, and decode steps since the request was done, ``[requests]``."""
        r, decodes = self.recording.requests, self._parts[2]
        step = self.recording.step_at(np.array([t_ns])) - 1  # the last that has ended
        last = np.maximum(np.minimum(r.last, step), 0)
        done = decodes.numbered(last)
        tokens = 1 + done - decodes.numbered(np.minimum(r.first, last))
        tokens = np.where(r.first <= step, np.minimum(tokens, r.output_tokens), 0)
        return tokens, decodes.numbered(step) - done

    def tokens_at(self, t_ns: int) -> int:
        return int(self._progress(t_ns)[0].sum())

    def at(self, t_ns: int, window_ns: int) -> SlotState:
        """Return the state at a moment; tokens per second are those of the last ``window_ns``."""
        over, now = t_ns >= self.end_ns, min(t_ns, self.end_ns)
        held, r = self._parts[0], self.recording.requests
        inside = (held.admitted <= now) & (now < held.freed) & (not over)

        def by_slot(values: Ints, empty: int = 0) -> Ints:
            column = np.full(self.slots, empty)
            column[r.slot[inside]] = values[inside]
            return column

        tokens, held_for = self._progress(now)
        state = np.select([now < held.first, now < held.done], [PROMPT, RUNNING], HELD)
        since = 0 if over else max(now - window_ns, 0)
        recent = int(tokens.sum()) - (self.tokens_at(since) if since else 0)
        arrived = np.minimum(r.due_ns, held.admitted) <= now
        return SlotState(
            name=self.name,
            now_ns=now,
            over=over,
            state=by_slot(state, EMPTY),
            request=by_slot(held.request, -1),
            tokens=by_slot(tokens),
            output_tokens=by_slot(r.output_tokens),
            held=by_slot(held_for),
            waiting=int((arrived & (held.admitted > now)).sum()),
            finished=int((held.done <= now).sum()),
            requests=len(r.slot),
            tokens_per_s=recent / (max(now - since, 1) / 1e9),
        )

    def levels(self, until_ns: int, columns: int, end_ns: int) -> tuple[Floats, Floats]:
        """Return the shares of slots that run, and that are held, in equal parts of a time.

        Means over each of the ``columns`` parts of ``end_ns``; NaN in parts after ``until_ns`` or
        the trial's end.
        """
        edges, levels = np.linspace(0, end_ns, columns + 1), self._parts[1]
        later = edges[:-1] >= min(until_ns, self.end_ns)

        def shares(level: Floats) -> Floats:
            area = [0.0, *np.cumsum(level * np.diff(levels.edges_ns))]
            mean = np.diff(np.interp(edges, levels.edges_ns, area)) / np.diff(edges)
            return np.where(later, np.nan, mean / self.slots)

        return shares(levels.running), shares(levels.finished)


@dataclass(frozen=True, eq=False)
class Replay:
    """A result's trials side by side: of each strategy the one of median duration."""

    title: str
    trials: tuple[TrialReplay, ...]

    @classmethod
    def of(cls, result: Result) -> Replay:
        """Return the replay of a result; raise UsageError if no strategy logs steps."""
        typical = {name: typical_trial(trials) for name, trials in result.recordings.items()}
        trials = tuple(TrialReplay(name, r) for name, r in typical.items() if r.has_steps)
        if not trials:
            alone = "schedule by themselves" if len(typical) > 1 else "schedules by itself"
            names = joined(list(typical))
            raise UsageError(
                f"{names} {alone}, so no slots are known; give a run of our own engine"
            )
        return cls(result.title, trials)

    @property
    def end_ns(self) -> int:
        return max(trial.end_ns for trial in self.trials)

    @property
    def in_steps(self) -> bool:
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
        window = int(self.end_ns * _RATE_OVER)
        return Frame(t_ns, self.end_ns, tuple(trial.at(t_ns, window) for trial in self.trials))

    @property
    def verdict(self) -> str:
        """The last line: ``continuous was 3.08× as fast as static``."""
        first, last = self.trials[0], self.trials[-1]
        if first is last:
            return f"{last.name} done after {self.spell(last.end_ns)}"
        return as_fast(first.end_ns / last.end_ns, last.name, first.name)


def usual_speed(replay: Replay) -> float:
    """Return the speed at which a replay takes about 12 s; true speed if that takes 10 to 15 s."""
    end_s = replay.end_ns / 1e9
    return 1.0 if 10 <= end_s <= 15 else float(f"{end_s / _LASTS_S:.2g}")


def moments(replay: Replay, speed: float, clock: Clock) -> Iterator[int]:
    """Yield the times to show, each when ``clock`` reaches it; slow drawing leaves some out."""
    clock.restart()
    period = 10**9 // FRAMES_PER_SECOND
    while (t_ns := int(clock.now() * speed)) < replay.end_ns:
        yield t_ns
        clock.wait_until((clock.now() // period + 1) * period)
    yield replay.end_ns
