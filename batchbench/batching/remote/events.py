"""Server-sent events, and the tokens in them: pure functions of the bytes and stamps of a trial.

Tokens are counted by the server: by token ids, by a running count in each chunk, or by ``usage``
at the end. Chunks are not tokens: a server holds back half a character, and sends several tokens
of speculative decoding at once.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.remote.address import Failure, FailureKind
from batchbench.batching.remote.exchange import (
    Exchange,
    Response,
    failure_of_response,
    response_of,
)
from batchbench.errors import shown

_DONE = "[DONE]"

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
"""Fields of a chat chunk's ``delta`` that hold output; ``role`` alone holds none."""

_CALLS = ("tool_calls", "function_call")

_BROKEN_OFF = ("abort", "error")
"""Finish reasons of a request that the server gave up."""


class StreamFormat(Protocol):
    """The part of a server's dialect that its streams need."""

    @property
    def ends_with_done(self) -> bool:
        """Tell whether each stream ends with ``data: [DONE]``."""


@dataclass(frozen=True)
class OpenAIFormat:
    """The format of OpenAI's own streams."""

    ends_with_done: bool = True


@dataclass(frozen=True)
class Event:
    """One server-sent event, and the index of the read that completed it."""

    read: int
    data: str
    kind: str = ""


@dataclass(frozen=True)
class Chunk:
    """The output of one event; ``tokens`` is None if the event does not tell their number."""

    read: int
    time_ns: int
    text: str
    tokens: int | None


@dataclass(frozen=True)
class Reply:
    """The tokens of one request.

    Attributes:
        token_times_ns: time of each output token; tokens of one chunk share a time.
        shared: for each token, whether another has the same time for want of a finer one: it came
            in the same chunk, or in the same read of the client.
        token_ids: all ids, or None if the server does not tell them.
        usage_output: output tokens by the server's ``usage``; likewise ``usage_input`` and
            ``cached_tokens``, prompt tokens that were not computed.
        itl_known: False if the number of tokens of some chunk had to be assumed.
        chunks: events with output.
        failure: reason for which the reply does not count; the rest is then what had arrived.
    """

    index: int
    token_times_ns: NDArray[np.int64]
    shared: NDArray[np.bool_]
    token_ids: list[int] | None
    text: str
    usage_output: int | None
    usage_input: int | None
    cached_tokens: int | None
    finish_reason: str | None
    itl_known: bool
    chunks: list[Chunk]
    failure: Failure | None

    @property
    def output_tokens(self) -> int:
        return len(self.token_times_ns)

    @property
    def first_token_ns(self) -> int | None:
        """Time of the first output, also if the tokens could not be counted."""
        return self.chunks[0].time_ns if self.chunks else None


def parse(exchange: Exchange, dialect: StreamFormat, asked_tokens: int | None) -> Reply:
    """Return the reply in an exchange.

    Args:
        exchange: a request of the API with ``"stream": true``, ended.
        dialect: the server's dialect.
        asked_tokens: the output tokens that the request must have; None: any number but 0.
    """
    response = response_of(exchange)
    failure = failure_of_response(exchange, response)
    stream = _Stream(exchange)
    if response.status not in (0, 200):
        return stream.reply(_status_failure(response))
    if failure is None and not _is_sse(response):
        return stream.reply(_not_sse(response))
    stream.take(events_of(response.pieces, whole=failure is None))
    failure = stream.failure or failure or stream.incomplete(dialect, asked_tokens)
    return stream.reply(failure)


# Events


_LINE_END = re.compile(rb"\r\n|\n|\r")


def events_of(pieces: Iterable[tuple[int, bytes]], *, whole: bool = True) -> Iterator[Event]:
    """Yield the events of a body, wherever it was cut into pieces.

    ``whole`` says that the body ends with the last piece; an event without the empty line after
    it then counts as well. A field ``error``, which some servers send, is an event of this kind.
    """
    begun: list[bytes] = []  # pieces of the line that has not ended
    after_cr, first = False, True
    lines: list[str] = []
    kind, read = "", 0
    for index, data in chain(pieces, [(-1, b"\n\n")] if whole else []):
        read = index if index >= 0 else read
        if after_cr:
            data = data.removeprefix(b"\n")
        after_cr = data.endswith(b"\r") or (after_cr and not data)
        head, *others = _LINE_END.split(data)
        begun.append(head)
        if not others:
            continue
        ended, begun = [b"".join(begun), *others[:-1]], [others[-1]]
        for line in ended:
            if first:
                line, first = line.removeprefix(codecs.BOM_UTF8), False
            if not line:
                if lines:
                    yield Event(read, "\n".join(lines), kind)
                lines, kind = [], ""
                continue
            name, _, value = line.decode(errors="replace").partition(":")
            value = value.removeprefix(" ")
            if name in ("data", "error"):
                lines.append(value)
            if name in ("event", "error"):
                kind = value if name == "event" else name


class _Stream:
    """The sum of the events of one request."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._done = False
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._cached: int | None = None
        self._outputs: list[_Output] = []
        self.failure: Failure | None = None

    def take(self, events: Iterable[Event]) -> None:
        """Read events up to the first that is an error."""
        for event in events:
            if event.data.strip() == _DONE:
                self._done = True
                continue
            try:
                data = json.loads(event.data)
            except (ValueError, RecursionError):
                data = None
            if event.kind == "error" or (isinstance(data, dict) and _is_error(data)):
                said = shown(_message(data) or event.data)
                self.failure = Failure(
                    FailureKind.STREAM_ERROR, f"the server reports an error in the stream: {said}"
                )
                return
            if not isinstance(data, dict) or not self._takes(event.read, data):
                said = shown(event.data)
                self.failure = Failure(
                    FailureKind.MALFORMED, f"an event of the stream is not one of the API: {said}"
                )
                return

    def _takes(self, read: int, data: Mapping[str, Any]) -> bool:
        """Add one chunk; False if it has not the API's shape."""
        usage = data.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        choices = data.get("choices") or []
        if not isinstance(choices, list):
            return False
        if not choices:
            return True
        choice = choices[0]
        if not isinstance(choice, dict):
            return False
        if choice.get("finish_reason") is not None:
            self._finish = str(choice["finish_reason"])
        text, ids = _text(choice), _ids(choice, data)
        if text is None:
            return False
        running = _running_count(data)
        if text or ids or _calls(choice) or self._has_more(running):
            self._outputs.append(_Output(read, text, ids, running))
        return True

    def _has_more(self, running: int | None) -> bool:
        """Tell whether a chunk without text has tokens: half a character at the end."""
        before = self._outputs[-1].running if self._outputs else None
        return running is not None and before is not None and running > before

    def incomplete(self, dialect: StreamFormat, asked: int | None) -> Failure | None:
        """Return the failure of a stream that ended without an error, if it lacks something."""
        usage = _number(self._usage, "completion_tokens")
        if self._finish in _BROKEN_OFF:
            text = f"the server gave up on the request (finish_reason {self._finish})"
            return Failure(FailureKind.STREAM_ERROR, text)
        if not self._done and (dialect.ends_with_done or self._finish is None):
            return Failure(FailureKind.NO_DONE, "the stream ends without data: [DONE]")
        if not self._outputs:
            said = "" if not usage else f", though its usage counts {usage:,}"
            return Failure(FailureKind.ZERO_TOKENS, f"the stream has no output token{said}")
        if usage is None and any(output.ids is None for output in self._outputs):
            text = "the stream has neither usage nor token ids, so its tokens cannot be counted"
            return Failure(FailureKind.NO_USAGE, text)
        tokens = self._total()
        if tokens == 0:
            text = "the server's usage counts no output token, though the stream has some"
            return Failure(FailureKind.ZERO_TOKENS, text)
        if asked is not None and tokens != asked:
            return Failure(FailureKind.USAGE_DIFFERS, _differs(tokens, asked))
        return None

    def _total(self) -> int:
        usage = _number(self._usage, "completion_tokens")
        if usage is not None:
            return usage
        return sum(1 if output.ids is None else len(output.ids) for output in self._outputs)

    def reply(self, failure: Failure | None) -> Reply:
        """Return the reply, of which a failure leaves what had arrived."""
        outputs, total = self._outputs, self._total()
        counts, known = _tokens_of_outputs(outputs, total)
        stamps = [read.stamp_ns for read in self._exchange.reads]
        chunks = [
            Chunk(output.read, stamps[output.read], output.text, count if known else None)
            for output, count in zip(outputs, counts, strict=True)
        ]
        reads = np.repeat(np.array([output.read for output in outputs], np.int64), counts)
        in_read = np.bincount(reads) if len(reads) else np.zeros(0, np.int64)
        ids = [i for output in outputs if output.ids is not None for i in output.ids]
        whole = len(ids) == total and all(output.ids is not None for output in outputs)
        details = self._usage.get("prompt_tokens_details")
        return Reply(
            index=self._exchange.index,
            token_times_ns=np.array(stamps, np.int64)[reads] if len(reads) else in_read,
            shared=in_read[reads] > 1 if len(reads) else np.zeros(0, np.bool_),
            token_ids=ids if whole else None,
            text="".join(output.text for output in outputs),
            usage_output=_number(self._usage, "completion_tokens"),
            usage_input=_number(self._usage, "prompt_tokens"),
            cached_tokens=_number(details, "cached_tokens") if isinstance(details, dict) else None,
            finish_reason=self._finish,
            itl_known=known,
            chunks=chunks,
            failure=failure,
        )


@dataclass(frozen=True)
class _Output:
    """The output of one event; ``running`` is the server's count of tokens up to it."""

    read: int
    text: str
    ids: list[int] | None
    running: int | None


def _tokens_of_outputs(outputs: Sequence[_Output], total: int) -> tuple[list[int], bool]:
    """Return the tokens of each output, ``total`` in all, and whether their numbers are known.

    Without ids and running counts, an output has one token if there are as many outputs as
    tokens. Else one is assumed, and the last output has the rest.
    """
    running = [0, *(output.running for output in outputs)]
    if all(count is not None for count in running) and running[-1] == total:
        counts = [int(b or 0) - int(a or 0) for a, b in pairwise(running)]
        if min(counts, default=0) >= 0:
            return counts, True
    counts = [1 if output.ids is None else len(output.ids) for output in outputs]
    known = sum(counts) == total
    left = total
    for i, count in enumerate(counts):
        counts[i] = min(count, left)
        left -= counts[i]
    if counts:
        counts[-1] += left
    return counts, known


def _is_error(data: Mapping[str, Any]) -> bool:
    return bool(data.get("error")) or data.get("object") == "error"


def _text(choice: Mapping[str, Any]) -> str | None:
    """Return the text of a chunk of either endpoint; None if it has another type."""
    delta = choice.get("delta") or {}
    if not isinstance(delta, dict):
        return None
    parts = [choice.get("text"), *(delta.get(name) for name in _TEXTS)]
    texts = [part for part in parts if part is not None]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _calls(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in _CALLS)


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


def _running_count(data: Mapping[str, Any]) -> int | None:
    """Return the tokens so far: vLLM's continuous usage, or llama.cpp's timings of each token."""
    for name, count in (("usage", "completion_tokens"), ("timings", "predicted_n")):
        found = data.get(name)
        if isinstance(found, dict) and (number := _number(found, count)) is not None:
            return number
    return None


def _number(data: Mapping[str, Any], name: str) -> int | None:
    value = data.get(name)
    return value if type(value) is int and 0 <= value < 1 << 40 else None


def _differs(tokens: int, asked: int) -> str:
    if tokens < asked:
        return (
            f"the server produced {tokens:,} of {asked:,} output tokens: it stopped at an end"
            " token, or its context is full"
        )
    return f"the server produced {tokens:,} output tokens, and {asked:,} were asked for"


# Responses that are no stream


def _is_sse(response: Response) -> bool:
    """Tell whether a response is a stream of events, by its type or how it begins."""
    if "text/event-stream" in response.headers.get("content-type", "").lower():
        return True
    return response.body[:64].lstrip().startswith((b"data:", b"event:", b":", b"id:", b"retry:"))


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
    body = response.body[:65536]
    text = body.decode(errors="replace").strip()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if message := _message(data):
        return shown(" ".join(message.split()), 300).rstrip(".")
    if title := re.search(r"<title[^>]*>([^<]*)</title>", text, re.IGNORECASE):
        return f"a page titled {shown(title[1].strip())!r}"
    return shown(" ".join(text.split())) or "an empty body"


_HINTS = {
    401: "; give its key with --api-key or OPENAI_API_KEY",
    403: "; give its key with --api-key or OPENAI_API_KEY",
    404: "; check --model and --endpoint",
    405: "; check --endpoint",
    429: "; it limits the rate of requests or their number",
}


def _status_failure(response: Response) -> Failure:
    status = response.status
    if 300 <= status < 400 and "location" in response.headers:
        said = f"a redirect to {shown(response.headers['location'])}; give that address"
    else:
        said = f"{_said(response)}{_HINTS.get(status, '')}"
    return Failure(FailureKind.STATUS, f"the server answers {status}: {said}", status)


def _not_sse(response: Response) -> Failure:
    kind = response.headers.get("content-type", "no content type")
    body = response.body[:65536].lstrip()
    said = f"the server answers 200 with {_said(response)}"
    if body.startswith(b"<"):
        said += " instead of a stream; check the address and --endpoint"
    elif body.startswith(b"{") and b'"choices"' in body:
        said = 'the server answers with plain JSON instead of a stream; it ignores "stream": true'
    elif body.startswith(b"{") and b'"error"' in body:
        return Failure(FailureKind.STREAM_ERROR, said, 200)
    else:
        said += f" ({shown(kind)}) instead of a stream"
    return Failure(FailureKind.NOT_SSE, said, 200)


# The client's own part in the times


@dataclass(frozen=True)
class ClientLag:
    """The client's own part in the times of a trial.

    Attributes:
        reads: reads of all requests.
        kernel_share: share of reads that the kernel stamped; their times hold however late they
            were read.
        merged_share: share of chunks of output that came in one read with a later chunk and so
            have its time, by the client, the network or the server.
        loop_p50_ns: median time for which bytes waited to be read: measured with kernel stamps,
            otherwise an upper bound; likewise ``loop_p99_ns``.
        late_p99_ns: how much later than it could the client sent a request; 99th percentile.
    """

    reads: int
    kernel_share: float
    merged_share: float
    loop_p50_ns: int
    loop_p99_ns: int
    late_p99_ns: int

    @property
    def stamp_error_p99_ns(self) -> int:
        """Error of the stamps: none if the kernel made (nearly) all, else that of the loop."""
        return 0 if self.kernel_share >= 0.99 else self.loop_p99_ns


def client_lag(exchanges: Sequence[Exchange], replies: Sequence[Reply]) -> ClientLag:
    """Return the client's own part in the times of a trial's requests."""
    reads = [read for exchange in exchanges for read in exchange.reads]
    chunks = sum(len(reply.chunks) for reply in replies)
    alone = sum(len({chunk.read for chunk in reply.chunks}) for reply in replies)
    lags = [read.lag_ns for read in reads]
    late = [exchange.late_ns for exchange in exchanges]
    return ClientLag(
        reads=len(reads),
        kernel_share=sum(read.kernel for read in reads) / max(1, len(reads)),
        merged_share=(chunks - alone) / max(1, chunks),
        loop_p50_ns=_percentile(lags, 50),
        loop_p99_ns=_percentile(lags, 99),
        late_p99_ns=_percentile(late, 99),
    )


def _percentile(values: Sequence[int], percent: int) -> int:
    return int(np.percentile(values, percent, method="higher")) if values else 0
