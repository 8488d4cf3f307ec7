"""The judge's laws: verdicts on servers of known schedule, and what each test must not mistake."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.probe_server import MS, Kind, observe

from batchbench.studies.probe import judge as judging
from batchbench.studies.probe.judge import (
    Fate,
    Verdict,
    burst_of,
    fate_of,
    judge,
    offset_of,
    sends_by_timer,
    shared_steps,
)
from batchbench.studies.probe.observations import (
    Observations,
    Pace,
    Role,
    Round,
    Server,
    Stream,
    pace_of,
)

CONTINUOUS = judging.Kind.CONTINUOUS
STATIC = judging.Kind.STATIC
SERIAL = judging.Kind.SERIAL
UNKNOWN = judging.Kind.UNKNOWN

PACE = Pace(ttft_ns=30 * MS, gap_ns=20 * MS, chunk=1, buffered=False)


def verdict_of(kind: Kind, seed: int = 1) -> Verdict:
    """Probe a server and judge it."""
    return judge(observe(kind, seed)[0])


def stream(role: Role, sent_ms: float, *times_ms: float) -> Stream:
    """Return a stream whose tokens arrived at these times."""
    times = tuple(round(t * MS) for t in times_ms)
    return Stream(role, len(times), round(sent_ms * MS), times)


def steady(role: Role, sent_ms: float, first_ms: float, tokens: int, gap: float = 20) -> Stream:
    """Return a stream with a token every 20 ms."""
    return stream(role, sent_ms, *(first_ms + gap * i for i in range(tokens)))


# Verdicts


@pytest.mark.parametrize("slots", [2, 3, 5, 8, 13, 24])
def test_a_continuous_server_is_known_with_its_slots(slots: int) -> None:
    found = verdict_of(Kind(slots=slots))
    assert (found.kind, found.slots, found.slots_is_lower_bound) == (CONTINUOUS, slots, False)


@pytest.mark.parametrize("slots", [2, 3, 8, 24])
@pytest.mark.parametrize("window", [0.0, 50.0])
def test_a_static_server_is_known_with_its_slots(slots: int, window: float) -> None:
    found = verdict_of(Kind("static", slots=slots, window=window))
    assert (found.kind, found.slots, found.slots_is_lower_bound) == (STATIC, slots, False)


@pytest.mark.parametrize("chunk", [0, 1, 4])
@pytest.mark.parametrize("policy", ["continuous", "static", "slices"])
def test_one_slot_is_serial_whatever_the_policy(policy: str, chunk: int) -> None:
    found = verdict_of(Kind(policy, slots=1, chunk=chunk))
    assert (found.kind, found.slots, found.slots_is_lower_bound) == (SERIAL, 1, False)


@pytest.mark.parametrize("slots", [64, 100])
def test_more_slots_than_requests_are_a_lower_bound(slots: int) -> None:
    found = verdict_of(Kind(slots=slots))
    assert (found.kind, found.slots, found.slots_is_lower_bound) == (CONTINUOUS, 64, True)


@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_a_buffered_server_is_known_by_its_ends(policy: str) -> None:
    found = verdict_of(Kind(policy, slots=6, chunk=0))
    assert found.kind.value == policy
    assert found.pace is not None
    assert found.pace.buffered
    assert found.slots == 6


def test_a_server_that_sends_several_tokens_together_is_known() -> None:
    found = verdict_of(Kind(slots=4, chunk=4))
    assert (found.kind, found.slots) == (CONTINUOUS, 4)
    assert found.pace is not None
    assert found.pace.chunk == 4


@pytest.mark.parametrize("routing", ["turns", "least", "random"])
def test_two_continuous_replicas_are_continuous_with_a_lower_bound(routing: str) -> None:
    found = verdict_of(Kind(slots=3, replicas=2, routing=routing))
    assert found.kind is CONTINUOUS
    assert found.slots_is_lower_bound
    assert found.slots is not None
    assert found.slots <= 6


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("routing", ["turns", "least", "random"])
@pytest.mark.parametrize(("policy", "slots"), [("static", 8), ("continuous", 1), ("slices", 4)])
def test_replicas_that_share_no_steps_are_not_called_continuous(
    policy: str, slots: int, routing: str, chunk: int
) -> None:
    """Requests join at once, since another replica is idle; only their steps tell."""
    kind = Kind(policy, slots=slots, replicas=2, routing=routing, chunk=chunk)
    found = verdict_of(kind)
    assert found.kind is UNKNOWN
    assert found.joining is not None
    assert found.joining.joined


@pytest.mark.parametrize("chunk", [0, 1, 4])
@pytest.mark.parametrize("quantum", [1, 2, 8])
def test_a_server_that_takes_turns_is_not_called_continuous(quantum: int, chunk: int) -> None:
    found = verdict_of(Kind("slices", quantum=quantum, chunk=chunk))
    assert found.kind is UNKNOWN
    assert "in turns" in found.reason or (quantum, chunk) != (1, 1)


@pytest.mark.parametrize("share", [0.3, 0.75, 0.95, 1.2])
@pytest.mark.parametrize("policy", ["static", "slices"])
def test_a_timer_that_sends_the_tokens_of_replicas_does_not_deceive(
    policy: str, share: float
) -> None:
    """Tokens of both replicas then arrive together, although they share no step."""
    kind = Kind(policy, step=40, tick=40 * share, replicas=2, routing="least")
    found = verdict_of(kind)
    assert found.kind is UNKNOWN
    assert found.joining is not None
    assert found.joining.joined


def test_no_reason_states_as_a_fact_that_there_is_a_timer() -> None:
    """A busy machine makes tokens late too, and from outside it looks the same."""
    reasons = [
        verdict_of(Kind(policy, step=40, tick=40 * share, replicas=replicas, chunk=chunk)).reason
        for policy in ("continuous", "static")
        for share in (0.3, 0.95, 1.2)
        for replicas, chunk in ((1, 1), (2, 1), (2, 0))
    ]
    about = [reason for reason in reasons if "timer" in reason]
    assert any("as if a timer" in reason for reason in about)
    assert all("a busy machine can cause it" in reason for reason in about)


@pytest.mark.parametrize("seed", range(4))
def test_requests_of_others_make_no_verdict_wrong(seed: int) -> None:
    busy = verdict_of(Kind("static", others=1.5), seed)
    assert busy.kind in (STATIC, UNKNOWN)
    serial = verdict_of(Kind(slots=1, others=0.6), seed)
    assert serial.kind in (SERIAL, UNKNOWN)
    continuous = verdict_of(Kind(others=2.0), seed)
    assert continuous.kind in (CONTINUOUS, UNKNOWN)
    assert continuous.slots is None or continuous.slots <= 8


def test_a_limit_of_requests_is_told_as_a_lower_bound() -> None:
    found = verdict_of(Kind(slots=8, limit=10))
    assert (found.kind, found.slots_is_lower_bound) == (CONTINUOUS, True)
    assert any(burst.refused for burst in found.bursts)


def test_a_server_that_refuses_while_it_serves_gives_no_verdict() -> None:
    found = verdict_of(Kind(slots=1, limit=1))
    assert found.kind is UNKNOWN
    assert "refuses" in found.reason


@pytest.mark.parametrize("step", [3.0, 130.0, 300.0])
def test_fast_and_slow_servers_are_known_in_a_minute(step: float) -> None:
    seen, seconds = observe(Kind(step=step, prefill=step / 4, slots=4), 1)
    assert judge(seen).kind is CONTINUOUS
    assert seconds <= 60


def test_too_little_time_gives_no_verdict_and_is_kept() -> None:
    seen, seconds = observe(Kind(step=200), 1, max_time_s=8)
    assert judge(seen).kind is UNKNOWN
    assert seconds <= 8


def test_slots_that_differ_from_what_the_server_says_are_a_lower_bound() -> None:
    seen, _ = observe(Kind(slots=4, tells=True), 1)
    assert not judge(seen).slots_is_lower_bound
    told = replace(seen, server=Server(slots=6))
    assert (judge(told).slots, judge(told).slots_is_lower_bound) == (4, True)


def test_requests_of_others_that_the_server_counts_make_slots_a_lower_bound() -> None:
    seen, _ = observe(Kind(slots=4), 1)
    busy = judge(replace(seen, server=Server(others=2)))
    assert (busy.slots, busy.slots_is_lower_bound) == (4, True)
    assert busy.busy


@pytest.mark.parametrize("server", [Server(others=2), Server(slots=8)])
def test_one_free_slot_of_many_is_not_called_serial(server: Server) -> None:
    """From outside, a server whose other slots are held for a minute has one."""
    seen, _ = observe(Kind(slots=1), 1)
    assert judge(seen).kind is SERIAL
    assert judge(replace(seen, server=server)).kind is UNKNOWN


def test_a_buffered_server_that_ends_early_is_not_called_serial() -> None:
    for seed in range(6):
        found = verdict_of(Kind("static", chunk=0, early_end=0.5, hiccup=0.08), seed)
        assert found.kind in (STATIC, UNKNOWN)


def test_a_busy_client_gives_no_verdict_on_shared_steps() -> None:
    seen, _ = observe(Kind(slots=4), 1)
    assert judge(replace(seen, lag_ns=3 * MS)).kind is UNKNOWN


def test_nothing_observed_is_no_verdict() -> None:
    assert judge(Observations(())).kind is UNKNOWN
    refused = Stream(Role.ALONE, 8, 0, (), refused=True)
    assert judge(Observations((Round([refused]),))).kind is UNKNOWN


# Joining


LONG = steady(Role.LONG, 0, 30, 50)  # ends at 1010 ms


@pytest.mark.parametrize(
    ("short", "fate"),
    [
        (steady(Role.SHORT, 100, 130, 6), Fate.JOINED),
        (steady(Role.SHORT, 100, 1040, 6), Fate.WAITED),
        (steady(Role.SHORT, 960, 990, 6), Fate.UNCLEAR),  # too near the end to tell
        (steady(Role.SHORT, 20, 50, 6), Fate.UNCLEAR),  # the long one had not begun
        (Stream(Role.SHORT, 6, 100 * MS, (), refused=True), Fate.REFUSED),
        (Stream(Role.SHORT, 6, 100 * MS, (), failure="reset"), Fate.UNCLEAR),
    ],
)
def test_the_fate_of_a_short_request(short: Stream, fate: Fate) -> None:
    assert fate_of(short, [LONG], PACE) is fate


def test_a_long_request_that_waits_is_not_one_that_runs() -> None:
    """On a busy static server both wait for others and then begin together, in one batch."""
    late = steady(Role.LONG, 0, 500, 50)
    assert fate_of(steady(Role.SHORT, 100, 500, 6), [late], PACE) is Fate.UNCLEAR


# Shared steps


@given(shift=st.floats(0, 0.5), tokens=st.integers(3, 12))
@settings(deadline=None, max_examples=50)
def test_the_offset_is_the_distance_from_the_nearest_step(shift: float, tokens: int) -> None:
    short = steady(Role.SHORT, 100, 130 + 20 * shift, tokens)
    offset = offset_of(short, LONG)
    assert offset is not None
    assert offset == pytest.approx(shift, abs=1e-3)


def test_chunks_of_several_tokens_are_compared_step_by_step() -> None:
    times = [t for k in range(10) for t in [130.0 + 80 * k] * 4]
    long = stream(Role.LONG, 0, 50, *times)
    joined = stream(Role.SHORT, 100, 210, *([290 + 20.0] * 4), *([290 + 100.0] * 4))
    assert offset_of(joined, long) == pytest.approx(0, abs=1e-6)
    apart = stream(Role.SHORT, 100, 210, *([290 + 30.0] * 4), *([290 + 110.0] * 4))
    assert offset_of(apart, long) == pytest.approx(0.5, abs=1e-6)


def shorts_at(phases: list[float]) -> Observations:
    """Return rounds in which a short request each joins at a phase of the long one's steps."""
    rounds = [Round([LONG, steady(Role.SHORT, 100, 150 + 20 * phase, 6)]) for phase in phases]
    return Observations(tuple(rounds))


def test_random_phases_are_not_shared_steps() -> None:
    random = np.random.default_rng(1)
    shown = [
        shared_steps(shorts_at(random.uniform(0, 1, 12).tolist()), PACE).shown for _ in range(200)
    ]
    assert sum(shown) == 0


def test_six_requests_in_one_step_are_the_fewest_that_show_it() -> None:
    assert shared_steps(shorts_at([0.0] * 6), PACE).shown
    assert not shared_steps(shorts_at([0.0] * 5), PACE).shown


def test_one_phase_between_the_steps_is_that_of_turns() -> None:
    found = shared_steps(shorts_at([0.5] * 8), PACE)
    assert found.in_turns
    assert not found.shown


# Timers


def test_a_timer_is_seen_and_a_server_without_one_is_not_suspected() -> None:
    for step, tick in ((40.0, 39.0), (40.0, 20.0), (40.0, 55.0)):
        seen, _ = observe(Kind(step=step, tick=tick), 1)
        pace = pace_of(seen.alone)
        assert pace is not None
        assert sends_by_timer(seen, pace), (step, tick)
    for seed in range(5):
        seen, _ = observe(Kind(prefill=20.0, jitter=0.001), seed)
        pace = pace_of(seen.alone)
        assert pace is not None
        assert not sends_by_timer(seen, pace)


def test_chunks_that_a_busy_client_reads_at_once_are_no_timer() -> None:
    """They share the time of the later one; a timer sends larger chunks at the same pace."""
    steps = [50.0 + 20 * i for i in range(24)]
    merged = [steps[i + 1] if i % 5 == 2 else t for i, t in enumerate(steps[:-1])]
    ticks = [50 + 26 * np.ceil((t - 50) / 26) for t in steps]
    for times, timer in ((merged, False), (ticks, True)):
        alone = [stream(Role.ALONE, 0, *times)] * 2
        seen = Observations(tuple(Round([s]) for s in alone))
        assert sends_by_timer(seen, PACE) is timer


# Slots


def test_a_burst_grows_only_if_half_of_it_ran_together() -> None:
    for seed in range(6):
        seen, _ = observe(Kind(slots=4, early_end=0.1), seed)
        pace = pace_of(seen.alone)
        assert pace is not None
        for before, after in pairwise([burst_of(round, pace) for round in seen.of(Role.BURST)]):
            assert after.sent <= before.sent or 2 * before.most >= before.sent


def burst(*streams: Stream) -> Round:
    return Round([replace(s, role=Role.BURST) for s in streams])


def test_a_start_right_after_an_end_does_not_count_as_one_more_slot() -> None:
    two = [steady(Role.BURST, 0, 30, 8), steady(Role.BURST, 0, 30, 12)]
    late_end = replace(two[0], times_ns=(*two[0].times_ns[:-1], two[0].last_ns + 5 * MS))
    third = steady(Role.BURST, 0, 30 + 8 * 20 + 4, 8)  # begins before that end has arrived
    assert burst_of(burst(late_end, two[1], third), PACE).most == 2


def test_room_that_others_left_is_not_an_exact_count() -> None:
    ours = [steady(Role.BURST, 0, 30, 12 + i) for i in range(3)]
    after_end = [steady(Role.BURST, 0, o.last_ns / MS + 20, 8) for o in ours]
    assert burst_of(burst(*ours, *after_end), PACE).exact
    early = steady(Role.BURST, 0, 200, 8)  # none of ours had ended
    assert not burst_of(burst(*ours, early, *after_end[1:]), PACE).exact


def test_the_first_and_the_last_group_of_a_static_server_need_not_be_full() -> None:
    def group(first: float, count: int) -> list[Stream]:
        return [steady(Role.BURST, 0, first, 8) for _ in range(count)]

    full = burst_of(burst(*group(30, 1), *group(300, 4), *group(600, 2)), PACE)
    assert (full.groups, full.most, full.exact) == ((1, 4, 2), 4, True)
    rest = burst_of(burst(*group(30, 1), *group(300, 3)), PACE)
    assert (rest.groups, rest.most, rest.exact) == ((1, 3), 3, False)


def test_a_request_of_one_token_makes_a_count_inexact() -> None:
    def group(first: float, *lengths: int) -> list[Stream]:
        return [steady(Role.BURST, 0, first + i / 10, n) for i, n in enumerate(lengths)]

    full = [*group(30, 8, 9), *group(300, 8, 8, 8, 9), *group(600, 8)]
    assert burst_of(burst(*full), PACE).exact
    early = [*group(30, 8, 9), *group(300, 1, 8, 8, 9), *group(600, 8)]
    assert not burst_of(burst(*early), PACE).exact


def test_a_prompt_in_a_pass_of_its_own_does_not_add_a_slot() -> None:
    """Its token comes long before the step of many rows that the others take."""
    ours = [steady(Role.BURST, 0, 30, 8 + i, gap=600) for i in range(4)]
    after_end = [steady(Role.BURST, 0, o.last_ns / MS + 16, 8, gap=600) for o in ours]
    assert burst_of(burst(*ours, *after_end), PACE).most == 4


def test_a_failed_request_makes_a_count_inexact() -> None:
    ours = [steady(Role.BURST, 0, 30, 12 + i) for i in range(3)]
    after_end = [steady(Role.BURST, 0, o.last_ns / MS + 20, 8) for o in ours]
    failed = Stream(Role.BURST, 8, 0, (), failure="reset")
    assert not burst_of(burst(*ours, *after_end, failed), PACE).exact
