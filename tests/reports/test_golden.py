"""A second simulation, written from the definitions: every metric must be the same to the bit.

It walks step by step over lists and knows nothing of the package's scheduler, Recorder, spans or
distributions; what it finds is compared with tolerance zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import StepCost
from batchbench.reports import metrics
from batchbench.reports.latency import by_length, length_classes, stalls
from batchbench.reports.time_budget import arrival_lag_ms
from batchbench.workloads import Workload

STEP = 7_300_017  # ns: no round number of milliseconds
LIMITS = {"ttft": 40.0, "tpot": 7.5, "e2el": 120.0}

CONSTANT = StepCost(STEP)
"""A cost of which every step takes the same time."""

STRATEGIES = ("static", "static-fixed", "static-bucketed", "static-oracle", "continuous")


@dataclass(frozen=True)
class Case:
    """The workload, and the settings that it is served with."""

    prompts: list[int]
    outputs: list[int]
    own_due: list[int]
    clients: int | None  # of a closed loop
    strategy: str
    slots: int
    mixed: bool
    room: int  # tokens of a mixed pass
    max_wait: int
    cost: StepCost = CONSTANT  # whole nanoseconds, of ``cached_ns`` whole picoseconds
    max_repeat: int | None = None

    def served(self) -> Recording:
        """Return the recording that the package makes."""
        workload = Workload.of(
            "golden",
            [[0] * n for n in self.prompts],
            self.outputs,
            due_ns=self.own_due,
            max_concurrency=self.clients,
        )
        batcher = Batcher(
            self.strategy,
            SimulatedEngine(self.cost),
            self.slots,
            prefill="mixed" if self.mixed else "separate",
            max_batched_tokens=self.room,
            max_wait_ns=self.max_wait,
            max_repeat=self.max_repeat,
        )
        return batcher.serve(workload, Watch())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Closed workloads, requests over time and closed loops, up to 20 requests and 6 slots."""
    size = draw(st.integers(1, 20))
    drawn = draw(st.binary(min_size=3 * size + 12, max_size=3 * size + 12))
    kind, slots, room, wait, clients, strategy, *rest = drawn
    *price, repeat = (rest.pop() for _ in range(6))
    gaps = [byte * STEP // 37 if kind % 3 else 0 for byte in rest[2::3]]
    return Case(
        prompts=[byte % 9 + 1 for byte in rest[::3]],
        outputs=[byte % (30 if byte < 90 else 5) + 1 for byte in rest[1::3]],
        own_due=[sum(gaps[: i + 1]) for i in range(size)],
        clients=clients % 7 + 1 if kind // 3 % 2 else None,
        strategy=STRATEGIES[strategy % len(STRATEGIES)],
        slots=slots % 6 + 1,
        mixed=kind // 6 % 2 == 1,
        room=slots % 6 + 1 + room % 12 + 1,
        max_wait=[0, STEP // 3, 5 * STEP][wait % 3],
        cost=cost_of(price) if price[0] % 4 else CONSTANT,
        max_repeat=[None, 1, 3][repeat % 3],
    )


def cost_of(price: Sequence[int]) -> StepCost:
    """Return a growing cost made from bytes; each part may be 0."""
    step, row, cached, prompt, host = (byte - 64 if byte > 64 else 0 for byte in price)
    return StepCost(
        STEP // 9 + step * 1009,
        row_ns=row * 1013,
        cached_ns=cached * 200_003 / 1000,
        prompt_ns=prompt * 3001,
        chunk_ns=prompt * 7,
        host_ns=host * 997,
    )


# The second simulation


@dataclass
class Life:
    """One request."""

    prompt: int
    output: int
    due: int = -1
    read: int = 0  # prompt tokens computed
    slot: int = -1
    began: int = -1  # start of the first step that computes it
    known: int = -1  # when a decision first knew of it
    tokens: list[int] = field(default_factory=list)  # when each came

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.output


@dataclass
class Pass:
    """One step: what each slot did."""

    start: int
    end: int
    kinds: Counter[str]
    pieces: list[int]
    decodes: bool
    cached: int


class Golden:
    """Serves a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.lives = [Life(p, o) for p, o in zip(case.prompts, case.outputs, strict=True)]
        self.held: list[Life | None] = [None] * case.slots
        self.come = 0
        self.waiting: list[int] = []
        self.reading: list[Life] = []  # those with a partly computed prompt
        self.passes: list[Pass] = []
        self.clock_ps = 0
        self.last: tuple[int, bool] = -1, False  # rows that get a token, prompts read
        self.left = False  # whether a slot became free since the last pass
        while not all(life.done for life in self.lives):
            self._step()

    @property
    def now(self) -> int:
        """Return the time in whole nanoseconds, as a clock shows it."""
        return self.clock_ps // 1000

    def next_due(self) -> int | None:
        """Return the time of the next arrival if no request is done before."""
        if self.come == len(self.lives):
            return None
        own, room = self.case.own_due[self.come], 0
        if self.case.clients is not None and self.come >= self.case.clients:
            ends = sorted(life.tokens[-1] for life in self.lives if life.done)
            place = self.come - self.case.clients  # so many must be done before it, and one more
            if place >= len(ends):
                return None
            room = ends[place]
        return max(own, room)

    def running(self) -> int:
        return sum(life is not None and not life.done for life in self.held)

    def _step(self) -> None:
        while (due := self.next_due()) is not None and due <= self.now:
            self.lives[self.come].due = due
            self.waiting.append(self.come)
            self.come += 1
        static = self.case.strategy != "continuous"
        for slot, life in enumerate(self.held):
            if life is not None and life.done and not (static and self.running()):
                self.held[slot] = None
                self.left = True
        ask_again = self._admit()
        if self.running():
            self._compute()
            return
        self._know()
        times = [t for t in (ask_again, self.next_due()) if t is not None]
        self.clock_ps = min(times) * 1000

    def _know(self) -> None:
        """Note the requests that have arrived."""
        for life in self.lives[: self.come]:
            life.known = self.now if life.known < 0 else life.known

    def _admit(self) -> int | None:
        """Let requests in; when to look again, if the batch waits for more."""
        case, free = self.case, self.held.count(None)
        if not self.waiting or not free:
            return None
        if case.strategy == "continuous":
            batch = self.waiting[:free]
        else:
            if self.running():
                return None
            if len(self.waiting) < case.slots:
                closes = self.lives[min(self.waiting)].due + case.max_wait
                if case.strategy == "static-fixed":
                    if self.next_due() is not None:
                        return None
                elif self.now < closes:
                    return closes
            batch = self._batch()
        self.waiting = [i for i in self.waiting if i not in batch]
        for i in batch:
            self.lives[i].slot = self.held.index(None)
            self.held[self.lives[i].slot] = self.lives[i]
            self.reading.append(self.lives[i])
        return None

    def _batch(self) -> list[int]:
        of = {"static-bucketed": self.case.prompts, "static-oracle": self.case.outputs}
        lengths = of.get(self.case.strategy)
        if lengths is None:
            return self.waiting[: self.case.slots]
        queue = sorted(self.waiting, key=lambda i: (-lengths[i], i))
        size = self.case.slots
        pieces = [queue[i : i + size] for i in range(0, len(queue), size)]
        return next(piece for piece in pieces if min(self.waiting) in piece)

    def _compute(self) -> None:
        """One forward pass."""
        decoding = [life for life in self.held if life is not None and life.read == life.prompt]
        kinds: Counter[str] = Counter()
        pieces = []
        newcomers = []
        if self.case.mixed:
            room = self.case.room - len(decoding)
            for life in self.reading:
                if not room:
                    break
                size = min(room, life.prompt - life.read)
                room -= size
                pieces.append(size)
                newcomers.append((life, size))
        else:
            for life in self.reading:
                pieces.append(life.prompt)
                newcomers.append((life, life.prompt))
        active = decoding if self.case.mixed or not newcomers else []
        start, end = self._pass_time(active, pieces)
        computed = {id(life) for life in active} | {id(life) for life, _ in newcomers}
        for life in self.held:
            if life is None:
                kinds["empty"] += 1
            elif life.done:
                kinds["finished"] += 1
            elif id(life) not in computed:
                kinds["stalled"] += 1
        for life in active:
            if not life.done:
                life.tokens.append(end)
                kinds["useful"] += 1
        for life, size in newcomers:
            life.began = start if life.began < 0 else life.began
            life.read += size
            if life.read == life.prompt:
                life.tokens.append(end)
            kinds["useful" if life.read == life.prompt else "prompt"] += 1
        self.reading = [life for life in self.reading if life.read < life.prompt]
        cached = sum(
            life.read + max(len(life.tokens) - 1, 0) for life in self.held if life is not None
        )
        self.passes.append(Pass(start, end, kinds, pieces, bool(active), cached))

    def _pass_time(self, active: Sequence[Life], pieces: Sequence[int]) -> tuple[int, int]:
        """Return the start and end of a pass; the host decides first if anything is new."""
        cost = self.case.cost
        wanting, (before, read) = sum(not life.done for life in active), self.last
        if pieces or read or self.left or wanting != before:
            self.clock_ps += int(cost.host_ns) * 1000
        # With a prompt in the pass the rows are those of the last pass without one.
        self.last, self.left = (before if pieces else wanting, bool(pieces)), False
        start = self.now
        self._know()
        longest = max((life.prompt + len(life.tokens) - life.done for life in active), default=0)
        self.clock_ps += 1000 * int(
            cost.step_ns
            + cost.row_ns * len(active)
            + cost.chunk_ns * len(pieces)
            + cost.prompt_ns * sum(pieces)
        )
        self.clock_ps += round(cost.cached_ns * 1000) * len(active) * longest
        return start, self.now

    # What is measured, by its definition

    def summary(self) -> dict[str, Any]:
        lives = self.lives
        duration = max(life.tokens[-1] for life in lives) / 1e9
        outputs = sum(len(life.tokens) for life in lives)
        found: dict[str, Any] = {
            "duration": duration,
            "completed": len(lives),
            "total_input_tokens": sum(life.prompt for life in lives),
            "total_output_tokens": outputs,
            "request_throughput": len(lives) / duration,
            "output_throughput": outputs / duration,
            "total_token_throughput": (sum(life.prompt for life in lives) + outputs) / duration,
        }
        good = sum(map(self._good, lives))
        found |= {"request_goodput": good / duration, "slo_attainment": good / len(lives)}
        # Nothing was spent, and no memory read.
        found |= {"energy_joules": None, "joules_per_output_token": None, "floor_share": None}
        gaps = [later - sooner for life in lives for sooner, later in pairwise(life.tokens)]
        for name, values in (
            ("queue", [(life.began - life.due) / 1e6 for life in lives]),
            ("ttft", [ttft(life) for life in lives]),
            ("tpot", [tpot(life) for life in lives if life.output > 1]),
            ("itl", [gap / 1e6 for gap in gaps]),
            ("e2el", [e2el(life) for life in lives]),
        ):
            found |= statistics_of(name, values)
        lags = self.lags()
        seen = [life.due + lag * 1e6 for life, lag in zip(lives, lags or [], strict=False)]
        spread = max(seen, default=0) - min(seen, default=0)
        return found | {
            "arrival_rate": (len(lives) - 1) / spread * 1e9 if spread else None,
            "mean_arrival_lag_ms": mean(lags) if lags else None,
            "p99_arrival_lag_ms": percentile(lags, 99) if lags else None,
            "max_arrival_lag_ms": max(lags) if lags else None,
        }

    def lags(self) -> list[float] | None:
        """Return the delay until each request was known; None if all are there at the start."""
        if not any(life.due for life in self.lives):
            return None
        found = []
        for life in self.lives:
            under_way = [p.end for p in self.passes if p.start < life.due < p.end]
            found.append(max(life.known - (under_way or [life.due])[0], 0) / 1e6)
        return found

    @staticmethod
    def _good(life: Life) -> bool:
        """A request of one token has no TPOT that could be too long."""
        quick = life.output == 1 or tpot(life) <= LIMITS["tpot"]
        return ttft(life) <= LIMITS["ttft"] and e2el(life) <= LIMITS["e2el"] and quick

    def counters(self) -> dict[str, int]:
        passes = self.passes
        kinds = Counter[str]()
        for each in passes:
            kinds += each.kinds
        return {
            "forward_passes": len(passes),
            "prefill_passes": sum(bool(p.pieces) and not p.decodes for p in passes),
            "mixed_passes": sum(bool(p.pieces) and p.decodes for p in passes),
            "decode_passes": sum(not p.pieces for p in passes),
            "prefill_tokens": sum(sum(p.pieces) for p in passes),
            "padded_prefill_tokens": sum(len(p.pieces) * max(p.pieces, default=0) for p in passes),
            "slot_steps": len(passes) * self.case.slots,
            **{
                f"{kind}_slot_steps": kinds[kind]
                for kind in ("useful", "prompt", "finished", "empty", "stalled")
            },
            "idle_slot_steps": kinds["finished"] + kinds["empty"],
            "kv_tokens_peak": max(p.cached for p in passes),
        }

    def by_length(self) -> list[dict[str, Any]]:
        lengths = sorted(life.output for life in self.lives)
        distinct = sorted(set(lengths))
        if len(distinct) <= 4:
            classes = [(length, length) for length in distinct]
        else:
            tops = [lengths[math.ceil(len(lengths) * k / 4) - 1] for k in (1, 2, 3, 4)]
            tops = sorted(set(tops))
            lows = [distinct[0], *(min(n for n in distinct if n > top) for top in tops[:-1])]
            classes = list(zip(lows, tops, strict=True))
        step = percentile([(p.end - p.start) / 1e6 for p in self.passes], 50)
        rows = []
        for low, high in classes:
            members = [life for life in self.lives if low <= life.output <= high]
            row: dict[str, Any] = {
                "min_output_tokens": low,
                "max_output_tokens": high,
                "requests": len(members),
            }
            for name, values in (
                ("queue_ms", [(m.began - m.due) / 1e6 for m in members]),
                ("ttft_ms", [ttft(m) for m in members]),
                ("e2el_ms", [e2el(m) for m in members]),
                ("slowdown", [e2el(m) / (m.output * step) for m in members]),
            ):
                row |= {f"mean_{name}": mean(values), f"p99_{name}": percentile(values, 99)}
            rows.append(row)
        return rows

    def longest_gaps(self) -> list[float]:
        """Distinct gaps that are stalls, longest first."""
        gaps = Counter(pair for life in self.lives for pair in pairwise(life.tokens))
        every = [(later - sooner) / 1e6 for sooner, later in gaps.elements()]
        if not every:
            return []
        limit = 1.5 * percentile(every, 50) * 1e6
        long = [later - sooner for sooner, later in gaps if later - sooner >= limit]
        return [gap / 1e6 for gap in sorted(long, reverse=True)[:5]]


def ttft(life: Life) -> float:
    return (life.tokens[0] - life.due) / 1e6


def e2el(life: Life) -> float:
    return (life.tokens[-1] - life.due) / 1e6


def tpot(life: Life) -> float:
    return (life.tokens[-1] - life.tokens[0]) / ((life.output - 1) * 1e6)


def mean(values: Sequence[float]) -> float:
    """Rounded once, of a histogram."""
    return math.fsum(value * n for value, n in Counter(values).items()) / len(values)


def percentile(values: Sequence[float], q: float) -> float:
    ranked, rank = sorted(values), (len(values) - 1) * q / 100
    below, above = ranked[int(rank)], ranked[min(int(rank) + 1, len(ranked) - 1)]
    return below + (above - below) * (rank - int(rank))


def statistics_of(name: str, values: Sequence[float]) -> dict[str, float | None]:
    keys = ("mean", "median", "std", "p90", "p99", "p99.9")
    found: dict[str, float | None] = dict.fromkeys(f"{key}_{name}_ms" for key in keys)
    if not values:
        return found
    centre = mean(values)
    squares = [(v - centre) * (v - centre) * n for v, n in Counter(values).items()]
    found |= {
        f"mean_{name}_ms": centre,
        f"std_{name}_ms": math.sqrt(math.fsum(squares) / len(values)),
        f"median_{name}_ms": percentile(values, 50),
        f"p90_{name}_ms": percentile(values, 90),
        f"p99_{name}_ms": percentile(values, 99),
    }
    if len(values) >= 1000:
        found[f"p99.9_{name}_ms"] = percentile(values, 99.9)
    return found


# The comparison

exact = settings(deadline=None, derandomize=True, database=None, max_examples=300)


@exact
@given(cases())
def test_every_metric_equals_the_golden_simulations_to_the_bit(case: Case) -> None:
    golden, recording = Golden(case), case.served()
    assert recording.requests.due_ns.tolist() == [life.due for life in golden.lives]
    assert recording.requests.slot.tolist() == [life.slot for life in golden.lives]
    assert metrics.summary([recording], LIMITS) == golden.summary()
    assert metrics.counters(recording) == golden.counters()
    classes = length_classes(recording.requests.output_tokens)
    assert by_length([recording], classes) == golden.by_length()
    assert [stall["gap_ms"] for stall in stalls([recording])] == golden.longest_gaps()
    lag = arrival_lag_ms(recording)
    assert (None if lag is None else lag.tolist()) == golden.lags()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_does_a_case_large_enough_for_p999(strategy: str) -> None:
    case = Case(
        prompts=[i % 11 + 1 for i in range(1200)],
        outputs=[i * i % 23 + 1 for i in range(1200)],
        own_due=[i * STEP * 3 // 2 for i in range(1200)],
        clients=40,
        strategy=strategy,
        slots=16,
        mixed=True,
        room=40,
        max_wait=STEP,
    )
    golden, recording = Golden(case), case.served()
    found = metrics.summary([recording], LIMITS)
    assert found == golden.summary()
    assert found["p99.9_ttft_ms"] is not None
    assert metrics.counters(recording) == golden.counters()
