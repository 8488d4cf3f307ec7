"""Responses, server-sent events and their tokens: pure functions of a trial's bytes and stamps.

Tokens are counted by the server: by token ids, by a running count in each chunk, or by ``usage``
at the end. Chunks are not tokens: a server holds back half a character, and sends several tokens
of speculative decoding at once.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import h11
import numpy as np
from numpy.typing import NDArray

from batchbench.batching.remote.exchange import Exchange, Failure, FailureKind
from batchbench.errors import shown

# Responses


@dataclass(frozen=True)
class Response:
    """A response, as far as it has arrived."""

    status: int  # 0 if there is none
    headers: Mapping[str, str]
    pieces: list[tuple[int, bytes]]  # the read that completed each piece of the body; its bytes
    failure: Failure | None = None  # why the response is not whole

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
                complete = isinstance(event, h11.EndOfMessage)
    except h11.RemoteProtocolError as error:
        broken = str(error) if data else None  # else the connection ended early
    failure = _not_http(exchange, status, broken) or exchange.failure
    if failure is None and not complete:
        size = sum(len(read.data) for read in exchange.reads)
        where = "before the response did" if status else "inside the response's headers"
        text = f"the connection ended after {size:,} bytes, {where}"
        if not size:
            text = "the server closed the connection without a response"
        failure = Failure(FailureKind.CLOSED_EARLY, text, status or None)
    return Response(status, headers, pieces, failure)


def _not_http(exchange: Exchange, status: int, broken: str | None) -> Failure | None:
    first = exchange.reads[0].data if exchange.reads else b""
    if broken is None and b"HTTP/1.".startswith(first[:7]):
        return None
    text = f"the response is not HTTP/1.1 ({shown(first[:32])})"
    if first.startswith(b"\x15\x03"):  # an alert
        text = "the server speaks TLS: begin its URL with https://"
    elif status:
        text = f"the response is broken ({shown(broken)})"
    return Failure(FailureKind.NOT_HTTP, text, status or None)


# Events


class Event(NamedTuple):
    """One server-sent event, and the index of the read that completed it."""

    read: int
    data: str
    kind: str = ""


_LINE = re.compile(rb"([^\r\n]*)(?:\r\n|\n|\r)")


def events_of(pieces: Iterable[tuple[int, bytes]], *, whole: bool = True) -> Iterator[Event]:
    """Yield the events of a body, wherever it was cut into pieces.

    ``whole`` says that the body ends with the last piece; an event without the empty line after
    it then counts as well. A field ``error``, which some servers send, is an event of this kind.
    """
    pieces = list(pieces)
    ends = list(accumulate(len(data) for _, data in pieces))
    body = b"".join(data for _, data in pieces) + b"\n\n" * whole
    begin = len(codecs.BOM_UTF8) if body.startswith(codecs.BOM_UTF8) else 0
    lines: list[str] = []
    kind = ""
    for line in _LINE.finditer(body, begin):
        if not line[1]:
            if lines:
                last = min(bisect_right(ends, line.start()), len(ends) - 1)
                yield Event(pieces[last][0], "\n".join(lines), kind)
            lines, kind = [], ""
            continue
        name, _, value = line[1].decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name in ("data", "error"):
            lines.append(value)
        if name in ("event", "error"):
            kind = value if name == "event" else name


# Tokens


class Chunk(NamedTuple):
    """The output of one event; None where the server does not tell."""

    read: int
    time_ns: int
    text: str
    ids: list[int] | None
    running: int | None  # the count of tokens up to it
    tokens: int | None = None  # its own; None if that had to be assumed


@dataclass(frozen=True)
class Reply:
    """The tokens of one request; None where the server does not tell."""

    index: int
    token_times_ns: NDArray[np.int64]  # tokens of one chunk share a time
    token_ids: list[int] | None
    text: str
    usage_output: int | None  # tokens by the server's usage
    usage_input: int | None
    cached_tokens: int | None  # prompt tokens that were not computed
    finish_reason: str | None
    itl_known: bool  # False if the number of tokens of some chunk had to be assumed
    chunks: list[Chunk]
    failure: Failure | None  # the rest is then what had arrived

    @property
    def output_tokens(self) -> int:
        return len(self.token_times_ns)


def parse(
    exchange: Exchange,
    asked_tokens: int | None,
    *,
    fewer: bool = False,
    ends_with_done: bool = True,
) -> Reply:
    """Return the reply to a request of the API with ``"stream": true`` that has ended.

    Args:
        asked_tokens: the output tokens that it must have; None: any number but 0.
        fewer: accept fewer than ``asked_tokens``.
        ends_with_done: the server ends each stream with ``data: [DONE]``.
    """
    response = response_of(exchange)
    stream = _Stream(exchange)
    failure = _no_stream(response)
    if failure is None:
        failure = stream.take(events_of(response.pieces, whole=response.failure is None))
        failure = failure or response.failure or stream.incomplete(ends_with_done)
    return stream.reply(failure or stream.miscounted(asked_tokens, fewer=fewer))


class _Stream:
    """The sum of the events of one request."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._done = False
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._chunks: list[Chunk] = []

    def take(self, events: Iterable[Event]) -> Failure | None:
        """Read events up to the first that is an error."""
        for event in events:
            if event.data.strip() == "[DONE]":
                self._done = True
                continue
            data = json_or_none(event.data)
            told = isinstance(data, dict) and (data.get("error") or data.get("object") == "error")
            if told or event.kind == "error":
                said = shown(_message(data) or event.data)
                text = f"the server reports an error in the stream: {said}"
                return Failure(FailureKind.STREAM_ERROR, text)
            try:
                self._add(event.read, data)
            except (AttributeError, KeyError, TypeError):
                text = f"an event of the stream is not one of the API: {shown(event.data)}"
                return Failure(FailureKind.MALFORMED, text)
        return None

    def _add(self, read: int, data: Any) -> None:
        """Add one event; it raises an error if a part is missing or has another type."""
        if isinstance(usage := data.get("usage"), dict):
            self._usage = usage
        choices = data.get("choices")
        if not choices:
            return
        choice = choices[0]
        if choice.get("finish_reason") is not None:
            self._finish = shown(choice["finish_reason"])
        delta = choice.get("delta") or {}  # at the endpoint of chats
        outputs = ("content", "reasoning_content", "reasoning", "refusal")
        texts = (choice.get("text"), *map(delta.get, outputs))
        text = "".join(text for text in texts if text is not None)
        # Tokens so far: vLLM's continuous usage, or llama.cpp's timings of each token.
        running = _number(usage, "completion_tokens")
        if running is None:
            running = _number(data.get("timings"), "predicted_n")
        before = self._chunks[-1].running if self._chunks else None
        counted = running is not None and before is not None and running > before
        # A chunk that is counted and has no text ends inside a character.
        calls, ids = delta.get("tool_calls") or delta.get("function_call"), _ids(choice, data)
        if text or ids or calls or counted:
            stamp_ns = self._exchange.reads[read].stamp_ns
            self._chunks.append(Chunk(read, stamp_ns, text, ids, running))

    def incomplete(self, ends_with_done: bool) -> Failure | None:
        """Return the failure of a stream that ended without an error, if it lacks something."""
        usage = _number(self._usage, "completion_tokens")
        if self._finish in ("abort", "error"):
            text = f"the server gave up on the request (finish_reason {self._finish})"
            return Failure(FailureKind.STREAM_ERROR, text)
        if not self._done and (ends_with_done or self._finish is None):
            return Failure(FailureKind.NO_DONE, "the stream ends without data: [DONE]")
        if not self._chunks:
            said = f", though its usage counts {usage:,}" if usage else ""
            return Failure(FailureKind.ZERO_TOKENS, f"the stream has no output token{said}")
        if usage is None and any(chunk.ids is None for chunk in self._chunks):
            text = "the stream has neither usage nor token ids, so its tokens cannot be counted"
            return Failure(FailureKind.NO_USAGE, text)
        if self._total() == 0:
            text = "the server's usage counts no output token, though the stream has some"
            return Failure(FailureKind.ZERO_TOKENS, text)
        return None

    def miscounted(self, asked: int | None, *, fewer: bool) -> Failure | None:
        tokens = self._total()
        if asked is None or tokens == asked or (fewer and tokens < asked):
            return None
        text = f"the server produced {tokens:,} output tokens, and {asked:,} were asked for"
        if tokens < asked:
            text = f"the server produced {tokens:,} of {asked:,} output tokens: it stopped at an"
            text += " end token, or its context is full"
        return Failure(FailureKind.USAGE_DIFFERS, text)

    def _total(self) -> int:
        usage = _number(self._usage, "completion_tokens")
        return sum(map(_least_tokens, self._chunks)) if usage is None else usage

    def reply(self, failure: Failure | None) -> Reply:
        """Return the reply, of which a failure leaves what had arrived."""
        total, chunks = self._total(), self._chunks
        counts, known = _tokens_of_chunks(chunks, total)
        times = np.array([chunk.time_ns for chunk in chunks], np.int64)
        ids = [i for chunk in chunks for i in chunk.ids or ()]
        whole = len(ids) == total and all(chunk.ids is not None for chunk in chunks)
        # Surrogates may be split between chunks; half a pair is no text.
        text = "".join(chunk.text for chunk in chunks).encode("utf-16", "surrogatepass")
        return Reply(
            index=self._exchange.index,
            token_times_ns=np.repeat(times, np.array(counts, np.int64)),
            token_ids=ids if whole else None,
            text=text.decode("utf-16", "replace"),
            usage_output=_number(self._usage, "completion_tokens"),
            usage_input=_number(self._usage, "prompt_tokens"),
            cached_tokens=_number(self._usage.get("prompt_tokens_details"), "cached_tokens"),
            finish_reason=self._finish,
            itl_known=known,
            chunks=[
                chunk._replace(tokens=count if known else None)
                for chunk, count in zip(chunks, counts, strict=True)
            ],
            failure=failure,
        )


def _least_tokens(chunk: Chunk) -> int:
    return 1 if chunk.ids is None else len(chunk.ids)


def _tokens_of_chunks(chunks: Sequence[Chunk], total: int) -> tuple[list[int], bool]:
    """Return the tokens of each chunk, ``total`` in all, and whether their numbers are known.

    Without ids and running counts, a chunk has one token if there are as many chunks as tokens.
    Else one is assumed, and the last chunk has the rest.
    """
    running = [0, *(chunk.running for chunk in chunks if chunk.running is not None)]
    if len(running) == len(chunks) + 1 and running[-1] == total and running == sorted(running):
        return [after - before for before, after in pairwise(running)], True
    counts = [_least_tokens(chunk) for chunk in chunks]
    known = sum(counts) == total
    left = total
    for i, count in enumerate(counts):
        counts[i] = min(count, left)
        left -= counts[i]
    if counts:
        counts[-1] += left
    return counts, known


def _ids(choice: Mapping[str, Any], data: Mapping[str, Any]) -> list[int] | None:
    """Return the token ids of a chunk.

    They are in ``token_ids``; with llama.cpp in ``__verbose.tokens`` or ``logprobs.content[].id``.
    """
    found = choice.get("token_ids")
    if found is None and isinstance(verbose := data.get("__verbose"), dict):
        found = verbose.get("tokens") or None
    if found is None:
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        found = [c.get("id") if isinstance(c, dict) else None for c in content or []] or None
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        return None
    return found


def _number(data: object, name: str) -> int | None:
    value = data.get(name) if isinstance(data, dict) else None
    return value if type(value) is int and 0 <= value < 1 << 40 else None


# Responses that are no stream


def _no_stream(response: Response) -> Failure | None:
    """Return the failure of a response that is no stream of events; None if it is one."""
    status, body, kind = response.status, response.body[:65536].lstrip(), FailureKind.NOT_SSE
    content_type = response.headers.get("content-type", "no content type")
    if status not in (0, 200):
        said = f"{_said(response)}{_HINTS.get(status, '')}"
        if 300 <= status < 400 and "location" in response.headers:
            said = f"a redirect to {shown(response.headers['location'])}; give that address"
        return Failure(FailureKind.STATUS, f"the server answers {status}: {said}", status)
    begins = body.startswith((b"data:", b"event:", b":", b"id:", b"retry:"))
    if response.failure is not None or begins or "text/event-stream" in content_type.lower():
        return None
    said = f"the server answers 200 with {_said(response)}"
    if body.startswith(b"<"):
        said += " instead of a stream; check the address and --endpoint"
    elif body.startswith(b"{") and b'"choices"' in body:
        said = 'the server answers with plain JSON instead of a stream; it ignores "stream": true'
    elif body.startswith(b"{") and b'"error"' in body:
        kind = FailureKind.STREAM_ERROR
    else:
        said += f" ({shown(content_type)}) instead of a stream"
    return Failure(kind, said, 200)


def json_or_none(text: str | bytes) -> object:
    """Return the value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message(data: object) -> str | None:
    """Return the message of an error in JSON, as the servers put it."""
    if isinstance(data, str):
        return data
    if isinstance(data, list):
        return _message(data[0]) if data else None
    if isinstance(data, dict):
        for name in ("error", "message", "detail", "msg"):
            if data.get(name) and (found := _message(data[name])):
                return found
    return None


def _said(response: Response) -> str:
    """Return the message in a response's body: of JSON, of a page, or the text itself."""
    text = response.body[:65536].decode(errors="replace").strip()
    if message := _message(json_or_none(text)):
        return shown(" ".join(message.split()), 300).rstrip(".")
    if title := re.search(r"<title[^>]*>([^<]*)</title>", text, re.IGNORECASE):
        return f"a page titled {shown(title[1].strip())!r}"
    return shown(" ".join(text.split())) or "an empty body"


_HINTS = {
    **dict.fromkeys((401, 403), "; give its key with --api-key or OPENAI_API_KEY"),
    404: "; check --model and --endpoint",
    405: "; check --endpoint",
    429: "; it limits the rate of requests or their number",
}


# The client's own part in the times


@dataclass(frozen=True)
class ClientLag:
    """The client's own part in the times of a trial.

    ``merged_share`` is the share of chunks of output that came in one read with a later chunk and
    so have its time, by the client, the network or the server.
    """

    reads: int
    kernel_share: float  # of reads that the kernel stamped; their times hold when read late
    merged_share: float
    loop_p50_ns: int  # bytes waited to be read: measured with kernel stamps, else an upper bound
    loop_p99_ns: int
    late_p99_ns: int  # how much later than it could the client sent a request

    @property
    def stamp_error_p99_ns(self) -> int:
        """Error of the stamps: none if the kernel made (nearly) all, else that of the loop."""
        return 0 if self.kernel_share >= 0.99 else self.loop_p99_ns


def client_lag(exchanges: Sequence[Exchange], replies: Sequence[Reply]) -> ClientLag:
    """Return the client's own part in the times of a trial's requests."""
    reads = [read for exchange in exchanges for read in exchange.reads]
    chunks = sum(len(reply.chunks) for reply in replies)
    alone = sum(len({chunk.read for chunk in reply.chunks}) for reply in replies)
    lags = [read.lag_ns for read in reads] or [0]
    late = [exchange.late_ns for exchange in exchanges] or [0]
    p50, p99 = np.percentile(lags, (50, 99), method="higher")
    return ClientLag(
        reads=len(reads),
        kernel_share=sum(read.kernel for read in reads) / max(1, len(reads)),
        merged_share=(chunks - alone) / max(1, chunks),
        loop_p50_ns=int(p50),
        loop_p99_ns=int(p99),
        late_p99_ns=int(np.percentile(late, 99, method="higher")),
    )
