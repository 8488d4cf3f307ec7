"""Reader of guidellm's report, ``benchmarks.json``: a run for each benchmark of the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchbench.reports.peers.values import (
    DamagedError,
    PeerFile,
    PeerRun,
    at,
    figure,
    items,
    make_run,
    series,
    text,
)
from batchbench.reports.statistics import Floats

VERSION = 2
"""The version of the report, which guidellm 0.8 writes."""

_STATISTICS = {
    "mean": ("mean",),
    "std": ("std_dev",),
    "median": ("median",),
    "p90": ("percentiles", "p90"),
    "p99": ("percentiles", "p99"),
    "p99.9": ("percentiles", "p999"),
}

_REQUESTS = {  # its "inter token latency" of a request is our TPOT
    "ttft": ("time_to_first_token_ms", 1.0),
    "tpot": ("inter_token_latency_ms", 1.0),
    "e2el": ("request_latency", 1e3),
}


def is_of_guidellm(data: Any) -> bool:
    return isinstance(data, dict) and "benchmarks" in data and "metadata" in data


def read_guidellm(data: Any) -> PeerFile:
    if (version := at(data, "metadata", "version")) != VERSION:
        raise DamagedError(f"its report has version {version}; batchbench reads {VERSION}")
    benchmarks = items(data, "benchmarks")
    if not benchmarks:
        raise DamagedError("benchmarks is empty; it must hold at least one")
    backend = at(data, "config", "spec", "backend")
    return PeerFile(
        "guidellm",
        text(data, "metadata", "guidellm_version"),
        text(backend, "model"),
        text(backend, "kind"),
        None,
        [_run(benchmark) for benchmark in benchmarks],
    )


def _run(benchmark: Any) -> PeerRun:
    metrics, strategy = at(benchmark, "metrics"), at(benchmark, "config", "strategy")
    if metrics is None:
        raise DamagedError("a benchmark has no metrics")
    completed = figure(metrics, "request_totals", "successful")
    given = {
        "duration": figure(benchmark, "duration"),
        "completed": completed,
        "request_throughput": _mean(metrics, "requests_per_second"),
        "output_throughput": _mean(metrics, "output_tokens_per_second"),
        "total_token_throughput": _mean(metrics, "tokens_per_second"),
        "total_input_tokens": figure(metrics, "prompt_token_count", "successful", "total_sum"),
        "total_output_tokens": figure(metrics, "output_token_count", "successful", "total_sum"),
        # A gap of a request counts once per token: the mean is that of all gaps. Percentiles are
        # of the requests' means, so they are no percentiles of gaps.
        "mean_itl_ms": _mean(metrics, "inter_token_latency_ms"),
    }
    for latency in ("ttft", "e2el") if completed else ():
        name, scale = _REQUESTS[latency]
        for statistic, path in _STATISTICS.items():
            value = figure(metrics, name, "successful", *path)
            given[f"{statistic}_{latency}_ms"] = None if value is None else scale * value
    failed = [figure(metrics, "request_totals", name) for name in ("errored", "incomplete")]
    return make_run(
        given,
        _latencies(items(benchmark, "requests", "successful") or [], completed),
        concurrency=figure(strategy, "streams"),
        rate=figure(strategy, "rate"),
        failed=sum(count or 0 for count in failed),
    )


def _mean(metrics: Any, name: str) -> float | None:
    """Return a mean over the completed requests; None if there are none, where it writes 0."""
    count = figure(metrics, name, "successful", "count")
    return figure(metrics, name, "successful", "mean") if count else None


def _latencies(requests: list[Any], completed: float | None) -> dict[str, Floats]:
    """Return the latencies of single requests; nothing if the file has only a sample of them."""
    if not requests or len(requests) != completed:
        return {}
    found = {
        key: scale * series((at(request, name) for request in requests), name)
        for key, (name, scale) in _REQUESTS.items()
    }
    lengths = series((at(request, "output_tokens") for request in requests), "output_tokens")
    found["tpot"][~(lengths > 1)] = np.nan
    return found
