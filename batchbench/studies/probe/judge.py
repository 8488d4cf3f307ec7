"""Judge observations: pure functions from the times of tokens to a verdict.

Three tests decide: does a short request begin while a long one is running; do its tokens come from
the steps of that one; and how many of the requests that are sent at once run at the same time?
``docs/probe.md`` explains them.
"""

from __future__ import annotations

from collections import Counter
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
    median_gap,
    pace_of,
)

WAITING_ROUNDS = 3  # rounds in which short requests must wait for the end of the long one
MOST_STRETCHED = 1.5
"""Between chunks of tokens, steps are assumed at equal distances. If a long request is slowed down
by more than this factor, turns of a server could fall on them."""

LEFT_STEPS = 2
"""A request joined if the long one still got this many tokens after the joiner's first."""

MOST_SLOWED = 1.3
"""A request of a buffered server that takes longer than this multiple may have waited."""

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

FEWEST_TOKENS = 3  # a request that ends earlier is over before it can be counted beside the others

Spans = Sequence[tuple[float, float]]
"""The beginning and the end of each request."""


class Kind(StrEnum):
    """The verdict, as in the JSON file."""

    CONTINUOUS = "continuous"
    STATIC = "static"
    SERIAL = "serial"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """The answer, and what each test saw."""

    kind: Kind
    reason: str
    slots: int | None = None
    slots_is_lower_bound: bool = False
    pace: Pace | None = None
    joining: Joining | None = None
    shared: SharedSteps | None = None
    bursts: tuple[Burst, ...] = ()
    busy: tuple[str, ...] = ()  # signs of other people's requests


def judge(observations: Observations) -> Verdict:
    """Return the verdict on everything that was observed."""
    because = f"; {observations.ended}" if observations.ended else ""
    pace = pace_of(observations.alone)
    if pace is None:
        return Verdict(Kind.UNKNOWN, f"no request was answered{because}")
    joining, shared = joining_of(observations, pace), shared_steps(observations, pace)
    bursts = tuple(burst_of(round, pace) for round in observations.of(Role.BURST))
    signs = (
        (observations.server.others, "the server counted requests of others"),
        (joining.loose, "some requests waited for longer than those of the probe explain"),
    )
    busy = tuple(sign for seen, sign in signs if seen)
    kind, reason = _decide(observations, pace, joining, shared, bursts)
    slots, bound = None, False
    if kind is Kind.UNKNOWN:
        reason += because
    else:
        slots, bound = _slots(kind, bursts, shared, observations.server.slots, busy=bool(busy))
    return Verdict(kind, reason, slots, bound, pace, joining, shared, bursts, busy)


def _decide(
    seen: Observations, pace: Pace, joining: Joining, shared: SharedSteps, bursts: Sequence[Burst]
) -> tuple[Kind, str]:
    """Return the first doubt that applies, or else the verdict that is left."""
    doubts: dict[str, object]
    if joining.joined:
        told = Kind.CONTINUOUS, "requests join a running batch and share its steps"
        groups = [b for b in bursts if len(b.groups) > 1 and not pace.buffered]
        longs = [s for s in seen.streams if s.role is Role.LONG and len(s.times_ns) > 1]
        each = [(s.last_ns - s.first_ns) / (len(s.times_ns) - 1) for s in longs if s.answered]
        stretched = pace.chunk > 1 and np.median(each) > MOST_STRETCHED * max(pace.gap_ns, 1)
        doubts = {
            f"only {shared.compared} requests that joined could be compared with a running one": (
                shared.compared < FEWEST_COMPARED
            ),
            "requests overlap, but get their tokens as if in turns: they share no steps": (
                shared.in_turns
            ),
            "requests overlap, but too few of them seem to share steps; replicas behind one "
            "address, a timer that sends the tokens, or a busy machine can cause it": (
                not shared.shown
            ),
            "a request joins a running batch, but a finished one makes no room for the next": (
                groups and not any(b.midway for b in groups)
            ),
            "tokens arrive in chunks, and requests slow one another down as if in turns": stretched,
            "this machine was too busy to tell at which step a token arrived": (
                seen.lag_ns > WINDOW * pace.gap_ns
            ),
            "too few requests began on an idle server to exclude that a timer sends the tokens": (
                len(beginnings_of(seen)) < FEWEST_BEGINNINGS
            ),
            "tokens arrive as if a timer sent them, which would hide the steps; "
            "a busy machine can cause it too": sends_by_timer(seen, pace),
        }
    else:
        several = any(b.most > 1 for b in bursts)
        told = Kind.SERIAL, "each request waits until the one before it has ended"
        if several:
            told = Kind.STATIC, "requests wait until all requests of the running batch have ended"
        doubts = {
            "the server refuses requests while it is serving one": (
                joining.refused and not joining.waited
            ),
            "too few requests clearly waited or clearly joined": (
                joining.rounds_waited < WAITING_ROUNDS or joining.loose
            ),
            "requests wait for a long one to end, but the slots were not counted": not bursts,
            "requests wait for a long one to end, but not for one another": (
                any(b.midway for b in bursts)
            ),
            "one request ran at a time, but others may hold the rest of the slots": (
                not several and (seen.server.others or (seen.server.slots or 1) > 1)
            ),
            "requests of a burst ended in an order that does not show its slots": (
                not several and not all(b.sequential for b in bursts)
            ),
        }
    return next(((Kind.UNKNOWN, doubt) for doubt, holds in doubts.items() if holds), told)


def _slots(
    kind: Kind,
    bursts: Sequence[Burst],
    shared: SharedSteps,
    told: int | None,
    *,
    busy: bool,
) -> tuple[int, bool]:
    """Return the number of slots, and whether there may be more."""
    if kind is Kind.SERIAL:
        return 1, False
    most = max((b.most for b in bursts), default=0)
    exact = [b.most for b in bursts if b.exact]
    sure = len(exact) > 1 and set(exact) == {most} and told in (None, most) and not busy
    replicas = kind is Kind.CONTINUOUS and shared.apart > 0
    return max(most, 2 if kind is Kind.CONTINUOUS else 1), not sure or replicas


# The first test: does a short request begin while a long one is running, or after it?


class Fate(StrEnum):
    """The outcome of a short request."""

    JOINED = "joined"
    WAITED = "waited"
    REFUSED = "refused"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Joining:
    """The short requests that were sent while a long one was running, by what became of them."""

    joined: int
    waited: int
    refused: int
    unclear: int
    waits: tuple[float, ...]  # times to first tokens, as shares of what the long one still took
    rounds_waited: int  # rounds in which all waited, each right behind one of the probe's requests
    loose: int  # short requests that waited longer than for requests of the probe


def fate_of(short: Stream, longs: Sequence[Stream], pace: Pace) -> Fate:
    """Return what became of a short request that was sent while others were running."""
    if short.refused:
        return Fate.REFUSED
    running = [s for s in longs if s.answered and _runs(s, short.sent_ns, pace)]
    if not short.answered or not running:
        return Fate.UNCLEAR
    long = max(running, key=lambda s: s.last_ns)
    end = long.last_ns
    if end - short.sent_ns <= 2 * pace.ttft_ns + 5 * pace.gap_ns:
        return Fate.UNCLEAR
    if pace.buffered:
        joined = end - short.last_ns > LEFT_STEPS * pace.gap_ns
        waited = short.last_ns - end > 0.5 * pace.e2e_ns(len(short.times_ns))
    else:
        joined = int((long.arrivals_ns >= short.first_ns).sum()) >= LEFT_STEPS
        waited = short.first_ns >= min(s.last_ns for s in running)
    return Fate.JOINED if joined else Fate.WAITED if waited else Fate.UNCLEAR


def _runs(long: Stream, now_ns: int, pace: Pace) -> bool:
    """Tell whether a request is known to have been running at a time, not waiting.

    On a busy static server it may wait and then begin together with the short request.
    """
    if pace.buffered:
        usual = MOST_SLOWED * pace.e2e_ns(len(long.times_ns))
        return long.e2e_ns < usual and long.sent_ns + pace.ttft_ns < now_ns < long.last_ns
    return bool(long.first_ns < now_ns < long.last_ns)


def _fates(round: Round, pace: Pace) -> list[tuple[Stream, Fate]]:
    longs = round.of(Role.LONG)
    return [(short, fate_of(short, longs, pace)) for short in round.of(Role.SHORT)]


def joining_of(observations: Observations, pace: Pace) -> Joining:
    """Return what became of the short requests of all rounds."""
    counts = Counter[Fate]()
    waits: list[float] = []
    rounds_waited = loose = 0
    for round in observations.of(Role.LONG):
        fates = _fates(round, pace)
        counts.update(fate for _, fate in fates)
        end = max((s.last_ns for s in round.of(Role.LONG) if s.answered), default=0)
        waits += [
            float((pace.begin_ns(short) - short.sent_ns) / (end - short.sent_ns))
            for short, fate in fates
            if fate in (Fate.JOINED, Fate.WAITED)
        ]
        follow = [_follows(short, round, pace) for short, fate in fates if fate is Fate.WAITED]
        loose += follow.count(False)
        joined = any(fate is Fate.JOINED for _, fate in fates)
        rounds_waited += bool(follow) and all(follow) and not joined
    told = {fate.value: counts[fate] for fate in Fate}
    return Joining(waits=tuple(waits), rounds_waited=rounds_waited, loose=loose, **told)


def _follows(short: Stream, round: Round, pace: Pace) -> bool:
    """Tell whether a request that waited began right after another one of the probe had ended."""
    begun = pace.begin_ns(short)
    ends = [s.last_ns for s in round.streams if s.answered and s is not short]
    before = [end for end in ends if end <= begun + pace.gap_ns]
    return bool(before) and begun - max(before) <= 2 * pace.ttft_ns + 4 * pace.gap_ns


# The second test: do the tokens of a request that joined come from the steps of another one?
# Tokens of one step arrive together. Requests are sent at random moments, so without a shared batch
# they do so only by chance, unless a timer sends them.


@dataclass(frozen=True)
class SharedSteps:
    """The joined requests whose tokens were compared with the steps of a long request.

    ``offsets`` are the distance of each request's tokens from the nearest step, as the median over
    its tokens and as a share of the time between two steps: from 0 to 0.5.
    """

    offsets: tuple[float, ...]
    window: float  # the one of WINDOWS whose number of offsets is the least likely
    chance: float  # the probability that so many are in the window without a shared batch
    buffered: bool
    compared: int
    together: int  # offsets within the window
    apart: int  # offsets outside the widest window: these requests shared no step
    shown: bool
    in_turns: bool  # tokens arrive in between, always at the same distance


def shared_steps(observations: Observations, pace: Pace) -> SharedSteps:
    """Compare the tokens of joined requests with the steps of the requests they joined."""
    offsets, references = list[float](), list[int]()
    # The second request of a pair is sent some steps later and is shorter by as many. It ends in
    # the same step as the first only if it joined it; those of a static batch begin together.
    pairs = [round.of(Role.PAIR) for round in observations.of(Role.PAIR) if pace.buffered]
    for pair in pairs:
        if len(pair) == 2 and all(s.answered and len(s.times_ns) == s.asked for s in pair):
            apart_ns = abs(pair[1].last_ns - pair[0].last_ns)
            offsets.append(min(float(apart_ns / max(pace.gap_ns, 1)), 0.5))
            references.append(1)
    for round in [] if pace.buffered else observations.of(Role.LONG):
        longs = [long for long in round.of(Role.LONG) if long.answered]
        for short in (short for short, fate in _fates(round, pace) if fate is Fate.JOINED):
            each = [offset_of(short, long) for long in longs]
            if known := [offset for offset in each if offset is not None]:
                offsets.append(min(known))
                references.append(len(known))
    # The probability that so many offsets are within a window without a shared batch.
    within = {width: sum(offset < width for offset in offsets) for width in WINDOWS}
    chance, window = min(
        (_at_least(count, [1 - (1 - CHANCE * width) ** n for n in references]), width)
        for width, count in within.items()
    )
    chance = min(1.0, len(WINDOWS) * chance)
    enough, apart = len(offsets) >= FEWEST_COMPARED, len(offsets) - within[WINDOW]
    evenly = enough and not pace.buffered and float(np.std(offsets)) < WINDOW / 2
    return SharedSteps(
        tuple(offsets),
        window,
        chance,
        pace.buffered,
        compared=len(offsets),
        together=within[window],
        apart=apart,
        shown=enough and chance < LEVEL,
        in_turns=evenly and apart == len(offsets),
    )


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


def sends_by_timer(observations: Observations, pace: Pace) -> bool:
    """Tell whether tokens are sent at the ticks of a timer, which would hide the steps.

    Requests that begin on an idle server at random moments then get their first token at a tick;
    and if ticks are longer than steps, chunks differ in size but keep up an even rate.
    """
    if pace.buffered:
        ticks = np.geomspace(0.2 * pace.gap_ns, 2 * pace.gap_ns, 1000)
        return _follow_a_grid(observations, ticks, len(ticks))
    streams = [s for s in observations.streams if s.role is not Role.BURST and s.answered]
    gaps = [np.diff(s.arrivals_ns) for s in streams if len(s.arrivals_ns) > 2]
    if not gaps:
        return False
    if any(_evenly_chunked(s) for s in observations.alone):
        return True
    usual = float(np.median(np.concatenate(gaps)))
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
    return np.array(
        [
            min(s.first_ns for s in after) - max(s.last_ns for s in before)
            for before, after in pairwise(filter(None, rounds))
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


# The third test: how many of the requests that are sent at once run at the same time?


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once."""

    sent: int
    refused: int
    most: int  # the largest number in progress at the same time
    exact: bool  # others were waiting meanwhile, and began when room was made
    midway: int  # requests that began while others were in the middle of theirs
    groups: tuple[int, ...]  # sizes of the groups that ran one after another
    gain: float  # tokens per second as a multiple of those of one request alone
    gradual: bool  # the first requests did not begin together
    sequential: bool  # each certainly began after the one before it had ended


def burst_of(round: Round, pace: Pace) -> Burst:
    """Count the slots in a burst."""
    sent = round.of(Role.BURST)
    streams = sorted((s for s in sent if s.times_ns), key=lambda s: s.last_ns)
    gap = median_gap(streams) or pace.gap_ns
    # The first are spans in which a request certainly ran, the others those in which it may have.
    spans = sorted((pace.begin_ns(s, 0.5), s.last_ns) for s in streams)
    overlap, _ = _at_once([(pace.begin_ns(s, 0.85), s.last_ns) for s in streams], 0.0)
    most, groups = _at_once(spans, 0.3 * gap)
    whole = all(s.answered and len(s.times_ns) >= FEWEST_TOKENS for s in sent)
    equal = len({len(s.times_ns) for s in streams}) == 1 or not pace.buffered
    # The first group has only those requests that had arrived, and the last one the rest.
    exact, gradual = equal and max(groups, default=0) in groups[1:-1], False
    midway = 0 if pace.buffered else _midway(streams)
    if midway:
        exact, gradual = _saturated(streams, spans, most, gap, pace)
    duration = max((s.last_ns for s in streams), default=0) - min(s.sent_ns for s in sent)
    tokens = sum(len(s.times_ns) for s in streams)
    return Burst(
        sent=len(sent),
        refused=sum(s.refused for s in sent),
        most=most,
        exact=exact and whole,
        midway=midway,
        groups=groups,
        gain=tokens * pace.gap_ns / max(duration, 1),
        gradual=gradual,
        sequential=max(most, overlap) == 1 and whole and equal,
    )


def _at_once(spans: Spans, shorter_ns: float) -> tuple[int, tuple[int, ...]]:
    """Return the largest number in progress, and the sizes of groups with nothing in between.

    Each counts as a little shorter than it was. A request that follows another one begins at least
    one step after its end, so an end that arrives late does not count twice.
    """
    events = [(begin, -1) for begin, _ in spans]  # which come before the ends of that time
    events += [(max(end - shorter_ns, begin), 1) for begin, end in spans]
    level, most, sizes = 0, 0, list[int]()
    for _, change in sorted(events):
        if change < 0:
            sizes += [0] * (not level)
            sizes[-1] += 1
        level -= change
        most = max(most, level)
    return most, tuple(sizes)


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


def _saturated(
    streams: Sequence[Stream], spans: Spans, most: int, gap: float, pace: Pace
) -> tuple[bool, bool]:
    """Tell whether the slots were full, and whether requests began only gradually.

    The slots were full if the first requests began together, then none for a while, and each later
    one right after one had ended.
    """

    def arrived(begin: float, end: float) -> bool:
        low, high = begin + 0.3 * gap, end - 0.3 * gap
        return any(((s.arrivals_ns > low) & (s.arrivals_ns < high)).any() for s in streams)

    ends, starts = sorted(end for _, end in spans), [begin for begin, _ in spans]
    first = [start for start in starts if start < ends[0] + 0.3 * gap]
    late = starts[len(first) :]
    if not late:
        return False, False
    # Two passes between which nothing arrived were one beginning.
    apart = [after - before for before, after in pairwise(first) if arrived(before, after)]
    gradual = late[0] - first[-1] < max(4 * gap, 3 * max(apart, default=0))
    waits = [start - end for start, end in zip(late, ends, strict=False)]
    tight = np.mean([wait <= 2 * pace.ttft_ns + 4 * gap for wait in waits])
    alone = min(waits) > -0.3 * gap  # room that others left would show before an end
    return len(first) == most and not gradual and alone and bool(tight >= 0.8), bool(gradual)
