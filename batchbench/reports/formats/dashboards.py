"""Values of a result that dashboards follow over time: github-action-benchmark, Bencher, pytest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchbench.json_file import json_text
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled
from batchbench.reports.statistics import Floats
from batchbench.reports.text import plural

_METRICS = (  # part of the result, metric, unit, more is better
    ("summary", "output_throughput", "tokens/s", True),
    ("summary", "total_token_throughput", "tokens/s", True),
    ("summary", "request_throughput", "requests/s", True),
    ("summary", "request_goodput", "requests/s", True),
    ("summary", "floor_share", "of the floor", True),
    ("summary", "duration", "s", False),
    ("summary", "mean_ttft_ms", "ms", False),
    ("summary", "p99_ttft_ms", "ms", False),
    ("summary", "mean_tpot_ms", "ms", False),
    ("summary", "p99_itl_ms", "ms", False),
    ("summary", "p99_e2el_ms", "ms", False),
    ("summary", "joules_per_output_token", "J", False),
    ("counters", "forward_passes", "passes", False),
    ("counters", "padded_prefill_tokens", "tokens", False),
    ("counters", "idle_slot_steps", "slot steps", False),
    ("counters", "kv_tokens_peak", "tokens", False),
)


@dataclass(frozen=True)
class Measure:
    """One value of one strategy.

    Attributes:
        low, high: range over the trials; of a speed-up its 95 % interval. None for one trial, and
            for counts.
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
    return [measure for name in result.names for measure in _of_strategy(result, name)]


def _of_strategy(result: Result, name: str) -> Iterator[Measure]:
    strategy: Mapping[str, Any] = result.data["strategies"][name]
    for part, metric, unit, bigger in _METRICS:
        value = (strategy[part] or {}).get(metric)
        if value is None:
            continue
        trials = [trial.get(metric) for trial in strategy["trials"]] if part == "summary" else []
        known = [float(trial) for trial in trials if trial is not None]
        if len(known) < 2:  # of a count, any difference is a change
            yield Measure(name, metric, unit, bigger, value)
            continue
        # A percentile of the pooled latencies is interpolated and may lie outside the trials'.
        low, high = min(value, *known), max(value, *known)
        spread = float(np.std(known, ddof=1))
        yield Measure(name, metric, unit, bigger, float(value), low, high, spread)
    for comparison in result.data["comparisons"]:
        if comparison["candidate"] == name:
            low, high = comparison["speedup"]["ci95"] or (None, None)
            yield Measure(name, "speedup", "×", True, comparison["speedup"]["median"], low, high)
            if comparison["efficiency"] is not None:
                yield Measure(name, "efficiency", "×", True, comparison["efficiency"])


def _with_prefixes(shown: Sequence[Labelled]) -> Iterator[tuple[Result, str]]:
    """Yield each result with the prefix of its names, which is empty for a single result.

    A dashboard identifies a curve by its name, so the folder of a run, which has the time of day in
    it, must not be part of it.
    """
    return ((one.result, f"{one.label}/" if len(shown) > 1 else "") for one in shown)


def render_github_benchmark(shown: Sequence[Labelled], *, bigger: bool) -> str:
    """Return the values of which more (``bigger``) or less is better."""
    entries = []
    for result, prefix in _with_prefixes(shown):
        trials = len(next(iter(result.recordings.values())))
        validity, version = result.data["validity"], result.data["batchbench_version"]
        lines = [
            result.title,
            f"{plural(trials, 'trial')}, batchbench {version}",
            "; ".join([f"run {validity['status']}", *validity["reasons"]]),
        ]
        for measure in measures(result):
            if measure.higher_is_better is not bigger:
                continue
            entry = {
                "name": f"{prefix}{measure.strategy}.{measure.metric}",
                "unit": measure.unit,
                "value": measure.value,
                # With its zeros: the action does not read a range of one digit.
                "range": None if measure.spread is None else f"± {measure.spread:#.6g}",
                "extra": "\n".join(lines),
            }
            entries.append({name: value for name, value in entry.items() if value is not None})
    return json_text(entries)


def render_bencher(shown: Sequence[Labelled]) -> str:
    document: dict[str, dict[str, dict[str, float]]] = {}
    for result, prefix in _with_prefixes(shown):
        for measure in measures(result):
            metric = {"value": measure.value}
            if measure.low is not None and measure.high is not None:
                metric |= {"lower_value": measure.low, "upper_value": measure.high}
            slug = measure.metric.replace("_", "-")
            document.setdefault(f"{prefix}{measure.strategy}", {})[slug] = metric
    return json_text(document)


def render_pytest_benchmark(shown: Sequence[Labelled]) -> str:
    """Return all results in one document; machine, commit and time are the first one's."""
    first = shown[0].result.data
    machine = first["environment"]  # that measured, not the one that writes this
    commit = machine.get("git_commit") or ""  # of batchbench's checkout; + if it was changed
    document = {
        "machine_info": {
            "node": machine.get("hostname"),
            "processor": machine.get("cpu"),
            "machine": machine.get("gpu") or machine.get("cpu"),
            "python_version": machine.get("python"),
            "system": machine.get("os"),
            "cpu": {"brand_raw": machine.get("cpu"), "count": machine.get("cpu_cores")},
        },
        "commit_info": {
            "id": commit.rstrip("+") or "unversioned",
            "time": None,
            "author_time": None,
            "dirty": commit.endswith("+"),
            "project": "batchbench",
            "branch": "(unknown)",
        },
        "benchmarks": [
            _benchmark(result, name, prefix)
            for result, prefix in _with_prefixes(shown)
            for name in result.names
        ],
        "datetime": first["created_at"],
        "version": f"batchbench {first['batchbench_version']}",
    }
    return json.dumps(document, indent=4, allow_nan=False) + "\n"


def _benchmark(result: Result, name: str, prefix: str) -> dict[str, Any]:
    strategy = result.data["strategies"][name]
    return {
        # A group is shown as one table: benchmarks of one model, machine and workload.
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
    """Return statistics of the rounds under pytest-benchmark's names, by its definitions.

    Its quartiles are the medians of the halves, interpolated for odd numbers: Hazen's.
    """
    q1, median, q3 = (float(q) for q in np.percentile(durations, (25, 50, 75), method="hazen"))
    mean, fence = float(durations.mean()), 1.5 * (q3 - q1)
    stddev = float(durations.std(ddof=1)) if len(durations) > 1 else 0.0
    far = int((abs(durations - mean) > stddev).sum())
    outside = int(((durations < q1 - fence) | (durations > q3 + fence)).sum())
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
        "iqr_outliers": outside,
        "stddev_outliers": far,
        "outliers": f"{far};{outside}",
        "ld15iqr": float(durations[durations >= q1 - fence].min()),
        "hd15iqr": float(durations[durations <= q3 + fence].max()),
        "ops": 1 / mean,
        "total": float(durations.sum()),
        "data": durations.tolist(),
        "iterations": 1,
    }
