"""A server of known schedule on a virtual clock, and a probe of it.

Times are integer nanoseconds. Everything that happens is an event on a heap; no process waits.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from batchbench.batching.remote.exchange import Wait
from batchbench.studies.probe.observations import Observations, Role, Round, Server, Stream
from batchbench.studies.probe.script import Player, Script, next_script

MS = 1_000_000


@dataclass(frozen=True)
class Kind:
    """A server's schedule and its disturbances; all times in ms.

    Attributes:
        policy: ``continuous``, ``static``, or ``slices`` (one request per pass, in turns).
        slots: requests served at once by one replica.
        step: time of a pass of one row; each further row adds ``growth`` of it.
        prefill: time of a prompt; ``separate`` computes it in a pass of its own.
        window: time that a static server waits for more requests before a batch begins.
        quantum: tokens of one turn of a server with slices.
        chunk: tokens that are sent together; 0 sends all of them at the end.
        tick: tokens are sent at multiples of this time; 0 for at once.
        jitter: standard deviation of the logarithm of a step's time.
        network: mean random delay of a message; ``skew`` separates messages of one step.
        hiccup: probability that a step takes 20 to 120 ms more.
        others: requests per second of other people, each of 5 to ``others_tokens`` tokens.
        limit: requests in the server, running or waiting, beyond which it refuses; 0 for none.
        routing: ``turns``, ``random`` or ``least``, for several replicas.
    """

    policy: str = "continuous"
    slots: int = 8
    step: float = 20.0
    growth: float = 0.03
    prefill: float = 5.0
    separate: bool = False
    window: float = 0.0
    quantum: int = 1
    chunk: int = 1
    tick: float = 0.0
    jitter: float = 0.02
    network: float = 0.1
    skew: float = 0.02
    latency: float = 0.5
    hiccup: float = 0.0
    others: float = 0.0
    others_tokens: int = 60
    limit: int = 0
    replicas: int = 1
    routing: str = "turns"
    early_end: float = 0.0
    context: int | None = None
    tells: bool = False


@dataclass(eq=False)
class Request:
    """A request within the server."""

    tokens: int
    deliver: Callable[[int, int, bool], None]  # time, tokens, whether it is the end
    done: int = 0
    sent: int = 0


@dataclass(eq=False)
class Replica:
    """One engine: its queue, its running requests and its loop."""

    world: World
    queue: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    held: int = 0
    busy: bool = False
    turn: int = 0
    begun: bool = False

    @property
    def load(self) -> int:
        return len(self.queue) + len([r for r in self.running if r.done < r.tokens])

    def arrive(self, request: Request) -> None:
        kind = self.world.kind
        if kind.limit and self.load >= kind.limit:
            request.deliver(self.world.now, -1, True)
            return
        self.queue.append(request)
        if not self.busy:
            self.busy = True
            wait = kind.window if kind.policy == "static" else 0.0
            self.world.after(int(wait * MS), self.step)

    def step(self) -> None:
        kind, random = self.world.kind, self.world.random
        self.running = [r for r in self.running if kind.policy == "static" or r.done < r.tokens]
        if kind.policy == "static" and all(r.done >= r.tokens for r in self.running):
            self.running = []
        admitted: list[Request] = []
        if kind.policy != "static" or not self.running:
            while self.queue and len(self.running) < kind.slots:
                admitted.append(self.queue.pop(0))
                self.running.append(admitted[-1])
        if not self.running:
            self.busy = False
            return
        rows = admitted if admitted and kind.separate else self.running
        if kind.policy == "slices":
            turn = self.turn // kind.quantum % len(self.running)
            rows = [self.running[turn]]
            self.turn += 1
        cost = kind.step * (1 + kind.growth * (len(rows) - 1))
        cost += kind.prefill * sum(r.done == 0 for r in rows)
        cost *= float(np.exp(random.normal(0, kind.jitter)))
        if kind.hiccup and random.random() < kind.hiccup:
            cost += random.uniform(20, 120)
        self.world.after(int(cost * MS), lambda: self.finish(rows))

    def finish(self, rows: list[Request]) -> None:
        kind = self.world.kind
        late = 0
        for row in rows:
            if row.done >= row.tokens:
                continue  # held by a static batch
            row.done += 1
            end = row.done == row.tokens
            due = kind.chunk and (row.done - row.sent >= kind.chunk or row.done == 1)
            if due or end:
                count, row.sent = row.done - row.sent, row.done
                row.deliver(self.world.now + late, count, end)
                late += int(kind.skew * MS)
        self.step()


class World:
    """A server, its clock and a client."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        self.kind, self.random = kind, np.random.default_rng(seed)
        self.now = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.replicas = [Replica(self) for _ in range(kind.replicas)]
        self._next = 0
        if kind.others:
            self.after(self._gap(), self._other)

    def after(self, delay: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + max(delay, 0), next(self._order), event))

    def run(self, until: Callable[[], bool], deadline: int) -> None:
        while not until() and self._events and self._events[0][0] <= deadline:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _gap(self) -> int:
        return int(self.random.exponential(1 / self.kind.others) * 1000 * MS)

    def _other(self) -> None:
        tokens = int(self.random.integers(5, self.kind.others_tokens + 1))
        self.route(Request(tokens, lambda *_: None))
        self.after(self._gap(), self._other)

    def route(self, request: Request) -> None:
        kind = self.kind
        if kind.routing == "random":
            index = int(self.random.integers(kind.replicas))
        elif kind.routing == "least":
            index = min(range(kind.replicas), key=lambda i: self.replicas[i].load)
        else:
            index, self._next = self._next, (self._next + 1) % kind.replicas
        self.replicas[index].arrive(request)

    def delay(self) -> int:
        return int((self.kind.latency + self.random.exponential(self.kind.network)) * MS)

    def arrival(self, time: int, before: int) -> int:
        """Return when a message arrives that the server has at ``time``."""
        tick = int(self.kind.tick * MS)
        if tick:
            time = -(-time // tick) * tick
        return max(time + self.delay(), before)


class Client:
    """Plays a script against a world."""

    def __init__(self, world: World, script: Script, deadline: int) -> None:
        self.world, self.deadline = world, deadline
        self.player = Player(script, lambda tokens: b"", "")
        self.streams: list[Stream] = []
        self.times: list[list[int]] = []
        self.whole: list[Stream] = []
        self.in_flight = 0
        self.over = False
        self._waiting = 0

    def play(self) -> Round:
        self.world.after(0, self.turn)
        self.world.run(lambda: self.over and not self.in_flight, self.deadline)
        streams = []
        for stream, times in zip(self.streams, self.times, strict=True):
            refused = times == [-1]
            known = () if refused else tuple(t for t in times if t <= self.deadline)
            stopped = len(known) < stream.asked and not refused and stream not in self.whole
            failure = "stopped before its end" if stopped else ""
            streams.append(
                Stream(stream.role, stream.asked, stream.sent_ns, known, refused, failure)
            )
        return Round(streams)

    def turn(self) -> None:
        while not self.over:
            move = self.player.next(self.world.now, self.in_flight)
            if move is None:
                self.over = True
            elif isinstance(move, Wait):
                if move.until_ns is not None:
                    self.world.after(move.until_ns - self.world.now, self.turn)
                return
            else:
                self.send(*self.player.sent[-1])

    def send(self, role: Role, tokens: int) -> None:
        world = self.world
        times: list[int] = []
        stream = Stream(role, tokens, world.now)
        self.streams.append(stream)
        self.times.append(times)
        self.in_flight += 1
        length = tokens
        if world.kind.early_end and world.random.random() < world.kind.early_end:
            length = int(world.random.integers(1, tokens + 1))

        def deliver(time: int, count: int, end: bool) -> None:
            if count < 0:
                times.append(-1)
                arrival = time + world.delay()
            else:
                arrival = world.arrival(time, times[-1] if times else 0)
                times.extend([arrival] * count)
            if end:
                world.after(arrival - world.now, lambda: self.ended(stream))

        request = Request(length, deliver)
        world.after(world.delay(), lambda: world.route(request))

    def ended(self, stream: Stream) -> None:
        self.in_flight -= 1
        self.whole.append(stream)
        self.turn()


def observe(kind: Kind, seed: int = 0, max_time_s: float = 60.0) -> tuple[Observations, float]:
    """Probe a server; return what was observed and the seconds that it took."""
    world = World(kind, seed)
    random = np.random.default_rng(seed + 1)
    rounds: list[Round] = []
    told = kind.slots * kind.replicas if kind.tells else None
    server = Server(slots=told, context=kind.context)
    while True:
        seen = Observations(tuple(rounds), server)
        left = max_time_s * 1e9 - world.now
        script = next_script(seen, left, random)
        if script is None:
            return seen, world.now / 1e9
        deadline = int(max_time_s * 1e9)
        rounds.append(Client(world, script, deadline).play())
        if any(s.failure for s in rounds[-1].streams):
            return Observations(tuple(rounds), server), max_time_s
