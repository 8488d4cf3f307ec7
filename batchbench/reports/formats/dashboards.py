"""The figures of a result that are worth following over time, for dashboards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled
from batchbench.reports.statistics import Floats

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
    strategy: Any = result.data["strategies"][name]
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


def render_github_benchmark(shown: Sequence[Labelled], *, bigger: bool) -> str:
    """The figures of which more is better, or less."""
    entries = [
        entry
        for one, prefix in zip(shown, prefixes(shown), strict=True)
        for entry in _entries(one.result, prefix, bigger=bigger)
    ]
    return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _entries(result: Result, prefix: str, *, bigger: bool) -> Iterator[dict[str, Any]]:
    about = "\n".join(_about(result))
    for each in measures(result):
        if each.higher_is_better is bigger:
            entry = {
                "name": f"{prefix}{each.strategy}.{each.metric}",
                "unit": each.unit,
                "value": each.value,
            }
            # With its zeros, since a range of one digit is not read.
            spread = {} if each.spread is None else {"range": f"± {each.spread:#.6g}"}
            yield {**entry, **spread, "extra": about}


def _about(result: Result) -> Iterator[str]:
    """What the chart shows beside a point."""
    data = result.data
    yield result.title
    trials = len(next(iter(result.recordings.values())))
    yield f"{trials} trial{'s' * (trials != 1)}, batchbench {data['batchbench_version']}"
    validity = data["validity"]
    yield "; ".join([f"run {validity['status']}", *validity["reasons"]])


def render_bencher(shown: Sequence[Labelled]) -> str:
    """All results in one document."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one, prefix in zip(shown, prefixes(shown), strict=True):
        for each in measures(one.result):
            slug = each.metric.replace("_", "-")
            found.setdefault(f"{prefix}{each.strategy}", {})[slug] = _metric(each)
    return json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _metric(each: Measure) -> dict[str, float]:
    metric = {"value": each.value}
    if each.low is not None and each.high is not None:
        metric |= {"lower_value": each.low, "upper_value": each.high}
    return metric


def render_pytest_benchmark(shown: Sequence[Labelled]) -> str:
    """All results in one document; machine, commit and time are the first one's."""
    first = shown[0].result.data
    document = {
        "machine_info": _machine(first["environment"]),
        "commit_info": _commit(first),
        "benchmarks": [
            benchmark
            for one, prefix in zip(shown, prefixes(shown), strict=True)
            for benchmark in _benchmarks(one.result, prefix)
        ],
        "datetime": first["created_at"],
        "version": f"batchbench {first['batchbench_version']}",
    }
    return json.dumps(document, indent=4, allow_nan=False) + "\n"


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Of the machine that measured, not of the one that writes this."""
    return {
        "node": environment.get("hostname"),
        "processor": environment.get("cpu"),
        "machine": environment.get("gpu") or environment.get("cpu"),
        "python_version": environment.get("python"),
        "system": environment.get("os"),
        "cpu": {"brand_raw": environment.get("cpu"), "count": environment.get("cpu_cores")},
    }


def _commit(data: Mapping[str, Any]) -> dict[str, Any]:
    """The commit of batchbench's checkout; a ``+`` behind it says that it was changed."""
    commit = data["environment"].get("git_commit")
    return {
        "id": commit.rstrip("+") if commit else "unversioned",
        "time": None,
        "author_time": None,
        "dirty": bool(commit) and commit.endswith("+"),
        "project": "batchbench",
        "branch": "(unknown)",
    }


def _benchmarks(result: Result, prefix: str) -> Iterator[dict[str, Any]]:
    for name in result.names:
        strategy = result.data["strategies"][name]
        yield {
            # Benchmarks of a group stand in one table: those of one model, machine and workload.
            "group": result.title,
            "name": f"{prefix}{name}",
            "fullname": f"batchbench::{prefix}{name}",
            "params": None,
            "param": None,
            "extra_info": {
                "output_throughput": strategy["summary"]["output_throughput"],
                "counters": strategy["counters"],
                "validity": result.data["validity"],
                "workload_digest": result.data["workload"]["digest"],
            },
            "options": {
                "disable_gc": False,
                "timer": "perf_counter_ns",
                "min_rounds": len(strategy["trials"]),
                "max_time": 0.0,
                "min_time": 0.0,
                "warmup": result.data["warm_up"].get("duration_s") is not None,
            },
            "stats": _stats(np.array([trial["duration"] for trial in strategy["trials"]])),
        }


def _stats(durations: Floats) -> dict[str, Any]:
    """Statistics of the rounds under pytest-benchmark's names, by its definitions.

    Its quartiles are the medians of the halves, which for odd numbers are interpolated: Hazen's.
    """
    q1, median, q3 = (float(q) for q in np.percentile(durations, (25, 50, 75), method="hazen"))
    mean, fence = float(durations.mean()), 1.5 * (q3 - q1)
    stddev = float(durations.std(ddof=1)) if len(durations) > 1 else 0.0
    beyond = [
        int((abs(durations - mean) > stddev).sum()),
        int(((durations < q1 - fence) | (durations > q3 + fence)).sum()),
    ]
    return {
        "min": float(durations.min()),
        "max": float(durations.max()),
        "mean": mean,
        "stddev": stddev,
        "rounds": len(durations),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond[1],
        "stddev_outliers": beyond[0],
        "outliers": ";".join(map(str, beyond)),
        "ld15iqr": float(durations[durations >= q1 - fence].min()),
        "hd15iqr": float(durations[durations <= q3 + fence].max()),
        "ops": 1 / mean,
        "total": float(durations.sum()),
        "data": durations.tolist(),
        "iterations": 1,
    }
