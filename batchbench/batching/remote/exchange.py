"""Requests and their responses, as bytes with time stamps; HTTP/1.1 framing of a response.

All times are nanoseconds of ``time.monotonic_ns``, or of the virtual clock of a simulated server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import h11

from batchbench.batching.remote.address import Failure, FailureKind
from batchbench.errors import shown

_HTTP = b"HTTP/1."

_TLS_ALERT = b"\x15\x03"


@dataclass(frozen=True)
class Outgoing:
    """A request to be sent: a POST of ``body``, or a GET if it is None."""

    index: int
    due_ns: int
    body: bytes | None
    path: str


@dataclass(frozen=True)
class Wait:
    """No request is due before ``until_ns``; None: before something arrives or ends."""

    until_ns: int | None = None


class Read(NamedTuple):
    """Bytes that were read at once.

    ``stamp_ns`` is when the last of them arrived: by the kernel if ``kernel``, else ``read_ns``.
    ``lag_ns`` is how long they had waited for the client: measured if ``kernel``, else an upper
    bound, from the time at which the client last knew that there was nothing to read.
    """

    stamp_ns: int
    kernel: bool
    read_ns: int
    data: bytes
    lag_ns: int = 0


@dataclass
class Exchange:
    """A request that was sent, and everything that came back.

    ``sent_ns`` is when the client began to connect, ``written_ns`` when the kernel had taken the
    whole request, ``ended_ns`` when the response was over or failed. ``late_ns`` is how much later
    than it could the client sent it: after it was due, or after the arrival of what ended the
    request in whose place it was sent. ``closed`` tells whether the server closed the connection.
    ``failure`` is one of the connection; a response that is complete may still be none of the API
    (``events.parse``).
    """

    index: int
    due_ns: int
    sent_ns: int
    connected_ns: int | None = None
    written_ns: int | None = None
    reads: list[Read] = field(default_factory=list)
    ended_ns: int = 0
    late_ns: int = 0
    closed: bool = False
    failure: Failure | None = None


class Feed(Protocol):
    """The source of requests, which decides when each is sent."""

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        """Return a request to be sent now, a Wait, or None if there are no more.

        Called until it returns a Wait, and again whenever something arrived or ended, or the time
        of the Wait has come.
        """


Watcher = Callable[[Exchange], None]
"""Called after each read of a request and when the request ends. An exception ends the trial."""


@dataclass(frozen=True)
class Response:
    """A response, as far as it goes.

    ``pieces`` are the index of the read that completed a piece of the body, and its bytes.
    ``status`` is 0 if there is none, and ``broken`` says what in it is not HTTP/1.1.
    """

    status: int
    headers: Mapping[str, str]
    pieces: list[tuple[int, bytes]]
    complete: bool
    broken: str | None = None

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


def response_of(exchange: Exchange) -> Response:
    """Return the response in an exchange's bytes, as far as it goes."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "any")]))
    connection.send(h11.EndOfMessage())
    status, headers, pieces = 0, dict[str, str](), list[tuple[int, bytes]]()
    complete, broken = False, None
    data = b""
    try:
        for index, data in enumerate([r.data for r in exchange.reads] + [b""] * exchange.closed):
            connection.receive_data(data)
            while not complete:
                event = connection.next_event()
                if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                    break
                if isinstance(event, h11.Response):
                    status = event.status_code
                    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    pieces.append((index, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    complete = True
    except h11.RemoteProtocolError as error:
        broken = str(error) if data else None  # else the connection ended early
    return Response(status, headers, pieces, complete, broken)


class ResponseEnd:
    """The cheapest check that a response is over, made after each read."""

    _LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
    _CHUNKED = re.compile(rb"\ntransfer-encoding:[^\n]*chunked", re.IGNORECASE)
    _HEAD_END = re.compile(rb"\r?\n\r?\n")
    _LAST_CHUNK = b"\r\n0\r\n\r\n"

    def __init__(self) -> None:
        self._head: bytes | None = b""
        self._left: int | None = None  # bytes of a body whose length is told
        self._tail: bytes | None = None  # last bytes of a chunked body

    def reached(self, data: bytes) -> bool:
        """Tell whether the response ends with ``data``; else it ends when the server closes."""
        if self._head is not None:
            self._head += data
            rest = self._body_begins()
            if rest is None:
                return False
            data = rest
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        if self._tail is not None:
            self._tail = (self._tail + data)[-len(self._LAST_CHUNK) :]
            return self._tail == self._LAST_CHUNK
        return False

    def _body_begins(self) -> bytes | None:
        assert self._head is not None
        while found := self._HEAD_END.search(self._head):
            head, rest = self._head[: found.start() + 1], self._head[found.end() :]
            status = head.partition(b" ")[2][:3]
            if status.startswith(b"1"):  # 100 Continue, say; the response follows
                self._head = rest
                continue
            self._head = None
            if self._CHUNKED.search(head):
                self._tail = b"\r\n"  # ahead of a body that is one empty chunk
            elif length := self._LENGTH.search(head):
                self._left = int(length[1])
            elif status in (b"204", b"304"):
                self._left = 0
            return rest
        return None


def failure_of_response(exchange: Exchange, response: Response) -> Failure | None:
    """Return the failure of a connection, or of a response that is not whole."""
    first = exchange.reads[0].data if exchange.reads else b""
    foreign = not _HTTP.startswith(first[: len(_HTTP)])
    if foreign or response.broken is not None:
        if first.startswith(_TLS_ALERT):
            text = "the server speaks TLS: begin its URL with https://"
        elif response.status:
            text = f"the response is broken ({shown(response.broken)})"
        else:
            text = f"the response is not HTTP/1.1 ({shown(first[:32])})"
        return Failure(FailureKind.NOT_HTTP, text, response.status or None)
    if exchange.failure is not None:
        return exchange.failure
    if response.complete:
        return None
    size = sum(len(read.data) for read in exchange.reads)
    if not size:
        text = "the server closed the connection without a response"
    elif not response.status:
        text = f"the connection ended after {size:,} bytes, inside the response's headers"
    else:
        text = f"the connection ended after {size:,} bytes, before the response did"
    return Failure(FailureKind.CLOSED_EARLY, text, response.status or None)
