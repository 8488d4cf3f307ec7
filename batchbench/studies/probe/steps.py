"""The second test: do the tokens of a request that joined come from the steps of another one?

Tokens of one step arrive together. Requests are sent at random moments, so without a shared batch
they do so only by chance, unless a timer sends them, for which the last functions look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchbench.studies.probe.joining import Fate, fate_of
from batchbench.studies.probe.observations import Floats, Observations, Pace, Role, Stream

WINDOW = 0.1  # a token arrives with a step if it is within this share of the time between two steps
WINDOWS = (0.1, 0.05, 0.02)
"""Windows that are tried: with narrower ones, the half of the requests that shares a replica with
the long one is enough."""

CHANCE = 3.0
"""Probability per width that a request without a shared batch falls into the window: 2 for phases
that are spread evenly, and a margin."""

LEVEL = 1e-4  # the largest probability of a chance result that counts as a shared batch
FEWEST_COMPARED = 6  # requests that joined whose tokens are compared with those of the long one
MOST_TICKS = 6  # ticks of a timer between two tokens, up to which it is looked for
TIMER_LEVEL = 1e-3  # the largest probability of a chance result that counts as a timer
FEWEST_BEGINNINGS = 12
"""Rounds that begin on an idle server at a random moment, by which a timer would show."""


@dataclass(frozen=True)
class SharedSteps:
    """The joined requests whose tokens were compared with the steps of a long request.

    Attributes:
        offsets: distance of each request's tokens from the nearest step, as the median over its
            tokens and as a share of the time between two steps: from 0 to 0.5.
        window: the one of :data:`WINDOWS` whose number of offsets is the least likely.
        chance: probability that so many of them are in the window without a shared batch.
    """

    offsets: tuple[float, ...]
    window: float
    chance: float
    buffered: bool

    @property
    def compared(self) -> int:
        return len(self.offsets)

    @property
    def together(self) -> int:
        """Offsets within the window."""
        return sum(offset < self.window for offset in self.offsets)

    @property
    def apart(self) -> int:
        """Offsets outside the widest window: these requests shared no step with the long one."""
        return sum(offset >= WINDOW for offset in self.offsets)

    @property
    def shown(self) -> bool:
        return self.compared >= FEWEST_COMPARED and self.chance < LEVEL

    @property
    def in_turns(self) -> bool:
        """Tokens arrive in between, always at the same distance: the server takes turns."""
        spread = float(np.std(self.offsets)) if self.offsets else 1.0
        enough = self.compared >= FEWEST_COMPARED and not self.buffered
        return enough and self.apart == self.compared and spread < WINDOW / 2


def shared_steps(observations: Observations, pace: Pace) -> SharedSteps:
    """Compare the tokens of joined requests with the steps of the requests they joined."""
    offsets: list[float] = []
    references: list[int] = []
    for round in observations.joining:
        longs, shorts = round.of(Role.LONG), round.of(Role.SHORT)
        joined = [s for s in shorts if fate_of(s, longs, pace) is Fate.JOINED]
        for short in joined if not pace.buffered else ():
            each = [offset_of(short, long) for long in longs if long.answered]
            known = [offset for offset in each if offset is not None]
            if known:
                offsets.append(min(known))
                references.append(len(known))
    if pace.buffered:
        offsets = _pair_offsets(observations.pairs, pace)
        references = [1] * len(offsets)
    chance, window = min((_chance(offsets, references, width), width) for width in WINDOWS)
    return SharedSteps(tuple(offsets), window, min(1.0, len(WINDOWS) * chance), pace.buffered)


def _chance(offsets: Sequence[float], references: Sequence[int], window: float) -> float:
    """Return the probability that so many offsets are within a window without a shared batch."""
    count = sum(offset < window for offset in offsets)
    return _at_least(count, [1 - (1 - CHANCE * window) ** n for n in references])


def _at_least(count: int, chances: Sequence[float]) -> float:
    """Return the probability that ``count`` or more of independent events happen."""
    exactly = np.ones(1)
    for chance in chances:
        exactly = np.convolve(exactly, [1 - chance, chance])
    return float(min(1.0, exactly[count:].sum()))


def offset_of(short: Stream, long: Stream) -> float | None:
    """Return the median distance of a request's tokens from the steps of another one.

    It is a share of the time between the two steps around the token, from 0 to 0.5. The first token
    is left out: a prompt may be computed in a pass of its own. None if there is nothing to compare.
    """
    steps = long.steps_ns
    events = short.arrivals_ns[1:]
    events = events[(events >= steps[0]) & (events <= steps[-1])]
    if len(events) < 2 or len(steps) < 3:
        return None
    after = np.clip(np.searchsorted(steps, events), 1, len(steps) - 1)
    before, behind = events - steps[after - 1], steps[after] - events
    return float(np.median(np.minimum(before, behind) / np.maximum(before + behind, 1)))


def _pair_offsets(pairs: Sequence[tuple[Stream, Stream]], pace: Pace) -> list[float]:
    """Return the distance between the ends of each pair, as a share of a step, at most 0.5.

    The second request is sent some steps later and is shorter by as many. It ends in the same step
    as the first one only if it joined it; requests of a static batch begin together, so that their
    ends are apart.
    """
    return [
        min(float(abs(two.last_ns - one.last_ns) / max(pace.gap_ns, 1)), 0.5)
        for one, two in pairs
        if len(one.times_ns) == one.asked and len(two.times_ns) == two.asked
    ]


def stretch_of(observations: Observations, pace: Pace) -> float:
    """Return the time of a token of the long requests as a multiple of that of a request alone."""
    longs = [s for r in observations.joining for s in r.of(Role.LONG) if s.answered]
    each = [(s.last_ns - s.first_ns) / (len(s.times_ns) - 1) for s in longs if len(s.times_ns) > 1]
    return float(np.median(each) / max(pace.gap_ns, 1)) if each else 1.0


def sends_by_timer(observations: Observations, pace: Pace) -> bool:
    """Tell whether tokens are sent at the ticks of a timer, which would hide the steps.

    Requests that begin on an idle server at random moments then get their first token at a tick;
    and if ticks are longer than steps, chunks differ in size but keep up an even rate.
    """
    if pace.buffered:
        ticks = np.geomspace(0.2 * pace.gap_ns, 2 * pace.gap_ns, 1000)
        return _follow_a_grid(observations, ticks, len(ticks))
    streams = [s for r in observations.rounds if not r.is_burst for s in r.streams if s.answered]
    streams = [s for s in streams if len(s.arrivals_ns) > 2]
    if not streams:
        return False
    gaps = np.concatenate([np.diff(s.arrivals_ns) for s in streams]).astype(np.float64)
    usual = float(np.median(gaps))
    if any(_evenly_chunked(s) for s in observations.alone):
        return True
    near = np.linspace(0.94, 1.06, 241)  # a median of gaps is not exact over hundreds of ticks
    ticks = np.concatenate([usual / parts * near for parts in range(1, MOST_TICKS + 1)])
    return _follow_a_grid(observations, ticks, 30 * MOST_TICKS)


def _follow_a_grid(observations: Observations, ticks: Floats, tried: int) -> bool:
    """Tell whether the first tokens of a round follow the last one of the round before by ticks.

    Each round begins at a random moment, so without a timer they follow by any time. ``tried`` is
    the number of ticks that are about independent.
    """
    between = beginnings_of(observations)
    phases = between / ticks[:, None]
    counts = (np.abs(phases - np.round(phases)) < WINDOW).sum(axis=1)
    most = int(counts.max(initial=0))
    return _at_least(most, [2 * WINDOW] * len(between)) * tried < TIMER_LEVEL


def beginnings_of(observations: Observations) -> Floats:
    """Return the times from the last token of a round to the first one of the next."""
    rounds = [[s for s in r.streams if s.answered] for r in observations.rounds]
    rounds = [streams for streams in rounds if streams]
    return np.array(
        [
            min(s.first_ns for s in after) - max(s.last_ns for s in before)
            for before, after in pairwise(rounds)
        ],
        np.float64,
    )


def _evenly_chunked(stream: Stream) -> bool:
    """Tell whether chunks differ in size, but by no more than an even rate makes necessary.

    Larger chunks come no later than others. If a busy client read two chunks at once, they do.
    """
    times, counts = stream.chunks
    inner = counts[1:-1]
    if len(inner) < 5 or inner.min() == inner.max():
        return False
    total = np.cumsum(inner)
    even = np.polyval(np.polyfit(times[1:-1], total, 1), times[1:-1])
    gaps, larger = np.diff(times)[:-1], inner > inner.min()
    on_time = np.median(gaps[larger]) < 1.3 * np.median(gaps[~larger])
    return bool(on_time and np.abs(total - even).max() <= 1.2 and np.mean(inner != inner[0]) > 0.1)
