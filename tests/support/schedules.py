"""Servers of known schedule on an integer clock, without sockets.

``Schedule`` says how a server batches, and ``Core`` computes when each token is ready. All times
are integers in nanoseconds, and exact.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MS = 1_000_000

Kind = Literal["continuous", "static", "sliced"]


@dataclass(frozen=True)
class Schedule:
    """The schedule of a server: the way it batches, and the cost of its passes.

    A pass produces one token of each running request, the first included; it costs ``step_ns``,
    ``row_ns`` for each row beyond the first, and ``prompt_ns`` for each new prompt token.

    Attributes:
        kind: ``continuous`` admits before each pass; ``static`` only when nothing runs;
            ``sliced`` admits before each pass and computes one request in each, in turn.
        slots: requests that may run at once, on each replica.
        replicas: servers behind the address; they get the requests in turn.
        buffered: send a response only when it is complete.
        window_ns: time for which a static server waits for more requests, once it has one.
        context: prompt and output tokens beyond which a request is cut without a word.
        jitter: a pass costs up to this share more, uniformly.
        stall_share: share of passes that cost ``stall_ns`` more, as on a machine with other load.
        delay_ns: the network, each way.
        foreign: requests of other clients: arrival, prompt tokens, output tokens.
        drift: position from which outputs depend on the number of running requests; None: never.
        vocabulary: token ids are below it.
    """

    kind: Kind = "continuous"
    slots: int = 8
    replicas: int = 1
    buffered: bool = False
    step_ns: int = 10 * MS
    row_ns: int = MS // 2
    prompt_ns: int = MS // 10
    window_ns: int = 0
    context: int = 1 << 30
    jitter: float = 0.0
    stall_share: float = 0.0
    stall_ns: int = 0
    delay_ns: int = MS // 20
    seed: int = 0
    foreign: Sequence[tuple[int, int, int]] = ()
    drift: int | None = None
    vocabulary: int = 50_257


FIVE: Mapping[str, Schedule] = {
    "continuous": Schedule(),
    "static": Schedule("static"),
    "serial": Schedule(slots=1),
    "buffered": Schedule(buffered=True),
    "replicas": Schedule(slots=4, replicas=2),
}
"""The five kinds of server that the tests know."""


@dataclass
class Job:
    """A request inside a server."""

    key: int | None  # None: of another client
    prompt: Sequence[int]
    asked: int
    tokens: list[int] = field(default_factory=list)
    admitted_ns: int | None = None
    times_ns: list[int] = field(default_factory=list)


@dataclass
class _Replica:
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    computing: list[Job] = field(default_factory=list)
    since_ns: int | None = None  # a static server's wait for more requests
    turn: int = 0


Ready = Callable[[int, Job, bool], None]
"""Receives a time, the request that has one token more, and whether it is its last."""


class Core:
    """The passes of one server. ``advance`` computes up to the next event.

    ``passes`` counts forward passes of all replicas.
    """

    def __init__(self, schedule: Schedule, ready: Ready) -> None:
        self._schedule, self._ready = schedule, ready
        self._random = random.Random(schedule.seed)
        self._replicas = [_Replica() for _ in range(schedule.replicas)]
        self._events: list[tuple[int, int, Callable[[int], None]]] = []
        self._count = self._arrived = 0
        self.passes = 0
        self.jobs: list[Job] = []
        for at_ns, prompt, output in schedule.foreign:
            self.arrive(at_ns, Job(None, [0] * prompt, output))

    @property
    def next_ns(self) -> int | None:
        """Time of the next event."""
        return self._events[0][0] if self._events else None

    @property
    def running(self) -> int:
        return sum(len(replica.running) for replica in self._replicas)

    @property
    def waiting(self) -> int:
        return sum(len(replica.waiting) for replica in self._replicas)

    def at(self, ns: int, action: Callable[[int], None]) -> None:
        """Do something at a time; what was asked for first is done first."""
        heapq.heappush(self._events, (ns, self._count, action))
        self._count += 1

    def advance(self) -> int:
        """Process the next event and return its time."""
        ns, _, action = heapq.heappop(self._events)
        action(ns)
        return ns

    def arrive(self, ns: int, job: Job) -> None:
        """Let a request arrive at a time that is not over."""

        def arrives(now_ns: int) -> None:
            replica = self._replicas[self._arrived % len(self._replicas)]
            self._arrived += 1
            self.jobs.append(job)
            replica.waiting.append(job)
            # After all that happens at this time, so that equal arrivals share a batch.
            self.at(now_ns, lambda at_ns: self._begin(replica, at_ns))

        self.at(ns, arrives)

    def _begin(self, replica: _Replica, now_ns: int) -> None:
        """Admit requests and begin a pass, unless one is being computed."""
        if replica.computing:
            return
        schedule = self._schedule
        admitted: list[Job] = []
        if schedule.kind != "static" or (
            not replica.running and self._window_over(replica, now_ns)
        ):
            while replica.waiting and len(replica.running) < schedule.slots:
                job = replica.waiting.popleft()
                job.admitted_ns = now_ns
                admitted.append(job)
                replica.running.append(job)
        if not replica.running:
            return
        rows = replica.running
        if schedule.kind == "sliced":
            replica.turn += 1
            rows = [replica.running[replica.turn % len(replica.running)]]
        replica.computing = list(rows)
        new = sum(len(job.prompt) for job in rows if not job.tokens)
        self.passes += 1
        cost = schedule.step_ns + schedule.row_ns * (len(rows) - 1) + schedule.prompt_ns * new
        self.at(now_ns + self._disturbed(cost), lambda at_ns: self._end(replica, at_ns))

    def _window_over(self, replica: _Replica, now_ns: int) -> bool:
        if not replica.waiting or not self._schedule.window_ns:
            return True
        if len(replica.waiting) >= self._schedule.slots:
            replica.since_ns = None
            return True
        if replica.since_ns is None:
            replica.since_ns = now_ns
            over_ns = now_ns + self._schedule.window_ns
            self.at(over_ns, lambda at_ns: self._begin(replica, at_ns))
        if now_ns < replica.since_ns + self._schedule.window_ns:
            return False
        replica.since_ns = None
        return True

    def _disturbed(self, cost_ns: int) -> int:
        more = self._random.random() * self._schedule.jitter
        stalls = self._random.random() < self._schedule.stall_share
        return cost_ns + int(cost_ns * more) + stalls * self._schedule.stall_ns

    def _end(self, replica: _Replica, now_ns: int) -> None:
        """End a pass: every row has one token more."""
        rows, replica.computing = replica.computing, []
        running = len(replica.running)
        for job in rows:
            job.tokens.append(self._token(job, running))
            job.times_ns.append(now_ns)
            most = max(1, self._schedule.context - len(job.prompt))
            last = len(job.tokens) >= min(job.asked, most)
            if last:
                replica.running.remove(job)
            self._ready(now_ns, job, last)
        self.at(now_ns, lambda at_ns: self._begin(replica, at_ns))

    def _token(self, job: Job, running: int) -> int:
        place = len(job.tokens)
        drift = self._schedule.drift
        rows = running if drift is not None and place >= drift else 0
        text = f"{list(job.prompt)} {place} {rows}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % self._schedule.vocabulary
