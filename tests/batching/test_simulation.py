"""Laws of simulation: equal passes at once or one by one, virtual time, work that grows evenly."""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import (
    STEP_NS,
    UNLIMITED,
    Config,
    Ledger,
    configs,
    law,
    serve,
    thorough,
    workload_of,
    workloads,
)
from support.replay import join_spans

from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.plan import Plan
from batchbench.batching.policies import POLICIES
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording, SpanLog
from batchbench.workloads import Arrivals, Request, Workload

ALL_POLICIES = ("static", "continuous", "support.laws:Patient", *POLICIES)
some_wait = functools.partial(configs, policies=ALL_POLICIES, waits=(0, 0, 7, STEP_NS, 95))


def assert_same(one: Recording, other: Recording) -> None:
    """Equal in every column."""
    assert one.header == other.header
    for name in ("requests", "spans", "chunks", "waits"):
        log, other_log = getattr(one, name), getattr(other, name)
        for column in fields(log):
            values = getattr(log, column.name).tolist()
            assert values == getattr(other_log, column.name).tolist(), f"{name}.{column.name}"
    assert one.step_ns is not None
    assert other.step_ns is not None
    assert one.step_ns.tolist() == other.step_ns.tolist()


# Repeat


@pytest.mark.parametrize("max_repeat", [1, 3])
@given(workload=workloads(), config=some_wait())
@thorough
def test_how_many_passes_are_planned_at_once_does_not_show_in_the_recording(
    max_repeat: int, workload: Workload, config: Config
) -> None:
    at_once = serve(workload, config)
    shortened = serve(workload, config, max_repeat=max_repeat)
    assert (shortened.spans.steps <= max_repeat).all()
    assert_same(join_spans(shortened), join_spans(at_once))


def by_step(recording: Recording) -> list[list[int]]:
    """Start, end, decoding, waiting and chunks of each step."""
    spans = recording.spans
    of_spans = (np.repeat(c, spans.steps) for c in (spans.decoding, spans.waiting, spans.chunks))
    times = (recording.step_starts_ns, recording.step_ends_ns)
    return np.stack([*times, *of_spans], axis=1).tolist()


@given(workloads(), some_wait(), st.integers(1, 4))
@law
def test_merging_equal_spans_changes_nothing_of_any_step(
    workload: Workload, config: Config, max_repeat: int
) -> None:
    recording = serve(workload, config, max_repeat=max_repeat)
    merged = join_spans(recording)
    assert by_step(merged) == by_step(recording)
    assert_same(join_spans(merged), merged)


@given(st.binary(min_size=1, max_size=12))
@law
def test_spans_are_merged_only_where_they_follow_at_once_and_equal_each_other(drawn: bytes) -> None:
    start, rows = 0, []
    for byte in drawn:  # a bit or two each for pause, waiting, decoding, chunks, steps and cost
        start += byte & 1
        waiting, decoding, chunks = byte >> 1 & 1, byte >> 2 & 1, byte >> 3 & 1
        steps, cost = 1 if chunks else (byte >> 4 & 3) + 1, (byte >> 6 & 1) + 1
        rows.append((steps, start, decoding, waiting, chunks, cost))
        start += steps * cost
    *columns, costs = np.array(rows).T
    blank = serve(workload_of([(1, 1, 0)]), Config("static", 1))
    recording = replace(blank, spans=SpanLog(*columns), step_ns=costs)
    merged = join_spans(recording)
    assert by_step(merged) == by_step(recording)
    assert merged.spans.steps[merged.spans.chunks > 0].max(initial=1) == 1
    assert_same(join_spans(merged), merged)


def test_equal_passes_become_one_call_of_the_engine() -> None:
    recording = serve(workload_of([(3, 1000, 0)] * 4), Config("static", 4))
    assert recording.spans.steps.tolist() == [1, 999]


# What a span says of its steps


@given(workloads(), some_wait())
@law
def test_waiting_counts_in_every_step_who_is_due_and_has_no_slot(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    log, spans = recording.requests, recording.spans
    steps, starts = np.arange(recording.num_steps)[:, None], recording.step_starts_ns[:, None]
    waiting = ((log.due_ns <= starts) & (log.admitted > steps)).sum(axis=1)
    assert np.repeat(spans.waiting, spans.steps).tolist() == waiting.tolist()


@given(workloads(), some_wait())
@law
def test_decoding_counts_in_every_pass_all_held_slots_that_have_read_their_prompt(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    log, spans = recording.requests, recording.spans
    steps = np.arange(recording.num_steps)[:, None]
    decoding = ((log.first < steps) & (steps < log.released)).sum(axis=1)
    if config.prefill == "separate":
        decoding[np.repeat(spans.chunks, spans.steps) > 0] = 0
    assert np.repeat(spans.decoding, spans.steps).tolist() == decoding.tolist()


# Virtual time


@pytest.mark.parametrize("explicit", [False, True])
@given(workload=workloads(), config=some_wait())
@law
def test_steps_follow_each_other_and_each_takes_its_cost(
    explicit: bool, workload: Workload, config: Config
) -> None:
    engine = Ledger(config.slots) if explicit else None
    recording = serve(workload, config, engine=engine)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    assert (recording.step_ns is None) == explicit
    assert len(starts) == len(ends) == recording.num_steps
    assert (ends - starts == STEP_NS).all()
    assert (starts[1:] >= ends[:-1]).all()
    assert (starts[recording.first_steps] == recording.spans.start_ns).all()
    assert recording.duration_ns == ends[-1]


@given(workloads(), some_wait())
@law
def test_ends_of_steps_are_the_same_as_a_formula_and_as_a_list(
    workload: Workload, config: Config
) -> None:
    formula = serve(workload, config)
    explicit = serve(workload, config, engine=Ledger(config.slots))
    assert explicit.step_starts_ns.tolist() == formula.step_starts_ns.tolist()
    assert explicit.step_ends_ns.tolist() == formula.step_ends_ns.tolist()


@given(workloads(), some_wait())
@law
def test_an_engine_serves_a_second_trial_as_it_did_the_first(
    workload: Workload, config: Config
) -> None:
    engine = SimulatedEngine(STEP_NS)
    assert_same(serve(workload, config, engine=engine), serve(workload, config, engine=engine))


@given(start=st.integers(0, 100), repeat=st.integers(1, 9), until=st.none() | st.integers(0, 300))
@law
def test_a_run_ends_with_its_last_pass_or_the_first_that_ends_at_or_after_until(
    start: int, repeat: int, until: int | None
) -> None:
    engine = SimulatedEngine(STEP_NS)
    engine.begin(workload_of([(1, 1, 0)]))
    engine.clock.wait_until(start)
    none = np.zeros(0, np.int64)
    ran = engine.run(Plan((), none, none, none, (), repeat, until))
    ends = [start + n * STEP_NS for n in range(1, repeat + 1)]
    expected = next(
        (n for n, end in enumerate(ends, 1) if until is not None and end >= until), repeat
    )
    assert ran == expected
    assert engine.clock.now() == ends[expected - 1]


# Arrivals


@given(workloads(loops=False), st.lists(st.integers(0, 30), max_size=40))
@law
def test_a_timetable_gives_each_request_once_when_it_is_due(
    workload: Workload, waits: list[int]
) -> None:
    timetable, given_out, now = Arrivals(workload), list[Request](), 0
    for wait in [*waits, 10**9]:
        now += wait
        given_out += timetable.due(now)
        assert given_out == [request for request in workload if request.due_ns <= now]
        left = [request.due_ns for request in workload if request.due_ns > now]
        assert timetable.next_due == min(left, default=None)
    assert timetable.due(now) == []


@given(workloads(), some_wait())
@law
def test_a_request_of_a_closed_loop_is_due_at_its_time_or_when_there_is_room(
    workload: Workload, config: Config
) -> None:
    """No sooner than fewer than N of those before it are unfinished, and not a moment later."""
    recording = serve(workload, config)
    ends = recording.step_ends_ns[recording.requests.last].tolist()
    most = workload.max_concurrency or len(workload)
    for request in workload:
        before = ends[: request.index]
        room = min(t for t in [0, *before] if sum(end > t for end in before) < most)
        assert recording.requests.due_ns[request.index] == max(request.due_ns, room)


def test_a_closed_loop_keeps_so_many_in_the_system_and_no_more() -> None:
    recording = serve(workload_of([(1, 3, 0)] * 20, 4), Config("continuous", 8))
    log = recording.requests
    ends = recording.step_ends_ns[log.last]
    for t in range(0, recording.duration_ns - 3 * STEP_NS, STEP_NS):
        assert ((log.due_ns <= t) & (ends > t)).sum() == 4


# Watching


class Witness(Watch):
    """Keeps a copy of all that it is told."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []

    def progressed(self, progress: Progress) -> None:
        self.seen.append(replace(progress))


@given(workloads(), some_wait())
@law
def test_progress_only_grows_and_ends_at_the_whole(workload: Workload, config: Config) -> None:
    watch = Witness()
    recording = serve(workload, config, watch=watch)
    for name in ("done", "steps", "tokens", "now_ns"):
        values = [getattr(progress, name) for progress in watch.seen]
        assert values == sorted(values)
    assert all(0 < progress.slots_in_use <= config.slots for progress in watch.seen)
    end = watch.seen[-1]
    assert end.done == end.requests == len(workload)
    assert end.steps == recording.num_steps
    assert end.tokens == workload.output_tokens.sum()
    assert end.now_ns == recording.duration_ns


# Large queues


class Counted(Request):
    """A request whose reading and comparing are calls, which a profile can count."""

    __slots__ = ()
    index = property(lambda self: self[0])
    output_tokens = property(lambda self: self[2])

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)

    def __hash__(self) -> int:
        return super().__hash__()


class CountedWorkload(Workload):
    """A workload of counted requests."""

    def __iter__(self) -> Iterator[Request]:
        return map(Counted._make, super().__iter__())


def work(serving: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, that ``serving`` makes: the same in every run."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        serving()
    finally:
        sys.setprofile(before)
    return calls


def many(count: int, gap_ns: int) -> Workload:
    """A large workload whose lengths vary."""
    draw = random.Random(count)
    workload = workload_of([(3, draw.randint(1, 30), gap_ns) for _ in range(count)])
    return CountedWorkload(**{f.name: getattr(workload, f.name) for f in fields(workload)})


@pytest.mark.parametrize("gap_ns", [0, STEP_NS], ids=["closed", "arriving faster than served"])
@pytest.mark.parametrize("prefill", ["separate", "mixed"])
@pytest.mark.parametrize("order", ["fifo", "longest-first"])
@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_four_times_the_requests_are_four_times_the_work(
    policy: str, order: str, prefill: str, gap_ns: int
) -> None:
    config = Config(policy, 8, order, prefill)
    small, large = (
        work(lambda count=count: serve(many(count, gap_ns), config)) for count in (400, 1600)
    )
    # Not four exactly: who ends together with whom differs. Work that grew as n² would be 16.
    assert 3 < large / small < 5.5


def test_the_work_of_a_pass_does_not_grow_with_the_slots() -> None:
    narrow, wide = (
        work(lambda slots=slots: serve(many(2000, 0), Config("continuous", slots)))
        for slots in (8, 512)
    )
    assert wide < narrow  # as many requests begin and end, in fewer passes


@pytest.mark.parametrize("policy", ["static", "continuous"])
@given(workload=workloads(timed=False), config=configs())
@law
def test_the_engine_is_called_at_most_twice_a_request(
    policy: str, workload: Workload, config: Config
) -> None:
    config = replace(config, policy=policy, max_batched_tokens=UNLIMITED)
    assert len(serve(workload, config).spans.steps) <= 2 * len(workload)


def test_a_hundred_thousand_requests_take_no_five_seconds() -> None:
    workload = workload_of([(7, 100 if i % 8 == 0 else 10, 0) for i in range(100_000)])
    began = time.process_time()
    recording = serve(workload, Config("continuous", 8))
    assert time.process_time() - began < 5
    assert (recording.requests.last >= 0).all()
