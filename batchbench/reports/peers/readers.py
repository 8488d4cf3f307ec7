"""Readers of result files of vLLM, guidellm and aiperf."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchbench.reports.peers.values import (
    LATENCIES,
    STATISTICS,
    DamagedError,
    Figures,
    PeerFile,
    PeerRun,
    at,
    figure,
    items,
    make_run,
    needed,
    series,
    statistics,
    text,
)
from batchbench.reports.statistics import Floats

# vllm bench serve --save-result; with --save-detailed it has single requests

_OF_VLLM = (
    *("duration", "completed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
)
"""Metrics that have our names; the tool's names of latencies are ours too."""


def read_vllm(data: Any) -> PeerFile:
    given = {name: figure(data, name) for name in _OF_VLLM}
    completed = int(needed(given["completed"], "completed"))
    names = [f"{statistic}_{latency}_ms" for latency in LATENCIES for statistic in STATISTICS]
    given |= {name: figure(data, name) for name in names if completed}
    sent, rate = figure(data, "num_prompts"), data.get("request_rate")
    concurrency = figure(data, "max_concurrency")
    run = make_run(
        given,
        _latencies_of_vllm(data, completed),
        name="unlimited" if rate == "inf" and concurrency is None else None,
        concurrency=concurrency,
        rate=None if rate == "inf" else figure(data, "request_rate"),
        failed=None if sent is None else sent - completed,
    )
    backend = text(data, "backend") or text(data, "endpoint_type")
    return PeerFile(
        "vllm bench serve", None, text(data, "model_id"), backend, text(data, "date"), [run]
    )


def _latencies_of_vllm(data: Any, completed: int) -> dict[str, Floats]:
    """Return the latencies of completed requests; a failed request has an error text and zeros."""
    errors, whole = items(data, "errors"), items(data, "latencies")
    if errors is None:  # without --save-detailed: nothing tells which requests failed
        full = whole is not None and len(whole) == completed
        return {"e2el": 1e3 * series(whole or [], "latencies")} if full else {}
    columns: dict[str, list[Any]] = {}
    for name in ("ttfts", "itls", "output_lens", "latencies"):
        if (column := items(data, name)) is None:
            continue
        if len(column) != len(errors):
            raise DamagedError(f"{name} has {len(column)} entries, and errors {len(errors)}")
        columns[name] = [v for v, error in zip(column, errors, strict=True) if not error]
    if "itls" in columns:
        columns["itls"] = [gap for gaps in columns["itls"] for gap in items(gaps) or []]
    ours = {"ttft": "ttfts", "itl": "itls", "e2el": "latencies"}
    found = {
        key: 1e3 * series(columns[name], name) for key, name in ours.items() if name in columns
    }
    if {"ttft", "e2el"} <= found.keys() and "output_lens" in columns:
        later = series(columns["output_lens"], "output_lens") - 1
        found["tpot"] = (found["e2el"] - found["ttft"]) / np.where(later < 1, np.nan, later)
    return found


# guidellm's report, benchmarks.json: a run for each benchmark of the file

_GUIDELLM = 2
"""The version of the report, which guidellm 0.8 writes."""

_STATISTICS_OF_GUIDELLM = {
    "mean": ("mean",),
    "std": ("std_dev",),
    "median": ("median",),
    **{key: ("percentiles", key.replace(".", "")) for key in ("p90", "p99", "p99.9")},
}

_REQUESTS = {  # its "inter token latency" of a request is our TPOT
    "ttft": ("time_to_first_token_ms", 1.0),
    "tpot": ("inter_token_latency_ms", 1.0),
    "e2el": ("request_latency", 1e3),
}


def read_guidellm(data: Any) -> PeerFile:
    if (version := at(data, "metadata", "version")) != _GUIDELLM:
        raise DamagedError(f"its report has version {version}; batchbench reads {_GUIDELLM}")
    benchmarks = items(data, "benchmarks")
    if not benchmarks:
        raise DamagedError("benchmarks is empty; it must hold at least one")
    backend, version = at(data, "config", "spec", "backend"), ("metadata", "guidellm_version")
    runs = [_run_of_guidellm(benchmark) for benchmark in benchmarks]
    model, kind = text(backend, "model"), text(backend, "kind")
    return PeerFile("guidellm", text(data, *version), model, kind, None, runs)


def _run_of_guidellm(benchmark: Any) -> PeerRun:
    metrics, strategy = at(benchmark, "metrics"), at(benchmark, "config", "strategy")
    if metrics is None:
        raise DamagedError("a benchmark has no metrics")

    def mean(name: str) -> float | None:
        """Return a mean over the completed requests; None if there are none, where it writes 0."""
        count = figure(metrics, name, "successful", "count")
        return figure(metrics, name, "successful", "mean") if count else None

    completed = figure(metrics, "request_totals", "successful")
    given = {
        "duration": figure(benchmark, "duration"),
        "completed": completed,
        "request_throughput": mean("requests_per_second"),
        "output_throughput": mean("output_tokens_per_second"),
        "total_token_throughput": mean("tokens_per_second"),
        "total_input_tokens": figure(metrics, "prompt_token_count", "successful", "total_sum"),
        "total_output_tokens": figure(metrics, "output_token_count", "successful", "total_sum"),
        # A gap of a request counts once per token: the mean is that of all gaps. Percentiles are
        # of the requests' means, so they are no percentiles of gaps.
        "mean_itl_ms": mean("inter_token_latency_ms"),
    }
    for latency in ("ttft", "e2el") if completed else ():
        name, scale = _REQUESTS[latency]
        stated = at(metrics, name, "successful")
        given |= statistics(stated, latency, _STATISTICS_OF_GUIDELLM, scale)
    failed = [figure(metrics, "request_totals", name) for name in ("errored", "incomplete")]
    return make_run(
        given,
        _latencies_of_guidellm(items(benchmark, "requests", "successful") or [], completed),
        concurrency=figure(strategy, "streams"),
        rate=figure(strategy, "rate"),
        failed=sum(count or 0 for count in failed),
    )


def _latencies_of_guidellm(requests: list[Any], completed: float | None) -> dict[str, Floats]:
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


# aiperf: its summary (profile_export_aiperf.json) and its records (JSONL)

_AIPERF = "1."
"""Beginning of the schema versions that are known; aiperf 0.13 writes 1.4."""

_TAGS = {  # its "inter token latency" is the mean of a request, our TPOT; chunks are our gaps
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2el": "request_latency",
}

_STATISTICS_OF_AIPERF = {
    "mean": ("avg",),
    "std": ("std",),
    "median": ("p50",),
    "p90": ("p90",),
    "p99": ("p99",),
}

_OF_AIPERF = {
    "completed": "request_count",
    "total_input_tokens": "total_isl",
    "total_output_tokens": "total_osl",
    "request_throughput": "request_throughput",
    "request_goodput": "goodput",
    "output_throughput": "output_token_throughput",
    "total_token_throughput": "total_token_throughput",
}

_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "sec": 1e3, "s": 1e3}


def read_aiperf(data: Any) -> PeerFile:
    schema = text(data, "schema_version") or ""
    if not schema.startswith(_AIPERF):
        raise DamagedError(f"it has schema version {schema or 'none'}; batchbench reads {_AIPERF}x")
    given = {name: figure(data, tag, "avg") for name, tag in _OF_AIPERF.items()}
    if (duration := figure(data, "benchmark_duration", "avg")) is not None:
        given["duration"] = duration * _ms(data, "benchmark_duration") / 1e3
    for latency, tag in _TAGS.items():
        if (stated := at(data, tag)) is not None:
            given |= statistics(stated, latency, _STATISTICS_OF_AIPERF, _ms(data, tag))
    config = at(data, "input_config")
    phases = items(config, "phases") or []
    phase = next((one for one in phases if at(one, "kind") == "profiling"), None)
    run = make_run(
        given,
        concurrency=figure(phase, "concurrency"),
        rate=figure(phase, "rate"),
        failed=figure(data, "error_request_count", "avg") or 0,
    )
    model, kind = text(config, "models", "items", 0, "name"), text(config, "endpoint", "type")
    version, end = text(data, "aiperf_version"), text(data, "end_time")
    return PeerFile("aiperf", version, model, kind, end, [run])


def are_records(data: Any) -> bool:
    keys = {"metadata", "metrics"}
    records = data if isinstance(data, list) else []
    return bool(records) and all(
        isinstance(one, dict) and one.keys() - {"error"} == keys for one in records
    )


def read_records(records: list[Any]) -> PeerFile:
    """Return the measurement of single requests; a record with an error has no latencies."""
    records = [one for one in records if at(one, "metadata", "benchmark_phase") == "profiling"]
    done = [one for one in records if at(one, "error") is None]
    if not done:
        raise DamagedError("it has no record of a completed request")
    latencies = {latency: _values(done, tag) for latency, tag in _TAGS.items()}
    start, end = (
        [needed(figure(one, "metadata", key), key) for one in done]
        for key in ("request_start_ns", "request_end_ns")
    )
    prompt, output = (  # NaN if it is missing in one of the records
        float(series((at(r, "metrics", f"{n}_sequence_length", "value") for r in done), n).sum())
        for n in ("input", "output")
    )
    seconds = (max(end) - min(start)) / 1e9
    divisor = seconds if seconds > 0 else math.nan
    given: Figures = {
        "duration": seconds,
        "completed": len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / divisor,
        "output_throughput": output / divisor,
        "total_token_throughput": (prompt + output) / divisor,
    }
    run = make_run(given, latencies, failed=len(records) - len(done))
    return PeerFile("aiperf", None, None, None, None, [run])


def _values(records: list[Any], tag: str) -> Floats:
    """Return a metric of all records in ms; a record has one value or a list of them."""
    values = [np.zeros(0)]
    for metrics in (at(record, "metrics") for record in records):
        if (value := at(metrics, tag, "value")) is not None:
            several = value if isinstance(value, list) else [value]
            values.append(_ms(metrics, tag) * series(several, tag))
    return np.concatenate(values)


def _ms(data: Any, tag: str) -> float:
    unit = text(data, tag, "unit")
    if unit not in _MS:
        raise DamagedError(f"{tag}.unit is {str(unit)[:20]}; it must be one of {', '.join(_MS)}")
    return _MS[unit]
