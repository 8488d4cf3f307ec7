"""Results as pytest-benchmark's JSON: a benchmark a strategy, a round a trial, in seconds.

``pytest-benchmark compare FILE FILE`` reads it, and with it whatever reads pytest-benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from batchbench.reports.formats.dashboards import prefixes
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled
from batchbench.reports.statistics import Floats


def render(shown: Sequence[Labelled]) -> str:
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
