"""The first test: does a short request begin while a long one is running, or after it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from batchbench.studies.probe.observations import Observations, Pace, Role, Round, Stream

LEFT_STEPS = 2
"""A request joined if the long one still got this many tokens after the joiner's first."""

MOST_SLOWED = 1.3
"""A request of a buffered server that takes longer than this multiple may have waited."""


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
    begun = pace.begin_ns(short)
    enough = end - short.sent_ns > 2 * pace.ttft_ns + 5 * pace.gap_ns
    if not enough:
        return Fate.UNCLEAR
    if pace.buffered:
        left = end - short.last_ns > LEFT_STEPS * pace.gap_ns
        late = short.last_ns - end > 0.5 * pace.e2e_ns(len(short.times_ns))
        return Fate.JOINED if left else Fate.WAITED if late else Fate.UNCLEAR
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
            float((pace.begin_ns(short) - short.sent_ns) / (end - short.sent_ns))
            for short, fate in zip(shorts, of_round, strict=True)
            if fate in (Fate.JOINED, Fate.WAITED)
        ]
        waited = [s for s, fate in zip(shorts, of_round, strict=True) if fate is Fate.WAITED]
        late = sum(not _follows(short, round, pace) for short in waited)
        loose += late
        rounds_waited += bool(waited) and Fate.JOINED not in of_round and not late
    return Joining(
        joined=fates.count(Fate.JOINED),
        waited=fates.count(Fate.WAITED),
        refused=fates.count(Fate.REFUSED),
        unclear=fates.count(Fate.UNCLEAR),
        waits=tuple(waits),
        rounds_waited=rounds_waited,
        loose=loose,
    )


def _follows(short: Stream, round: Round, pace: Pace) -> bool:
    """Tell whether a request that waited began right after another one of the probe had ended."""
    begun = pace.begin_ns(short)
    ends = [s.last_ns for s in round.streams if s.answered and s is not short]
    before = [end for end in ends if end <= begun + pace.gap_ns]
    return bool(before) and begun - max(before) <= 2 * pace.ttft_ns + 4 * pace.gap_ns
