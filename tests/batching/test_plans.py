"""Plans of the scheduler, each asked for by hand at one moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from support.laws import workload_of

from batchbench.batching import scheduler as module
from batchbench.batching.plan import Plan, Wait
from batchbench.batching.policies import Continuous, View
from batchbench.batching.scheduler import Scheduler
from batchbench.errors import UsageError
from batchbench.workloads import Arrivals, Request


def planned(scheduler: Scheduler, now: int = 0) -> Plan:
    """The next plan, of a scheduler that has something to compute."""
    plan = scheduler.plan(now)
    assert isinstance(plan, Plan)
    return plan


def decoding(
    *rows: tuple[int, int, int], slots: int = 2, policy: Continuous | None = None
) -> Scheduler:
    """A scheduler whose first requests have read their prompts, at time 0."""
    scheduler = Scheduler(Arrivals(workload_of(rows)), policy or Continuous(), slots)
    scheduler.apply(planned(scheduler), 1)
    return scheduler


class Asks(Continuous):
    """Admits the first request alone, and asks to be asked again at a given time."""

    def __init__(self, again: int | None) -> None:
        self._again = again

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return [request for request in view.waiting if request.index == 0], self._again


class Keeps(Continuous):
    """Releases no slot."""

    def release(self, view: View) -> Iterable[int]:
        return ()


def test_a_plan_holds_whole_numbers_from_its_first_pass_on() -> None:
    scheduler = decoding((3, 4, 0), (2, 6, 0))
    for plan in (planned(decoding((3, 4, 0))), planned(scheduler)):
        assert {plan.slots.dtype, plan.positions.dtype, plan.growing.dtype} == {np.dtype(np.int64)}
    prompts = planned(Scheduler(Arrivals(workload_of([(3, 4, 0)])), Continuous(), 2))
    assert {prompts.slots.dtype, prompts.positions.dtype, prompts.growing.dtype} == {
        np.dtype(np.int64)
    }
    assert (prompts.repeat, prompts.until, len(prompts.slots)) == (1, None, 0)


def test_unless_told_otherwise_requests_end_at_their_length_and_prompts_have_passes() -> None:
    scheduler = decoding((3, 4, 0), (2, 6, 0))
    plan = planned(scheduler)
    assert (plan.slots.tolist(), plan.positions.tolist()) == ([0, 1], [3, 2])
    assert plan.growing.tolist() == [1, 1]
    assert (plan.repeat, plan.until, plan.chunks) == (3, None, ())


def test_unless_told_otherwise_a_mixed_pass_computes_2048_tokens() -> None:
    arrivals = Arrivals(workload_of([(3000, 4, 0)]))
    scheduler = Scheduler(arrivals, Continuous(), 2, prefill="mixed")
    [chunk] = planned(scheduler).chunks
    assert (chunk.start, chunk.stop) == (0, 2048)


def test_where_lengths_are_not_known_each_pass_is_planned_alone() -> None:
    arrivals = Arrivals(workload_of([(3, 4, 0)]))
    scheduler = Scheduler(arrivals, Continuous(), 2, lengths_known=False)
    scheduler.apply(planned(scheduler), 1)
    assert planned(scheduler).repeat == 1


@pytest.mark.parametrize(
    ("again", "next_due", "until"),
    [(7, 20, 7), (30, 20, 20), (None, 20, 20), (7, None, 7), (None, None, None)],
)
def test_a_plan_ends_where_the_policy_or_the_next_request_wants_to_be_heard(
    again: int | None, next_due: int | None, until: int | None
) -> None:
    rows = [(3, 4, 0), (3, 4, 0)] + [(1, 1, next_due)] * (next_due is not None)
    scheduler = decoding(*rows, slots=3, policy=Asks(again))
    plan = planned(scheduler)
    assert (plan.chunks, plan.repeat, plan.until) == ((), 3, until)


@pytest.mark.parametrize("prefill", ["separate", "mixed"])
def test_a_prefill_ends_before_the_next_request_is_looked_for(prefill: str) -> None:
    """A GPU's host would otherwise plan the next pass before it knows who came meanwhile."""
    arrivals = Arrivals(workload_of([(3, 4, 0), (1, 1, 20)]))
    scheduler = Scheduler(arrivals, Continuous(), 2, prefill=prefill, max_batched_tokens=8)
    plan = planned(scheduler)
    assert (len(plan.chunks), plan.repeat, plan.until) == (1, 1, 20)


@pytest.mark.parametrize(("again", "refused"), [(4, True), (5, True), (6, False)])
def test_a_policy_may_ask_to_be_asked_again_at_a_later_time_only(again: int, refused: bool) -> None:
    scheduler = Scheduler(Arrivals(workload_of([(3, 4, 0)])), Asks(again), 2)
    if not refused:
        planned(scheduler, now=5)
        return
    with pytest.raises(UsageError, match="a next time that has passed"):
        scheduler.plan(5)


def test_the_policy_sees_the_time_of_the_plan() -> None:
    scheduler = Scheduler(Arrivals(workload_of([(3, 4, 9)])), Continuous(), 2)
    assert scheduler.plan(4) == Wait(9)
    assert scheduler.now == 4


def test_clients_that_wait_for_their_answers_bring_more_while_one_runs() -> None:
    workload = workload_of([(3, 2, 0), (3, 2, 0)], max_concurrency=1)
    scheduler = Scheduler(Arrivals(workload), Continuous(), 2)
    assert not scheduler.more_to_come or scheduler.arrivals.next_due is not None
    scheduler.apply(planned(scheduler), 1)
    assert scheduler.running == 1
    assert scheduler.arrivals.next_due is None
    assert scheduler.more_to_come


class Lingers(Continuous):
    """Admits the first that wait where its script says so, and else asks again 1 ns later."""

    def __init__(self, script: str) -> None:
        self._script = iter(script)

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        word = next(self._script)
        if word == "a":
            return view.waiting[:1], None
        return (), None if word == "n" else view.now + 1


def lingering(
    script: str, *rows: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> Scheduler:
    """A scheduler that lets a policy admit nobody three times in a row."""
    monkeypatch.setattr(module, "MOST_ASKS", 3)
    return Scheduler(Arrivals(workload_of(rows)), Lingers(script), 2)


def test_a_policy_that_lingers_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = lingering("llll", (3, 1, 0), monkeypatch=monkeypatch)
    assert [scheduler.plan(now) for now in range(3)] == [Wait(1), Wait(2), Wait(3)]
    with pytest.raises(UsageError) as error:
        scheduler.plan(3)
    assert str(error.value) == (
        "the policy Lingers admitted no request 3 times in a row although nothing runs: "
        "it would wait forever"
    )


def test_a_policy_may_linger_again_once_it_has_admitted_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = lingering("lllalll", (3, 1, 0), (3, 1, 0), monkeypatch=monkeypatch)
    assert [scheduler.plan(now) for now in range(3)] == [Wait(1), Wait(2), Wait(3)]
    scheduler.apply(planned(scheduler, 3), 1)
    assert [scheduler.plan(now) for now in range(4, 7)] == [Wait(5), Wait(6), Wait(7)]


def test_a_policy_may_linger_while_a_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = lingering("alllllll", (3, 9, 0), (3, 1, 0), monkeypatch=monkeypatch)
    scheduler.apply(planned(scheduler), 1)
    for now in range(1, 8):
        plan = planned(scheduler, now)
        assert (plan.slots.tolist(), plan.until) == ([0], now + 1)
        scheduler.apply(plan, 1)


def test_a_policy_may_linger_again_once_it_has_waited_for_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = lingering("lllnlll", (3, 1, 0), (3, 1, 50), monkeypatch=monkeypatch)
    assert [scheduler.plan(now) for now in range(4)] == [Wait(1), Wait(2), Wait(3), Wait(50)]
    assert [scheduler.plan(now) for now in range(50, 53)] == [Wait(51), Wait(52), Wait(53)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((["first"], None), "a policy admitted something that is not a request"),
        (((), "soon"), "admit returned soon as the next time: give ns"),
        (((), 1.5), "admit returned 1.5 as the next time: give ns"),
    ],
)
def test_what_a_policy_may_not_answer(answer: object, message: str) -> None:
    policy = type("Mine", (Continuous,), {"admit": lambda self, view: answer})()
    scheduler = Scheduler(Arrivals(workload_of([(3, 1, 0)])), policy, 2)
    with pytest.raises(UsageError) as error:
        scheduler.plan(0)
    assert str(error.value) == message


def test_a_policy_that_releases_no_slot_is_told_so_when_it_would_wait_for_ever() -> None:
    scheduler = decoding((3, 1, 0), (3, 1, 0), slots=1, policy=Keeps())
    with pytest.raises(UsageError, match=r"^the policy Keeps releases no slot although"):
        scheduler.plan(10)


def test_the_end_of_a_text_that_ended_early_is_forgotten_with_its_slot() -> None:
    """Two requests want 5 and 9 tokens; the first ends its text with its second token."""
    arrivals = Arrivals(workload_of([(3, 5, 0), (3, 9, 0)]))
    scheduler = Scheduler(arrivals, Continuous(), 2, lengths_known=False)
    scheduler.apply(planned(scheduler), 1)
    [(slot, request)] = scheduler.apply(planned(scheduler), 1, stopped=[0])
    assert (slot, request.index) == (0, 0)
    done = []
    while (plan := scheduler.plan(0)) is not None:
        assert isinstance(plan, Plan)
        assert plan.slots.tolist() == [1]
        done += scheduler.apply(plan, 1)
    assert [(slot, request.index) for slot, request in done] == [(1, 1)]
