"""HTTP/1.1 over non-blocking sockets: requests go out when they are due, and reads get time stamps.

One thread serves all connections. During a trial it only moves bytes: each read keeps its bytes
and the time at which they arrived, and ``batching.remote.events`` parses them afterwards. Each
request has a connection of its own, is sent once, and follows no redirect.

All times are nanoseconds of ``time.perf_counter_ns``. On Linux without TLS, the kernel stamps the
bytes when they arrive (SO_TIMESTAMPNS), so a busy client measures the same times. The kernel's
clock is CLOCK_REALTIME; its offset is measured before and after the trial. With TLS, and on other
systems, a stamp is the time at which the client has read the bytes. Bytes that arrive while the
client is busy are merged into one read, and have the stamp of the last of them.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from batchbench.batching.remote.events import Response, response_of
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    Failure,
    FailureKind,
    Feed,
    Outgoing,
    Read,
    ServerError,
    Wait,
    Watcher,
)

_NS = 1_000_000_000

_HEARTBEAT_NS = 20_000_000
"""Longest wait; one that takes longer shows that the client did not get a processor."""

_AT_ONCE_NS = 100_000
"""A wait that is shorter found bytes that had arrived before it."""

_CLOCK_STEP_NS = 200_000
"""Change of the offset between the two clocks beyond which kernel stamps are not used."""

_SO_TIMESTAMPNS = 35
"""The same on all Linux systems but SPARC and PA-RISC; a message of another shape is not read."""

_TIMESPEC = struct.Struct("@qq")

_STAMP_MESSAGE = (socket.SOL_SOCKET, _SO_TIMESTAMPNS, _TIMESPEC.size)

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_Ancillary = list[tuple[int, int, bytes]]

_Where = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class ResponseEnd:
    """The cheapest check that a response is over, made after each read."""

    _HEAD = re.compile(rb"(?:HTTP/\S+ 1.*?\r?\n\r?\n)*(HTTP/\S+ ([^1]..).*?\n)\r?\n", re.DOTALL)
    """The head of the response, after those of 100 Continue and the like."""
    _LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
    _CHUNKED = re.compile(rb"\ntransfer-encoding:[^\n]*chunked", re.IGNORECASE)
    _LAST_CHUNK = b"\r\n0\r\n\r\n"

    def __init__(self) -> None:
        self._head: bytes | None = b""
        self._left: int | None = None  # bytes of a body whose length is told
        self._tail: bytes | None = None  # last bytes of a chunked body

    def reached(self, data: bytes) -> bool:
        """Tell whether the response ends with ``data``; else it ends when the server closes."""
        if self._head is not None:
            self._head += data
            found = self._HEAD.match(self._head)
            if not found:
                return False
            head, status = found.groups()
            data, self._head = self._head[found.end() :], None
            if self._CHUNKED.search(head):
                self._tail = b"\r\n"  # ahead of a body that is one empty chunk
            elif length := self._LENGTH.search(head):
                self._left = int(length[1])
            elif status in (b"204", b"304"):
                self._left = 0
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        if self._tail is not None:
            self._tail = (self._tail + data)[-len(self._LAST_CHUNK) :]
        return self._tail == self._LAST_CHUNK


class _Phase(Enum):
    """Stages of a request; the values complete the sentence of a timeout."""

    CONNECT = "no connection"
    SHAKE = "no end of the TLS handshake"
    WRITE = "the request was not taken"
    READ = "no response"


@dataclass(eq=False)
class _Stream:
    """The connection of one request.

    ``talk`` does a step and yields the events to wait for; it is sent those that came.
    """

    exchange: Exchange
    most_bytes: int
    progress_ns: int
    talk: Generator[int, int, None] = field(init=False)
    phase: _Phase = _Phase.CONNECT
    end: ResponseEnd = field(default_factory=ResponseEnd)
    size: int = 0  # bytes received
    connection: socket.socket | None = None
    waits_for: int = 0  # events for which the selector has the connection


def exchange(
    address: Address,
    feed: Feed,
    watch: Watcher | None = None,
    *,
    until_ns: int | None = None,
    kernel_stamps: bool = True,
) -> list[Exchange]:
    """Send the requests of ``feed`` and return all exchanges, in the order in which they began.

    At ``until_ns`` the trial ends, and requests in flight fail as stopped. ``kernel_stamps`` says
    to use the kernel's stamps where there are any.
    """
    until_ns = sys.maxsize if until_ns is None else until_ns
    client = _Client(address, feed, watch, until_ns, kernel_stamps)
    with client.resources:
        client.run()
    return client.exchanges


class _Client:
    """The loop of one trial."""

    def __init__(
        self, address: Address, feed: Feed, watch: Watcher | None, until_ns: int, stamped: bool
    ) -> None:
        self._address, self._feed, self._watch, self._until_ns = address, feed, watch, until_ns
        self._timeout_ns = int(address.timeout_s * _NS)
        self._tls = _tls_context(address) if address.scheme == "https" else None
        self._routes = _resolve(address)
        self._streams: set[_Stream] = set()
        self._buffer = memoryview(bytearray(1 << 18))
        self._stamped = stamped and self._tls is None and sys.platform == "linux"
        self._offset_ns = _clock_offset_ns()
        self._asked_ns = self._freed_ns = -1  # when the feed last had none; when a request ended
        self._returned_ns, self._base_lag_ns = time.perf_counter_ns(), 0
        self.exchanges: list[Exchange] = []
        self.resources = ExitStack()
        self._selector = self.resources.enter_context(selectors.DefaultSelector())
        self._schedstat: int | None = None
        with suppress(OSError):
            if self._stamped:
                _keep_stamping(self.resources)
            else:  # where Linux counts for how long this thread had no processor
                self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
                self.resources.callback(os.close, self._schedstat)
        self._run_delay_ns = self._run_delay()
        self.resources.callback(self._stop)

    def run(self) -> None:
        more, next_scan_ns = True, 0
        while (now := time.perf_counter_ns()) < self._until_ns:
            wake_ns: int | None = None
            while more and isinstance(answer := self._feed.next(now, len(self._streams)), Outgoing):
                self._start(answer)
                now = time.perf_counter_ns()
            if more:
                self._asked_ns = now
                more = answer is not None
                wake_ns = answer.until_ns if isinstance(answer, Wait) else None
            if not self._streams and wake_ns is None:
                if more:
                    raise RuntimeError("the feed waits, and no request is in flight")
                break
            self._select(now, now + _HEARTBEAT_NS if wake_ns is None else wake_ns)
            if self._returned_ns >= next_scan_ns:
                for stream in list(self._streams):
                    if self._returned_ns - stream.progress_ns > self._timeout_ns:
                        self._advance(stream, partial(stream.talk.throw, TimeoutError()))
                next_scan_ns = self._returned_ns + min(self._timeout_ns // 10, 2 * _HEARTBEAT_NS)
        self._correct_stamps()

    def _stop(self) -> None:
        self._watch = None  # which may have raised the exception
        for stream in list(self._streams):
            self._finish(stream, Failure(FailureKind.STOPPED, "stopped before its end"))

    def _run_delay(self) -> int:
        """Return how long this thread has been ready without a processor; 0 if not known."""
        if self._schedstat is None or sys.platform == "win32":
            return 0
        return int(os.pread(self._schedstat, 64, 0).split()[1])

    def _select(self, now_ns: int, wake_ns: int) -> None:
        """Wait for the sockets until ``wake_ns``, and serve those that are ready."""
        wait_ns = max(0, min(_HEARTBEAT_NS, min(wake_ns, self._until_ns) - now_ns))
        ready = []
        if self._streams:
            ready = self._selector.select(wait_ns / _NS)
        else:  # some systems refuse to wait for no sockets
            time.sleep(wait_ns / _NS)
        returned_ns, run_delay_ns = time.perf_counter_ns(), self._run_delay()
        self._base_lag_ns = max(run_delay_ns - self._run_delay_ns, returned_ns - now_ns - wait_ns)
        if returned_ns - now_ns < _AT_ONCE_NS:
            self._base_lag_ns = returned_ns - self._returned_ns
        self._returned_ns, self._run_delay_ns = returned_ns, run_delay_ns
        for key, events in ready:
            self._advance(key.data, partial(key.data.talk.send, events))

    def _start(self, outgoing: Outgoing) -> None:
        request = self._address.request(outgoing.path, outgoing.body)
        now_ns = time.perf_counter_ns()
        waited = outgoing.due_ns <= self._asked_ns  # it was due, and the feed held it back
        free_ns = max(self._asked_ns, self._freed_ns) if waited else outgoing.due_ns
        exchange = Exchange(outgoing.index, outgoing.due_ns, now_ns)
        exchange.late_ns = max(0, now_ns - free_ns)
        self.exchanges.append(exchange)
        stream = _Stream(exchange, outgoing.most_bytes, now_ns)
        stream.talk = self._talk(stream, memoryview(request))
        self._streams.add(stream)
        self._advance(stream, partial(next, stream.talk))

    def _advance(self, stream: _Stream, step: Callable[[], int]) -> None:
        """Let a request go on until it must wait for its socket."""
        try:
            events = step()
        except StopIteration:
            self._finish(stream)
        except OSError as error:  # also those of ssl
            self._finish(stream, _failure_of(error, stream, self._address))
        else:
            if events != stream.waits_for:
                assert stream.connection is not None
                change = self._selector.modify if stream.waits_for else self._selector.register
                change(stream.connection, events, stream)
                stream.waits_for = events

    def _talk(self, stream: _Stream, unsent: memoryview) -> Generator[int, int, None]:
        """Connect, send the request and read the response."""
        connection = yield from self._connect(stream)
        if self._tls is not None:
            connection = yield from self._shake(stream, connection, self._tls)
        stream.phase = _Phase.WRITE
        while unsent:
            try:
                unsent = unsent[connection.send(unsent) :]
                stream.progress_ns = time.perf_counter_ns()
            except _WOULD_BLOCK:
                events = yield _READ | _WRITE
                if events & _READ and self._read(stream, connection):  # an answer such as 413
                    return
            except (BrokenPipeError, ConnectionResetError):
                break  # the answer may be there, or else reading raises again
        stream.phase = _Phase.READ
        yield _READ
        while not self._read(stream, connection):
            yield _READ

    def _connect(self, stream: _Stream) -> Generator[int, int, socket.socket]:
        """Connect by the first route that works; later requests begin with it."""
        reason: OSError = socket.gaierror("the host is not known")
        routes = self._routes
        for i, (family, where) in enumerate(routes):
            try:
                stream.connection = raw = socket.socket(family, socket.SOCK_STREAM)
                stream.progress_ns = time.perf_counter_ns()
                raw.setblocking(False)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._stamped:
                    raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                _check(raw.connect_ex(where), errno.EINPROGRESS, errno.EWOULDBLOCK)
                yield _WRITE
                _check(raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            except OSError as error:  # of an address family that the system lacks, say
                reason = error
                self._disconnect(stream)
            else:
                stream.progress_ns = time.perf_counter_ns()
                self._routes = routes[i:]
                return raw
        raise reason

    def _shake(
        self, stream: _Stream, raw: socket.socket, tls: ssl.SSLContext
    ) -> Generator[int, int, socket.socket]:
        """Put TLS around a connection."""
        self._selector.unregister(raw)
        stream.phase, stream.waits_for = _Phase.SHAKE, 0
        stream.connection = wrapped = tls.wrap_socket(
            raw, do_handshake_on_connect=False, server_hostname=self._address.host
        )
        while True:
            try:
                wrapped.do_handshake()
                return wrapped
            except ssl.SSLWantReadError:
                yield _READ
            except ssl.SSLWantWriteError:
                yield _WRITE

    def _read(self, stream: _Stream, connection: socket.socket) -> bool:
        """Keep what has arrived, with its stamp; tell whether the response is over.

        The buffer holds more than a record of TLS.
        """
        exchange = stream.exchange
        ancillary: _Ancillary = []
        try:
            if self._stamped and sys.platform != "win32":
                count, ancillary, _, _ = connection.recvmsg_into([self._buffer], 64)
            else:
                count = connection.recv_into(self._buffer)
        except _WOULD_BLOCK:
            return False
        read_ns = stream.progress_ns = time.perf_counter_ns()
        data = bytes(self._buffer[:count])
        stamp_ns = _stamp_ns(ancillary)
        if stamp_ns is None:
            lag_ns = read_ns - self._returned_ns + self._base_lag_ns
            read = Read(read_ns, False, read_ns, data, lag_ns)
        else:
            stamp_ns += self._offset_ns
            read = Read(stamp_ns, True, read_ns, data, max(0, read_ns - stamp_ns))
        exchange.closed = not count
        stream.size += count
        if count:
            exchange.reads.append(read)
        if not count or stream.end.reached(data):
            return True
        if stream.size > stream.most_bytes:
            text = f"the response is longer than {stream.most_bytes:,} bytes"
            exchange.failure = Failure(FailureKind.STOPPED, text)
            return True
        if self._watch is not None:
            self._watch(exchange)
        return False

    def _disconnect(self, stream: _Stream) -> None:
        if stream.connection is not None:
            if stream.waits_for:
                self._selector.unregister(stream.connection)
            stream.connection.close()
        stream.connection, stream.waits_for = None, 0

    def _finish(self, stream: _Stream, failure: Failure | None = None) -> None:
        exchange = stream.exchange
        exchange.failure = failure or exchange.failure
        exchange.ended_ns = self._freed_ns = time.perf_counter_ns()
        if not exchange.failure and exchange.reads and not exchange.closed:
            self._freed_ns = exchange.reads[-1].stamp_ns
        self._disconnect(stream)
        self._streams.remove(stream)
        if self._watch is not None:
            self._watch(exchange)

    def _correct_stamps(self) -> None:
        """Use the times of reading if somebody has set the system's clock meanwhile."""
        step_ns = abs(_clock_offset_ns() - self._offset_ns)
        if step_ns > _CLOCK_STEP_NS:
            for exchange in self.exchanges:
                exchange.reads = [
                    Read(r.read_ns, False, r.read_ns, r.data, r.lag_ns + step_ns)
                    for r in exchange.reads
                ]


def _check(code: int, *fine: int) -> None:
    """Raise the OSError of an error number other than 0 and these."""
    if code not in (0, *fine):
        raise OSError(code, os.strerror(code))


def _stamp_ns(ancillary: _Ancillary) -> int | None:
    """Return the kernel's stamp in what came with some bytes."""
    for level, kind, content in ancillary:
        if (level, kind, len(content)) == _STAMP_MESSAGE:
            seconds, ns = _TIMESPEC.unpack(content)
            return int(seconds * _NS + ns)
    return None


def _keep_stamping(resources: ExitStack) -> None:
    """Keep the kernel stamping: it begins some milliseconds after a socket first asks for it.

    Until then a datagram has the time at which it is read.
    """
    if sys.platform == "win32":
        return
    own = resources.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    own.settimeout(1)
    own.bind(("127.0.0.1", 0))
    own.connect(own.getsockname())
    own.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    for _ in range(100):
        own.send(b"?")
        sent_ns = time.time_ns()
        time.sleep(0.001)
        stamp_ns = _stamp_ns(own.recvmsg(1, 64)[1])
        if stamp_ns is not None and stamp_ns <= sent_ns:
            break


def _clock_offset_ns() -> int:
    """Return CLOCK_MONOTONIC minus CLOCK_REALTIME, from the quickest of some readings."""
    readings = []
    for _ in range(20):
        before, real, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, (before + after) // 2 - real))
    return min(readings)[1]


def _tls_context(address: Address) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if address.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _resolve(address: Address) -> list[tuple[int, _Where]]:
    """Return the ways to connect to a host, in the system's order; none if it is not known."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))


_NO_SOCKETS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


def _failure_of(error: OSError, stream: _Stream, address: Address) -> Failure:
    """Return the failure of a request, in a line that says what to do."""
    kinds, connecting = FailureKind, stream.phase is _Phase.CONNECT
    why = error.strerror or os.strerror(0)
    plain = f"; a server without TLS is http://{address.authority}{address.path_prefix}"
    so_far = "before its response"
    if stream.size:
        so_far = f"after {stream.size:,} bytes of the response"
    if isinstance(error, socket.gaierror):
        text = f"{address}: the host {address.host} is not known; check its name"
        return Failure(kinds.DNS, text)
    if isinstance(error, TimeoutError) and error.errno is None:  # ours
        said = f"nothing more {so_far}" if stream.size else stream.phase.value
        hint = plain if stream.phase is _Phase.SHAKE else " (--timeout)"
        text = f"{address}: {said} for {address.timeout_s:g} s{hint}"
        return Failure(kinds.UNREACHABLE if connecting else kinds.TIMEOUT, text)
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"{address}: the certificate is not trusted ({error.verify_message}); name its"
        text += " authority with SSL_CERT_FILE, or accept it with --insecure"
        return Failure(kinds.TLS, text)
    if isinstance(error, ssl.SSLError) or stream.phase is _Phase.SHAKE:
        reason = getattr(error, "reason", None) or "the connection ended"
        return Failure(kinds.TLS, f"{address}: the TLS handshake failed ({reason}){plain}")
    if isinstance(error, ConnectionRefusedError):
        text = f"{address} refuses connections: is the server running, on this port?"
        return Failure(kinds.REFUSED, text)
    if error.errno in _NO_SOCKETS:
        text = f"this machine has no socket left ({why}): raise ulimit -n, or have fewer requests"
        return Failure(kinds.LOCAL, f"{text} in flight")
    if connecting and not isinstance(error, ConnectionError):
        return Failure(kinds.UNREACHABLE, f"{address} cannot be reached ({why})")
    return Failure(kinds.RESET, f"{address} broke the connection {so_far}")


# Requests that prepare the trials


class _Once:
    """A feed of one request."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._left = [outgoing]

    def next(self, now_ns: int, in_flight: int) -> Outgoing | None:
        return self._left.pop() if self._left else None


def get(address: Address, path: str) -> Response:
    """Return the response to a GET, whatever its status; raise ServerError if there is none."""
    return post(address, path, None)


def post(address: Address, path: str, body: bytes | None) -> Response:
    """Return the response to a POST of JSON; raise ServerError if there is none."""
    feed = _Once(Outgoing(0, time.perf_counter_ns(), body, path))
    (only,) = exchange(address, feed, kernel_stamps=False)
    response = response_of(only)
    if response.failure is not None:
        raise ServerError(response.failure)
    return response
