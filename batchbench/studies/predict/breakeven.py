"""The break-even map: batch size × spread of output lengths × load, and who wins where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from batchbench.batching.models import ModelSpec
from batchbench.batching.step_cost import StepCost
from batchbench.reports.latency import within
from batchbench.reports.result import Result
from batchbench.studies.predict.teacher import Teacher
from batchbench.studies.sweep.grid import Cell, make_experiment
from batchbench.studies.sweep.run import SweepWatch, run_cells
from batchbench.studies.sweep.store import Store

STRATEGIES = "static,continuous"

ALL = "all"
"""The load at which all requests are there at the start."""

EVEN = 0.02
"""Within this share of each other the two are even."""

METRICS = ("throughput", "ttft", "goodput")


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
        """Output lengths as ``--output-tokens`` has them: lognormal with this spread.

        Cut at ten times the mean and where the model's context ends.
        """
        if not spread:
            return str(self.mean_tokens)
        most = 10 * self.mean_tokens
        if self.context is not None:
            most = max(1, min(most, self.context - self.prompt_tokens))
        sigma = math.sqrt(math.log1p(spread**2))
        if not sigma:  # the spread's square is 0
            return str(self.mean_tokens)
        return f"lognormal:mean={self.mean_tokens},sigma={sigma:.6g},max={most}"

    def chosen(self, batch: int, spread: float, rate: float | None) -> dict[str, Any]:
        """The options of a cell, by field name."""
        model = {"model": self.model.model, "load_format": self.model.load_format}
        model |= {"dtype": self.model.dtype, "device": self.model.device}
        options = {"revision": self.model.revision, "threads": self.model.threads}
        return {
            "batch_size": batch,
            "output_tokens": self.lengths(spread),
            "prompt_tokens": str(self.prompt_tokens),
            "queue_size": max(2 * batch, self.batches * batch),
            "strategy": STRATEGIES,
            "engine": self.engine,
            "prefill": self.prefill,
            "seed": self.seed,
            **model,
            **{name: value for name, value in options.items() if value is not None},
            **({} if rate is None else {"request_rate": rate}),
        }


@dataclass(frozen=True)
class Chosen:
    """Cells to be served, for :func:`run_cells`."""

    cells: tuple[Cell, ...]
    varying: tuple[str, ...] = ("batch_size", "output_tokens", "request_rate")


@dataclass(frozen=True)
class Contest:
    """Both strategies in one metric: who is better, and by how much."""

    static: float
    continuous: float
    ratio: float | None  # above 1: continuous is better; None where static's is 0 or both are

    @classmethod
    def of(cls, static: float, continuous: float, *, less_is_better: bool = False) -> Contest:
        """From the two values."""
        above, below = (static, continuous) if less_is_better else (continuous, static)
        return cls(static, continuous, above / below if below else None)

    @property
    def height(self) -> float:
        """Logarithm of the ratio: above 0 where continuous is better, infinite over nothing."""
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
        """Whether both are on one side of the border, or one of them on it."""
        return self.winner == other.winner or "even" in (self.winner, other.winner)


@dataclass(frozen=True, eq=False)
class Place:
    """One cell of the map."""

    batch_size: int
    spread: float
    load: str
    request_rate: float | None
    cell: Cell
    contests: Mapping[str, Contest]  # as simulated, by metric
    durations: Mapping[str, float]  # seconds, by strategy
    beyond: tuple[str, ...]  # in what it goes beyond the steps that the cost was fitted on
    measured: Mapping[str, Contest] | None = None
    measured_durations: Mapping[str, float] | None = None

    def agrees(self, metric: str) -> bool | None:
        """Whether the real run falls on the side that the map says; None where there is none."""
        if self.measured is None:
            return None
        return self.contests[metric].agrees(self.measured[metric])

    def error(self, metric: str) -> float | None:
        """Predicted over measured advantage, less 1."""
        told, real = self.contests[metric].ratio, (self.measured or {}).get(metric)
        return told / real.ratio - 1 if told and real is not None and real.ratio else None


@dataclass(frozen=True, eq=False)
class BreakEven:
    """The map."""

    spec: MapSpec
    teacher: Teacher
    limits_ms: Mapping[str, float]  # of goodput, by latency
    places: Sequence[Place]

    @property
    def measured(self) -> list[Place]:
        """Cells that were also run for real."""
        return [place for place in self.places if place.measured is not None]

    @cached_property
    def by_axes(self) -> dict[tuple[int, float, str], Place]:
        """By batch size, spread and load."""
        return {(p.batch_size, p.spread, p.load): p for p in self.places}

    def wins(self, metric: str) -> dict[str, list[Place]]:
        """Cells by who wins them."""
        found: dict[str, list[Place]] = {"continuous": [], "static": [], "even": []}
        for place in self.places:
            found[place.contests[metric].winner].append(place)
        return found

    def border(self, metric: str, batch: int, load: str) -> float | None:
        """The spread from which on continuous wins; 0 or more, None where it does not at the end.

        Between two spreads of the map by the straight line of the ratio's logarithm.
        """
        heights = [
            self.by_axes[batch, spread, load].contests[metric].height - math.log1p(EVEN)
            for spread in self.spec.spreads
        ]
        if heights[-1] <= 0:
            return None
        lost = [i for i, height in enumerate(heights) if height <= 0]
        if not lost:
            return self.spec.spreads[0]
        low, high = lost[-1], lost[-1] + 1
        if math.isinf(heights[low]) or math.isinf(heights[high]):
            return self.spec.spreads[high]
        step = self.spec.spreads[high] - self.spec.spreads[low]
        return self.spec.spreads[low] + step * -heights[low] / (heights[high] - heights[low])


def usual_limits(cost: StepCost, spec: MapSpec) -> dict[str, float]:
    """Return the limits in ms that goodput takes if none are given.

    The limit of the first token is the time that a request of mean length takes alone. That of a
    token is twice the time of a step of the largest batch.
    """
    alone = spec.mean_tokens * (cost.step_ns + cost.rows_ns(1))
    rows = max(spec.batch_sizes)
    longest = spec.prompt_tokens + spec.mean_tokens
    step = cost.step_ns + cost.rows_ns(rows) + rows * cost.cached_ns * longest
    return {"ttft": _rounded(alone / 1e6), "tpot": _rounded(2 * step / 1e6)}


def _rounded(value: float) -> float:
    """Round to three digits."""
    return float(f"{value:.3g}")


def make_map(
    spec: MapSpec,
    teacher: Teacher,
    limits_ms: Mapping[str, float],
    store: Store,
    watch: SweepWatch,
) -> BreakEven:
    """Simulate every cell; those that the store holds are not simulated again."""
    asked = {
        (batch, spread): _cell(spec, teacher, batch, spread, None)
        for batch in spec.batch_sizes
        for spread in spec.spreads
    }
    run_cells(Chosen(tuple(asked.values())), store, watch)
    rates = {}
    for key, cell in asked.items():
        served = store.load(cell).data["strategies"]["continuous"]["summary"]
        for load in spec.loads:
            capacity = served["request_throughput"]
            # Five digits, so that the command that repeats a cell is one that people can type.
            rates[*key, load] = None if load == ALL else float(f"{float(load) * capacity:.5g}")
    cells = {k: _cell(spec, teacher, k[0], k[1], rate) for k, rate in rates.items()}
    run_cells(Chosen(tuple(cells.values())), store, watch)
    places = []
    for (batch, spread, load), cell in cells.items():
        result = store.load(cell)
        contests, durations = contests_of(result, limits_ms)
        cost = result.data.get("cost")
        outside = tuple(cost["extrapolates"] if cost else ())
        rate = rates[batch, spread, load]
        places.append(Place(batch, spread, load, rate, cell, contests, durations, outside))
    return BreakEven(spec, teacher, limits_ms, places)


def _cell(spec: MapSpec, teacher: Teacher, batch: int, spread: float, rate: float | None) -> Cell:
    chosen = spec.chosen(batch, spread, rate)
    shown = {"request_rate": None, **chosen}
    return Cell(shown, make_experiment(chosen, simulated=True, cost=teacher.known))


def measure(
    found: BreakEven, count: int, trials: int, store: Store, watch: SweepWatch
) -> BreakEven:
    """The map with ``count`` cells, drawn with its seed, run for real."""
    rng = np.random.Generator(np.random.Philox(found.spec.seed))
    places = list(found.places)
    drawn = sorted(rng.choice(len(places), min(count, len(places)), replace=False).tolist())
    real = {}
    for i in drawn:
        place = places[i]
        chosen = found.spec.chosen(place.batch_size, place.spread, place.request_rate)
        chosen |= {"trials": trials, "verify": "none"}
        shown = {"request_rate": None, **chosen}
        real[i] = Cell(shown, make_experiment(chosen, simulated=False))
    run_cells(Chosen(tuple(real.values())), store, watch)
    for i, cell in real.items():
        contests, durations = contests_of(store.load(cell), found.limits_ms)
        places[i] = replace(places[i], measured=contests, measured_durations=durations)
    return replace(found, places=places)


def contests_of(
    result: Result, limits_ms: Mapping[str, float]
) -> tuple[dict[str, Contest], dict[str, float]]:
    """All metrics of one cell, and how long each strategy took."""
    told: dict[str, Any] = {
        name: result.data["strategies"][name]["summary"] for name in STRATEGIES.split(",")
    }
    static, continuous = told["static"], told["continuous"]
    good = {name: goodput(result, name, limits_ms) for name in told}
    contests = {
        "throughput": Contest.of(static["output_throughput"], continuous["output_throughput"]),
        "ttft": Contest.of(static["mean_ttft_ms"], continuous["mean_ttft_ms"], less_is_better=True),
        "goodput": Contest.of(good["static"], good["continuous"]),
    }
    return contests, {name: summary["duration"] for name, summary in told.items()}


def goodput(result: Result, strategy: str, limits_ms: Mapping[str, float]) -> float:
    """Requests a second within all limits: the median over trials."""
    rates = [
        float(within(recording, limits_ms).sum()) / (recording.duration_ns / 1e9)
        for recording in result.recordings[strategy]
    ]
    return float(np.median(rates))


def rows_of(found: BreakEven) -> Iterator[dict[str, Any]]:
    """A row a cell and metric, for the table and JSON."""
    for place in found.places:
        for metric in METRICS:
            contest = place.contests[metric]
            real = None if place.measured is None else place.measured[metric]
            yield {
                "batch_size": place.batch_size,
                "spread": place.spread,
                "load": place.load,
                "request_rate": place.request_rate,
                "metric": metric,
                "static": contest.static,
                "continuous": contest.continuous,
                "advantage": contest.ratio,
                "winner": contest.winner,
                "extrapolates": bool(place.beyond),
                "measured_static": None if real is None else real.static,
                "measured_continuous": None if real is None else real.continuous,
                "measured_advantage": None if real is None else real.ratio,
                "measured_winner": None if real is None else real.winner,
                "same_side": place.agrees(metric),
                "error": place.error(metric),
            }
