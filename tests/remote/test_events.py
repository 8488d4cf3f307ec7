"""Server-sent events and their tokens: the same however the bytes were cut; tokens are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.feeds import body
from support.streams import SSE_HEAD, Asked, DialectName, Writer, chunked, event, text_of

from batchbench.batching.remote.events import Reply, client_lag, events_of, parse
from batchbench.batching.remote.exchange import Exchange, Failure, FailureKind, Read
from batchbench.batching.remote.wire import ResponseEnd


def received(pieces: Sequence[bytes], *, closed: bool = True) -> Exchange:
    """Return an exchange whose reads, 10 ns apart, are these pieces."""
    reads = [Read(10 * (i + 1), True, 10 * (i + 1), data) for i, data in enumerate(pieces)]
    return Exchange(0, 0, 0, reads=reads, ended_ns=10 * len(pieces), closed=closed)


def events(text: bytes, whole: bool = True) -> list[tuple[str, str]]:
    return [(e.data, e.kind) for e in events_of([(0, text)], whole=whole)]


def bytewise(text: bytes) -> Iterator[tuple[int, bytes]]:
    return ((i, text[i : i + 1]) for i in range(len(text)))


# The format of events


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"data: a\n\n", [("a", "")]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [("a", ""), ("b", ""), ("c", "")]),
        (b"data: a\r\ndata: b\r\n\r\n", [("a\nb", "")]),
        (b"data:a\n\ndata:  a\n\n", [("a", ""), (" a", "")]),
        (b": keep alive\n\n: \n\ndata: a\n: inside\n\n", [("a", "")]),
        (b"data: a\ndata: b\ndata\ndata:\n\n", [("a\nb\n\n", "")]),
        (b"event: error\ndata: x\n\ndata: y\n\n", [("x", "error"), ("y", "")]),
        (b"event: alone\n\ndata: y\n\n", [("y", "")]),
        (b"id: 7\nretry: 10\nunknown: z\ndata: a\n\n", [("a", "")]),
        (b'error: {"code": 1}\n\n', [('{"code": 1}', "error")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("a", "")]),
        (b"\n\n\r\n\rdata: a\n\n\n\n", [("a", "")]),
        ("data: Zürich → 😀\n\n".encode(), [("Zürich → 😀", "")]),
        (b"data: \xff\n\n", [("�", "")]),
        (b"", []),
    ],
)
def test_events_are_those_of_the_standard(text: bytes, expected: list[tuple[str, str]]) -> None:
    assert events(text) == expected
    assert [(e.data, e.kind) for e in events_of(bytewise(text))] == expected
    for cut in range(len(text) + 1):
        pieces = [(0, text[:cut]), (1, b""), (2, text[cut:])]
        assert [(e.data, e.kind) for e in events_of(pieces)] == expected


@pytest.mark.parametrize("text", [b"data: a", b"data: a\n", b"data: a\r\n", b"data: a\r"])
def test_an_event_without_its_empty_line_counts_only_in_a_body_that_is_whole(text: bytes) -> None:
    assert events(text) == [("a", "")]
    assert events(text, whole=False) == []


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
# Some are line ends to str.splitlines, and none is one to the format.
texts = st.text(st.sampled_from("ab: \x00\x0b\x1c\x85\u2028ü→😀"), max_size=8)


@given(
    st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), st.booleans()), max_size=5),
    st.data(),
)
def test_any_events_in_any_line_ends_and_cuts(
    written: list[tuple[list[str], bool]], data: st.DataObject
) -> None:
    text, ends, expected = b"", [], []
    for lines, comment in written:
        if comment:
            text += b": a comment" + data.draw(line_ends)
        for line in lines:
            text += b"data: " + line.encode() + data.draw(line_ends)
        # CR LF would be one line end, so an event that ends in CR is closed by CR.
        text += b"\r" if text.endswith(b"\r") else data.draw(line_ends)
        ends.append(len(text))
        expected.append("\n".join(lines))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [(i, text[a:b]) for i, (a, b) in enumerate(pairwise(edges))]
    found = list(events_of(pieces))
    assert [e.data for e in found] == expected
    for e, end in zip(found, ends, strict=True):
        # An event that ends in CR LF is complete with the CR.
        assert edges[e.read] < end
        assert end - 1 <= edges[e.read + 1]


# Whole responses


DIALECTS: tuple[DialectName, ...] = ("llama.cpp", "vllm", "openai")
TOKENS = [11, 222, 3333]


def stream(dialect: DialectName, path: str = "/v1/completions", per_chunk: int = 1) -> bytes:
    """Return the response to a request of three tokens."""
    writer = Writer(dialect, Asked.of(path, body(3)), per_chunk)
    return writer.begins() + b"".join(writer.token(t, t == TOKENS[-1]) for t in TOKENS)


def unchunked(data: bytes) -> bytes:
    """Return the body of a chunked response."""
    rest, out = data.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        out, rest = out + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return out


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def framings(data: bytes) -> dict[str, bytes]:
    """Return the same body in all framings of HTTP/1.1, and of HTTP/1.0."""
    content = unchunked(data)
    return {
        "chunked": data,
        "one chunk": SSE_HEAD + chunked(content) + chunked(b""),
        "other chunks": SSE_HEAD
        + b"".join(chunked(content[i : i + 37]) for i in range(0, len(content), 37))
        + chunked(b""),
        "length": HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content,
        "close": HEAD + b"\r\n" + content,
        "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + data,
        "1.0": HEAD.replace(b"1.1", b"1.0") + b"\r\n" + content,
    }


def same(one: Reply, other: Reply) -> bool:
    """Tell whether two replies agree in all but times."""
    nothing = np.zeros(0)
    strip = {"token_times_ns": nothing, "chunks": []}
    texts = [[(c.text, c.tokens) for c in reply.chunks] for reply in (one, other)]
    left, right = (vars(replace(reply, **strip)) for reply in (one, other))
    for name in strip:
        del left[name], right[name]
    return left == right and texts[0] == texts[1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_response_cut_at_every_byte_has_the_same_tokens(dialect: DialectName, path: str) -> None:
    data = stream(dialect, path)
    whole = parse(received([data]), 3)
    assert whole.failure is None
    assert (whole.output_tokens, whole.itl_known, whole.finish_reason) == (3, True, "length")
    assert whole.text == "".join(map(text_of, TOKENS))
    assert whole.token_ids == (None if dialect == "openai" else TOKENS)
    # A token has arrived with the empty line after its event.
    ends = [data.index(b"\n\n", data.index(text_of(t).encode())) + 2 for t in TOKENS]
    for cut in range(1, len(data)):
        reply = parse(received([data[:cut], data[cut:]]), 3)
        assert same(reply, whole)
        assert reply.token_times_ns.tolist() == [10 if end <= cut else 20 for end in ends]
    single = parse(received([data[i : i + 1] for i in range(len(data))]), 3)
    assert same(single, whole)
    assert single.token_times_ns.tolist() == [10 * end for end in ends]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_framing_does_not_matter(dialect: DialectName) -> None:
    whole = parse(received([stream(dialect)]), 3)
    for name, data in framings(stream(dialect)).items():
        assert same(parse(received([data]), 3), whole), name


@pytest.mark.parametrize("framing", framings(stream("vllm")))
def test_nothing_half_received_is_a_success(framing: str) -> None:
    data = framings(stream("vllm"))[framing]
    for length in range(len(data)):
        reply = parse(received([data[:length]] if length else []), 3)
        whole = framing in ("close", "1.0") and b"[DONE]" in data[:length]
        assert (reply.failure is None) == whole, data[:length][-40:]


@pytest.mark.parametrize("framing", framings(stream("vllm")))
def test_the_end_of_a_response_is_seen_at_its_last_byte(framing: str) -> None:
    data = framings(stream("vllm"))[framing]
    told = framing not in ("close", "1.0")
    end = ResponseEnd()
    seen = [end.reached(data[i : i + 1]) for i in range(len(data))]
    assert seen == [False] * (len(data) - 1) + [told]
    for cut in range(len(data)):
        end = ResponseEnd()
        assert (end.reached(data[:cut]), end.reached(data[cut:])) == (False, told)


def test_the_end_of_an_event_is_not_taken_for_the_end_of_the_response() -> None:
    """Lines end in CR LF, and the data in a 0, as the last chunk does."""
    data = SSE_HEAD + chunked(b"data: 0\r\n\r\n") + chunked(b"data: 10\r\n\r\n") + chunked(b"")
    for size in range(1, len(data)):
        end = ResponseEnd()
        seen = [end.reached(data[i : i + size]) for i in range(0, len(data), size)]
        assert not any(seen[:-1])
        assert seen[-1]


def test_an_error_in_a_stream_counts_also_if_the_connection_then_breaks() -> None:
    failed = chunked(event({"error": {"message": "engine died"}}))
    exchange = received([SSE_HEAD + chunked(event({"choices": [text(" a")]})) + failed])
    for failure in (None, Failure(FailureKind.RESET, "reset")):
        reply = parse(replace(exchange, failure=failure), 3)
        assert reply.failure is not None
        assert reply.failure.kind is FailureKind.STREAM_ERROR
        assert "engine died" in reply.failure.text
        assert reply.text == " a"


# Counting


def chunks(*choices: dict[str, Any], usage: int | None = None) -> list[bytes]:
    """Return a whole response with one read for each of these choices."""
    out = [chunked(event({"choices": [choice]})) for choice in choices]
    if usage is not None:
        told = {"prompt_tokens": 9, "completion_tokens": usage}
        out.append(chunked(event({"choices": [], "usage": told})))
    return [SSE_HEAD + out[0], *out[1:], chunked(event("[DONE]")) + chunked(b"")]


def text(said: str, ids: list[int] | None = None) -> dict[str, Any]:
    return {"text": said} if ids is None else {"text": said, "token_ids": ids}


def counts(reply: Reply) -> list[int]:
    """Return the tokens of each read of a reply, up to the last that has any."""
    return np.bincount(reply.token_times_ns // 10)[1:].tolist()


@pytest.mark.parametrize(
    ("choices", "usage", "expected", "known"),
    [
        # As many chunks as tokens: one each.
        ([text(" a"), text(" b"), text(" c")], 3, [1, 1, 1], True),
        # Ids tell the tokens of a chunk, whatever its text.
        ([text(" a", [1]), text(" bc", [2, 3]), text("", [4])], 4, [1, 2, 1], True),
        ([text(" a", [1]), text("", []), text(" b", [2])], 2, [1, 0, 1], True),
        # Ids alone count without usage.
        ([text(" a", [1]), text(" bc", [2, 3])], None, [1, 2], True),
        # Fewer chunks than tokens, and nothing says which chunk has two.
        ([text(" a"), text(" bc"), text(" d")], 5, [1, 1, 3], False),
        ([text(" a", [1]), text(" bc"), text(" d", [4])], 4, [1, 1, 2], False),
        # More chunks than tokens.
        ([text(" a"), text(" b"), text(" c")], 2, [1, 1], False),
        # An empty chunk of text is none.
        ([text(""), text(" a"), text(""), text(" b")], 2, [0, 1, 0, 1], True),
    ],
)
def test_tokens_are_counted_by_ids_or_usage(
    choices: list[dict[str, Any]], usage: int | None, expected: list[int], known: bool
) -> None:
    reply = parse(received(chunks(*choices, usage=usage)), sum(expected))
    assert reply.failure is None
    assert counts(reply) == expected
    assert reply.itl_known is known
    assert all((chunk.tokens is not None) is known for chunk in reply.chunks)


def test_ids_are_told_only_if_they_are_all_there() -> None:
    for ids, expected in (([1, 2], [1, 2]), ([1], None), (["1", "2"], None), ([1.0, 2], None)):
        data = {"text": " ab", "token_ids": ids}
        reply = parse(received(chunks(data, usage=2)), 2)
        assert (reply.token_ids, reply.failure) == (expected, None)
        assert reply.itl_known is (expected is not None)


def test_a_running_count_tells_the_tokens_of_each_chunk() -> None:
    def run(counted: list[dict[str, Any]]) -> Reply:
        events = [chunked(event({"choices": [text(" x")], **more})) for more in counted]
        last = {"choices": [], "usage": {"completion_tokens": 6}}
        end = chunked(event(last)) + chunked(event("[DONE]")) + chunked(b"")
        return parse(received([SSE_HEAD + events[0], *events[1:], end]), 6)

    vllm = run([{"usage": {"completion_tokens": n}} for n in (1, 4, 6)])
    llama = run([{"timings": {"predicted_n": n}} for n in (1, 4, 6)])
    for reply in (vllm, llama):
        assert (counts(reply), reply.itl_known, reply.failure) == ([1, 3, 2], True, None)
    # Counts that do not add up are not used.
    for wrong in ((1, 4, 5), (4, 1, 6)):
        reply = run([{"usage": {"completion_tokens": n}} for n in wrong])
        assert (counts(reply), reply.itl_known) == ([1, 1, 4], False)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("per_chunk", [2, 3])
def test_tokens_of_a_chunk_share_its_time_and_are_marked(
    dialect: DialectName, per_chunk: int
) -> None:
    data = stream(dialect, per_chunk=per_chunk)
    ends = [i + 2 for i in range(len(data)) if data[i : i + 2] == b"\n\n"]
    edges = [0, *ends, len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    reply = parse(received(pieces), 3)
    assert reply.failure is None
    if dialect == "openai":  # which does not tell the tokens of a chunk
        assert (counts(reply)[0], reply.itl_known) == (3 if per_chunk == 3 else 1, False)
        return
    times = reply.token_times_ns.tolist()
    assert times[0] == times[1]
    assert (times[1] == times[2]) is (per_chunk == 3)
    assert reply.itl_known


def delta(**content: Any) -> dict[str, Any]:
    return {"delta": content, "finish_reason": None}


@pytest.mark.parametrize(
    "first",
    [
        delta(content="x"),
        delta(reasoning_content="x"),
        delta(reasoning="x"),
        delta(refusal="x"),
        delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}]),
        {**delta(content=""), "token_ids": [5]},
    ],
)
def test_the_first_token_is_the_first_with_output_never_the_role(first: dict[str, Any]) -> None:
    empty = delta(role="assistant", content="", reasoning_content=None, tool_calls=[])
    reply = parse(received(chunks(empty, first, delta(content="y"), usage=2)), 2)
    assert reply.failure is None
    assert reply.chunks[0].time_ns == 20
    assert reply.token_times_ns.tolist() == [20, 30]


def test_usage_tells_the_prompt_and_what_was_cached() -> None:
    writer = Writer("vllm", Asked.of("/v1/completions", body(1)), cached_tokens=2)
    reply = parse(received([writer.begins() + writer.token(5, True)]), 1)
    assert (reply.usage_input, reply.usage_output, reply.cached_tokens) == (3, 1, 2)


def test_a_number_that_is_none_is_not_taken_for_one() -> None:
    for wrong in (True, "3", -3, 3.0, 1 << 60, None):
        usage = {"choices": [], "usage": {"completion_tokens": wrong, "prompt_tokens": wrong}}
        data = [SSE_HEAD + chunked(event({"choices": [text(" a")]})), chunked(event(usage))]
        end = chunked(event("[DONE]")) + chunked(b"")
        reply = parse(received([*data, end]), None)
        assert reply.failure is not None
        assert reply.failure.kind is FailureKind.NO_USAGE


FIELDS = [
    *("choices", "delta", "text", "content", "usage", "error", "object", "finish_reason"),
    *("token_ids", "logprobs", "id", "completion_tokens", "timings", "predicted_n"),
    *("tool_calls", "prompt_tokens_details"),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.lists(json_values, max_size=4))
def test_no_json_breaks_the_parser(values: list[Any]) -> None:
    data = [chunked(event(json.dumps(value))) for value in values]
    reply = parse(received([SSE_HEAD, *data, chunked(event("[DONE]")), chunked(b"")]), 3)
    assert reply.failure is not None or reply.output_tokens == 3


@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_break_the_parser(data: bytes, closed: bool) -> None:
    for head in (b"", SSE_HEAD, HEAD + b"\r\n"):
        reply = parse(received([head + data] if head + data else [], closed=closed), 1)
        assert reply.failure is not None


def test_deep_json_is_malformed() -> None:
    data = SSE_HEAD + chunked(event('{"choices": ' + "[" * 100_000)) + chunked(b"")
    reply = parse(received([data]), 1)
    assert reply.failure is not None
    assert reply.failure.kind is FailureKind.MALFORMED


def test_a_server_that_never_says_done_must_say_that_it_finished() -> None:
    for finish in ("stop", None):
        choices = [text(" a"), {"text": "", "finish_reason": finish}]
        pieces = [*chunks(*choices, usage=1)[:-1], chunked(b"")]
        reply = parse(received(pieces), 1, ends_with_done=False)
        assert (reply.failure is None) is (finish is not None)


# The client's own part


def test_the_clients_lag_is_told() -> None:
    data = chunks(text(" a"), text(" b"), text(" c"), text(" d"), usage=4)
    exchange = received([data[0] + data[1], *data[2:]])
    exchange.late_ns = 7
    exchange.reads = [
        replace_read(read, kernel=i > 0, lag_ns=100 * i) for i, read in enumerate(exchange.reads)
    ]
    reply = parse(exchange, 4)
    lag = client_lag([exchange], [reply])
    assert (lag.reads, lag.kernel_share, lag.merged_share) == (5, 0.8, 0.25)
    assert (lag.loop_p50_ns, lag.loop_p99_ns, lag.late_p99_ns) == (200, 400, 7)
    assert lag.stamp_error_p99_ns == 400
    whole = client_lag([replace(exchange, reads=exchange.reads[1:])], [])
    assert (whole.kernel_share, whole.merged_share, whole.stamp_error_p99_ns) == (1.0, 0.0, 0)
    assert client_lag([], []).reads == 0


def replace_read(read: Read, **values: Any) -> Read:
    return read._replace(**values)


def test_a_line_in_many_pieces_is_one_event() -> None:
    pieces = [(0, b"data: "), *((index, b"y" * 100) for index in range(1, 500))]
    assert [(found.read, len(found.data)) for found in events_of(pieces)] == [(499, 49_900)]


def test_half_a_surrogate_pair_is_no_text_and_halves_in_two_chunks_are() -> None:
    for texts, expected in ((["\ud83d", "\ude00"], "😀"), (["a\ud800", "b"], "a\ufffdb")):
        stream = b"".join(chunked(event({"choices": [{"text": text}]})) for text in texts)
        answer = SSE_HEAD + stream + chunked(event("[DONE]")) + chunked(b"")
        assert parse(received([answer]), 2).text == expected
