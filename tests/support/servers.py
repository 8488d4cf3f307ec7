"""Servers for tests: one without sockets on an integer clock, and one that plays it in real time.

``FakeServer(schedule).exchange`` stands in for ``batchbench.batching.remote.wire.exchange``: it
takes the requests of a feed and returns the exchanges that a client would have seen. ``get`` and
``post`` stand in for the functions of these names.

``serving(schedule)`` runs the same server on a port of 127.0.0.1, in a thread and in real time.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from batchbench.batching.remote.events import Response, response_of
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    Failure,
    FailureKind,
    Feed,
    Outgoing,
    Read,
    Wait,
    Watcher,
)
from support.schedules import Core, Job, Schedule
from support.streams import Asked, DialectName, Writer, response

MODEL = "fake-model"


@dataclass(frozen=True)
class Manner:
    """The manner in which a server speaks, apart from when.

    ``dialect``, ``per_chunk`` and ``usage_alone`` are those of ``streams.Writer``. ``kernel`` and
    ``client_lag_ns`` belong to the client: whether its kernel stamps, and how late it reads.
    """

    dialect: DialectName = "llama.cpp"
    per_chunk: int = 1
    usage_alone: bool | None = None
    cached_tokens: int = 0
    kernel: bool = True
    client_lag_ns: int = 0


class Site:
    """The pages of a server beside its streams, and its counters."""

    def __init__(self, schedule: Schedule, manner: Manner) -> None:
        self.schedule, self.manner = schedule, manner
        self.passes = self.running = self.waiting = 0

    def page(self, path: str) -> bytes:
        """Return the response to a GET."""
        body = self._pages().get(path)
        if body is None:
            return response(b'{"error": {"message": "no such page"}}', "404 Not Found")
        return response(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    def _pages(self) -> Mapping[str, str | Mapping[str, Any]]:
        model: dict[str, Any] = {"id": MODEL, "object": "model"}
        context = min(self.schedule.context, 4096)
        pages: dict[str, str | Mapping[str, Any]] = {"/health": {"status": "ok"}}
        if self.manner.dialect == "llama.cpp":
            model |= {"owned_by": "llamacpp", "meta": {"n_ctx": context, "n_vocab": 50257}}
            slots = self.schedule.slots * self.schedule.replicas
            settings = {"n_ctx": context}
            pages["/props"] = {"total_slots": slots, "default_generation_settings": settings}
            pages["/metrics"] = (
                f"llamacpp:n_decode_total {self.passes}\n"
                f"llamacpp:requests_processing {self.running}\n"
                f"llamacpp:requests_deferred {self.waiting}\n"
            )
        if self.manner.dialect == "vllm":
            model |= {"owned_by": "vllm", "max_model_len": context}
            pages["/version"] = {"version": "0.0.fake"}
            pages["/metrics"] = (
                f"vllm:iteration_tokens_total_count {self.passes}.0\n"
                f"vllm:num_requests_running {self.running}.0\n"
                f"vllm:num_requests_waiting {self.waiting}.0\n"
            )
        pages["/v1/models"] = {"object": "list", "data": [model]}
        return pages


@dataclass
class _Reply:
    """A response that is being written; ``held`` is what a buffering server keeps back."""

    exchange: Exchange
    writer: Writer
    begun: bool = False
    held: bytes = b""


class FakeServer:
    """A server of known schedule on a virtual clock, with the client that uses it.

    Each call of ``exchange`` is a trial of its own that begins at 0. ``passes`` counts on.
    ``jobs`` are those of the last trial, with the times at which each was admitted and each of its
    tokens was ready.
    """

    def __init__(self, schedule: Schedule | None = None, manner: Manner | None = None) -> None:
        self.schedule, self.manner = schedule or Schedule(), manner or Manner()
        self._site = Site(self.schedule, self.manner)
        self.jobs: list[Job] = []

    @property
    def passes(self) -> int:
        return self._site.passes

    def get(self, address: Address | None, path: str) -> Response:
        return self._whole(self._site.page(path))

    def post(self, address: Address | None, path: str, body: bytes) -> Response:
        return self._whole(response(b"{}", "404 Not Found"))

    def _whole(self, data: bytes) -> Response:
        return response_of(Exchange(0, 0, 0, reads=[Read(0, True, 0, data)], closed=True))

    def exchange(
        self,
        address: Address | None,
        feed: Feed,
        watch: Watcher | None = None,
        *,
        until_ns: int | None = None,
        kernel_stamps: bool = True,
    ) -> list[Exchange]:
        """Return the exchanges of a trial, in the order in which they began."""
        trial = _Trial(self.schedule, self.manner, watch, kernel_stamps)
        self.jobs = trial.core.jobs
        try:
            return trial.run(feed, until_ns)
        finally:
            self._site.passes += trial.core.passes


class _Trial:
    """The client's loop on the virtual clock."""

    def __init__(
        self, schedule: Schedule, manner: Manner, watch: Watcher | None, kernel: bool
    ) -> None:
        self.schedule, self.manner, self.watch = schedule, manner, watch
        self.kernel = kernel and manner.kernel
        self.core = Core(schedule, self._ready)
        self.replies: dict[int, _Reply] = {}
        self.in_flight = 0

    def run(self, feed: Feed, until_ns: int | None) -> list[Exchange]:
        now, more, wake_ns = 0, True, None
        while until_ns is None or now < until_ns:
            while more and isinstance(answer := feed.next(now, self.in_flight), Outgoing):
                self._send(answer, now)
            if more:
                more = answer is not None
                wake_ns = answer.until_ns if isinstance(answer, Wait) else None
            if not more and not self.in_flight:
                break
            event_ns = self.core.next_ns
            if event_ns is None or (more and wake_ns is not None and wake_ns < event_ns):
                assert wake_ns is not None, "the feed waits for ever"
                now = max(now, wake_ns)
            else:
                now = self.core.advance()
                while self.core.next_ns == now:
                    self.core.advance()
        for reply in self.replies.values():
            if not reply.exchange.ended_ns:
                reply.exchange.failure = Failure(FailureKind.STOPPED, "stopped before its end")
                reply.exchange.ended_ns = now
        return [reply.exchange for reply in self.replies.values()]

    def _send(self, outgoing: Outgoing, now_ns: int) -> None:
        asked = Asked.of(outgoing.path, outgoing.body)
        delay = self.schedule.delay_ns
        exchange = Exchange(outgoing.index, outgoing.due_ns, now_ns)
        key = len(self.replies)
        self.replies[key] = _Reply(exchange, _writer(self.manner, asked))
        self.in_flight += 1
        job = Job(key, asked.prompt, asked.output_tokens)
        self.core.arrive(now_ns + 3 * delay, job)

    def _ready(self, now_ns: int, job: Job, last: bool) -> None:
        if job.key is None:
            return
        reply = self.replies[job.key]
        data = _next_bytes(reply, self.schedule, job, last)
        if data:
            stamp_ns = now_ns + self.schedule.delay_ns
            self.core.at(
                stamp_ns + self.manner.client_lag_ns,
                lambda read_ns: self._arrives(reply.exchange, stamp_ns, read_ns, data, last),
            )

    def _arrives(
        self, exchange: Exchange, stamp_ns: int, read_ns: int, data: bytes, last: bool
    ) -> None:
        stamp = stamp_ns if self.kernel else read_ns
        exchange.reads.append(Read(stamp, self.kernel, read_ns, data, read_ns - stamp_ns))
        if last:
            exchange.ended_ns = read_ns
            self.in_flight -= 1
        if self.watch is not None:
            self.watch(exchange)


def _writer(manner: Manner, asked: Asked) -> Writer:
    return Writer(manner.dialect, asked, manner.per_chunk, manner.usage_alone, manner.cached_tokens)


def _next_bytes(reply: _Reply, schedule: Schedule, job: Job, last: bool) -> bytes:
    """Return what a server sends now that a request has one token more."""
    data = reply.writer.token(job.tokens[-1], last)
    if data and not reply.begun:
        data, reply.begun = reply.writer.begins() + data, True
    if schedule.buffered and not last:
        reply.held += data
        return b""
    data, reply.held = reply.held + data, b""
    return data


# The same server on a port


@dataclass
class _Connection:
    socket: socket.socket
    received: bytes = b""
    reply: _Reply | None = None
    unsent: bytes = b""
    closing: bool = False


class SocketServer(threading.Thread):
    """A server of known schedule on a port of 127.0.0.1, in real time.

    Use ``serving``, which starts and stops it.
    """

    def __init__(self, schedule: Schedule, manner: Manner) -> None:
        super().__init__(daemon=True)
        self.schedule, self.manner = schedule, manner
        self.site = Site(schedule, manner)
        self.core = Core(schedule, self._ready)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._stopper = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._connections: dict[int, _Connection] = {}
        self._began_ns = time.monotonic_ns()
        self._served = 0
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def stop(self) -> None:
        self._stopper.send(b"x")
        self.join(10)
        assert not self.is_alive()
        for connection in self._connections.values():
            connection.socket.close()
        for one in (self._listener, self._wake, self._stopper, self._selector):
            one.close()

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self._began_ns

    def run(self) -> None:
        while True:
            due_ns = self.core.next_ns
            wait_s = None if due_ns is None else max(0, due_ns - self._now_ns()) / 1e9
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self._wake:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive(key.data)
            while (due_ns := self.core.next_ns) is not None and due_ns <= self._now_ns():
                self.core.advance()

    def _accept(self) -> None:
        raw, _ = self._listener.accept()
        raw.setblocking(True)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(raw, selectors.EVENT_READ, _Connection(raw))

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except OSError:
            data = b""
        connection.received += data
        head, found, body = connection.received.partition(b"\r\n\r\n")
        length = _content_length(head)
        if not data or (found and len(body) >= length):
            self._selector.unregister(connection.socket)
        if not data:
            connection.socket.close()
        elif found and len(body) >= length:
            verb, path, _ = head.decode("latin-1").split(" ", 2)
            self._answer(connection, verb, path, body)

    def _answer(self, connection: _Connection, verb: str, path: str, body: bytes) -> None:
        if verb == "GET":
            self.site.passes = self.core.passes
            self.site.running, self.site.waiting = self.core.running, self.core.waiting
            self._send(connection, self.site.page(path), last=True)
            return
        self.bodies.append(json.loads(body))
        asked = Asked.of(path, body)
        key, self._served = self._served, self._served + 1
        self._connections[key] = connection
        connection.reply = _Reply(Exchange(key, 0, 0), _writer(self.manner, asked))
        self.core.arrive(self._now_ns(), Job(key, asked.prompt, asked.output_tokens))

    def _ready(self, now_ns: int, job: Job, last: bool) -> None:
        if job.key is None:
            return
        connection = self._connections[job.key]
        assert connection.reply is not None
        data = _next_bytes(connection.reply, self.schedule, job, last)
        if data:
            self._send(connection, data, last=last)
        if last:
            del self._connections[job.key]

    def _send(self, connection: _Connection, data: bytes, *, last: bool) -> None:
        try:
            connection.socket.sendall(data)
        except OSError:  # the client has gone
            return
        finally:
            if last:
                connection.socket.close()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


@contextmanager
def serving(
    schedule: Schedule | None = None, manner: Manner | None = None
) -> Iterator[SocketServer]:
    """Run a server of known schedule in real time; its address is ``url``."""
    server = SocketServer(schedule or Schedule(), manner or Manner())
    server.start()
    try:
        yield server
    finally:
        server.stop()
