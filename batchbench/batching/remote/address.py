"""Addresses of servers, and the ways in which a request to one fails."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import unquote, urlsplit

from batchbench.errors import UsageError, shown
from batchbench.version import __version__

_HOST = re.compile(r"[\w-]+(\.[\w-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*(%[\w.-]+)?", re.ASCII)
"""A name or an IPv4 address, or an IPv6 address with or without its zone."""

_PORTS = {"http": 80, "https": 443}


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


_SETUP = frozenset(
    {
        *(FailureKind.REFUSED, FailureKind.UNREACHABLE, FailureKind.DNS),
        *(FailureKind.TLS, FailureKind.LOCAL, FailureKind.NOT_HTTP, FailureKind.NOT_SSE),
    }
)

_BUSY = (408, 425, 429)


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
            return status < 500 and status not in _BUSY
        return self.kind in _SETUP and not (self.kind is FailureKind.NOT_HTTP and status)


class ServerError(UsageError):
    """A server did not answer a request that prepares the trials."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


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
        option: str = "--target",
    ) -> Address:
        """Parse a URL such as ``http://127.0.0.1:8000`` or ``https://example.org/api/v1``.

        The path is put before the path of every request. A final ``/v1`` is left out, because the
        paths of the API begin with it.

        Raises:
            UsageError: the URL is not one of a server, or the key cannot be sent.
        """
        if "@" in url:
            raise UsageError(f"{option}: a URL with a password is not accepted; use --api-key")
        bare = re.split("[?#]", url, maxsplit=1)[0]  # a query may hold a key
        says = f"{option} {shown(bare)}"
        if "://" not in url:
            raise UsageError(f"{says}: a URL needs its scheme; type {option} http://{shown(bare)}")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise UsageError(f"{says}: a URL has only printable ASCII characters and no spaces")
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise UsageError(f"{says}: is not a URL ({error})") from error
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError(
                f"{says}: is not a URL (a port is a number from 1 to 65535)"
            ) from error
        if parts.scheme not in _PORTS:
            raise UsageError(f"{says}: begin the URL with http:// or https://")
        if not host or port == 0:
            raise UsageError(f"{says}: needs a host and a port, such as http://127.0.0.1:8000")
        host = unquote(host)
        if not _HOST.fullmatch(host):
            raise UsageError(f"{says}: {shown(host)} is not the name of a host")
        if parts.query or parts.fragment:
            raise UsageError(f"{says}: leave out everything from ? or # on")
        path = parts.path.rstrip("/")
        if path.endswith(("/completions", "/chat")):
            raise UsageError(f"{says}: give the server's address alone, the path with --endpoint")
        headers = {} if not api_key else {"Authorization": f"Bearer {_key(api_key)}"}
        return cls(
            parts.scheme,
            host,
            port or _PORTS[parts.scheme],
            path.removesuffix("/v1"),
            headers,
            timeout_s,
            insecure,
        )

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


def _key(api_key: str) -> str:
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise UsageError("--api-key: a key has only printable ASCII characters and no spaces")
    return api_key
