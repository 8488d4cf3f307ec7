"""Policies: what they may decide, what they may not, and how one of yours is found."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import (
    STEP_NS,
    UNLIMITED,
    Config,
    Patient,
    configs,
    drive,
    law,
    scheduler_of,
    serve,
    workload_of,
    workloads,
)

from batchbench.batching.policies import (
    POLICIES,
    Bucketed,
    Continuous,
    Oracle,
    Policy,
    Static,
    View,
    make_policy,
)
from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.workloads import Request, Workload

PAIRS = """
class Pairs:
    \"\"\"Newcomers join two at a time, or alone when nothing runs.\"\"\"

    def admit(self, view):
        if view.free < 2 and view.running:
            return (), None
        return view.waiting[: view.free], None

    def release(self, view):
        return view.finished
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def served_by(policy: Policy, workload: Workload, slots: int = 3) -> list[int]:
    """Return the finished requests, in order, under a policy that is given as an object."""
    return drive(scheduler_of(workload, Config("given", slots), policy), lambda plan: None)


FIVE = workload_of([(3, 4, 0), (2, 1, 0), (1, 7, 0), (3, 2, 0), (2, 5, 0)])


# Policies that misbehave


class TooMany(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[: view.free + 1], None


class Stranger(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return [Request(99, 3, 3, 0)], None


class Twice(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return [view.waiting[0], view.waiting[0]], None


class Again(Continuous):
    """Admits whom it has admitted before."""

    def __init__(self) -> None:
        self._first: list[Request] = []

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        self._first = self._first or [view.waiting[0]]
        return self._first, None


class Shortens(Continuous):
    """Admits not the request that waits but one that looks like it and asks for less."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return [view.waiting[0]._replace(output_tokens=1)], None


class ReleasesRunning(Continuous):
    def release(self, view: View) -> Iterable[int]:
        return range(3)


class ReleasesTwice(Continuous):
    def release(self, view: View) -> Iterable[int]:
        return [*view.finished, *view.finished]


class ReleasesUnheard(Continuous):
    def release(self, view: View) -> Iterable[int]:
        return [77]


class Never(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return (), None


class Keeps(Continuous):
    def release(self, view: View) -> Iterable[int]:
        return ()


class AsksNow(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return (), view.now


class AsksInThePast(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[: view.free], view.now - 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (TooMany(), "admitted 4 requests into 3 slots"),
        (Stranger(), "not waiting"),
        (Twice(), "not waiting"),
        (Again(), "not waiting"),
        (Shortens(), "not waiting"),
        (ReleasesRunning(), r"released slot \d, whose request is not done"),
        (ReleasesTwice(), r"released slot \d"),
        (ReleasesUnheard(), "released slot 77"),
        (Never(), "Never admits no request .* wait forever"),
        (Keeps(), "Keeps releases no slot .* wait forever"),
        (AsksNow(), "time that has passed"),
        (AsksInThePast(), "time that has passed"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_policy_that_misbehaves_is_told_so(policy: Policy, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        served_by(policy, FIVE)


def test_never_admitting_is_told_only_when_nothing_more_will_come() -> None:
    arriving = workload_of([(1, 1, 0), (1, 1, 5 * STEP_NS)])
    scheduler = scheduler_of(arriving, Config("given", 2), Never())
    assert scheduler.plan(0) == (5 * STEP_NS,)
    with pytest.raises(UsageError, match="wait forever"):
        scheduler.plan(5 * STEP_NS)


# Policies that are unusual and right


class WholeQueue(Continuous):
    """Returns the queue that it is shown, and not a piece of it."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return (view.waiting if len(view.waiting) <= view.free else ()), None


class LastFirst(Continuous):
    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[::-1][: view.free], None


class Miser(Continuous):
    """Releases one slot at a time."""

    def release(self, view: View) -> Iterable[int]:
        return list(view.finished)[:1]


def test_a_policy_may_admit_the_queue_that_it_is_shown() -> None:
    assert sorted(served_by(WholeQueue(), FIVE, slots=5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("policy", [LastFirst(), Miser(), Patient()])
@given(workload=workloads())
@law
def test_under_unusual_policies_too_everybody_is_served_once(
    policy: Policy, workload: Workload
) -> None:
    assert sorted(served_by(policy, workload)) == list(range(len(workload)))


class Onlooker(Continuous):
    """Holds what it is shown against what it has decided, and against the workload."""

    def __init__(self, workload: Workload, slots: int) -> None:
        self._workload, self._slots = workload, slots
        self._admitted: set[Request] = set()

    def look(self, view: View) -> None:
        assert view.free + view.running + len(view.finished) == self._slots
        there = {request for request in self._workload if request.due_ns <= view.now}
        assert set(view.waiting) == there - self._admitted
        assert view.more_to_come == (len(there) < len(self._workload))

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        self.look(view)
        self._admitted.update(view.waiting[: view.free])
        return super().admit(view)

    def release(self, view: View) -> Iterable[int]:
        self.look(view)
        return super().release(view)


@given(workloads(loops=False), configs())
@law
def test_a_policy_is_shown_who_waits_what_is_free_and_who_runs(
    workload: Workload, config: Config
) -> None:
    policy = Onlooker(workload, config.slots)
    drive(scheduler_of(workload, config, policy), lambda plan: None)


def test_a_policy_is_shown_the_time() -> None:
    times: list[int] = []

    class Clockwatcher(Continuous):
        def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
            times.append(view.now)
            return super().admit(view)

    served_by(Clockwatcher(), workload_of([(1, 1, 0), (1, 1, 7), (1, 1, 50)]))
    assert times == [0, STEP_NS, 57]


def test_a_policy_that_asks_to_be_asked_again_is_asked_then() -> None:
    workload = workload_of([(3, 2, 7), (3, 2, 100 * STEP_NS)])
    recording = serve(workload, Config("support.laws:Patient", 2))
    admitted_ns = recording.step_starts_ns[recording.requests.admitted]
    assert (admitted_ns - workload.due_ns).tolist() == [Patient.patience_ns] * 2


def test_a_policy_is_asked_again_while_others_run() -> None:
    running_for_long = [(3, 40, 0)] * 3
    workload = workload_of([*running_for_long, (3, 2, 2 * STEP_NS)])
    recording = serve(workload, Config("support.laws:Patient", 4))
    # After 2 + 4.5 steps, so at the start of the eighth.
    assert recording.requests.admitted.tolist() == [0, 0, 0, 7]


def test_a_policy_may_say_how_the_queue_is_sorted() -> None:
    class Eager(Continuous):
        order = "longest-first"

    assert served_by(Eager(), FIVE, slots=1) == [2, 4, 0, 3, 1]


def test_an_order_that_nobody_knows_is_refused() -> None:
    class Odd(Continuous):
        order = "lifo"

    with pytest.raises(UsageError, match="the policy Odd: its order is 'lifo'; it must be one"):
        served_by(Odd(), FIVE)


# Static batches, better and worse

STATICS = ("static", "static-fixed", "static-bucketed", "static-oracle")
WAITS = (0, 1, STEP_NS, 4 * STEP_NS + 3, 10**9)
static_configs = configs(policies=STATICS, waits=WAITS)


def batches_of(recording: Recording) -> list[list[int]]:
    """Requests of each batch, in the order in which the batches began."""
    admitted = recording.requests.admitted
    return [np.flatnonzero(admitted == step).tolist() for step in np.unique(admitted)]


@given(workloads(), static_configs)
@law
def test_nobody_waits_for_ever(workload: Workload, config: Config) -> None:
    assert (serve(workload, config).requests.last >= 0).all()


@given(workloads(), configs(policies=["static"], rooms=[UNLIMITED], waits=WAITS))
@law
def test_a_batch_closes_when_it_is_full_or_its_oldest_has_waited_enough(
    workload: Workload, config: Config
) -> None:
    config = replace(config, order="fifo")
    recording = serve(workload, config)
    log, ends = recording.requests, recording.step_ends_ns
    free_at = 0  # when the batch before was done
    for batch in batches_of(recording):
        begins = recording.step_starts_ns[log.admitted[batch[0]]]
        due = log.due_ns[batch]
        full_at = due.max() if len(batch) == config.slots else np.inf
        assert begins == max(free_at, min(full_at, due.min() + config.max_wait_ns))
        free_at = ends[log.last[batch]].max()


def test_a_lone_request_waits_as_long_as_it_is_told() -> None:
    recording = serve(workload_of([(1, 2, 7)]), Config("static", 4, max_wait_ns=35))
    assert recording.step_starts_ns[0] == 7 + 35


@given(workloads(), configs(policies=["static-fixed"], rooms=[UNLIMITED]))
@law
def test_fixed_batches_are_full_while_more_will_come(workload: Workload, config: Config) -> None:
    recording = serve(workload, config)
    for batch in batches_of(recording)[:-1]:
        begins = recording.step_starts_ns[recording.requests.admitted[batch[0]]]
        later = recording.requests.due_ns > begins
        # In a closed loop with fewer clients than slots no batch can ever be full.
        assert len(batch) == config.slots or workload.max_concurrency or not later.any()


def test_fixed_batches_do_not_wait_for_clients_that_wait_for_them() -> None:
    recording = serve(workload_of([(1, 3, 0)] * 7, 3), Config("static-fixed", 8))
    assert batches_of(recording) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("policy", "key"), [("static-bucketed", "prompt_tokens"), ("static-oracle", "output_tokens")]
)
@given(workload=workloads(timed=False), slots=st.integers(1, 5))
@law
def test_sorted_batches_are_the_sorted_queue_cut_into_pieces(
    policy: str, key: str, workload: Workload, slots: int
) -> None:
    queue = sorted(workload, key=lambda r: (-getattr(r, key), r.index))
    pieces = [sorted(r.index for r in queue[i : i + slots]) for i in range(0, len(queue), slots)]
    assert sorted(batches_of(serve(workload, Config(policy, slots)))) == sorted(pieces)


@given(workloads(), configs(policies=STATICS[2:], rooms=[UNLIMITED], waits=WAITS))
@law
def test_whoever_has_waited_longest_is_in_the_next_batch(
    workload: Workload, config: Config
) -> None:
    served: set[int] = set()
    for batch in batches_of(serve(workload, config)):
        assert min(set(range(len(workload))) - served) in batch
        served |= set(batch)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
@law
def test_no_way_to_cut_a_queue_into_batches_has_fewer_steps_than_the_oracle(
    lengths: list[int], slots: int
) -> None:
    def fewest(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        return min(
            max(lengths[i] for i in batch) + fewest(tuple(i for i in left if i not in batch))
            for size in range(1, slots + 1)
            for batch in combinations(left, size)
        )

    workload = workload_of([(1, length, 0) for length in lengths])
    steps = serve(workload, Config("static-oracle", slots)).num_steps
    assert steps == fewest(tuple(range(len(lengths))))


# Policies by name


def test_the_policies_by_name() -> None:
    assert {name: type(make_policy(name)) for name in POLICIES} == {
        "static": Static,
        "static-fixed": Static,
        "static-bucketed": Bucketed,
        "static-oracle": Oracle,
        "continuous": Continuous,
    }


def test_each_call_makes_a_new_policy() -> None:
    assert make_policy("static") is not make_policy("static")


def test_a_policy_of_yours_is_found_in_the_working_directory(here: Path) -> None:
    (here / "pairs_policy.py").write_text(PAIRS)
    assert type(make_policy("pairs_policy:Pairs")).__name__ == "Pairs"


def test_a_policy_of_yours_may_stand_in_a_package(here: Path) -> None:
    (here / "my_package").mkdir()
    (here / "my_package" / "__init__.py").touch()
    (here / "my_package" / "pairs.py").write_text(PAIRS)
    assert type(make_policy("my_package.pairs:Pairs")).__name__ == "Pairs"


def test_a_policy_of_yours_serves_in_simulation_from_end_to_end(here: Path) -> None:
    (here / "pairs_in_simulation.py").write_text(PAIRS)
    workload = workload_of([(3, length, 0) for length in (9, 2, 5, 5, 3, 1, 4, 8, 2)])
    log = serve(workload, Config("pairs_in_simulation:Pairs", 4)).requests
    assert (log.last >= 0).all()
    newcomers = np.bincount(log.admitted)
    assert newcomers[0] == 4
    assert set(newcomers[1:].tolist()) <= {0, 1, 2, 3, 4}
    assert newcomers[newcomers > 0].min() >= 2 or newcomers[-1] == 1


@given(workloads(), configs(policies=["support.laws:Patient"]))
@law
def test_a_policy_of_yours_serves_everybody_under_all_settings(
    workload: Workload, config: Config
) -> None:
    log = serve(workload, config).requests
    assert (log.last >= log.first).all()
    assert (log.first >= log.admitted).all()
    assert (log.admitted >= 0).all()


@pytest.mark.parametrize(
    "name",
    [":", "static:", ":Static", "no_such_module_here:Policy"],
)
def test_a_name_that_is_no_policy_is_refused_by_the_name_of_the_option(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_policy(name)
    assert str(refused.value).startswith(" ".join(f"--strategy {name}:".split()))
