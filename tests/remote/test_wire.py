"""The client: connections, stamps, time limits, and what it leaves behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from support.faults import CERTIFICATE, FAULTS, Connection, Fault, playing
from support.feeds import Fixed, Timed, Waves, body
from support.schedules import FIVE, MS, Schedule
from support.servers import MODEL, FakeServer, Manner, serving
from support.streams import chunked, event, response

from batchbench.batching.remote import wire
from batchbench.batching.remote.events import Reply, client_lag, parse
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    FailureKind,
    Outgoing,
    ServerError,
    Wait,
)
from batchbench.batching.remote.wire import exchange, get, post
from batchbench.errors import UsageError

QUICK = Schedule(step_ns=MS, row_ns=0, prompt_ns=0)

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernel stamps are Linux's")


def good(**more: Any) -> Fault:
    """Return no fault: a server that answers well."""
    return Fault("none", FailureKind.RESET, "", lambda c: c.send(c.events()), **more)


def does(play: Callable[[Connection], None]) -> Fault:
    return Fault("own", FailureKind.RESET, "", play)


def ask(url: str, count: int = 1, tokens: int = 4, **options: Any) -> tuple[list[Exchange], Reply]:
    """Return the exchanges of some requests at once, and the reply to the last."""
    address = Address.parse(url, **{"timeout_s": 20.0, **options})
    exchanges = exchange(address, Fixed([body(tokens)] * count))
    return exchanges, parse(exchanges[-1], tokens)


# Time stamps


@linux
def test_the_kernel_stamps_reads_between_sending_and_reading() -> None:
    with playing(good()) as url:
        (one,), reply = ask(url)
    assert reply.failure is None
    assert all(read.kernel for read in one.reads)
    for read in one.reads:
        assert one.sent_ns <= read.stamp_ns <= read.read_ns + 200_000  # the clocks' offset
        assert read.lag_ns == max(0, read.read_ns - read.stamp_ns)
    assert one.due_ns <= one.sent_ns <= one.ended_ns


@linux
@pytest.mark.parametrize("kernel", [True, False])
def test_a_blocked_client_has_the_kernels_times_and_knows_its_own_lag(kernel: bool) -> None:
    """The rest of the response is sent while the client is blocked, and 100 ms before its end."""
    blocked, sent = threading.Event(), threading.Event()

    def play(connection: Connection) -> None:
        data, first = connection.events(), connection.events(1)
        connection.send(first)
        blocked.wait(20)
        connection.send(data[len(first) :])
        sent.set()

    def block(one: Exchange) -> None:
        if not blocked.is_set():
            blocked.set()
            sent.wait(20)
            time.sleep(0.1)

    with playing(does(play)) as url:
        address = Address.parse(url)
        exchanges = exchange(address, Fixed([body(4)]), block, kernel_stamps=kernel)
    first, last = exchanges[0].reads[0], exchanges[0].reads[-1]
    assert first.kernel is last.kernel is kernel
    assert last.lag_ns >= 100 * MS
    if kernel:
        assert last.read_ns - last.stamp_ns == last.lag_ns
    else:
        assert last.stamp_ns == last.read_ns
    lag = client_lag(exchanges, [parse(exchanges[0], 4)])
    assert lag.loop_p99_ns >= 100 * MS
    assert lag.stamp_error_p99_ns == (0 if kernel else lag.loop_p99_ns)


@linux
def test_stamps_of_the_kernel_are_not_used_if_the_clock_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offset, calls = wire._clock_offset_ns(), iter([0, 5_000_000_000])
    monkeypatch.setattr(wire, "_clock_offset_ns", lambda: offset + next(calls))
    with playing(good()) as url:
        (one,), reply = ask(url)
    assert reply.failure is None
    assert all(read.stamp_ns == read.read_ns and not read.kernel for read in one.reads)
    assert all(read.lag_ns >= 5_000_000_000 for read in one.reads)


def test_other_systems_have_user_space_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with playing(good()) as url:
        (one,), reply = ask(url)
    assert reply.failure is None
    assert all(read.stamp_ns == read.read_ns and not read.kernel for read in one.reads)


@linux
def test_every_read_of_every_trial_has_a_stamp_of_the_kernel() -> None:
    """The kernel begins to stamp some milliseconds after the first socket has asked for it."""
    with playing(good()) as url:
        for _ in range(20):
            exchanges, _ = ask(url)
            assert all(read.kernel for one in exchanges for read in one.reads)
            time.sleep(0.005)


# TLS


def test_tls_has_user_space_stamps_and_trusts_whom_the_user_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with playing(good(tls=True, scheme="https")) as url:
        for host in ("127.0.0.1", "localhost"):
            exchanges, reply = ask(url.replace("127.0.0.1", host), count=3, tokens=40)
            assert reply.failure is None
            assert reply.output_tokens == 40
            assert not any(read.kernel for one in exchanges for read in one.reads)


def test_an_insecure_client_accepts_any_certificate() -> None:
    with playing(good(tls=True, scheme="https")) as url:
        _, reply = ask(url, insecure=True)
        assert reply.failure is None
        _, reply = ask(url)
        assert reply.failure is not None
        assert reply.failure.kind is FailureKind.TLS


def test_large_bodies_pass_over_tls_and_without() -> None:
    """Both ways: a request of a megabyte, and a response of many records."""
    prompt = list(range(150_000))
    for tls in (False, True):
        with playing(good(tls=tls, scheme="https" if tls else "http")) as url:
            address = Address.parse(url, insecure=True)
            (one,) = exchange(address, Fixed([body(5000, prompt)]))
        reply = parse(one, 5000)
        assert reply.failure is None
        assert (reply.output_tokens, reply.usage_input) == (5000, len(prompt))


# Connections


def test_each_request_is_sent_once_on_a_connection_of_its_own() -> None:
    with serving(QUICK) as server:
        address = Address.parse(server.url + "/v1/", api_key="secret-key")
        exchanges = exchange(address, Fixed([body(3)] * 20))
        assert len(server.bodies) == 20
    assert [one.index for one in exchanges] == list(range(20))
    assert all(parse(one, 3).failure is None for one in exchanges)


def test_the_requests_bytes() -> None:
    address = Address.parse("http://[::1]:8000/api/v1", api_key="key")
    head, _, content = address.request("/v1/completions", b"{}").partition(b"\r\n\r\n")
    assert content == b"{}"
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /api/v1/completions HTTP/1.1"
    assert {"Host: [::1]:8000", "Connection: close", "Content-Length: 2"} < set(lines)
    assert "Authorization: Bearer key" in lines
    assert address.request("/health", None).startswith(b"GET /api/health HTTP/1.1\r\n")
    assert b"Content" not in address.request("/health", None)


def test_a_server_that_keeps_its_connections_open_delays_nothing() -> None:
    """It ignores ``Connection: close``; the response tells its end."""

    def length(connection: Connection) -> None:
        content = event({"choices": [{"text": " a"}], "usage": {"completion_tokens": 1}})
        connection.send(response(content + event("[DONE]"), kind="text/event-stream"))
        connection.hang()

    def chunks(connection: Connection) -> None:
        connection.send(connection.events())
        connection.hang()

    for play, tokens in ((length, 1), (chunks, 4)):
        with playing(does(play)) as url:
            (one,), reply = ask(url, tokens=tokens)
        assert reply.failure is None
        assert not one.closed


def test_an_answer_before_the_request_was_read_is_seen() -> None:
    """A server refuses a body of megabytes, reads none of it, and resets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def serve() -> None:
            one, _ = listener.accept()
            one.recv(1000)
            one.sendall(response(b'{"error": "too large"}', "413 Content Too Large"))
            stop.wait(20)
            one.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = Address.parse(f"http://127.0.0.1:{listener.getsockname()[1]}")
        (one,) = exchange(address, Fixed([b" " * (64 << 20)]))
        assert thread.is_alive()  # it still keeps the connection open
        stop.set()
        thread.join()
    reply = parse(one, 1)
    assert reply.failure is not None
    assert (reply.failure.status, reply.failure.is_usage) == (413, True)
    assert "too large" in reply.failure.text


def connections_of_three_requests(patch: pytest.MonkeyPatch) -> int:
    """Return the connections that three requests, one after another, try to make."""
    calls, connect = [], socket.socket.connect_ex
    patch.setattr(socket.socket, "connect_ex", lambda *args: calls.append(1) or connect(*args))
    exchange(Address.parse("http://some.host:1"), Fixed([body(4)] * 3, at_once=1))
    return len(calls)


def test_every_address_of_a_host_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` is ::1 first on many systems, and servers listen on 127.0.0.1."""
    with playing(good()) as url, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = int(url.rpartition(":")[2])
        wheres = [closed.getsockname(), ("127.0.0.1", port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", where) for where in wheres]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
            exchanges, reply = ask("http://some.host:1", count=3)
            assert reply.failure is None
            assert all(one.failure is None for one in exchanges)
            assert connections_of_three_requests(patch) == 4  # the first tries both addresses
            found.pop()
            _, reply = ask("http://some.host:1")
            assert reply.failure is not None
            assert reply.failure.kind is FailureKind.REFUSED


def test_an_address_of_a_family_that_the_system_lacks_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with playing(good()) as url, monkeypatch.context() as patch:
        port = int(url.rpartition(":")[2])
        families = (250, socket.AF_INET)  # the first is none
        found = [(f, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for f in families]
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        _, reply = ask("http://some.host:1")
    assert reply.failure is None


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with listener:

        def serve() -> None:
            one, _ = listener.accept()
            one.recv(65536)
            one.sendall(response(b'{"fine": true}'))
            one.close()

        thread = threading.Thread(target=serve)
        thread.start()
        found = get(Address.parse(f"http://[::1]:{listener.getsockname()[1]}"), "/health")
        thread.join()
    assert (found.status, found.body) == (200, b'{"fine": true}')


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EADDRNOTAVAIL])
def test_a_machine_without_sockets_says_what_to_raise(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(socket, "socket", refuse)
    exchanges = exchange(Address("http", "127.0.0.1", 9), Fixed([body(1)] * 2))
    for one in exchanges:
        assert one.failure is not None
        assert (one.failure.kind, one.failure.is_usage) == (FailureKind.LOCAL, True)
        assert "ulimit -n" in one.failure.text


# The loop


def test_a_feed_decides_when_requests_are_sent() -> None:
    due = [0, 30 * MS, 30 * MS, 60 * MS]
    with serving(QUICK) as server:
        exchanges = exchange(Address.parse(server.url), Timed(due, [body(2)] * 4))
    assert [one.due_ns - exchanges[0].due_ns for one in exchanges] == due
    assert all(one.sent_ns >= one.due_ns for one in exchanges)


def test_waves_and_at_most_b_in_flight() -> None:
    with serving(QUICK) as server:
        waves = exchange(Address.parse(server.url), Waves([body(4)] * 9, 3))
        flying = exchange(Address.parse(server.url), Fixed([body(4)] * 9, 3))
    for first in (3, 6):
        assert min(one.sent_ns for one in waves[first : first + 3]) >= max(
            one.ended_ns for one in waves[first - 3 : first]
        )
    for one in flying:
        at = [x for x in flying if x.sent_ns <= one.sent_ns < x.ended_ns]
        assert len(at) <= 3


def test_lateness_is_the_clients_own_and_not_the_wait_for_a_slot() -> None:
    """Each request takes 20 ms or more, and the client is blocked for 40 ms at the end of one."""

    def block(one: Exchange) -> None:
        if one.ended_ns and one.index == 4:
            time.sleep(0.04)

    with serving(replace(QUICK, step_ns=5 * MS)) as server:
        address = Address.parse(server.url)
        exchanges = exchange(address, Fixed([body(4)] * 9, at_once=1), block)
        timed = exchange(address, Timed([0, 30 * MS, 60 * MS], [body(4)] * 3))
    assert exchanges[5].late_ns >= 40 * MS
    for one in exchanges:
        assert one.late_ns <= one.sent_ns - one.due_ns
    assert min(one.late_ns for one in exchanges[1:]) < 20 * MS  # others waited longer, for a slot
    assert all(one.late_ns == one.sent_ns - one.due_ns for one in timed)


def test_a_feed_is_asked_again_after_each_read() -> None:
    """A second request is sent once the first has a token, as a probe does."""
    seen: list[Exchange] = []

    class AfterFirstToken:
        sent = 0

        def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
            if self.sent == 2:
                return None
            if self.sent == 1 and not any(one.reads for one in seen):
                return Wait()
            self.sent += 1
            return Outgoing(self.sent - 1, now_ns, body(30), "/v1/completions")

    with serving(QUICK) as server:
        one, two = exchange(Address.parse(server.url), AfterFirstToken(), seen.append)
    assert one.reads[0].read_ns <= two.sent_ns < one.ended_ns


def test_a_trial_ends_when_its_time_is_over() -> None:
    hangs = next(fault for fault in FAULTS if fault.name == "hangs-later")
    with playing(hangs) as url:
        until_ns = time.monotonic_ns() + 100 * MS
        (one,) = exchange(Address.parse(url), Fixed([body(5)]), until_ns=until_ns)
    assert one.failure is not None
    assert one.failure.kind is FailureKind.STOPPED
    assert one.ended_ns >= until_ns
    assert one.reads


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_of_the_watcher_leaves_no_socket_open(error: type[BaseException]) -> None:
    def fail(_: Exchange) -> None:
        raise error

    with serving(QUICK) as server:
        with pytest.raises(error):
            exchange(Address.parse(server.url), Fixed([body(9)] * 4), fail)
        gc.collect()  # an open socket would be a ResourceWarning, and so an error


# Requests that prepare the trials


def test_get_and_post_return_what_the_server_says() -> None:
    with serving(QUICK) as server:
        address = Address.parse(server.url)
        models = json.loads(get(address, "/v1/models").body)
        assert [model["id"] for model in models["data"]] == [MODEL]
        assert get(address, "/nothing").status == 404
        streamed = post(address, "/v1/completions", body(2))
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if fault.where or fault.name.startswith(("reset", "closes-f"))],
    ids=lambda fault: fault.name,
)
def test_a_server_that_cannot_be_asked_is_a_usage_error(fault: Fault) -> None:
    with playing(fault) as url, pytest.raises(ServerError) as raised:
        post(Address.parse(url, timeout_s=fault.timeout_s), "/v1/completions", body(2))
    assert isinstance(raised.value, UsageError)
    assert raised.value.failure.kind is fault.kind
    assert str(raised.value) == raised.value.failure.text


def test_an_empty_answer_is_one() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for content in (b"", b"ab"):
        data = head + (chunked(content) if content else b"") + chunked(b"")

        def play(connection: Connection, data: bytes = data) -> None:
            connection.send(data)
            connection.hang()

        with playing(does(play)) as url:
            assert post(Address.parse(url, timeout_s=5.0), "/x", b"{}").body == content


# Servers on a clock


@contextmanager
def clock(name: str, **more: Any) -> Iterator[FakeServer]:
    yield FakeServer(FIVE[name], Manner(**more))


CLASSIC = [100 if i % 8 == 0 else 10 for i in range(32)]


@pytest.mark.parametrize(
    ("name", "waves", "flying"),
    [
        ("continuous", 400, 133),
        ("static", 400, 410),
        ("serial", 680, 680),
        ("buffered", 400, 133),
        ("replicas", 440, 244),
    ],
)
def test_the_fakes_take_the_passes_of_their_schedule(name: str, waves: int, flying: int) -> None:
    bodies = [body(length, [i + 1] * 5) for i, length in enumerate(CLASSIC)]
    texts = []
    for feed, passes in ((Waves(bodies, 8), waves), (Fixed(bodies, 8), flying)):
        with clock(name) as server:
            exchanges = server.exchange(None, feed)
        assert server.passes == passes
        replies = [parse(one, n) for one, n in zip(exchanges, CLASSIC, strict=True)]
        assert {reply.failure for reply in replies} == {None}
        # The client sees each token when it was ready, by the network's delay later.
        delay = server.schedule.delay_ns
        for reply, job in zip(replies, server.jobs, strict=True):
            times = job.times_ns[-1:] * len(job.times_ns) if name == "buffered" else job.times_ns
            assert (reply.token_times_ns - delay).tolist() == times
            assert reply.token_ids == job.tokens
        texts.append([reply.text for reply in replies])
    assert texts[0] == texts[1]


def test_the_fake_on_a_port_answers_as_the_one_on_the_clock() -> None:
    bodies = [body(length, [i + 1] * 5) for i, length in enumerate(CLASSIC[:16])]
    slow = FakeServer(QUICK).exchange(None, Waves(bodies, 8))
    with serving(QUICK) as server:
        real = exchange(Address.parse(server.url), Waves(bodies, 8))
    for one, other in zip(slow, real, strict=True):
        replies = [parse(x, CLASSIC[one.index]) for x in (one, other)]
        assert replies[0].failure is replies[1].failure is None
        assert replies[0].token_ids == replies[1].token_ids
        assert replies[0].text == replies[1].text
