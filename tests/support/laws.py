"""Random workloads and settings, and an engine that records what it is asked to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines import VirtualClock
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.plan import Plan, Wait
from batchbench.batching.policies import ORDERS, Policy, View
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording, Steps, token_steps
from batchbench.batching.scheduler import Scheduler
from batchbench.workloads import Arrivals, Request, Workload

STEP_NS = 10
"""Duration of a step in these tests; due times fall on and between its multiples."""

UNLIMITED = 1_000_000
"""More tokens than any pass of these tests could compute."""

law = settings(deadline=None, derandomize=True, database=None, max_examples=100)
"""The same examples in each run, so that a red test stays red until it is mended."""

thorough = settings(law, max_examples=300)
"""Draw more examples for the few laws from which most others follow."""


@dataclass(frozen=True)
class Config:
    """The settings with which a workload is served."""

    policy: str
    slots: int
    order: str = "fifo"
    prefill: str = "separate"
    max_batched_tokens: int = UNLIMITED
    max_wait_ns: int = 0


def configs(
    *,
    policies: Sequence[str] = ("static", "continuous"),
    orders: Sequence[str] = tuple(ORDERS),
    prefills: Sequence[str] = ("separate", "mixed"),
    rooms: Sequence[int] = (1, 2, 3, 5, 8, 12, UNLIMITED, UNLIMITED),
    waits: Sequence[int] = (0,),
) -> st.SearchStrategy[Config]:
    """Settings with 1 to 9 slots; ``rooms`` is what a pass may compute beyond a token a slot,
    ``waits`` how long (ns) static batching waits for a batch to fill."""

    def config_of(drawn: bytes) -> Config:
        slots = drawn[1] % 9 + 1
        return Config(
            policies[drawn[0] % len(policies)],
            slots,
            orders[drawn[2] % len(orders)],
            prefills[drawn[3] % len(prefills)],
            slots + rooms[drawn[4] % len(rooms)],
            waits[drawn[5] % len(waits)],
        )

    return st.binary(min_size=6, max_size=6).map(config_of)


def workloads(
    *, timed: bool = True, loops: bool = True, most: int = 14
) -> st.SearchStrategy[Workload]:
    """Up to ``most`` requests; with ``timed`` half of the workloads have arrivals over time, and
    with ``loops`` too a third are closed loops.

    Drawn as bytes, which takes a quarter of the time that lists of tuples take.
    """

    def from_bytes(drawn: bytes) -> Workload:
        over_time = timed and drawn[0] % 2
        rows = [
            (prompt % 9 + 1, output % (40 if output < 64 else 6) + 1, gap % 91 if over_time else 0)
            for prompt, output, gap in zip(drawn[2::3], drawn[3::3], drawn[4::3], strict=True)
        ]
        loop = timed and loops and drawn[0] // 2 % 3 == 0
        return workload_of(rows[: drawn[1] % most + 1], drawn[0] // 6 % 5 + 1 if loop else None)

    size = 3 * most + 2
    return st.binary(min_size=size, max_size=size).map(from_bytes)


def workload_of(
    rows: Sequence[tuple[int, int, int]], max_concurrency: int | None = None
) -> Workload:
    """A workload from (prompt tokens, output tokens, ns since the request before)."""
    due = np.cumsum([gap for _, _, gap in rows]).tolist()
    return Workload.of(
        "random",
        [[0] * row[0] for row in rows],
        [r[1] for r in rows],
        due_ns=due,
        max_concurrency=max_concurrency,
    )


def scheduler_of(
    workload: Workload, config: Config, policy: Policy, *, lengths_known: bool = True
) -> Scheduler:
    """A scheduler to be driven by hand."""
    return Scheduler(
        Arrivals(workload),
        policy,
        config.slots,
        order=config.order,
        prefill=config.prefill,
        max_batched_tokens=config.max_batched_tokens,
        lengths_known=lengths_known,
    )


def serve(
    workload: Workload,
    config: Config,
    *,
    engine: SimulatedEngine | None = None,
    max_repeat: int | None = None,
    watch: Watch | None = None,
) -> Recording:
    """Serve a workload in simulation."""
    batcher = Batcher(
        config.policy,
        Strict(STEP_NS) if engine is None else engine,
        config.slots,
        order=config.order,
        prefill=config.prefill,
        max_batched_tokens=config.max_batched_tokens,
        max_wait_ns=config.max_wait_ns,
        max_repeat=max_repeat,
    )
    return batcher.serve(workload, Watch() if watch is None else watch)


def steps_with_tokens(recording: Recording) -> list[list[int]]:
    """Steps in which each request got its tokens, going by the log alone."""
    decodes = np.repeat(recording.spans.decoding > 0, recording.spans.steps)
    log = recording.requests
    return [
        token_steps(decodes, first, last).tolist()
        for first, last in zip(log.first, log.last, strict=True)
    ]


def token(request: int, nth: int) -> int:
    """The n-th token that the ledger hands to a request, counted from 0."""
    return request * 1000 + nth


class StrictClock(VirtualClock):
    """Fails where it is told to wait for what has passed, which a loop could do for ever."""

    def wait_until(self, t: int) -> None:
        assert t > self.now()
        super().wait_until(t)


class Strict(SimulatedEngine):
    """Fails where a plan would have it do nothing, which a loop could do for ever."""

    def __init__(self, step_ns: int) -> None:
        super().__init__(step_ns)
        self.clock = StrictClock()

    def run(self, plan: Plan) -> int:
        assert plan.repeat >= 1
        assert len(plan.slots) or plan.chunks
        return super().run(plan)


class Ledger(Strict):
    """Keeps the books of a KV cache, and fails where a plan asks of it what it could not do.

    It knows of each slot only what plans told it, and hands out tokens that tell whose they are.
    ``stops`` gives the number of tokens after which a request's text ends.
    """

    def __init__(self, slots: int, stops: Mapping[int, int] | None = None) -> None:
        super().__init__(STEP_NS)
        self._slots = slots
        self._stops = stops or {}

    def begin(self, workload: Workload) -> None:
        super().begin(workload)
        self._occupant: dict[int, Request] = {}
        self._cached: dict[int, int] = {}  # tokens in the cache, by slot
        self._produced: dict[int, int] = {}  # by slot
        self._rows: list[list[int]] = []
        self._ends: list[int] = []

    def run(self, plan: Plan) -> int:
        start = self.clock.now()
        steps = super().run(plan)
        for slot in plan.released:
            assert self._done(slot)
            del self._occupant[slot], self._cached[slot], self._produced[slot]
        self._check_slots(plan)
        for step in range(steps):
            self._rows.append([-1] * self._slots)
            self._ends.append(start + (step + 1) * STEP_NS)
            self._decode(plan, step)
        for chunk in plan.chunks:
            self._prefill(chunk.request, chunk.slot, chunk.start, chunk.stop)
        return steps

    def stopped(self, plan: Plan, *, late: bool = False) -> list[int]:
        """Slots whose text has ended; a held one says so again in each pass, as a model does."""
        computed = plan.slots.tolist() + [chunk.slot for chunk in plan.chunks]
        return [slot for slot in computed if self._produced[slot] == self._stop(slot)]

    def collect(self) -> Steps:
        tokens = np.array(self._rows, np.int32).reshape(-1, self._slots)
        return Steps(super().collect().start_ns, np.array(self._ends, np.int64), tokens=tokens)

    def _check_slots(self, plan: Plan) -> None:
        computed = plan.slots.tolist() + [chunk.slot for chunk in plan.chunks]
        assert 0 < len(computed) <= self._slots
        assert len(set(computed)) == len(computed)
        assert all(0 <= slot < self._slots for slot in computed)
        assert plan.repeat == 1 or not plan.chunks
        assert plan.growing.any() or plan.chunks

    def _decode(self, plan: Plan, step: int) -> None:
        positions = plan.advanced(step).tolist()
        for slot, position, growing in zip(
            plan.slots.tolist(), positions, plan.growing.tolist(), strict=True
        ):
            assert self._produced[slot] > 0
            assert growing == (not self._done(slot))
            if not growing:
                assert position == self._cached[slot] - 1
                continue
            assert position == self._cached[slot]
            self._cached[slot] += 1
            self._hand_out(slot)

    def _prefill(self, request: Request, slot: int, start: int, stop: int) -> None:
        if start == 0:
            assert slot not in self._occupant
            self._occupant[slot] = request
            self._cached[slot] = self._produced[slot] = 0
        assert self._occupant[slot] == request
        assert self._cached[slot] == start < stop <= request.prompt_tokens
        self._cached[slot] = stop
        if stop == request.prompt_tokens:
            self._hand_out(slot)

    def _hand_out(self, slot: int) -> None:
        self._rows[-1][slot] = token(self._occupant[slot].index, self._produced[slot])
        self._produced[slot] += 1

    def _stop(self, slot: int) -> int | None:
        return self._stops.get(self._occupant[slot].index)

    def _done(self, slot: int) -> bool:
        asked = self._occupant[slot].output_tokens
        return self._produced[slot] in (asked, self._stop(slot))


def ending_early(workload: Workload) -> Workload:
    """The same workload, in which a text may end before its asked length."""
    return replace(workload, stop_at_eos=True)


class Patient:
    """Lets newcomers wait until three are there or the first has waited for 4.5 steps."""

    patience_ns = 4 * STEP_NS + STEP_NS // 2

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        """A full group, or whoever has waited long enough."""
        if len(view.waiting) >= 3:
            return view.waiting[: view.free], None
        ready = min(request.due_ns for request in view.waiting) + self.patience_ns
        return ((), ready) if view.now < ready else (view.waiting[: view.free], None)

    def release(self, view: View) -> Sequence[int]:
        return list(view.finished)


class Lazy:
    """Gives slots up in twos, or when no request runs: requests stay held while others go on."""

    def admit(self, view: View) -> tuple[Sequence[Request], int | None]:
        return view.waiting[: view.free], None

    def release(self, view: View) -> Sequence[int]:
        return list(view.finished) if len(view.finished) > 1 or not view.running else []


ORDER_KEYS: dict[str, Callable[[Request], tuple[int, int]]] = {
    "fifo": lambda r: (r.due_ns, r.index),
    "longest-first": lambda r: (-r.output_tokens, r.index),
    "shortest-first": lambda r: (r.output_tokens, r.index),
    "longest-prompt-first": lambda r: (-r.prompt_tokens, r.index),
}
"""The sort keys of the orders, written a second time."""


def drive(
    scheduler: Scheduler, look: Callable[[Plan], None], *, most: int | None = None
) -> list[int]:
    """Run every plan to its end, by at most ``most`` passes; who was finished, in order."""
    now, finished = 0, []
    while (plan := scheduler.plan(now)) is not None:
        if isinstance(plan, Wait):
            assert plan.until > now
            now = plan.until
            continue
        look(plan)
        assert plan.repeat >= 1
        passes = min(plan.repeat, most or plan.repeat)
        if plan.until is not None:
            passes = min(passes, max(1, -((now - plan.until) // STEP_NS)))
        done = scheduler.apply(plan, passes)
        now += passes * STEP_NS
        for _, request in done:
            scheduler.arrivals.finished(request, now)
            finished.append(request.index)
    return finished
