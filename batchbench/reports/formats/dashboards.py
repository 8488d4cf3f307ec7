"""The figures of a result that are worth following over time, for dashboards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled

BIGGER = {
    "output_throughput": "tokens/s",
    "total_token_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "request_goodput": "requests/s",
    "floor_share": "of the floor",
}
"""Of the summary, by unit: what is good to have more of."""

SMALLER = {
    "duration": "s",
    "mean_ttft_ms": "ms",
    "p99_ttft_ms": "ms",
    "mean_tpot_ms": "ms",
    "p99_itl_ms": "ms",
    "p99_e2el_ms": "ms",
    "joules_per_output_token": "J",
}
"""Of the summary, by unit: what is good to have less of."""

COUNTS = {
    "forward_passes": "passes",
    "padded_prefill_tokens": "tokens",
    "idle_slot_steps": "slot steps",
    "kv_tokens_peak": "tokens",
}
"""Of the counters: work that is exact, so that a change of one is a change."""


@dataclass(frozen=True)
class Measure:
    """One figure of one strategy.

    Attributes:
        low, high: between which it lay in the trials; of a speed-up its 95 % interval. None where
            one trial, or a count, has no range.
        spread: standard deviation over the trials.
    """

    strategy: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


def measures(result: Result) -> list[Measure]:
    """All figures of a result that have a meaning, strategy by strategy."""
    return [measure for name in result.names for measure in _of_strategy(result, name)]


def prefixes(shown: Sequence[Labelled]) -> list[str]:
    """What stands before the names of each result's figures: nothing where there is but one.

    A name is what a dashboard knows a curve by: the folder of a run, which changes with the time
    of day, must not be in it.
    """
    return [f"{one.label}/" if len(shown) > 1 else "" for one in shown]


def _of_strategy(result: Result, name: str) -> Iterator[Measure]:
    strategy = result.data["strategies"][name]
    for units, bigger in ((BIGGER, True), (SMALLER, False)):
        for metric, unit in units.items():
            value = strategy["summary"].get(metric)
            if value is not None:
                trials = [trial.get(metric) for trial in strategy["trials"]]
                yield Measure(name, metric, unit, bigger, float(value), *_range(value, trials))
    for metric, unit in COUNTS.items() if strategy["counters"] else ():
        yield Measure(name, metric, unit, False, strategy["counters"][metric])
    for found in result.data["comparisons"]:
        if found["candidate"] == name:
            low, high = found["speedup"]["ci95"] or (None, None)
            yield Measure(name, "speedup", "×", True, found["speedup"]["median"], low, high)
            if found["efficiency"] is not None:
                yield Measure(name, "efficiency", "×", True, found["efficiency"])


def _range(value: float, trials: Sequence[Any]) -> tuple[float | None, float | None, float | None]:
    """Lowest, highest and standard deviation of the trials; None of fewer than two."""
    known = [float(each) for each in trials if each is not None]
    if len(known) < 2:
        return None, None, None
    # A percentile of the pooled latencies may, by interpolation, lie beyond those of the trials.
    low, high = min(value, *known), max(value, *known)
    return low, high, float(np.std(known, ddof=1))
