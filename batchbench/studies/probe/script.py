"""Plan the requests of a probe: the next round, from what was observed so far.

A round is one of four: a request alone; a long request with short ones that are sent while it runs;
pairs of short ones for a server that sends all tokens at the end; a burst of many at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchbench.batching.remote.exchange import Outgoing, Wait
from batchbench.studies.probe.judge import (
    FEWEST_BEGINNINGS,
    WAITING_ROUNDS,
    Burst,
    beginnings_of,
    burst_of,
    joining_of,
    shared_steps,
)
from batchbench.studies.probe.observations import Observations, Pace, Role, pace_of

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
class Script:
    """The requests of a round: an opening, then short requests one after another."""

    opening: Sequence[tuple[Role, int, int]]  # role, tokens, and delay of each
    shorts: int = 0
    short_tokens: int = SHORT_TOKENS
    first_ns: int = 0  # delay of the first short request
    pauses_ns: Sequence[int] = ()  # a random pause before each
    patience_ns: int = 0  # after which the next is sent, even if one is unanswered
    estimate_ns: float = 0.0


class Player:
    """The requests of a script, as a feed; ``sent`` are the role and the tokens of each."""

    def __init__(self, script: Script, body: Callable[[int], bytes], path: str) -> None:
        self.sent: list[tuple[Role, int]] = []
        self._script, self._body, self._path = script, body, path
        self._began_ns = self._free_ns = -1
        self._last_ns = 0

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        """Return the next request, a wait, or None when the round is over."""
        if self._began_ns == -1:
            self._began_ns = now_ns
        script, shorts = self._script, len(self.sent) - len(self._script.opening)
        if shorts < 0:
            role, tokens, delay = script.opening[len(self.sent)]
            due: int | None = self._began_ns + delay
        elif shorts < script.shorts and in_flight:
            role, tokens, due = Role.SHORT, script.short_tokens, self._due(now_ns, in_flight)
        else:
            return None
        if due is None or now_ns < due:
            return Wait(due)
        self._last_ns, self._free_ns = now_ns, -1
        self.sent.append((role, tokens))
        return Outgoing(len(self.sent) - 1, now_ns, self._body(tokens), self._path)

    def _due(self, now_ns: int, in_flight: int) -> int | None:
        """Return when the next short request is due; None if a request must end before."""
        script, openings = self._script, len(self._script.opening)
        shorts, unanswered = len(self.sent) - openings, in_flight - openings
        if not shorts:
            return self._began_ns + script.first_ns + script.pauses_ns[0]
        if unanswered <= 0:
            self._free_ns = now_ns if self._free_ns == -1 else self._free_ns
            return self._free_ns + script.pauses_ns[shorts]
        return self._last_ns + script.patience_ns if unanswered < 2 else None


def next_script(
    observations: Observations, left_ns: float, random: np.random.Generator
) -> Script | None:
    """Return the next round that fits into the time left; None if there is nothing to learn."""
    alone = [stream for stream in observations.streams if stream.role is Role.ALONE]
    if len(alone) < MOST_WARM_UPS and not any(s.answered for s in alone):
        return Script([(Role.ALONE, WARM_UP_TOKENS, 0)])
    pace = pace_of(observations.alone)
    if pace is None:
        return None
    planner = _Planner(observations, pace, left_ns, random)
    script = (
        planner.alone(len(alone))
        or planner.join()
        or planner.pair()
        or planner.beginning()
        or planner.burst()
    )
    return script if script is not None and script.estimate_ns <= left_ns else None


class _Planner:
    """The choice of the next round; each method returns None if there were enough of its kind."""

    def __init__(
        self, seen: Observations, pace: Pace, left_ns: float, random: np.random.Generator
    ) -> None:
        self._seen, self._pace, self._left_ns, self._random = seen, pace, left_ns, random
        self._joining, self._shared = joining_of(seen, pace), shared_steps(seen, pace)
        self._waits = bool(self._joining.waited and not self._joining.joined)
        least = 4 if pace.gap_ns > SLOW_NS else SHORT_TOKENS
        self._short_tokens = max(least, 2 * pace.chunk + 2)  # several chunks

    def _moment_ns(self, low: float = 0.0, high: float = 1.0) -> int:
        """Return a random time between two multiples of that of a token."""
        return int(self._random.uniform(low, high) * self._pace.gap_ns)

    def _within_context(self, tokens: int) -> int:
        context = self._seen.server.context
        return min(tokens, MOST_TOKENS, context // 2 if context else MOST_TOKENS)

    def _single(self, tokens: int) -> Script:
        opening = [(Role.ALONE, tokens, self._moment_ns())]
        return Script(opening, estimate_ns=self._pace.e2e_ns(tokens))

    def alone(self, done: int) -> Script | None:
        """Plan a request that runs alone: a longer one, then two short ones."""
        lengths = [LONE_TOKENS, *([self._short_tokens] * 2)]
        if self._pace.gap_ns > SLOW_NS:
            lengths = [self._short_tokens]
        lengths += [LONE_TOKENS] * self._pace.buffered
        if done > len(lengths):
            return None
        return self._single(self._within_context(lengths[done - 1]))

    def beginning(self) -> Script | None:
        """Plan one more token alone, if too few began on an idle server to see a timer."""
        enough = len(beginnings_of(self._seen)) >= FEWEST_BEGINNINGS
        if enough or len(self._seen.rounds) > MOST_ROUNDS or not self._shared.shown:
            return None
        # The text of one token may be held back, so ask for more of them after that.
        hidden = sum(bool(s.hidden) for s in self._seen.streams)
        return self._single(min(1 << hidden, WARM_UP_TOKENS))

    def join(self) -> Script | None:
        """Plan a round with a long request."""
        seen, shared, buffered = self._joining, self._shared, self._pace.buffered
        rounds, longs = len(self._seen.of(Role.LONG)), 1
        if rounds >= 10:
            return None
        if not rounds:
            count = 4 if self._pace.gap_ns < SLOW_NS else 8
        elif seen.joined:
            enough = shared.compared >= MOST_COMPARED or seen.joined >= 2 * MOST_COMPARED
            compared = shared.compared >= ENOUGH_COMPARED
            if (
                enough
                or (compared and (shared.shown or shared.in_turns))
                or (buffered and seen.joined >= FEWEST_JOINED)
            ):
                return None
            longs, count = 2 if compared and not buffered else 1, 8
        elif seen.waited:
            if seen.rounds_waited >= WAITING_ROUNDS or seen.loose > 2:
                return None
            count = 2
        else:
            count = 4
        share = 0.75 if rounds < 2 else 0.5
        while True:
            script = self._long(count, longs)
            if count == 2 or script.estimate_ns <= share * self._left_ns:
                return script
            count //= 2

    def _long(self, count: int, longs: int) -> Script:
        """Return a round in which so many short requests can be served while a long one runs."""
        pace, gap, tokens = self._pace, self._pace.gap_ns, self._short_tokens
        own = 1.3 * pace.e2e_ns(tokens) + 0.5 * gap
        pauses = self._random.integers(0, max(1, int(gap)), count).tolist()
        first = int(pace.ttft_ns + 3 * gap * max(1, pace.chunk // 2))
        waiting = self._joining.waited
        span = first + (4 * pace.ttft_ns + 10 * gap if waiting else count * own + 2 * gap)
        length = max(10, int(np.ceil((span - pace.ttft_ns) / max(gap, 1))) + 2 * pace.chunk)
        length = self._within_context(length)
        start = self._moment_ns()
        opening = [(Role.LONG, length, start)]
        if longs > 1:
            opening.append((Role.LONG, length, start + self._moment_ns(0.1, 0.9)))
        return Script(
            opening,
            count,
            tokens,
            start + first,
            pauses,
            patience_ns=int(2 * gap + (0 if waiting else 3 * pace.e2e_ns(tokens))),
            estimate_ns=1.3 * pace.e2e_ns(length) * longs + 2 * own,
        )

    def pair(self) -> Script | None:
        """Plan a pair of a buffered server."""
        enough = ENOUGH_COMPARED if self._shared.shown else MOST_COMPARED
        done = len(self._seen.of(Role.PAIR))
        if not self._pace.buffered or not self._joining.joined or done >= enough:
            return None
        delay = self._moment_ns(PAIR_STEPS - 0.8, PAIR_STEPS + 0.8)
        start, longer = self._moment_ns(), PAIR_TOKENS + PAIR_STEPS
        return Script(
            [(Role.PAIR, longer, start), (Role.PAIR, PAIR_TOKENS, start + delay)],
            estimate_ns=1.3 * self._pace.e2e_ns(longer) + self._pace.gap_ns,
        )

    def burst(self) -> Script | None:
        """Plan a burst, until the slots are counted."""
        pace = self._pace
        if not (self._waits or self._shared.shown):
            return None
        bursts = [burst_of(round, pace) for round in self._seen.of(Role.BURST)]
        count = _burst_size(bursts, self._waits)
        if count is None:
            return None
        longer = 4 if any(b.gradual for b in bursts) else 2 if bursts and bursts[-1].exact else 1
        shortest = longer * max(8, 2 * pace.chunk + 4)
        lengths = [shortest + (5 * i) % (shortest + 1) for i in range(count)]
        if pace.buffered:
            lengths = [10] * count
        delays = np.sort(self._random.integers(0, max(1, int(0.5 * pace.gap_ns)), count)).tolist()
        told = 1 if self._waits else self._seen.server.slots or 4
        at_once = min(count, max(told, *(b.most for b in bursts), 1))
        growth = 1 + min(count, 64) / 24
        steps = np.ceil(count / at_once) * max(lengths) * growth
        return Script(
            [
                (Role.BURST, self._within_context(length), delay)
                for length, delay in zip(lengths, delays, strict=True)
            ],
            estimate_ns=float(steps * pace.gap_ns + pace.ttft_ns * count / 4),
        )


def _burst_size(bursts: Sequence[Burst], waits: bool) -> int | None:
    """Return the requests of the next burst; None if the slots are counted."""
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
