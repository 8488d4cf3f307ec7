"""The address of a server, requests to it, and what came back: bytes with time stamps.

All times are nanoseconds of ``time.perf_counter_ns``, or of a simulated server's virtual clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from batchbench.errors import UsageError, shown
from batchbench.version import __version__


class FailureKind(StrEnum):
    """Kinds of failures of one request."""

    REFUSED = "refused"  # nothing listens at the address
    UNREACHABLE = "unreachable"  # no route to the host, or no answer to the connection
    DNS = "dns"  # the name of the host has no address
    TLS = "tls"  # the handshake failed, or the certificate is not trusted
    LOCAL = "local"  # this machine has no sockets or ports left
    TIMEOUT = "timeout"  # nothing arrived for as long as --timeout says
    STOPPED = "stopped"  # the client ended the trial before the response was over
    RESET = "reset"  # the server broke the connection
    CLOSED_EARLY = "closed_early"  # the connection ended before the response did
    NOT_HTTP = "not_http"  # the answer is not HTTP/1.1
    STATUS = "status"  # the answer's status is not 200
    NOT_SSE = "not_sse"  # HTML or plain JSON with status 200
    MALFORMED = "malformed"  # an event of the stream is not JSON, or not of the API's shape
    STREAM_ERROR = "stream_error"  # an error inside the stream
    NO_DONE = "no_done"  # the stream ends without data: [DONE]
    NO_USAGE = "no_usage"  # neither usage nor token ids: tokens cannot be counted
    ZERO_TOKENS = "zero_tokens"  # the stream is complete and has no token
    USAGE_DIFFERS = "usage_differs"  # more or fewer tokens than the request asked for


@dataclass(frozen=True)
class Failure:
    """Failure of one request; ``text`` is one line that says what to do where that is known."""

    kind: FailureKind
    text: str
    status: int | None = None

    @property
    def is_usage(self) -> bool:
        """Tell whether the same request would fail again: before a trial, a usage error."""
        status = self.status or 0
        if self.kind is FailureKind.STATUS:
            return status < 500 and status not in (408, 425, 429)
        if self.kind is FailureKind.NOT_HTTP:
            return not status
        return self.kind in ("refused", "unreachable", "dns", "tls", "local", "not_sse")


class ServerError(UsageError):
    """A server did not answer a request that prepares the trials."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


_HOST = re.compile(r"[\w-]+(\.[\w-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*(%[\w.-]+)?", re.ASCII)
"""A name or an IPv4 address, or an IPv6 address with or without its zone."""

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """The address of a server, and what all requests to it have in common.

    ``headers`` may hold a key, so neither ``str`` nor ``repr`` shows them.
    """

    scheme: str
    host: str
    port: int
    path_prefix: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    timeout_s: float = 60.0
    insecure: bool = False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path_prefix}"

    @property
    def authority(self) -> str:
        """The host and the port, the latter only if it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        insecure: bool = False,
    ) -> Address:
        """Return the address in a URL such as ``http://127.0.0.1:8000``, or raise UsageError.

        The path is put before the path of every request. A final ``/v1`` is left out, because the
        paths of the API begin with it.
        """
        if "@" in url:
            raise UsageError("--target: a URL with a password is not accepted; use --api-key")
        bare = shown(re.split("[?#]", url, maxsplit=1)[0])  # a query may hold a key
        says = f"--target {bare}"
        if "://" not in url:
            raise UsageError(f"{says}: a URL needs its scheme; type --target http://{bare}")
        if not _is_plain(url):
            raise UsageError(f"{says}: a URL has only printable ASCII characters and no spaces")
        try:
            parts = urlsplit(url)
            host, port, path = unquote(parts.hostname or ""), parts.port, parts.path.rstrip("/")
        except ValueError as error:
            raise UsageError(
                f"{says}: is not a URL: an IPv6 address stands in brackets, and a port is a number "
                "from 1 to 65535"
            ) from error
        faults = {
            "begin the URL with http:// or https://": parts.scheme not in _PORTS,
            "needs a host and a port, such as http://127.0.0.1:8000": not host or port == 0,
            f"{shown(host)} is not the name of a host": not _HOST.fullmatch(host),
            "leave out everything from ? or # on": parts.query or parts.fragment,
            "give the server's address alone, the path with --endpoint": (
                path.endswith(("/completions", "/chat"))
            ),
        }
        for fault, found in faults.items():
            if found:
                raise UsageError(f"{says}: {fault}")
        if api_key and not _is_plain(api_key):
            raise UsageError("--api-key: a key has only printable ASCII characters and no spaces")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        port, path = port or _PORTS[parts.scheme], path.removesuffix("/v1")
        return cls(parts.scheme, host, port, path, headers, timeout_s, insecure)

    def request(self, path: str, body: bytes | None) -> bytes:
        """Return the bytes of a request: a POST of ``body``, or a GET if there is none."""
        fields = {
            "Host": self.authority,
            "User-Agent": f"batchbench/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **self.headers,
        }
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        verb = "GET" if body is None else "POST"
        lines = [f"{verb} {self.path_prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


@dataclass(frozen=True)
class Outgoing:
    """A request to be sent: a POST of ``body``, or a GET if it is None.

    A response of more than ``most_bytes`` is a failure.
    """

    index: int
    due_ns: int
    body: bytes | None
    path: str
    most_bytes: int = 1 << 24


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

    ``late_ns`` is how much later than it could the client sent it: after it was due, or after the
    arrival of what ended the request in whose place it was sent.
    """

    index: int
    due_ns: int
    sent_ns: int  # when the client began to connect
    reads: list[Read] = field(default_factory=list)
    ended_ns: int = 0  # when the response was over or failed
    late_ns: int = 0
    closed: bool = False  # by the server
    failure: Failure | None = None  # of the connection; `parse` finds those of the response


class Feed(Protocol):
    """The source of requests, which decides when each is sent."""

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        """Return a request to be sent now, a Wait, or None if there are no more.

        Called until it returns a Wait, and again whenever something arrived or ended, or the time
        of the Wait has come.
        """


Watcher = Callable[[Exchange], None]
"""Called after each read of a request and when the request ends. An exception ends the trial."""
