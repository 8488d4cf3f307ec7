"""The fakes do what their options say: tests of the client and the probe rely on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.feeds import Fixed, Timed, Waves, body
from support.schedules import FIVE, MS, Schedule
from support.servers import FakeServer, Manner

from batchbench.batching.remote.events import Reply, parse
from batchbench.batching.remote.exchange import Exchange, FailureKind, Feed

PLAIN = Schedule(step_ns=10 * MS, row_ns=0, prompt_ns=0, delay_ns=0)
"""A pass takes 10 ms, whatever it computes."""


def run(schedule: Schedule, feed: Feed, tokens: int, **manner: object) -> list[Reply]:
    server = FakeServer(schedule, Manner(**manner))  # type: ignore[arg-type]
    return [parse(one, tokens) for one in server.exchange(None, feed)]


def times_ms(reply: Reply) -> list[int]:
    return [int(ns) // MS for ns in reply.token_times_ns]


def test_a_pass_gives_each_running_request_a_token() -> None:
    first, second = run(PLAIN, Timed([0, 15 * MS], [body(3)] * 2), 3)
    assert times_ms(first) == [10, 20, 30]
    assert times_ms(second) == [30, 40, 50]  # it joins at the next pass


def test_static_batches_wait_for_their_longest_and_for_their_window() -> None:
    static = replace(PLAIN, kind="static")
    first, second = run(static, Timed([0, 15 * MS], [body(3)] * 2), 3)
    assert (times_ms(first), times_ms(second)) == ([10, 20, 30], [40, 50, 60])
    both = run(replace(static, window_ns=20 * MS), Timed([0, 15 * MS], [body(3)] * 2), 3)
    assert [times_ms(reply) for reply in both] == [[30, 40, 50]] * 2
    full = replace(static, window_ns=20 * MS, slots=2)
    both = run(full, Timed([0, 5 * MS], [body(3)] * 2), 3)
    assert [times_ms(reply) for reply in both] == [[15, 25, 35]] * 2  # a full batch does not wait


def test_a_sliced_server_computes_one_request_in_each_pass() -> None:
    server = FakeServer(replace(PLAIN, kind="sliced"))
    replies = [parse(one, 3) for one in server.exchange(None, Fixed([body(3)] * 2))]
    assert server.passes == 6
    times = sorted(time for reply in replies for time in times_ms(reply))
    assert times == [10, 20, 30, 40, 50, 60]


def test_costs_are_of_rows_and_of_prompt_tokens() -> None:
    costly = replace(PLAIN, row_ns=2 * MS, prompt_ns=MS)
    replies = run(costly, Fixed([body(2, [1] * 4)] * 3), 2)
    assert [times_ms(reply) for reply in replies] == [[10 + 4 + 12, 26 + 14]] * 3


def test_a_full_context_cuts_without_a_word() -> None:
    (reply,) = run(replace(PLAIN, context=8), Fixed([body(10, [1] * 5)]), 10)
    assert reply.failure is not None
    assert reply.failure.kind is FailureKind.USAGE_DIFFERS
    assert (reply.usage_output, reply.finish_reason) == (3, "length")


def test_outputs_that_depend_on_the_batch_differ_from_their_position_on() -> None:
    drifting = replace(PLAIN, drift=2)
    (alone,) = run(drifting, Fixed([body(5)]), 5)
    together, _ = run(drifting, Fixed([body(5)] * 2), 5)
    assert alone.token_ids is not None
    assert together.token_ids is not None
    assert alone.token_ids[:2] == together.token_ids[:2]
    assert alone.token_ids[2] != together.token_ids[2]


def test_load_on_the_machine_is_the_same_for_a_seed() -> None:
    def durations(seed: int) -> list[Exchange]:
        loaded = replace(PLAIN, jitter=0.3, stall_share=0.2, stall_ns=50 * MS, seed=seed)
        return FakeServer(loaded).exchange(None, Fixed([body(20)] * 3))

    assert durations(1) == durations(1)
    assert durations(1) != durations(2)
    assert min(e.ended_ns for e in durations(1)) > 200 * MS  # at best 20 passes of 10 ms


def test_requests_of_other_clients_take_slots() -> None:
    busy = replace(PLAIN, slots=1, foreign=((0, 4, 7),))
    (reply,) = run(busy, Fixed([body(1)]), 1)
    assert times_ms(reply) == [80]


def test_replicas_take_turns() -> None:
    two = replace(PLAIN, slots=1, replicas=2)
    replies = run(two, Fixed([body(2)] * 3), 2)
    assert [times_ms(reply) for reply in replies] == [[10, 20], [10, 20], [30, 40]]


def test_a_buffered_response_arrives_at_once() -> None:
    (reply,) = run(replace(PLAIN, buffered=True), Fixed([body(3)]), 3)
    assert times_ms(reply) == [30, 30, 30]
    assert len(set(reply.token_times_ns.tolist())) == 1


def test_a_client_that_reads_late_has_late_stamps_unless_the_kernel_makes_them() -> None:
    for kernel in (True, False):
        late = {"kernel": kernel, "client_lag_ns": 3 * MS}
        (reply,) = run(PLAIN, Fixed([body(2)]), 2, **late)
        assert times_ms(reply) == ([10, 20] if kernel else [13, 23])


@pytest.mark.parametrize("name", FIVE)
def test_each_trial_of_a_fake_is_the_same(name: str) -> None:
    server = FakeServer(FIVE[name])
    bodies = [body(3 + i % 5, [i]) for i in range(20)]
    assert server.exchange(None, Waves(bodies, 8)) == server.exchange(None, Waves(bodies, 8))


def test_a_trial_that_is_ended_stops_the_requests_in_flight() -> None:
    done = FakeServer(PLAIN).exchange(None, Fixed([body(9)] * 2), until_ns=35 * MS)
    assert [one.failure is not None for one in done] == [True, True]
    assert all(one.failure and one.failure.kind is FailureKind.STOPPED for one in done)
    assert [len(one.reads) for one in done] == [4, 4]  # the event at which the time is over counts
