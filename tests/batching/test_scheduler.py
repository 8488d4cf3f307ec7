"""Laws of the scheduler: who is served, where, when, and what each pass computes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import (
    ORDER_KEYS,
    STEP_NS,
    UNLIMITED,
    Config,
    Ledger,
    configs,
    drive,
    ending_early,
    law,
    scheduler_of,
    serve,
    steps_with_tokens,
    thorough,
    token,
    workloads,
)

from batchbench.batching.experiment import ServingSpec
from batchbench.batching.plan import Plan, Wait
from batchbench.batching.policies import make_policy
from batchbench.errors import UsageError
from batchbench.workloads import Request, Workload, WorkloadSpec, make_workload

TIGHT = (1, 2, 3, 5, 8, 12)
"""Tokens that a mixed pass may compute beyond one a slot: seldom enough for all newcomers."""


def classic() -> Workload:
    """Eight slots' worth of the notebook's workload: 32 requests, one in eight long."""
    return make_workload(WorkloadSpec(), batch_size=8, vocab_size=50257, encode=None)


# Everybody is served


@given(workloads(), configs())
@law
def test_every_request_is_served_exactly_once_with_its_number_of_tokens(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    log = recording.requests
    assert [len(steps) for steps in steps_with_tokens(recording)] == workload.output_tokens.tolist()
    assert (log.admitted >= 0).all()
    assert (log.admitted <= log.first).all()
    assert (log.first <= log.last).all()
    assert (log.last < log.released).all()
    assert (log.released <= recording.num_steps).all()
    assert recording.num_steps == log.last.max() + 1


@given(workloads(), configs())
@thorough
def test_a_kv_cache_can_do_what_plans_ask_and_each_request_gets_its_own_tokens(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config, engine=Ledger(config.slots))
    for request in workload:
        expected = [token(request.index, nth) for nth in range(request.output_tokens)]
        assert recording.tokens_of(request.index).tolist() == expected


@given(workloads(), configs())
@law
def test_the_pieces_of_a_prompt_cover_it_once_and_in_order(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    read = [0] * len(workload)
    chunks = recording.chunks
    for request, start, stop in zip(chunks.request, chunks.start, chunks.stop, strict=True):
        assert read[request] == start < stop
        read[request] = stop
    assert read == workload.prompt_tokens.tolist()


@given(workloads(), configs())
@law
def test_nobody_is_admitted_before_being_due(workload: Workload, config: Config) -> None:
    recording = serve(workload, config)
    due = recording.requests.due_ns
    assert (recording.step_starts_ns[recording.requests.admitted] >= due).all()
    assert (due >= workload.due_ns).all()


# Slots


@given(workloads(), configs())
@law
def test_a_slot_never_has_two_requests_at_once(workload: Workload, config: Config) -> None:
    log = serve(workload, config).requests
    assert set(log.slot.tolist()) <= set(range(config.slots))
    stays = sorted(
        zip(log.slot.tolist(), log.admitted.tolist(), log.released.tolist(), strict=True)
    )
    for (slot, _, released), (next_slot, admitted, _) in pairwise(stays):
        assert slot != next_slot or released <= admitted


@given(workloads(), configs())
@law
def test_no_step_computes_more_than_the_slots(workload: Workload, config: Config) -> None:
    recording = serve(workload, config)
    spans, log = recording.spans, recording.requests
    assert (spans.decoding + spans.chunks <= config.slots).all()
    assert (spans.decoding + spans.chunks > 0).all()
    steps = np.arange(recording.num_steps)[:, None]
    held = ((log.admitted <= steps) & (steps < log.released)).sum(axis=1)
    assert (np.repeat(spans.decoding + spans.chunks, spans.steps) <= held).all()
    assert (held <= config.slots).all()


@given(workloads(), configs(prefills=["mixed"], rooms=TIGHT))
@law
def test_a_mixed_pass_computes_no_more_than_its_tokens(workload: Workload, config: Config) -> None:
    recording = serve(workload, config)
    spans, chunks = recording.spans, recording.chunks
    span_of_chunk = np.repeat(np.arange(len(spans.steps)), spans.chunks)
    pieces = np.bincount(span_of_chunk, chunks.stop - chunks.start, minlength=len(spans.steps))
    assert (spans.decoding + pieces <= config.max_batched_tokens).all()


@given(workloads(), configs(prefills=["mixed"], rooms=TIGHT))
@law
def test_in_mixed_prefill_a_running_request_gets_a_token_in_every_step(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    log = recording.requests
    assert (log.last - log.first == workload.output_tokens - 1).all()


@given(workloads(), configs(prefills=["separate"]))
@law
def test_in_separate_prefill_no_pass_reads_prompts_and_decodes(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    spans = recording.spans
    assert ((spans.decoding == 0) == (spans.chunks > 0)).all()
    assert (recording.requests.first == recording.requests.admitted).all()


# Orders


@given(workloads(), configs(orders=["fifo"]))
@law
def test_fifo_admits_in_the_order_of_arrival(workload: Workload, config: Config) -> None:
    assert (np.diff(serve(workload, config).requests.admitted) >= 0).all()


@pytest.mark.parametrize("order", ["longest-first", "shortest-first"])
@given(workload=workloads(timed=False), config=configs())
@law
def test_a_closed_workload_is_admitted_in_the_order_asked(
    order: str, workload: Workload, config: Config
) -> None:
    admitted = serve(workload, replace(config, order=order)).requests.admitted
    queue = [request.index for request in sorted(workload, key=ORDER_KEYS[order])]
    assert (np.diff(admitted[queue]) >= 0).all()


@pytest.mark.parametrize("order", list(ORDER_KEYS))
@given(workload=workloads(), config=configs())
@law
def test_of_two_who_wait_the_one_in_front_is_admitted_no_later(
    order: str, workload: Workload, config: Config
) -> None:
    # Chosen to be admitted and admitted differ where a pass has no tokens left for a newcomer.
    config = replace(config, order=order, max_batched_tokens=UNLIMITED)
    recording = serve(workload, config)
    admitted = recording.requests.admitted.tolist()
    starts = recording.step_starts_ns[admitted].tolist()
    due = recording.requests.due_ns.tolist()
    queue = sorted(workload, key=ORDER_KEYS[order])
    for place, behind in enumerate(queue):
        for front in queue[:place]:
            there = due[front.index] <= starts[behind.index]
            assert not there or admitted[front.index] <= admitted[behind.index]


# Static


@given(workloads(timed=False), configs(policies=["static"], prefills=["separate"]))
@law
def test_static_serves_in_waves_as_long_as_their_longest_output(
    workload: Workload, config: Config
) -> None:
    log = serve(workload, config).requests
    queue = [request.index for request in sorted(workload, key=ORDER_KEYS[config.order])]
    begin = 0
    for at in range(0, len(queue), config.slots):
        wave = queue[at : at + config.slots]
        end = begin + int(workload.output_tokens[wave].max())
        assert log.slot[wave].tolist() == list(range(len(wave)))
        assert set(log.admitted[wave].tolist()) == {begin}
        assert set(log.released[wave].tolist()) == {end}
        begin = end
    assert begin == log.released.max()


@given(workloads(), configs(policies=["static"], rooms=[UNLIMITED]))
@law
def test_static_holds_a_wave_until_its_longest_is_done(workload: Workload, config: Config) -> None:
    log = serve(workload, config).requests
    rows = zip(log.admitted.tolist(), log.last.tolist(), log.released.tolist(), strict=True)
    waves = [list(wave) for _, wave in groupby(sorted(rows), key=lambda row: row[0])]
    for wave in waves:
        assert {released for _, _, released in wave} == {max(last for _, last, _ in wave) + 1}
    for before, after in pairwise(waves):
        assert before[0][2] <= after[0][0]


@pytest.mark.parametrize("policy", ["static", "static-fixed", "static-bucketed", "static-oracle"])
@given(workloads(), configs(policies=["static"], waits=(0, 25)))
@law
def test_the_members_of_a_batch_take_their_slots_in_one_step_whatever_a_pass_may_compute(
    policy: str, workload: Workload, config: Config
) -> None:
    log = serve(workload, replace(config, policy=policy)).requests
    for step in np.unique(log.admitted):
        batch = np.flatnonzero(log.admitted == step)
        assert sorted(log.slot[batch].tolist()) == list(range(len(batch)))
        assert len(set(log.released[batch].tolist())) == 1
        assert (log.started[batch] >= step).all()


@pytest.mark.parametrize(
    ("policy", "prefill", "steps"),
    [
        ("static", "separate", 400),
        ("static", "mixed", 400),
        ("continuous", "separate", 132),
        ("continuous", "mixed", 130),
    ],
)
def test_steps_of_the_classic_workload(policy: str, prefill: str, steps: int) -> None:
    assert serve(classic(), Config(policy, 8, prefill=prefill)).num_steps == steps


# Continuous


@given(workloads(), configs(policies=["continuous"]))
@law
def test_continuous_never_leaves_a_slot_empty_while_someone_waits(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    log = recording.requests
    steps, starts = np.arange(recording.num_steps)[:, None], recording.step_starts_ns[:, None]
    held = ((log.admitted <= steps) & (steps < log.released)).sum(axis=1)
    waiting = ((log.due_ns <= starts) & (log.admitted > steps)).sum(axis=1)
    assert not ((held < config.slots) & (waiting > 0)).any()


@given(workloads(), configs(policies=["continuous"]))
@law
def test_continuous_gives_up_a_slot_in_the_step_after_the_last_token(
    workload: Workload, config: Config
) -> None:
    log = serve(workload, config).requests
    assert (log.released == log.last + 1).all()


@given(workloads(), configs())
@law
def test_time_passes_without_a_step_only_while_nobody_is_there(
    workload: Workload, config: Config
) -> None:
    recording = serve(workload, config)
    starts, ends = recording.step_starts_ns, recording.step_ends_ns
    log = recording.requests
    for step in np.flatnonzero(starts > np.concatenate([[0], ends[:-1]])):
        came_before = log.due_ns < starts[step]
        assert (log.last[came_before] < step).all()
        assert starts[step] in log.due_ns


@given(
    workloads(timed=False),
    configs(policies=["continuous"], prefills=["mixed"], rooms=[UNLIMITED]),
)
@law
def test_with_mixed_prefill_nobody_is_done_later_under_continuous_than_under_static(
    workload: Workload, config: Config
) -> None:
    continuous = serve(workload, config).requests
    static = serve(workload, replace(config, policy="static")).requests
    assert (continuous.last <= static.last).all()


@given(
    workloads(timed=False),
    configs(policies=["continuous"], prefills=["mixed"], rooms=[UNLIMITED]),
)
@law
def test_with_mixed_prefill_continuous_keeps_grahams_bound_of_list_scheduling(
    workload: Workload, config: Config
) -> None:
    steps = serve(workload, config).num_steps
    work, longest = int(workload.output_tokens.sum()), int(workload.output_tokens.max())
    assert max(longest, work / config.slots) <= steps
    assert steps <= work / config.slots + (1 - 1 / config.slots) * longest


# A second, naive scheduler


def naive(workload: Workload, config: Config) -> list[list[int]]:
    """Return slot and steps of each request, found step by step."""
    requests, slots = list(workload), config.slots
    produced, read = [0] * len(requests), [0] * len(requests)
    log = [[-1] * 6 for _ in requests]
    held: list[int | None] = [None] * slots
    to_come, waiting, reading = list(requests), list[Request](), list[int]()
    step = now = 0
    while True:
        while to_come and to_come[0].due_ns <= now:
            waiting.append(to_come.pop(0))
        waiting.sort(key=ORDER_KEYS[config.order])
        done = [i is not None and produced[i] == requests[i].output_tokens for i in held]
        running = sum(i is not None for i in held) - sum(done)
        if config.policy == "continuous" or not running:
            for slot, i in enumerate(held):
                if i is not None and done[slot]:
                    log[i][5], held[slot] = step, None
            free = held.count(None)
            for request in waiting[:free]:
                slot = held.index(None)
                held[slot] = request.index
                log[request.index][:2] = slot, step
                reading.append(request.index)
            waiting = waiting[free:]
        decoding = [i for i in held if i is not None and produced[i]]
        budget = config.max_batched_tokens - len(decoding) if config.prefill == "mixed" else 10**9
        if config.prefill == "separate" and reading:
            decoding = []
        if not reading and all(produced[i] == requests[i].output_tokens for i in decoding):
            if not to_come:
                return log
            now = to_come[0].due_ns
            continue
        tokens_for = [i for i in decoding if produced[i] < requests[i].output_tokens]
        for i in list(reading):
            piece = min(budget, requests[i].prompt_tokens - read[i])
            if piece and not read[i]:
                log[i][2] = step
            read[i], budget = read[i] + piece, budget - piece
            if read[i] == requests[i].prompt_tokens:
                log[i][3] = step
                reading.remove(i)
                tokens_for.append(i)
        for i in tokens_for:
            produced[i] += 1
            if produced[i] == requests[i].output_tokens:
                log[i][4] = step
        step, now = step + 1, now + STEP_NS


@given(workloads(loops=False), configs())
@thorough
def test_a_naive_scheduler_that_walks_every_step_agrees_slot_for_slot(
    workload: Workload, config: Config
) -> None:
    log = serve(workload, config).requests
    columns = (log.slot, log.admitted, log.started, log.first, log.last, log.released)
    assert np.stack(columns, axis=1).tolist() == naive(workload, config)


# Driven by hand: positions


@pytest.mark.parametrize("most", [None, 1, 3])
@given(workload=workloads(), config=configs(policies=["static"]))
@law
def test_a_finished_request_that_is_held_keeps_its_last_position(
    most: int | None, workload: Workload, config: Config
) -> None:
    occupant: dict[int, Request] = {}

    def look(plan: Plan) -> None:
        occupant.update((chunk.slot, chunk.request) for chunk in plan.chunks)
        ends = plan.advanced(plan.repeat - 1)
        for slot, begin, end, growing in zip(
            plan.slots, plan.positions, ends, plan.growing, strict=True
        ):
            request = occupant[int(slot)]
            last = request.prompt_tokens + request.output_tokens - 2
            assert begin <= end <= last
            assert growing in (0, 1)
            assert growing or begin == end == last

    finished = drive(scheduler_of(workload, config, make_policy("static")), look, most=most)
    assert sorted(finished) == list(range(len(workload)))


@given(workloads(), configs())
@law
def test_positions_of_a_running_request_count_up_from_its_prompt(
    workload: Workload, config: Config
) -> None:
    occupant: dict[int, Request] = {}
    seen: dict[int, list[int]] = {request.index: [] for request in workload}

    def look(plan: Plan) -> None:
        for slot, position, growing in zip(plan.slots, plan.positions, plan.growing, strict=True):
            if growing:
                seen[occupant[int(slot)].index].append(int(position))
        occupant.update((chunk.slot, chunk.request) for chunk in plan.chunks)

    drive(scheduler_of(workload, config, make_policy(config.policy)), look, most=1)
    for request in workload:
        first = request.prompt_tokens
        assert seen[request.index] == list(range(first, first + request.output_tokens - 1))


# Driven by hand: texts that end early


@given(workloads(), configs(), st.integers(0, 2**32 - 1))
@law
def test_with_texts_that_end_early_slots_are_freed_and_nothing_is_lost(
    workload: Workload, config: Config, seed: int
) -> None:
    draw = random.Random(seed)
    scheduler = scheduler_of(workload, config, make_policy(config.policy), lengths_known=False)
    occupant: dict[int, Request] = {}
    produced: Counter[int] = Counter()
    finished: dict[int, Request] = {}
    now = 0
    while (plan := scheduler.plan(now)) is not None:
        if isinstance(plan, Wait):
            assert plan.until > now
            now = plan.until
            continue
        assert plan.repeat == 1
        for slot in plan.released:
            assert occupant.pop(slot).index in finished
        for chunk in plan.chunks:
            assert occupant.setdefault(chunk.slot, chunk.request) == chunk.request
        yielding = plan.slots.tolist() + [chunk.slot for chunk in plan.chunks if chunk.yields]
        running = [slot for slot in yielding if occupant[slot].index not in finished]
        produced.update(occupant[slot].index for slot in running)
        # A model says of a held slot again and again that its text has ended.
        stopped = [slot for slot in yielding if draw.random() < 0.2]
        expected = {
            slot
            for slot in running
            if slot in stopped or produced[occupant[slot].index] == occupant[slot].output_tokens
        }
        done = scheduler.apply(plan, 1, stopped)
        assert sorted(slot for slot, _ in done) == sorted(expected)
        now += STEP_NS
        for slot, request in done:
            assert request == occupant[slot]
            finished[request.index] = request
            scheduler.arrivals.finished(request, now)
    assert sorted(finished) == list(range(len(workload)))
    assert all(1 <= produced[request.index] <= request.output_tokens for request in workload)
    assert not scheduler.waiting
    assert scheduler.running == 0


@given(workloads(), configs(), st.lists(st.integers(1, 12), min_size=14, max_size=14))
@law
def test_a_text_that_ends_early_has_its_tokens_up_to_the_end(
    workload: Workload, config: Config, ends: list[int]
) -> None:
    stops = dict(enumerate(ends[: len(workload)]))
    recording = serve(ending_early(workload), config, engine=Ledger(config.slots, stops))
    for request in workload:
        count = min(request.output_tokens, stops[request.index])
        expected = [token(request.index, nth) for nth in range(count)]
        assert recording.tokens_of(request.index).tolist() == expected
    assert recording.requests.output_tokens.tolist() == [
        min(request.output_tokens, stops[request.index]) for request in workload
    ]


# What cannot be


@given(st.integers(1, 20), st.integers(2, 20))
@law
def test_mixed_prefill_needs_room_for_a_prompt_beside_a_full_batch(slots: int, most: int) -> None:
    def make() -> ServingSpec:
        return ServingSpec(batch_size=slots, prefill="mixed", max_batched_tokens=most)

    if most > slots:
        make()
    else:
        with pytest.raises(UsageError, match=f"--max-batched-tokens {most}: "):
            make()
