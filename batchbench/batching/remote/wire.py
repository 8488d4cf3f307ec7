"""HTTP/1.1 over non-blocking sockets: requests go out when they are due, and reads get time stamps.

One thread serves all connections. During a trial it only moves bytes: each read keeps its bytes
and the time at which they arrived, and ``batching.remote.events`` parses them afterwards. Each
request has a connection of its own, is sent once, and follows no redirect.

All times are nanoseconds of ``time.monotonic_ns``. On Linux without TLS, the kernel stamps the
bytes when they arrive (SO_TIMESTAMPNS), so a busy client measures the same times. The kernel's
clock is CLOCK_REALTIME; its offset is measured before and after the trial. With TLS, and on other
systems, a stamp is the time at which the client has read the bytes. Bytes that arrive while the
client is busy are merged into one read, and have the stamp of the last of them.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum

from batchbench.batching.remote.address import Address, Failure, FailureKind, ServerError
from batchbench.batching.remote.exchange import (
    Exchange,
    Feed,
    Outgoing,
    Read,
    Response,
    ResponseEnd,
    Wait,
    Watcher,
    failure_of_response,
    response_of,
)

_NS = 1_000_000_000

_HEARTBEAT_NS = 20_000_000
"""Longest wait; one that takes longer shows that the client did not get a processor."""

_AT_ONCE_NS = 100_000
"""A wait that is shorter found bytes that had arrived before it."""

_CLOCK_STEP_NS = 200_000
"""Change of the offset between the two clocks beyond which kernel stamps are not used."""

_BUFFER = 1 << 18

_MOST_BYTES = 1 << 28
"""Longest response; one of 100,000 tokens with their probabilities has a tenth of it."""

_SO_TIMESTAMPNS = 35
"""The same on all Linux systems but SPARC and PA-RISC; a message of another shape is not read."""

_TIMESPEC = struct.Struct("@qq")

_STAMP_MESSAGE = (socket.SOL_SOCKET, _SO_TIMESTAMPNS, _TIMESPEC.size)


class _Phase(Enum):
    """Stages of a request; the values complete the sentence of a timeout."""

    CONNECT = "no connection"
    SHAKE = "no end of the TLS handshake"
    WRITE = "the request was not taken"
    READ = "no response"


class _Stream:
    """The connection of one request."""

    __slots__ = ("end", "exchange", "phase", "progress_ns", "route", "size", "socket", "unsent")

    def __init__(self, outgoing: Outgoing, request: bytes, now_ns: int, route: int) -> None:
        self.exchange = Exchange(outgoing.index, outgoing.due_ns, now_ns)
        self.unsent = memoryview(request)
        self.route = route
        self.phase = _Phase.CONNECT
        self.progress_ns = now_ns
        self.end = ResponseEnd()
        self.size = 0  # bytes received
        self.socket: socket.socket  # while the client has the stream among its own


_Route = tuple[int, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def exchange(
    address: Address,
    feed: Feed,
    watch: Watcher | None = None,
    *,
    until_ns: int | None = None,
    kernel_stamps: bool = True,
) -> list[Exchange]:
    """Send the requests of ``feed`` and return all exchanges, in the order in which they began.

    Args:
        address: the server, and the longest time without progress.
        feed: the requests, each when it is to be sent.
        watch: called after each read and at the end of each request.
        until_ns: the end of the trial; requests in flight then fail as stopped.
        kernel_stamps: use the kernel's stamps where there are any.
    """
    client = _Client(address, feed, watch, until_ns, kernel_stamps)
    try:
        client.run()
    finally:
        client.close()
    return client.exchanges


class _Client:
    """The loop of one trial."""

    def __init__(
        self,
        address: Address,
        feed: Feed,
        watch: Watcher | None,
        until_ns: int | None,
        kernel_stamps: bool,
    ) -> None:
        self._address, self._feed, self._watch = address, feed, watch
        self._until_ns = until_ns
        self._timeout_ns = int(address.timeout_s * _NS)
        self._selector = selectors.DefaultSelector()
        self._streams: set[_Stream] = set()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._tls = _tls_context(address) if address.scheme == "https" else None
        self._stamped = kernel_stamps and self._tls is None and sys.platform == "linux"
        self._stamping = _Stamping(wanted=self._stamped)
        self._run_delay = _RunDelay(wanted=not self._stamped)
        self._offset_ns = _clock_offset_ns()
        self._no_route: Failure | None = None
        self._routes: list[_Route] = []
        self._route = 0  # the first that may work
        self._asked_ns = self._freed_ns = -1  # when the feed last had none; when a request ended
        self._returned_ns, self._base_lag_ns = time.monotonic_ns(), 0
        self.exchanges: list[Exchange] = []

    def run(self) -> None:
        found = _resolve(self._address)
        self._no_route = found if isinstance(found, Failure) else None
        self._routes = [] if isinstance(found, Failure) else found
        more, next_scan_ns = True, 0
        while True:
            now = time.monotonic_ns()
            if self._until_ns is not None and now >= self._until_ns:
                break
            wake_ns: int | None = None
            while more and isinstance(answer := self._feed.next(now, len(self._streams)), Outgoing):
                self._start(answer)
                now = time.monotonic_ns()
            if more:
                self._asked_ns = now
                more = answer is not None
                wake_ns = answer.until_ns if isinstance(answer, Wait) else None
            if not more and not self._streams:
                break
            if not self._streams and wake_ns is None:
                raise RuntimeError("the feed waits, and no request is in flight")
            self._select(now, wake_ns)
            if self._returned_ns >= next_scan_ns:
                self._give_up_on_the_slow(self._returned_ns)
                next_scan_ns = self._returned_ns + min(self._timeout_ns // 10, 2 * _HEARTBEAT_NS)
        self._correct_stamps()

    def close(self) -> None:
        """Close what is open; requests in flight were stopped."""
        for stream in list(self._streams):
            self._finish(stream, Failure(FailureKind.STOPPED, "stopped before its end"), tell=False)
        self._selector.close()
        self._stamping.close()
        self._run_delay.close()

    def _select(self, now_ns: int, wake_ns: int | None) -> None:
        """Wait for the sockets until ``wake_ns``, and serve those that are ready."""
        wait_ns = _HEARTBEAT_NS if wake_ns is None else min(_HEARTBEAT_NS, wake_ns - now_ns)
        if self._until_ns is not None:
            wait_ns = min(wait_ns, self._until_ns - now_ns)
        if self._streams:
            ready = self._selector.select(max(0, wait_ns) / _NS)
        else:  # some systems refuse to wait for no sockets
            time.sleep(max(0, wait_ns) / _NS)
            ready = []
        returned = time.monotonic_ns()
        unscheduled_ns = self._run_delay.since_last_ns()
        if returned - now_ns < _AT_ONCE_NS:
            self._base_lag_ns = returned - self._returned_ns
        else:
            self._base_lag_ns = max(unscheduled_ns, returned - now_ns - max(0, wait_ns))
        self._returned_ns = returned
        for key, events in ready:
            self._advance(key.data, events)

    def _start(self, outgoing: Outgoing) -> None:
        request = self._address.request(outgoing.path, outgoing.body)
        stream = _Stream(outgoing, request, time.monotonic_ns(), self._route)
        waited = outgoing.due_ns <= self._asked_ns  # it was due, and the feed held it back
        free_ns = max(self._asked_ns, self._freed_ns) if waited else outgoing.due_ns
        stream.exchange.late_ns = max(0, stream.exchange.sent_ns - free_ns)
        self.exchanges.append(stream.exchange)
        if self._no_route is not None:
            self._finish(stream, self._no_route)
        else:
            self._connect(stream)

    def _connect(self, stream: _Stream) -> None:
        """Begin to connect by the stream's route."""
        family, where = self._routes[stream.route]
        try:
            raw = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._broken(stream, error)  # no IPv6, say
            return
        stream.socket = raw
        self._streams.add(stream)
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._stamped:
                raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            code = raw.connect_ex(where)
            if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
                raise OSError(code, "connect")
            self._selector.register(raw, selectors.EVENT_WRITE, stream)
        except OSError as error:
            self._broken(stream, error)

    def _advance(self, stream: _Stream, events: int) -> None:
        """Do what a ready socket allows."""
        try:
            if stream.phase is _Phase.CONNECT:
                code = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, "connect")
                self._connected(stream)
            if stream.phase is _Phase.SHAKE:
                self._shake(stream)
            if stream.phase is _Phase.WRITE:
                self._write(stream, events)
            elif stream.phase is _Phase.READ:
                self._read(stream)
        except OSError as error:  # also those of ssl
            self._broken(stream, error)

    def _connected(self, stream: _Stream) -> None:
        stream.exchange.connected_ns = stream.progress_ns = time.monotonic_ns()
        self._route = stream.route
        if self._tls is None:
            stream.phase = _Phase.WRITE
            return
        self._selector.unregister(stream.socket)
        stream.socket = self._tls.wrap_socket(
            stream.socket,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=True,
            server_hostname=self._address.host,
        )
        self._selector.register(stream.socket, selectors.EVENT_WRITE, stream)
        stream.phase = _Phase.SHAKE

    def _shake(self, stream: _Stream) -> None:
        assert isinstance(stream.socket, ssl.SSLSocket)
        try:
            stream.socket.do_handshake()
        except ssl.SSLWantReadError:
            self._selector.modify(stream.socket, selectors.EVENT_READ, stream)
        except ssl.SSLWantWriteError:
            self._selector.modify(stream.socket, selectors.EVENT_WRITE, stream)
        else:
            stream.phase = _Phase.WRITE

    def _write(self, stream: _Stream, events: int) -> None:
        """Send as much as the kernel takes. A server may answer before it has read everything."""
        if events & selectors.EVENT_READ:
            self._read(stream)
            if stream not in self._streams:
                return
        try:
            while stream.unsent:
                stream.unsent = stream.unsent[stream.socket.send(stream.unsent) :]
                stream.progress_ns = time.monotonic_ns()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(stream.socket, both, stream)
            return
        except (BrokenPipeError, ConnectionResetError):
            self._read(stream)  # raises again, unless an answer such as 413 is there
            return
        stream.exchange.written_ns = stream.progress_ns = time.monotonic_ns()
        stream.phase = _Phase.READ
        self._selector.modify(stream.socket, selectors.EVENT_READ, stream)

    def _read(self, stream: _Stream) -> None:
        """Keep what has arrived, with its stamp. The buffer holds more than a record of TLS."""
        exchange = stream.exchange
        ancillary: list[tuple[int, int, bytes]] = []
        try:
            if self._stamped:
                count, ancillary, _, _ = stream.socket.recvmsg_into([self._buffer], 64)
            else:
                count = stream.socket.recv_into(self._buffer)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        read_ns = stream.progress_ns = time.monotonic_ns()
        if not count:
            exchange.closed = True
            self._finish(stream)
            return
        data = bytes(self._buffer[:count])
        exchange.reads.append(self._stamped_read(read_ns, data, ancillary))
        stream.size += count
        if stream.end.reached(data):
            self._finish(stream)
        elif stream.size > _MOST_BYTES:
            text = f"the response is longer than {_MOST_BYTES >> 20} MiB"
            self._finish(stream, Failure(FailureKind.STOPPED, text))
        elif self._watch is not None:
            self._watch(exchange)

    def _stamped_read(
        self, read_ns: int, data: bytes, ancillary: list[tuple[int, int, bytes]]
    ) -> Read:
        for level, kind, content in ancillary:
            if (level, kind, len(content)) == _STAMP_MESSAGE:
                seconds, ns = _TIMESPEC.unpack(content)
                stamp_ns = seconds * _NS + ns + self._offset_ns
                return Read(stamp_ns, True, read_ns, data, max(0, read_ns - stamp_ns))
        return Read(read_ns, False, read_ns, data, read_ns - self._returned_ns + self._base_lag_ns)

    def _give_up_on_the_slow(self, now_ns: int) -> None:
        for stream in list(self._streams):
            if now_ns - stream.progress_ns > self._timeout_ns:
                self._broken(stream, TimeoutError())

    def _broken(self, stream: _Stream, error: OSError) -> None:
        """Try the next address of a host that cannot be reached; else the request has failed."""
        if stream.phase is _Phase.CONNECT and stream.route + 1 < len(self._routes):
            self._disconnect(stream)
            stream.route += 1
            stream.progress_ns = time.monotonic_ns()
            self._connect(stream)
        else:
            self._finish(stream, _failure_of(error, stream, self._address))

    def _disconnect(self, stream: _Stream) -> None:
        if stream in self._streams:
            with suppress(KeyError, ValueError):  # not registered, or closed already
                self._selector.unregister(stream.socket)
            stream.socket.close()
            self._streams.remove(stream)

    def _finish(
        self, stream: _Stream, failure: Failure | None = None, *, tell: bool = True
    ) -> None:
        stream.exchange.failure = failure
        stream.exchange.ended_ns = self._freed_ns = time.monotonic_ns()
        if not failure and stream.exchange.reads and not stream.exchange.closed:
            self._freed_ns = stream.exchange.reads[-1].stamp_ns
        self._disconnect(stream)
        if tell and self._watch is not None:
            self._watch(stream.exchange)

    def _correct_stamps(self) -> None:
        """Use the times of reading if somebody has set the system's clock meanwhile."""
        step_ns = _clock_offset_ns() - self._offset_ns
        if abs(step_ns) > _CLOCK_STEP_NS:
            for exchange in self.exchanges:
                exchange.reads = [
                    Read(read.read_ns, False, read.read_ns, read.data, read.lag_ns + abs(step_ns))
                    for read in exchange.reads
                ]


class _Stamping:
    """Keeps the kernel stamping: it begins some milliseconds after a socket first asks for it."""

    def __init__(self, *, wanted: bool) -> None:
        self._pair: list[socket.socket] = []
        if wanted:
            with suppress(OSError):
                self._begin()

    def _begin(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(1)
            self._pair = [socket.socket()]
            self._pair[0].settimeout(1)
            self._pair[0].connect(listener.getsockname())
            self._pair.append(listener.accept()[0])
        reader, writer = self._pair
        reader.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        for _ in range(100):
            writer.send(b"?")
            if reader.recvmsg(1, 64)[1]:
                break
            time.sleep(0.001)

    def close(self) -> None:
        for one in self._pair:
            one.close()


class _RunDelay:
    """Time for which this thread was ready to run and had no processor, as Linux counts it."""

    def __init__(self, *, wanted: bool) -> None:
        self._file, self._last_ns = -1, 0
        if wanted:
            with suppress(OSError):
                self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self.since_last_ns()

    def since_last_ns(self) -> int:
        """Return the time since the last call; 0 where it is not known."""
        if self._file < 0:
            return 0
        last, self._last_ns = self._last_ns, int(os.pread(self._file, 64, 0).split()[1])
        return self._last_ns - last

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _clock_offset_ns() -> int:
    """Return CLOCK_MONOTONIC minus CLOCK_REALTIME, from the quickest of some readings."""
    readings = []
    for _ in range(20):
        before, real, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, (before + after) // 2 - real))
    return min(readings)[1]


def _tls_context(address: Address) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if address.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _resolve(address: Address) -> list[_Route] | Failure:
    """Return the ways to connect to a host, in the system's order."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        text = f"{address}: the host {address.host} is not known; check its name"
        return Failure(FailureKind.DNS, text)
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))


_KINDS: Mapping[int, FailureKind] = {
    errno.ECONNREFUSED: FailureKind.REFUSED,
    **dict.fromkeys((errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED), FailureKind.RESET),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL),
        FailureKind.LOCAL,
    ),
}


def _failure_of(error: OSError, stream: _Stream, address: Address) -> Failure:
    """Return the failure of a request, in a line that says what to do."""
    connecting = stream.phase is _Phase.CONNECT
    if isinstance(error, TimeoutError) and error.errno is None:  # ours
        kind = FailureKind.UNREACHABLE if connecting else FailureKind.TIMEOUT
        return Failure(kind, _timeout_text(stream, address))
    if isinstance(error, ssl.SSLError) or stream.phase is _Phase.SHAKE:
        return Failure(FailureKind.TLS, _tls_text(error, address))
    unknown = FailureKind.UNREACHABLE if connecting else FailureKind.RESET
    kind = _KINDS.get(error.errno or 0, unknown)
    why = error.strerror if error.strerror != "connect" else None
    texts = {
        FailureKind.REFUSED: f"{address} refuses connections: is the server running, on this port?",
        FailureKind.LOCAL: f"this machine has no socket left ({why}): raise ulimit -n, or have"
        " fewer requests in flight",
        FailureKind.RESET: f"{address} broke the connection {_so_far(stream)}",
        FailureKind.UNREACHABLE: f"{address} cannot be reached"
        f" ({why or os.strerror(error.errno or 0)})",
    }
    return Failure(kind, texts[kind])


def _tls_text(error: OSError, address: Address) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"{address}: the certificate is not trusted ({error.verify_message}); name its"
            " authority with SSL_CERT_FILE, or accept it with --insecure"
        )
    reason = getattr(error, "reason", None) or "the connection ended"
    plain = f"http://{address.authority}{address.path_prefix}"
    return f"{address}: the TLS handshake failed ({reason}); a server without TLS is {plain}"


def _timeout_text(stream: _Stream, address: Address) -> str:
    said = f"nothing more {_so_far(stream)}" if stream.exchange.reads else stream.phase.value
    return f"{address}: {said} for {address.timeout_s:g} s (--timeout)"


def _so_far(stream: _Stream) -> str:
    return f"after {stream.size:,} bytes of the response" if stream.size else "before its response"


# One request that prepares the trials


class _Once:
    """A feed of one request."""

    def __init__(self, path: str, body: bytes | None) -> None:
        self._left = [Outgoing(0, time.monotonic_ns(), body, path)]

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        return self._left.pop() if self._left else None


def get(address: Address, path: str) -> Response:
    """Return the response to a GET, whatever its status; raise ServerError if there is none."""
    return _ask(address, path, None)


def post(address: Address, path: str, body: bytes) -> Response:
    """Return the response to a POST of JSON; raise ServerError if there is none."""
    return _ask(address, path, body)


def _ask(address: Address, path: str, body: bytes | None) -> Response:
    (only,) = exchange(address, _Once(path, body), kernel_stamps=False)
    response = response_of(only)
    failure = failure_of_response(only, response)
    if failure is not None:
        raise ServerError(failure)
    return response
