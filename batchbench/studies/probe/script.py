"""Plan the requests of a probe: the next round, from what was observed so far.

A round is one of four: a request alone; a long request with short ones that are sent while it runs;
pairs of short ones for a server that sends all tokens at the end; a burst of many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchbench.studies.probe.joining import joining_of
from batchbench.studies.probe.judge import WAITING_ROUNDS
from batchbench.studies.probe.observations import Observations, Pace, Role, pace_of
from batchbench.studies.probe.slots import Burst, burst_of
from batchbench.studies.probe.steps import FEWEST_BEGINNINGS, beginnings_of, shared_steps

WARM_UP_TOKENS, MOST_WARM_UPS = 8, 3
LONE_TOKENS = 24

SHORT_TOKENS = 6  # tokens of a short request; the first one is not compared
MOST_COMPARED = 48  # joined requests after which more would not decide either
FEWEST_JOINED = 6  # short requests that must have joined on a buffered server
ENOUGH_COMPARED = 12
"""Joined requests that are compared even if fewer decide, so that a replica would be seen."""

PAIR_TOKENS, PAIR_STEPS = 5, 2
"""Tokens of the second request of a pair, and by how many the first one is longer and earlier."""

MOST_ROUNDS = 40  # rounds after which no more requests are sent alone
BURSTS = (4, 16, 64)  # requests of a burst; the first is for servers on which requests wait
SLOW_NS = 250_000_000  # servers that take longer for a token get fewer of them to compute
MOST_TOKENS = 1000  # output tokens of the longest request


@dataclass(frozen=True)
class Send:
    """A request to send now."""

    role: Role
    tokens: int


@dataclass(frozen=True)
class Pause:
    """Nothing to send before a time, or before a request ends if that is None."""

    until_ns: int | None


@dataclass(frozen=True)
class Script:
    """The requests of a round.

    Attributes:
        opening: role, tokens and delay of the requests that do not depend on any other.
        shorts: number of short requests, sent one after another.
        first_ns: delay of the first short request.
        pauses_ns: random pause before each short request.
        patience_ns: the next short request is sent after this time, even if one is unanswered.
    """

    opening: Sequence[tuple[Role, int, int]]
    shorts: int = 0
    short_tokens: int = SHORT_TOKENS
    first_ns: int = 0
    pauses_ns: Sequence[int] = ()
    patience_ns: int = 0
    estimate_ns: float = 0.0


@dataclass
class Player:
    """Play a script: say what to send, given the time and the requests in flight."""

    script: Script
    began_ns: int | None = None
    sent: int = 0
    shorts: int = 0
    last_ns: int = 0
    free_ns: int | None = None

    def next(self, now_ns: int, in_flight: int) -> Send | Pause | None:
        """Return the next request, a pause, or None when the round is over."""
        if self.began_ns is None:
            self.began_ns = now_ns
        script = self.script
        if self.sent < len(script.opening):
            role, tokens, delay = script.opening[self.sent]
            if now_ns < self.began_ns + delay:
                return Pause(self.began_ns + delay)
            self.sent += 1
            return Send(role, tokens)
        if self.shorts >= script.shorts or not in_flight:
            return None
        due = self._due(now_ns, in_flight)
        if due is None or now_ns < due:
            return Pause(due)
        self.shorts, self.last_ns, self.free_ns = self.shorts + 1, now_ns, None
        return Send(Role.SHORT, script.short_tokens)

    def _due(self, now_ns: int, in_flight: int) -> int | None:
        """Return when the next short request is due; None if a request must end before."""
        script, began = self.script, self.began_ns or 0
        if not self.shorts:
            return began + script.first_ns + script.pauses_ns[0]
        unanswered = in_flight - len(script.opening)
        if unanswered <= 0:
            self.free_ns = now_ns if self.free_ns is None else self.free_ns
            return self.free_ns + script.pauses_ns[self.shorts]
        return self.last_ns + script.patience_ns if unanswered < 2 else None


def next_script(
    observations: Observations, left_ns: float, random: np.random.Generator
) -> Script | None:
    """Return the next round that fits into the time left; None if there is nothing to learn."""
    alone = [s for r in observations.rounds for s in r.of(Role.ALONE)]
    if not any(s.answered for s in alone) and len(alone) < MOST_WARM_UPS:
        return Script([(Role.ALONE, WARM_UP_TOKENS, 0)])
    pace = pace_of(observations.alone)
    if pace is None:
        return None
    script = (
        _alone(len(alone), pace, observations, random)
        or _join(observations, pace, left_ns, random)
        or _pair(observations, pace, random)
        or _beginning(observations, pace, random)
        or _burst(observations, pace, random)
    )
    return script if script is not None and script.estimate_ns <= left_ns else None


def short_tokens(pace: Pace) -> int:
    """Return the length of short requests, with several chunks."""
    if pace.gap_ns > SLOW_NS:
        return max(4, 2 * pace.chunk + 2)
    return max(SHORT_TOKENS, 2 * pace.chunk + 2)


def _alone(
    done: int, pace: Pace, observations: Observations, random: np.random.Generator
) -> Script | None:
    """Return the next request that runs alone: a longer one, then two short ones."""
    if pace.gap_ns > SLOW_NS:
        lengths = [short_tokens(pace)]
    else:
        lengths = [LONE_TOKENS, *([short_tokens(pace)] * 2)]
    lengths += [LONE_TOKENS] * pace.buffered
    if done > len(lengths):
        return None
    tokens = _within_context(lengths[done - 1], observations)
    return _single(tokens, pace, random)


def _single(tokens: int, pace: Pace, random: np.random.Generator) -> Script:
    delay = int(random.uniform(0, 1) * pace.gap_ns)
    return Script([(Role.ALONE, tokens, delay)], estimate_ns=pace.e2e_ns(tokens))


def _beginning(
    observations: Observations, pace: Pace, random: np.random.Generator
) -> Script | None:
    """Return one more token alone, if too few requests began on an idle server to see a timer."""
    enough = len(beginnings_of(observations)) >= FEWEST_BEGINNINGS
    if enough or len(observations.rounds) > MOST_ROUNDS:
        return None
    # The text of one token may be held back, so ask for more of them after that.
    hidden = sum(bool(s.hidden) for s in observations.streams)
    tokens = min(1 << hidden, WARM_UP_TOKENS)
    return _single(tokens, pace, random) if shared_steps(observations, pace).shown else None


def _within_context(tokens: int, observations: Observations) -> int:
    context = observations.server.context
    return min(tokens, MOST_TOKENS, context // 2 if context else MOST_TOKENS)


# Joining


def _join(
    observations: Observations, pace: Pace, left_ns: float, random: np.random.Generator
) -> Script | None:
    """Return the next round with a long request; None if there were enough of them."""
    seen, shared = joining_of(observations, pace), shared_steps(observations, pace)
    rounds, longs = len(observations.joining), 1
    if rounds >= 10:
        return None
    if not rounds:
        count = 4 if pace.gap_ns < SLOW_NS else 8
    elif seen.joined:
        enough = shared.compared >= MOST_COMPARED or seen.joined >= 2 * MOST_COMPARED
        if enough or (shared.shown and shared.compared >= ENOUGH_COMPARED):
            return None
        if pace.buffered and seen.joined >= FEWEST_JOINED:
            return None
        if shared.in_turns and shared.compared >= ENOUGH_COMPARED:
            return None
        mixed = shared.compared >= ENOUGH_COMPARED and not shared.shown
        longs, count = 2 if mixed and not pace.buffered else 1, 8
    elif seen.waited:
        if seen.rounds_waited >= WAITING_ROUNDS or seen.loose > 2:
            return None
        count = 2
    else:
        count = 4
    share = 0.75 if rounds < 2 else 0.5
    while count > 2:
        script = _long(observations, pace, count, longs, bool(seen.waited), random)
        if script.estimate_ns <= share * left_ns:
            return script
        count //= 2
    return _long(observations, pace, 2, longs, bool(seen.waited), random)


def _long(
    observations: Observations,
    pace: Pace,
    count: int,
    longs: int,
    waiting: bool,
    random: np.random.Generator,
) -> Script:
    """Return a round in which so many short requests can be served while a long one runs."""
    gap, tokens = pace.gap_ns, short_tokens(pace)
    own = 1.3 * pace.e2e_ns(tokens) + 0.5 * gap
    pauses = random.integers(0, max(1, int(gap)), count).tolist()
    first = int(pace.ttft_ns + 3 * gap * max(1, pace.chunk // 2))
    span = first + count * own + 2 * gap
    if waiting:
        span = first + 4 * pace.ttft_ns + 10 * gap
    length = max(10, int(np.ceil((span - pace.ttft_ns) / max(gap, 1))) + 2 * pace.chunk)
    length = _within_context(length, observations)
    start = int(random.uniform(0, 1) * gap)
    opening = [(Role.LONG, length, start)]
    if longs > 1:
        opening.append((Role.LONG, length, start + int(random.uniform(0.1, 0.9) * gap)))
    return Script(
        opening,
        count,
        tokens,
        start + first,
        pauses,
        patience_ns=int(2 * gap if waiting else 3 * pace.e2e_ns(tokens) + 2 * gap),
        estimate_ns=1.3 * pace.e2e_ns(length) * longs + 2 * own,
    )


# Pairs


def _pair(observations: Observations, pace: Pace, random: np.random.Generator) -> Script | None:
    """Return the next pair of a buffered server; None if there were enough of them."""
    shared = shared_steps(observations, pace)
    if not pace.buffered or not joining_of(observations, pace).joined:
        return None
    enough = ENOUGH_COMPARED if shared.shown else MOST_COMPARED
    if len([r for r in observations.rounds if r.of(Role.PAIR)]) >= enough:
        return None
    delay = int((PAIR_STEPS + random.uniform(-0.8, 0.8)) * pace.gap_ns)
    first, second = PAIR_TOKENS + PAIR_STEPS, PAIR_TOKENS
    start = int(random.uniform(0, 1) * pace.gap_ns)
    return Script(
        [(Role.PAIR, first, start), (Role.PAIR, second, start + delay)],
        estimate_ns=1.3 * pace.e2e_ns(first) + pace.gap_ns,
    )


# Bursts


def _burst(observations: Observations, pace: Pace, random: np.random.Generator) -> Script | None:
    """Return the next burst; None if the slots are counted."""
    seen, shared = joining_of(observations, pace), shared_steps(observations, pace)
    waits = not seen.joined and seen.waited
    if not (waits or shared.shown):
        return None
    bursts = [burst_of(round, pace) for round in observations.bursts]
    count = _burst_size(bursts, bool(waits))
    if count is None:
        return None
    longer = 4 if any(b.gradual for b in bursts) else 2 if bursts and bursts[-1].exact else 1
    shortest = longer * max(8, 2 * pace.chunk + 4)
    lengths = [shortest + (5 * i) % (shortest + 1) for i in range(count)]
    if pace.buffered:
        lengths = [10] * count
    delays = np.sort(random.integers(0, max(1, int(0.5 * pace.gap_ns)), count)).tolist()
    told = 1 if waits else observations.server.slots or 4
    at_once = min(count, max(told, *(b.most for b in bursts), 1))
    growth = 1 + min(count, 64) / 24
    steps = np.ceil(count / at_once) * max(lengths) * growth
    return Script(
        [
            (Role.BURST, _within_context(length, observations), delay)
            for length, delay in zip(lengths, delays, strict=True)
        ],
        estimate_ns=float(steps * pace.gap_ns + pace.ttft_ns * count / 4),
    )


def _burst_size(bursts: Sequence[Burst], waits: bool) -> int | None:
    if not bursts:
        return BURSTS[0] if waits else BURSTS[1]
    last = bursts[-1]
    if any(b.refused for b in bursts) or len(bursts) > 6:
        return None
    if last.exact:
        confirmed = any(a.exact and b.exact and a.most == b.most for a, b in pairwise(bursts))
        return None if confirmed or last.most == 1 else last.sent
    larger = [n for n in BURSTS if n > last.sent]
    if last.gradual and sum(b.gradual for b in bursts) < 3:
        return last.sent
    if larger and 2 * last.most >= last.sent:
        return larger[0]
    most = 3 if any(b.exact for b in bursts) else 2
    return last.sent if sum(b.sent == last.sent for b in bursts) < most else None
