"""Judge observations: pure functions from the times of tokens to a verdict.

Three tests decide.

**Joining.** A short request is sent while a long one is running. On a server that batches
continuously its first token arrives while the long one is still running; on a static or serial
server it arrives after the long one has ended.

**Shared steps.** Requests of one batch get their tokens from the same forward pass, so the tokens
of the short request arrive together with tokens of the long one. Two replicas, or a server that
computes its requests in turns, let a request join too, but their tokens do not arrive together.
Short requests are sent at random moments, so without a shared batch an arrival falls into the
window around a step only by chance.

**Slots.** Many requests are sent at once. The number in progress at the same time is the number of
slots, if others were waiting meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from batchbench.studies.probe.observations import (
    Floats,
    Observations,
    Pace,
    Role,
    Round,
    Stream,
    pace_of,
)

WINDOW = 0.1
"""A token arrives with a step if it is within this share of the time between two steps."""

WINDOWS = (0.1, 0.05, 0.02)
"""Windows that are tried: with narrower ones, the half of the requests that shares a replica with
the long one is enough."""

CHANCE = 3.0
"""Probability per width that a request without a shared batch falls into the window: 2 for phases
that are spread evenly, and a margin."""

LEVEL = 1e-4
"""The largest probability of a chance result that counts as a shared batch."""

LEFT_STEPS = 2
"""A request joined if the long one still got this many tokens after the joiner's first."""

MOST_TICKS = 6
"""Ticks of a timer between two tokens, up to which it is looked for."""

TIMER_LEVEL = 1e-3
"""The largest probability of a chance result that counts as a timer."""

FEWEST_BEGINNINGS = 12
"""Rounds that begin on an idle server at a random moment, by which a timer would show."""

MOST_STRETCHED = 1.5
"""Between chunks of tokens, steps are assumed at equal distances. If a long request is slowed down
by more than this factor, turns of a server could fall on them."""

MOST_SLOWED = 1.3
"""A request of a buffered server that takes longer than this multiple may have waited."""

WAITING_ROUNDS = 3
"""Rounds in which short requests must wait for the end of the long one."""

FEWEST_COMPARED = 6
"""Requests that joined whose tokens are compared with those of the long one."""


class Kind(StrEnum):
    """The verdict, as in the JSON file."""

    CONTINUOUS = "continuous"
    STATIC = "static"
    SERIAL = "serial"
    UNKNOWN = "cannot tell"


# Joining


@dataclass(frozen=True)
class Joining:
    """The short requests that were sent while a long one was running, by what became of them.

    Attributes:
        waits: for each that is clear, the time to its first token as a share of the time that the
            long one still took.
        rounds_waited: rounds in which all waited, each right behind one of the probe's requests.
        loose: short requests that waited longer than for requests of the probe.
    """

    joined: int
    waited: int
    refused: int
    unclear: int
    waits: tuple[float, ...]
    rounds_waited: int
    loose: int


class Fate(StrEnum):
    """The outcome of a short request."""

    JOINED = "joined"
    WAITED = "waited"
    REFUSED = "refused"
    UNCLEAR = "unclear"


def fate_of(short: Stream, longs: Sequence[Stream], pace: Pace) -> Fate:
    """Return what became of a short request that was sent while others were running."""
    if short.refused:
        return Fate.REFUSED
    running = [s for s in longs if s.answered and _runs(s, short.sent_ns, pace)]
    if not short.answered or not running:
        return Fate.UNCLEAR
    end = max(s.last_ns for s in running)
    begun = _begin(short, pace)
    enough = end - short.sent_ns > 2 * pace.ttft_ns + 5 * pace.gap_ns
    if not enough:
        return Fate.UNCLEAR
    if pace.buffered:
        left = end - short.last_ns > LEFT_STEPS * pace.gap_ns
        return Fate.JOINED if left else _waited_buffered(short, end, pace)
    long = max(running, key=lambda s: s.last_ns)
    if np.searchsorted(long.arrivals_ns, short.first_ns) <= len(long.arrivals_ns) - LEFT_STEPS:
        return Fate.JOINED
    return Fate.WAITED if begun >= min(s.last_ns for s in running) else Fate.UNCLEAR


def _runs(long: Stream, now_ns: int, pace: Pace) -> bool:
    """Tell whether a request is known to have been running at a time, not waiting.

    On a busy static server it may wait and then begin together with the short request.
    """
    if pace.buffered:
        usual = MOST_SLOWED * pace.e2e_ns(len(long.times_ns))
        return long.e2e_ns < usual and long.sent_ns + pace.ttft_ns < now_ns < long.last_ns
    return bool(long.first_ns < now_ns < long.last_ns)


def _waited_buffered(short: Stream, end: int, pace: Pace) -> Fate:
    """Return the fate of a request that ended late, on a server that sends tokens at the end."""
    own = pace.e2e_ns(len(short.times_ns))
    return Fate.WAITED if short.last_ns - end > 0.5 * own else Fate.UNCLEAR


def _begin(stream: Stream, pace: Pace) -> float:
    """Return when a request's first token was there; an estimate for a buffered server."""
    if pace.buffered:
        return stream.last_ns - (len(stream.times_ns) - 1) * pace.gap_ns
    return stream.first_ns


def joining_of(observations: Observations, pace: Pace) -> Joining:
    """Return what became of the short requests of all rounds."""
    fates: list[Fate] = []
    waits: list[float] = []
    rounds_waited = loose = 0
    for round in observations.joining:
        longs, shorts = round.of(Role.LONG), round.of(Role.SHORT)
        of_round = [fate_of(short, longs, pace) for short in shorts]
        fates += of_round
        end = max((s.last_ns for s in longs if s.answered), default=0)
        waits += [
            float((_begin(short, pace) - short.sent_ns) / (end - short.sent_ns))
            for short, fate in zip(shorts, of_round, strict=True)
            if fate in (Fate.JOINED, Fate.WAITED)
        ]
        waited = [s for s, fate in zip(shorts, of_round, strict=True) if fate is Fate.WAITED]
        late = sum(not _follows(short, round, pace) for short in waited)
        loose += late
        rounds_waited += bool(waited) and Fate.JOINED not in of_round and not late
    return Joining(
        *(fates.count(f) for f in (Fate.JOINED, Fate.WAITED, Fate.REFUSED, Fate.UNCLEAR)),
        tuple(waits),
        rounds_waited,
        loose,
    )


def _follows(short: Stream, round: Round, pace: Pace) -> bool:
    """Tell whether a request that waited began right after another one of the probe had ended."""
    begun = _begin(short, pace)
    ends = [s.last_ns for s in round.streams if s.answered and s is not short]
    before = [end for end in ends if end <= begun + pace.gap_ns]
    return bool(before) and begun - max(before) <= 2 * pace.ttft_ns + 4 * pace.gap_ns


# Shared steps


@dataclass(frozen=True)
class SharedSteps:
    """The joined requests whose tokens were compared with the steps of a long request.

    Attributes:
        offsets: distance of each request's tokens from the nearest step, as the median over its
            tokens and as a share of the time between two steps: from 0 to 0.5.
        chance: probability that so many of them are in the window without a shared batch.
    """

    offsets: tuple[float, ...]
    chance: float
    buffered: bool

    @property
    def compared(self) -> int:
        return len(self.offsets)

    @property
    def together(self) -> int:
        return sum(offset < WINDOW for offset in self.offsets)

    @property
    def shown(self) -> bool:
        return self.compared >= FEWEST_COMPARED and self.chance < LEVEL

    @property
    def in_turns(self) -> bool:
        """Tokens arrive in between, always at the same distance: the server takes turns."""
        spread = float(np.std(self.offsets)) if self.offsets else 1.0
        enough = self.compared >= FEWEST_COMPARED and not self.buffered
        return enough and not self.together and spread < WINDOW / 2


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
    chances = [_chance(offsets, references, window) for window in WINDOWS]
    chance = min(1.0, len(WINDOWS) * min(chances))
    return SharedSteps(tuple(offsets), chance, pace.buffered)


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


def sends_by_timer(observations: Observations) -> bool:
    """Tell whether tokens are sent at the ticks of a timer, which would hide the steps.

    Requests that begin on an idle server at random moments then get their first token at a tick;
    and if ticks are longer than steps, chunks differ in size but keep up an even rate.
    """
    streams = [s for r in observations.rounds if not r.is_burst for s in r.streams if s.answered]
    streams = [s for s in streams if len(s.arrivals_ns) > 2]
    if not streams:
        return False
    gaps = np.concatenate([np.diff(s.arrivals_ns) for s in streams]).astype(np.float64)
    usual = float(np.median(gaps))
    if any(_evenly_chunked(s) for s in observations.alone):
        return True
    near = np.linspace(0.94, 1.06, 241)  # a median of gaps is not exact over hundreds of ticks
    ticks = [usual / parts * near for parts in range(1, MOST_TICKS + 1)]
    return _follow_a_grid(observations, np.concatenate(ticks), 30 * MOST_TICKS)


def _follow_a_grid(observations: Observations, ticks: Floats, tried: int) -> bool:
    """Tell whether the first tokens of a round follow the last one of the round before by ticks.

    Each round begins at a random moment, so without a timer they follow by any time. ``tried`` is
    the number of ticks that are about independent.
    """
    between = _between_rounds(observations)
    phases = between / ticks[:, None]
    counts = (np.abs(phases - np.round(phases)) < WINDOW).sum(axis=1)
    most = int(counts.max(initial=0))
    return _at_least(most, [2 * WINDOW] * len(between)) * tried < TIMER_LEVEL


def _between_rounds(observations: Observations) -> Floats:
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


def _buffered_by_timer(observations: Observations, pace: Pace) -> bool:
    """Tell whether a buffered server answers at the ticks of a timer."""
    ticks = np.geomspace(0.2 * pace.gap_ns, 2 * pace.gap_ns, 1000)
    return _follow_a_grid(observations, ticks, len(ticks))


def _evenly_chunked(stream: Stream) -> bool:
    """Tell whether chunks differ in size, but by no more than an even rate makes necessary."""
    times, counts = np.unique(np.array(stream.times_ns, np.int64), return_counts=True)
    inner = counts[1:-1]
    if len(inner) < 5 or inner.min() == inner.max():
        return False
    total = np.cumsum(inner)
    even = np.polyval(np.polyfit(times[1:-1], total, 1), times[1:-1])
    return bool(np.abs(total - even).max() <= 1.2 and np.mean(inner != inner[0]) > 0.1)


# Slots

Span = tuple[float, float]
"""The beginning and the end of a request."""


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once.

    Attributes:
        most: the largest number in progress at the same time.
        exact: others were waiting meanwhile, and began when room was made.
        midway: requests that began while others were in the middle of theirs.
        groups: sizes of the groups that ran one after another.
        gain: tokens per second as a multiple of those of one request alone.
        gradual: requests began one after another, so that the first ended before the last began.
        sequential: each certainly began after the one before it had ended.
    """

    sent: int
    refused: int
    most: int
    exact: bool
    midway: int
    groups: tuple[int, ...]
    gain: float
    gradual: bool
    sequential: bool


def burst_of(round: Round, pace: Pace) -> Burst:
    """Count the slots in a burst."""
    sent = round.of(Role.BURST)
    streams = sorted((s for s in sent if s.answered), key=lambda s: s.last_ns)
    tokens = sum(len(s.times_ns) for s in streams)
    gain = tokens * pace.gap_ns / max(round.duration_ns, 1)
    gap = _burst_gap(streams) or pace.gap_ns
    spans = sorted((_earliest_begin(s, pace), float(s.last_ns)) for s in streams)
    most, groups = _most_at_once(spans, 0.3 * gap), _groups(spans, 0.3 * gap)
    midway = 0 if pace.buffered else _midway(streams)
    equal = len({len(s.times_ns) for s in streams}) == 1 or not pace.buffered
    exact, gradual = _is_full(groups) and equal, False
    overlap = _most_at_once([_longest_span(s, pace) for s in streams], 0.0)
    if midway:
        exact, gradual = _saturated(spans, most, gap, pace)
    whole = len(streams) == len(sent)
    refused = sum(s.refused for s in sent)
    return Burst(
        *(len(sent), refused, most, exact and whole, midway, groups, gain, gradual),
        sequential=max(most, overlap) == 1 and whole,
    )


def _earliest_begin(stream: Stream, pace: Pace) -> float:
    """Return a time at which a request was certainly in progress.

    A buffered server shows no beginning, but a request takes at least as long as it does alone.
    """
    if pace.buffered:
        return stream.last_ns - 0.5 * (len(stream.times_ns) - 1) * pace.gap_ns
    return float(stream.first_ns)


def _longest_span(stream: Stream, pace: Pace) -> Span:
    """Return the longest time for which a request may have been in progress."""
    if pace.buffered:
        return stream.last_ns - 0.85 * (len(stream.times_ns) - 1) * pace.gap_ns, stream.last_ns
    return float(stream.first_ns), float(stream.last_ns)


def _burst_gap(streams: Sequence[Stream]) -> float:
    gaps = [np.diff(s.steps_ns) for s in streams if len(s.arrivals_ns) > 1]
    return float(np.median(np.concatenate(gaps))) if gaps else 0.0


def _most_at_once(spans: Sequence[Span], shorter_ns: float) -> int:
    """Return the largest number in progress; each counts as a little shorter than it was.

    A request that follows another one begins at least one step after its end, so an end that
    arrives late does not count twice.
    """
    events = [(begin, 1) for begin, _ in spans]
    events += [(max(end - shorter_ns, begin), -1) for begin, end in spans]
    level = most = 0
    for _, change in sorted(events, key=lambda event: (event[0], -event[1])):
        level += change
        most = max(most, level)
    return most


def _groups(spans: Sequence[Span], shorter_ns: float) -> tuple[int, ...]:
    """Return the sizes of the groups between which nothing was in progress."""
    sizes: list[int] = []
    latest = -np.inf
    for begin, end in spans:
        if begin > latest - shorter_ns:
            sizes.append(0)
        sizes[-1] += 1
        latest = max(latest, end)
    return tuple(sizes)


def _midway(streams: Sequence[Stream]) -> int:
    """Return how many began when another one had several tokens and was not at its end."""
    return sum(
        any(
            2 <= np.searchsorted(other.arrivals_ns, one.first_ns) < len(other.arrivals_ns) - 1
            for other in streams
            if other is not one
        )
        for one in streams
    )


def _is_full(groups: Sequence[int]) -> bool:
    """Tell whether the largest group was full.

    The first group has only those requests that had arrived, and the last one the rest.
    """
    return max(groups, default=0) in groups[1:-1]


def _saturated(spans: Sequence[Span], most: int, gap: float, pace: Pace) -> tuple[bool, bool]:
    """Tell whether the slots were full, and whether requests began only gradually.

    The slots were full if the first requests began together, then none for a while, and each later
    one right after one had ended.
    """
    ends = sorted(end for _, end in spans)
    starts = [begin for begin, _ in spans]
    first = [start for start in starts if start < ends[0] + 0.3 * gap]
    late = starts[len(first) :]
    if not late:
        return False, False
    spacing = max(np.diff(first), default=0)
    quiet = late[0] - first[-1]
    gradual = bool(quiet < max(2 * gap, 3 * spacing))
    waits = [start - end for start, end in zip(late, ends, strict=False)]
    tight = [wait <= 2 * pace.ttft_ns + 4 * gap for wait in waits]
    alone = min(waits) > -0.3 * gap  # room that others left would show before an end
    full = len(first) == most and not gradual and alone and sum(tight) >= 0.8 * len(tight)
    return full, gradual


# The verdict


@dataclass(frozen=True)
class Verdict:
    """The answer, and what each test saw."""

    kind: Kind
    slots: int | None
    slots_is_lower_bound: bool
    reason: str
    pace: Pace | None
    joining: Joining | None
    shared: SharedSteps | None
    bursts: tuple[Burst, ...]
    busy: tuple[str, ...]


def judge(observations: Observations) -> Verdict:
    """Return the verdict on everything that was observed."""
    pace = pace_of(observations.alone)
    if pace is None:
        return Verdict(
            *(Kind.UNKNOWN, None, False, "no request was answered", None, None, None, (), ())
        )
    joining = joining_of(observations, pace)
    shared = shared_steps(observations, pace)
    bursts = tuple(burst_of(round, pace) for round in observations.bursts)
    busy = tuple(signs_of_others(observations, joining))
    kind, reason = _decide(observations, pace, joining, shared, bursts)
    slots, bound = None, False
    if kind is not Kind.UNKNOWN:
        slots, bound = _slots(kind, bursts, shared, observations, busy=bool(busy))
    return Verdict(kind, slots, bound, reason, pace, joining, shared, bursts, busy)


def signs_of_others(observations: Observations, joining: Joining) -> list[str]:
    """Return the signs that other people's requests were served too."""
    signs = []
    if observations.server.others:
        signs.append(f"the server counted {observations.server.others} requests of others")
    if joining.loose:
        signs.append(f"{joining.loose} requests waited for something that was not the probe's")
    return signs


def _decide(
    observations: Observations,
    pace: Pace,
    joining: Joining,
    shared: SharedSteps,
    bursts: Sequence[Burst],
) -> tuple[Kind, str]:
    if joining.joined and shared.shown:
        late = [b for b in bursts if len(b.groups) > 1 and not pace.buffered]
        if late and not any(b.midway for b in late):
            return Kind.UNKNOWN, (
                "a request joins a running batch, but a finished one does not make room for the next"
            )
        if pace.chunk > 1 and stretch_of(observations, pace) > MOST_STRETCHED:
            return Kind.UNKNOWN, (
                "tokens arrive in chunks, and a request slows another one down as if they took turns"
            )
        if observations.lag_ns > WINDOW * pace.gap_ns:
            return Kind.UNKNOWN, ("this machine was too busy to tell at which step a token arrived")
        by_timer = _buffered_by_timer(observations, pace) if pace.buffered else False
        if len(_between_rounds(observations)) < FEWEST_BEGINNINGS:
            return Kind.UNKNOWN, "there was no time to exclude that a timer sends the tokens"
        if by_timer or sends_by_timer(observations):
            return Kind.UNKNOWN, "tokens are sent at the ticks of a timer, which hide the steps"
        return Kind.CONTINUOUS, "requests join a running batch and share its steps"
    if joining.joined:
        return Kind.UNKNOWN, _unshared(joining, shared)
    if joining.refused and not joining.waited:
        return Kind.UNKNOWN, "the server refuses requests while it is serving one"
    if joining.rounds_waited < WAITING_ROUNDS or joining.loose:
        return Kind.UNKNOWN, "too few requests clearly waited or clearly joined"
    if not bursts or any(b.midway for b in bursts):
        return Kind.UNKNOWN, (
            "requests wait for a long one to end, but not for one another"
            if bursts
            else "there was no time to count the slots"
        )
    if max(b.most for b in bursts) > 1:
        return Kind.STATIC, "requests wait until all requests of the running batch have ended"
    if all(b.sequential for b in bursts):
        return Kind.SERIAL, "each request waits until the one before it has ended"
    return Kind.UNKNOWN, "requests of a burst ended in an order that does not show its slots"


def _unshared(joining: Joining, shared: SharedSteps) -> str:
    if shared.compared < FEWEST_COMPARED:
        return f"only {shared.compared} requests that joined could be compared with a running one"
    if shared.in_turns:
        return "requests overlap, but get their tokens in turns: they do not share steps"
    return (
        "requests overlap, but not enough of them share steps: replicas behind one address, or "
        "tokens sent at the ticks of a timer"
    )


def _slots(
    kind: Kind,
    bursts: Sequence[Burst],
    shared: SharedSteps,
    observations: Observations,
    *,
    busy: bool,
) -> tuple[int, bool]:
    """Return the number of slots, and whether there may be more."""
    least = 2 if kind is Kind.CONTINUOUS else 1
    most = max((b.most for b in bursts), default=least)
    if kind is Kind.SERIAL:
        return 1, False
    exact = [b.most for b in bursts if b.exact]
    replicas = shared.together < shared.compared
    told = observations.server.slots
    sure = (
        len(exact) > 1
        and set(exact) == {most}
        and not busy
        and not (replicas and kind is Kind.CONTINUOUS)
        and told in (None, most)
    )
    return max(most, least), not sure
