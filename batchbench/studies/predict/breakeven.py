"""The break-even map: both strategies by batch size, spread of output lengths and load."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from batchbench.batching.experiment import make_experiment
from batchbench.batching.models import ModelSpec
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import StepCost
from batchbench.reports.latency import within
from batchbench.reports.result import Result
from batchbench.reports.text import plural, spell_time
from batchbench.studies.executors.jobs import Executor, kinds_of
from batchbench.studies.predict.fitted import FittedRun
from batchbench.studies.sweep.grid import Cell
from batchbench.studies.sweep.run import Store, SweepWatch, run_cells

STRATEGIES = "static,continuous"

ALL = "all"
"""Load at which all requests are there at the start."""

EVEN = 0.02
"""Difference, as a share, up to which the two count as even."""

METRICS = {"throughput": "throughput", "ttft": "TTFT", "goodput": "goodput"}
"""Metrics by name, with their names in words."""


@dataclass(frozen=True)
class MapSpec:
    """The axes of the map, and what all its cells share."""

    batch_sizes: tuple[int, ...]
    spreads: tuple[float, ...]  # standard deviation of output lengths over their mean
    loads: tuple[str, ...]  # requests/s over what continuous batching can serve, or ALL
    mean_tokens: int
    prompt_tokens: int
    batches: int  # requests over slots
    seed: int
    engine: str
    prefill: str
    model: ModelSpec
    context: int | None  # of the model

    def lengths(self, spread: float) -> str:
        """Return lognormal output lengths for ``--output-tokens``, cut at ten times the mean."""
        sigma = math.sqrt(math.log1p(spread**2))
        if not sigma:  # a tiny spread has a square of 0
            return str(self.mean_tokens)
        most = 10 * self.mean_tokens
        if self.context is not None:
            most = max(1, min(most, self.context - self.prompt_tokens))
        return f"lognormal:mean={self.mean_tokens},sigma={sigma:.6g},max={most}"

    def chosen(self, batch: int, spread: float, rate: float | None) -> dict[str, Any]:
        options = {
            "batch_size": batch,
            "output_tokens": self.lengths(spread),
            "prompt_tokens": str(self.prompt_tokens),
            "queue_size": max(2 * batch, self.batches * batch),
            "strategy": STRATEGIES,
            "engine": self.engine,
            "prefill": self.prefill,
            "seed": self.seed,
            "request_rate": rate,
            **vars(self.model),
        }
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class CellList:
    cells: tuple[Cell, ...] = ()
    varying: tuple[str, ...] = ("batch_size", "spread", "load")


@dataclass(frozen=True)
class Contest:
    """A comparison of both strategies in one metric."""

    static: float
    continuous: float
    ratio: float | None  # above 1: continuous is better; None if static's or both are 0

    @classmethod
    def of(cls, static: float, continuous: float, *, less_is_better: bool = False) -> Contest:
        above, below = (static, continuous) if less_is_better else (continuous, static)
        return cls(static, continuous, above / below if below else None)

    @property
    def height(self) -> float:
        """Logarithm of the ratio: above 0 if continuous is better, infinite if static has 0."""
        if self.ratio is None:
            return math.inf if self.continuous else 0.0
        return math.log(self.ratio) if self.ratio else -math.inf

    @property
    def winner(self) -> str:
        """``static``, ``continuous`` or ``even``."""
        if abs(self.height) <= math.log1p(EVEN):
            return "even"
        return "continuous" if self.height > 0 else "static"

    def agrees(self, other: Contest) -> bool:
        """Return True if both have the same winner, or one of them is even."""
        return self.winner == other.winner or "even" in (self.winner, other.winner)


@dataclass(frozen=True, eq=False)
class MapCell:
    batch_size: int
    spread: float
    load: str
    request_rate: float | None
    contests: Mapping[str, Contest]  # simulated, by metric
    seconds: float  # simulated time of both strategies
    beyond: tuple[str, ...]  # respects in which it goes beyond the steps of the fit
    measured: Mapping[str, Contest] | None = None

    @property
    def place(self) -> str:
        return f"batch size {self.batch_size:,}, spread {self.spread:g}, {load_of(self.load)}"

    def agrees(self, metric: str) -> bool | None:
        """Return True if the measured winner is the predicted one; None if it was not measured."""
        return self.contests[metric].agrees(self.measured[metric]) if self.measured else None

    def error(self, metric: str) -> float | None:
        """Return predicted over measured advantage, less 1."""
        predicted, real = self.contests[metric].ratio, (self.measured or {}).get(metric)
        if not predicted or real is None or not real.ratio:
            return None
        return predicted / real.ratio - 1


def load_of(load: str) -> str:
    return "all there at once" if load == ALL else f"load {float(load):g}"


@dataclass(frozen=True, eq=False)
class BreakEven:
    spec: MapSpec
    fitted: FittedRun
    limits_ms: Mapping[str, float]  # of goodput, by latency
    cells: Sequence[MapCell]
    machines: Sequence[str] = ()  # kinds of machines of the fit and of the measured cells

    @property
    def measured(self) -> list[MapCell]:
        return [cell for cell in self.cells if cell.measured is not None]

    @property
    def extrapolated(self) -> list[MapCell]:
        return [cell for cell in self.cells if cell.beyond]

    @cached_property
    def by_axes(self) -> dict[tuple[int, float, str], MapCell]:
        return {(c.batch_size, c.spread, c.load): c for c in self.cells}

    def won_by(self, winner: str, metric: str) -> list[MapCell]:
        return [cell for cell in self.cells if cell.contests[metric].winner == winner]

    def break_even_spread(self, metric: str, batch: int, load: str) -> float | None:
        """Return the smallest spread at which continuous wins; None if it loses at the last one.

        Between two spreads of the map, the logarithm of the ratio is taken as a straight line.
        """
        spreads = self.spec.spreads
        contests = [self.by_axes[batch, spread, load].contests[metric] for spread in spreads]
        heights = [contest.height - math.log1p(EVEN) for contest in contests]
        lost = [i for i, height in enumerate(heights) if height <= 0]
        if not lost:
            return spreads[0]
        low, high = lost[-1], lost[-1] + 1
        if high == len(spreads):
            return None
        if math.isinf(heights[low]) or math.isinf(heights[high]):
            return spreads[high]
        share = -heights[low] / (heights[high] - heights[low])
        return spreads[low] + (spreads[high] - spreads[low]) * share


def usual_limits(cost: StepCost, spec: MapSpec) -> dict[str, float]:
    """Return the limits in ms for goodput if none are given, with three digits.

    TTFT: the time of a request of mean length alone; TPOT: two steps of the largest batch.
    """
    alone = spec.mean_tokens * (cost.step_ns + cost.rows_ns(1))
    rows = max(spec.batch_sizes)
    longest = spec.prompt_tokens + spec.mean_tokens
    step = cost.step_ns + cost.rows_ns(rows) + rows * cost.cached_ns * longest
    return {name: float(f"{ns / 1e6:.3g}") for name, ns in (("ttft", alone), ("tpot", 2 * step))}


class SimulationWatch(SweepWatch):
    """Reports the progress of simulated cells with a note every 5 seconds."""

    def __init__(self, watch: SweepWatch) -> None:
        self._watch, self._done, self._cells = watch, 0, 0
        self._noted_at = time.monotonic()

    def note(self, line: str) -> None:
        self._watch.note(line)

    def cells_begin(self, cells: int, kept: int) -> None:
        self._done, self._cells = kept, cells

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        self._done += 1
        if time.monotonic() - self._noted_at > 5:
            self._noted_at = time.monotonic()
            left = "" if not left_s else f", about {spell_time(left_s)} left"
            self.note(f"simulated {self._done:,} of {self._cells:,} cells{left}")


def make_map(
    spec: MapSpec,
    fitted: FittedRun,
    limits_ms: Mapping[str, float],
    store: Store,
    watch: SweepWatch,
) -> BreakEven:
    """Simulate every cell; those that the store holds are not simulated again."""

    def simulated(batch: int, spread: float, load: str, rate: float | None) -> Cell:
        chosen = spec.chosen(batch, spread, rate)
        experiment = make_experiment(chosen, simulated=True, cost=fitted.known)
        return Cell({"batch_size": batch, "spread": spread, "load": load}, experiment)

    watch = SimulationWatch(watch)
    pairs = list(itertools.product(spec.batch_sizes, spec.spreads))
    watch.note(f"simulating {plural(len(pairs) * len(spec.loads), 'cell')} on fitted step costs")
    closed = {pair: simulated(*pair, ALL, None) for pair in pairs}
    run_cells(CellList(tuple(closed.values())), store, watch)
    rates: dict[tuple[int, float, str], float | None] = {}
    for pair, cell in closed.items():
        summary = store.load(cell).data["strategies"]["continuous"]["summary"]
        for load in spec.loads:
            # Five digits, so that people can type the command that repeats a cell.
            rate = None if load == ALL else float(load) * summary["request_throughput"]
            rates[*pair, load] = None if rate is None else float(f"{rate:.5g}")
    every = {key: simulated(*key, rate) for key, rate in rates.items()}
    run_cells(CellList(tuple(every.values())), store, watch)
    cells = []
    for key, cell in every.items():
        result = store.load(cell)
        contests, seconds = contests_of(result, limits_ms)
        cost = result.data.get("cost")
        outside = tuple(cost["extrapolates"] if cost else ())
        cells.append(MapCell(*key, rates[key], contests, seconds, outside))
    return BreakEven(spec, fitted, limits_ms, cells)


def measure(
    predicted: BreakEven,
    count: int,
    trials: int,
    store: Store,
    watch: SweepWatch,
    executor: Executor | None = None,
) -> BreakEven:
    """Return the map with ``count`` cells, drawn with its seed, measured by an executor."""
    rng = np.random.Generator(np.random.Philox(predicted.spec.seed))
    cells = list(predicted.cells)
    drawn = sorted(rng.choice(len(cells), min(count, len(cells)), replace=False).tolist())
    if not drawn:
        return predicted
    seconds = trials * sum(cells[i].seconds for i in drawn)
    watch.note(
        f"measuring {plural(len(drawn), 'cell')}, {plural(trials, 'trial')} each: about "
        f"{spell_time(seconds)}, plus a warm-up of each"
    )
    real = {}
    for i in drawn:
        cell = cells[i]
        chosen = predicted.spec.chosen(cell.batch_size, cell.spread, cell.request_rate)
        chosen |= {"trials": trials, "verify": "none"}
        label = {"batch_size": cell.batch_size, "spread": cell.spread, "load": cell.load}
        real[i] = Cell(label, make_experiment(chosen, simulated=False))
    run_cells(CellList(tuple(real.values())), store, watch, executor=executor)
    results = {i: store.load(cell) for i, cell in real.items()}
    for i, result in results.items():
        cells[i] = replace(cells[i], measured=contests_of(result, predicted.limits_ms)[0])
    every = (predicted.fitted.result, *results.values())
    machines = kinds_of(result.data["environment"] for result in every)
    return replace(predicted, cells=cells, machines=machines)


def contests_of(result: Result, limits_ms: Mapping[str, float]) -> tuple[dict[str, Contest], float]:
    """Compare all metrics of one cell; also return the seconds of both strategies together."""
    strategies, names = result.data["strategies"], STRATEGIES.split(",")
    summaries = [strategies[name]["summary"] for name in names]
    contests = {
        "throughput": Contest.of(*(s["output_throughput"] for s in summaries)),
        "ttft": Contest.of(
            *(cast("float", s["mean_ttft_ms"]) for s in summaries), less_is_better=True
        ),
        "goodput": Contest.of(*(_goodput(result.recordings[n], limits_ms) for n in names)),
    }
    return contests, sum(s["duration"] for s in summaries)


def _goodput(trials: Sequence[Recording], limits_ms: Mapping[str, float]) -> float:
    """Return requests per second within all limits, the median over trials."""
    rates = [within(trial, limits_ms).sum() / (trial.duration_ns / 1e9) for trial in trials]
    return float(np.median(rates))


def rows_of(breakeven: BreakEven) -> Iterator[dict[str, Any]]:
    for cell in breakeven.cells:
        for metric, contest in cell.contests.items():
            yield {
                "batch_size": cell.batch_size,
                "spread": cell.spread,
                "load": cell.load,
                "request_rate": cell.request_rate,
                "metric": metric,
                **_columns(contest, ""),
                "extrapolates": bool(cell.beyond),
                **_columns((cell.measured or {}).get(metric), "measured_"),
                "same_side": cell.agrees(metric),
                "error": cell.error(metric),
            }


def _columns(contest: Contest | None, prefix: str) -> dict[str, Any]:
    names = ("static", "continuous", "ratio", "winner")
    columns = {f"{prefix}{name}": contest and getattr(contest, name) for name in names}
    return {name.replace("ratio", "advantage"): value for name, value in columns.items()}
