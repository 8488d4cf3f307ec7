"""The table of faults: servers that fail in one way each, and how the client must report it.

``playing(fault)`` runs such a server on 127.0.0.1 and yields its URL. The server answers GETs, and
POSTs for which ``when`` is false, as a real one does.
"""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchbench.batching.remote.exchange import FailureKind
from support.schedules import Schedule
from support.servers import Manner, Site
from support.streams import Asked, DialectName, Writer, chunked, event, response

CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""A key and a self-signed certificate for localhost, valid until 2120; trusted nowhere."""

SHORT_S = 0.5
"""Time limit for servers that hang."""

_TOKEN = 7


@dataclass
class Connection:
    """A connection after its request was read."""

    socket: socket.socket
    stop: threading.Event
    asked: Asked
    dialect: DialectName

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def hang(self) -> None:
        """Keep the connection open, and say nothing."""
        self.stop.wait(60)

    def reset(self) -> None:
        """Close with RST in place of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def events(self, tokens: int | None = None) -> bytes:
        """Return a response's bytes up to and with some tokens, or all, with the end if all."""
        asked = self.asked.output_tokens
        writer = Writer(self.dialect, self.asked)
        count = asked if tokens is None else tokens
        return writer.begins() + b"".join(
            writer.token(_TOKEN, last=i == asked - 1) for i in range(count)
        )


Play = Callable[[Connection], None]

When = Callable[[Asked], bool]
"""Tells whether a request is the one that fails."""


def _never(_: Connection) -> None:
    raise AssertionError("no request gets as far as this")


@dataclass(frozen=True)
class Fault:
    """One way to fail.

    Attributes:
        name: of the row.
        kind: kind of the failure that the client reports.
        line: regular expression for its text.
        play: what the server does once it has read the request.
        exit_code: exit code of a run whose every request fails like this, and its GETs if the
            fault is of the connection or ``site_fails``.
        scheme: scheme of the URL.
        tls: the server speaks TLS.
        timeout_s: time limit of the client.
        site_fails: GETs fail as well.
        where: replaces the server: ``closed`` port, ``full`` queue, ``unknown`` host, or one that
            is ``silent`` from the first.
    """

    name: str
    kind: FailureKind
    line: str
    play: Play = _never
    exit_code: int = 1
    scheme: str = "http"
    tls: bool = False
    timeout_s: float = 60.0
    site_fails: bool = False
    where: str = ""


class FaultyServer:
    """A server with a thread for each connection."""

    def __init__(self, fault: Fault, when: When, dialect: DialectName) -> None:
        self._fault, self._when = fault, when
        self._dialect = dialect
        self._site = Site(Schedule(), Manner(dialect))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._tls: ssl.SSLContext | None = None
        if fault.tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(CERTIFICATE)
        self.requests: list[bytes] = []

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._begin(self._accept)

    def _begin(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End all threads; the one that accepts is woken by a last connection."""
        self._stop.set()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            raw, _ = self._listener.accept()
            if self._stop.is_set():
                raw.close()
            else:
                self._begin(self._serve, raw)

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(60)
        with ExitStack() as stack:
            stack.callback(lambda: raw.close())
            try:
                if self._fault.where == "silent":
                    self._stop.wait(60)
                    return
                if self._tls is not None:
                    raw = self._tls.wrap_socket(raw, server_side=True)
                self._answer(raw)
            except OSError:  # the client has gone, or refuses the certificate
                return

    def _answer(self, raw: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            data = raw.recv(1 << 16)
            if not data:
                return
            received += data
            if received[:1] == b"\x16":  # a client of TLS
                raw.sendall(response(b"speak HTTP", "400 Bad Request", "text/plain"))
                return
        head, _, body = received.partition(b"\r\n\r\n")
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
        }
        while len(body) < int(fields.get("content-length", "0")):
            body += raw.recv(1 << 16)
        self.requests.append(received[: len(head) + 4] + body)
        verb, path, _ = head.decode().split(" ", 2)
        if verb == "GET" and not self._fault.site_fails:
            raw.sendall(self._site.page(path))
            return
        connection = Connection(raw, self._stop, Asked.of(path, body or None), self._dialect)
        with self._lock:
            fails = verb == "GET" or self._when(connection.asked)
        if fails:
            self._fault.play(connection)
        else:
            connection.send(connection.events())


def after(good: int) -> When:
    """Return a condition that is false for the first requests, and then true."""
    counter = itertools.count()
    return lambda _: next(counter) >= good


def at_time(place: int, time: int | None) -> When:
    """Return a condition that is true once: when a prompt is seen the ``time``-th time.

    Without a time it is true whenever the prompt is seen. ``place`` is the prompt's place in the
    order in which prompts are first seen, from 0.
    """
    seen: Counter[tuple[int, ...]] = Counter()

    def when(asked: Asked) -> bool:
        prompt = tuple(asked.prompt)
        seen[prompt] += 1
        return list(seen).index(prompt) == place and time in (None, seen[prompt])

    return when


@contextmanager
def playing(
    fault: Fault, *, when: When | None = None, dialect: DialectName = "openai"
) -> Iterator[str]:
    """Run a server that fails, in every POST or when a condition is true; yield its URL."""
    if fault.where == "unknown":
        yield f"{fault.scheme}://{'a' * 64}.invalid:8000"  # no label is so long: no name server
        return
    if fault.where in ("closed", "full"):
        with _port(full=fault.where == "full") as port:
            yield f"{fault.scheme}://127.0.0.1:{port}"
        return
    server = FaultyServer(fault, when or after(0), dialect)
    server.start()
    try:
        yield f"{fault.scheme}://127.0.0.1:{server.port}"
    finally:
        server.stop()


@contextmanager
def _port(*, full: bool) -> Iterator[int]:
    """Yield a port that is bound and refuses connections, or one whose queue is full."""
    with ExitStack() as stack:
        bound = stack.enter_context(closing(socket.socket()))
        bound.bind(("127.0.0.1", 0))
        port = int(bound.getsockname()[1])
        if full:
            bound.listen(0)
            for _ in range(4):
                waiting = stack.enter_context(closing(socket.socket()))
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
        yield port


def _say(*parts: bytes) -> Play:
    """Return a play that sends something and closes."""
    return lambda connection: connection.send(*parts)


def _json(status: str, message: object) -> Play:
    return _say(response(json.dumps(message).encode(), status))


def _partly(then: Callable[[Connection], None]) -> Play:
    """Return a play that sends three tokens, and then does something."""

    def play(connection: Connection) -> None:
        connection.send(connection.events(3))
        then(connection)

    return play


def _in_stream(text: bytes) -> Play:
    """Return a play that sends three tokens, one more event, and a proper end."""
    return _partly(lambda c: c.send(chunked(text), chunked(event("[DONE]")), chunked(b"")))


def _finished(finish: str, usage: int | None, tokens: int = 3, done: bool = True) -> Play:
    """Return a play of a whole stream of three tokens, with this finish reason and usage."""

    def play(connection: Connection) -> None:
        choice = {"index": 0, "text": "", "delta": {}, "finish_reason": finish}
        connection.send(connection.events(tokens), chunked(event({"choices": [choice]})))
        if usage is not None:
            told = {"completion_tokens": usage, "prompt_tokens": 4}
            connection.send(chunked(event({"choices": [], "usage": told})))
        connection.send(chunked(event("[DONE]")) if done else b"", chunked(b""))

    return play


def _closed_body(connection: Connection) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    connection.send(head, event({"choices": [{"text": " a"}]}))


def _flood(connection: Connection) -> None:
    """Send tokens without end."""
    connection.send(connection.events(3))
    token = chunked(event({"choices": [{"index": 0, "text": " a"}]}) * 1000)
    while not connection.stop.is_set():
        connection.send(token)


_LONG = {"error": {"message": "the request exceeds the context size", "code": 400}}
_PAGE = b"<html><head><title>Welcome to nginx!</title></head><body>hi</body></html>"
_WHOLE = {"object": "text_completion", "choices": [{"text": " a"}], "usage": {}}

K = FailureKind

FAULTS: tuple[Fault, ...] = (
    Fault("refused", K.REFUSED, "refuses connections: is the server", exit_code=2, where="closed"),
    Fault("dns", K.DNS, "is not known; check its name", exit_code=2, where="unknown"),
    Fault(
        "queue-full",
        K.UNREACHABLE,
        "no connection for",
        exit_code=2,
        timeout_s=SHORT_S,
        where="full",
    ),
    Fault(
        "silent",
        K.TIMEOUT,
        r"no response for",
        exit_code=2,
        timeout_s=SHORT_S,
        where="silent",
    ),
    Fault(
        *("silent-tls", K.TIMEOUT, r"handshake for 0\.5 s; a server without TLS is http://127"),
        exit_code=2,
        timeout_s=SHORT_S,
        where="silent",
        scheme="https",
    ),
    Fault("floods", K.STOPPED, r"the response is longer than [\d,]+ bytes", _flood),
    Fault("hangs-first", K.TIMEOUT, "no response", Connection.hang, timeout_s=SHORT_S),
    Fault(
        *("hangs-later", K.TIMEOUT, r"nothing more after \d+ bytes of the response for"),
        *(_partly(Connection.hang),),
        timeout_s=SHORT_S,
    ),
    Fault(
        *("hangs-handshake", K.TIMEOUT, "no end of the TLS handshake for"),
        exit_code=2,
        scheme="https",
        timeout_s=SHORT_S,
        where="silent",
    ),
    Fault(
        "certificate",
        K.TLS,
        "certificate is not trusted .*--insecure",
        exit_code=2,
        scheme="https",
        tls=True,
    ),
    Fault("no-tls", K.TLS, "a server without TLS is http://", exit_code=2, scheme="https"),
    Fault(
        *("only-tls", K.NOT_HTTP, "begin its URL with https://"),
        *(_say(b"\x15\x03\x03\x00\x02\x02\x46"), 2),
        site_fails=True,
    ),
    Fault(
        "not-http", K.NOT_HTTP, "not HTTP/1.1", _say(b"SSH-2.0-OpenSSH_9.6\r\n"), 2, site_fails=True
    ),
    Fault("reset-first", K.RESET, "broke the connection before its resp", Connection.reset),
    Fault("reset-later", K.RESET, r"after \d+ bytes of the response", _partly(Connection.reset)),
    Fault("closes-first", K.CLOSED_EARLY, "closed the connection without a", lambda c: None),
    Fault(
        "closes-in-headers",
        K.CLOSED_EARLY,
        "inside the response's headers",
        _say(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    ),
    Fault(
        "closes-between-chunks",
        K.CLOSED_EARLY,
        r"after \d+ bytes, before the response did",
        _partly(lambda c: None),
    ),
    Fault(
        "closes-in-a-chunk",
        K.CLOSED_EARLY,
        "before the response did",
        _partly(lambda c: c.send(chunked(event({"choices": []}))[:9])),
    ),
    Fault(
        "shorter-than-told",
        K.CLOSED_EARLY,
        "before the response did",
        _say(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n"
            + event({"choices": [{"text": " a"}]})
        ),
    ),
    Fault("closes-a-stream-of-no-length", K.NO_DONE, r"without data: \[DONE\]", _closed_body),
    Fault(
        "broken-chunk",
        K.NOT_HTTP,
        "the response is broken",
        _partly(lambda c: c.send(b"zz\r\nnothing\r\n")),
        timeout_s=SHORT_S,
    ),
    Fault("400", K.STATUS, "answers 400: the request exceeds", _json("400 Bad Request", _LONG), 2),
    Fault(
        "401",
        K.STATUS,
        "answers 401: Invalid key; give its key with --api-key",
        _json("401 Unauthorized", {"error": "Invalid key"}),
        2,
        site_fails=True,
    ),
    Fault(
        "404",
        K.STATUS,
        "answers 404: The model `x` does not exist; check --model",
        _json("404 Not Found", {"error": {"message": "The model `x` does not exist."}}),
        2,
    ),
    Fault(
        "422",
        K.STATUS,
        "answers 422: field required",
        _json("422 Unprocessable", {"detail": [{"loc": ["body"], "msg": "field required"}]}),
        2,
    ),
    Fault(
        "429",
        K.STATUS,
        "answers 429: too many; it limits the rate",
        _json("429 Too Many Requests", {"message": "too many"}),
    ),
    Fault(
        "500",
        K.STATUS,
        "answers 500: CUDA out of memory",
        _json("500 Internal Server Error", {"error": {"message": "CUDA out of memory"}}),
    ),
    Fault(
        "503",
        K.STATUS,
        "answers 503: a page titled 'Welcome to nginx!'",
        _say(response(_PAGE, "503 Service Unavailable", "text/html")),
    ),
    Fault(
        "redirect",
        K.STATUS,
        "answers 307: a redirect to https://example.org/; give that",
        _say(
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://example.org/\r\n"
            b"Content-Length: 0\r\n\r\n"
        ),
        2,
    ),
    Fault(
        "html",
        K.NOT_SSE,
        "200 with a page titled 'Welcome to nginx!' instead of a stream",
        _say(response(_PAGE, kind="text/html")),
        2,
    ),
    Fault(
        "json",
        K.NOT_SSE,
        'plain JSON instead of a stream; it ignores "stream"',
        _json("200 OK", _WHOLE),
        2,
    ),
    Fault(
        "json-error",
        K.STREAM_ERROR,
        "answers 200 with no capacity",
        _json("200 OK", {"error": {"message": "no capacity"}}),
    ),
    Fault(
        "error-in-stream",
        K.STREAM_ERROR,
        "an error in the stream: engine died",
        _in_stream(event({"error": {"message": "engine died"}})),
    ),
    Fault(
        "error-field",
        K.STREAM_ERROR,
        "an error in the stream: slot unavailable",
        _in_stream(b'error: {"code": 500, "message": "slot unavailable"}\n\n'),
    ),
    Fault(
        "error-event",
        K.STREAM_ERROR,
        "an error in the stream: overloaded",
        _in_stream(b"event: error\ndata: overloaded\n\n"),
    ),
    Fault("aborted", K.STREAM_ERROR, "gave up on the request", _finished("abort", 3)),
    Fault(
        "not-json",
        K.MALFORMED,
        "an event of the stream is not one of the API: {",
        _in_stream(b'data: {"choices": [\n\n'),
    ),
    Fault("no-done", K.NO_DONE, r"ends without data: \[DONE\]", _finished("length", 3, done=False)),
    Fault("no-usage", K.NO_USAGE, "neither usage nor token ids", _finished("length", None)),
    Fault("no-tokens", K.ZERO_TOKENS, "no output token", _finished("stop", 0, tokens=0)),
    Fault(
        "cut",
        K.USAGE_DIFFERS,
        r"produced 3 of \d+ output tokens: .*its context is full",
        _finished("length", 3),
    ),
    Fault(
        "too-many",
        K.USAGE_DIFFERS,
        r"9,999 output tokens, and \d+ were asked for",
        _finished("length", 9999),
    ),
)
"""The table. Times are never part of it: a server that hangs is given up after ``SHORT_S``."""
