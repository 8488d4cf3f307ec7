"""Readers of aiperf: its summary (``profile_export_aiperf.json``) and its records (JSONL)."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchbench.reports.peers.values import (
    DamagedError,
    PeerFile,
    at,
    figure,
    items,
    make_run,
    needed,
    series,
    text,
)

VERSION = "1."
"""Beginning of the schema versions that are known; aiperf 0.13 writes 1.4."""

_TAGS = {  # its "inter token latency" is the mean of a request, our TPOT; chunks are our gaps
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2el": "request_latency",
}

_STATISTICS = {"mean": "avg", "std": "std", "median": "p50", "p90": "p90", "p99": "p99"}

_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "sec": 1e3, "s": 1e3}


def is_of_aiperf(data: Any) -> bool:
    return isinstance(data, dict) and "aiperf_version" in data


def are_records(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(map(_is_record, data))


def _is_record(data: Any) -> bool:
    return isinstance(data, dict) and {"metadata", "metrics"} == data.keys() - {"error"}


def read_aiperf(data: Any) -> PeerFile:
    schema = text(data, "schema_version") or ""
    if not schema.startswith(VERSION):
        raise DamagedError(f"it has schema version {schema or 'none'}; batchbench reads {VERSION}x")
    seconds = figure(data, "benchmark_duration", "avg")
    given = {
        "duration": None if seconds is None else seconds * _ms(data, "benchmark_duration") / 1e3,
        "completed": figure(data, "request_count", "avg"),
        "total_input_tokens": figure(data, "total_isl", "avg"),
        "total_output_tokens": figure(data, "total_osl", "avg"),
        "request_throughput": figure(data, "request_throughput", "avg"),
        "request_goodput": figure(data, "goodput", "avg"),
        "output_throughput": figure(data, "output_token_throughput", "avg"),
        "total_token_throughput": figure(data, "total_token_throughput", "avg"),
    }
    for latency, tag in _TAGS.items():
        for statistic, name in _STATISTICS.items():
            value = figure(data, tag, name)
            given[f"{statistic}_{latency}_ms"] = None if value is None else value * _ms(data, tag)
    config = at(data, "input_config")
    phases = items(config, "phases") or []
    phase = next((one for one in phases if at(one, "kind") == "profiling"), None)
    run = make_run(
        given,
        concurrency=figure(phase, "concurrency"),
        rate=figure(phase, "rate"),
        failed=figure(data, "error_request_count", "avg") or 0,
    )
    return PeerFile(
        "aiperf",
        text(data, "aiperf_version"),
        text(config, "models", "items", 0, "name"),
        text(config, "endpoint", "type"),
        text(data, "end_time"),
        [run],
    )


def read_records(records: list[Any]) -> PeerFile:
    """Return the measurement of single requests; a record with an error has no latencies."""
    records = [one for one in records if at(one, "metadata", "benchmark_phase") == "profiling"]
    done = [one for one in records if at(one, "error") is None]
    if not done:
        raise DamagedError("it has no record of a completed request")
    latencies = {}
    for latency, tag in _TAGS.items():
        values: list[float] = []
        for metrics in (at(one, "metrics") for one in done):
            value = at(metrics, tag, "value")
            several = value if isinstance(value, list) else [value]
            scale = _ms(metrics, tag) if value is not None else 1.0
            values += (scale * series(several, tag)).tolist()
        latencies[latency] = np.array(values, np.float64)
    times = [
        [needed(figure(one, "metadata", key), key) for one in done]
        for key in ("request_start_ns", "request_end_ns")
    ]
    seconds = (max(times[1]) - min(times[0])) / 1e9
    tokens = [
        series((at(one, "metrics", f"{side}_sequence_length", "value") for one in done), side)
        for side in ("input", "output")
    ]
    prompt, output = (float(n.sum()) if np.isfinite(n).all() else None for n in tokens)
    known = seconds > 0
    whole = None if prompt is None or output is None else prompt + output
    given = {
        "duration": seconds,
        "completed": len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / seconds if known else None,
        "output_throughput": output / seconds if known and output is not None else None,
        "total_token_throughput": whole / seconds if known and whole is not None else None,
    }
    run = make_run(given, latencies, failed=len(records) - len(done))
    return PeerFile("aiperf", None, None, None, None, [run])


def _ms(data: Any, tag: str) -> float:
    unit = text(data, tag, "unit")
    if unit not in _MS:
        raise DamagedError(f"{tag}.unit is {str(unit)[:20]}; it must be one of {', '.join(_MS)}")
    return _MS[unit]
