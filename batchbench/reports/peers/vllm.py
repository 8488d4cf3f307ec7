"""Reader of ``vllm bench serve --save-result``; with ``--save-detailed`` it has single requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchbench.reports.peers.values import (
    LATENCIES,
    STATISTICS,
    DamagedError,
    PeerFile,
    figure,
    items,
    make_run,
    needed,
    series,
    text,
)
from batchbench.reports.statistics import Floats

_SAME = (
    *("duration", "completed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
)
"""Metrics that have our names; the tool's names of latencies are ours too."""


def is_of_vllm(data: Any) -> bool:
    return isinstance(data, dict) and {"model_id", "completed", "request_throughput"} <= data.keys()


def read_vllm(data: Any) -> PeerFile:
    given = {name: figure(data, name) for name in _SAME}
    completed = int(needed(given["completed"], "completed"))
    for latency in LATENCIES:
        for statistic in STATISTICS:
            name = f"{statistic}_{latency}_ms"
            given[name] = figure(data, name) if completed else None
    sent, rate = figure(data, "num_prompts"), data.get("request_rate")
    concurrency = figure(data, "max_concurrency")
    run = make_run(
        given,
        _latencies(data, completed),
        name="unlimited" if rate == "inf" and concurrency is None else None,
        concurrency=concurrency,
        rate=None if rate == "inf" else figure(data, "request_rate"),
        failed=None if sent is None else sent - completed,
    )
    backend = text(data, "backend") or text(data, "endpoint_type")
    return PeerFile(
        "vllm bench serve", None, text(data, "model_id"), backend, text(data, "date"), [run]
    )


def _latencies(data: Any, completed: int) -> dict[str, Floats]:
    """Return the latencies of completed requests; a failed request has an error text and zeros."""
    errors = items(data, "errors")
    whole = items(data, "latencies")
    if errors is None:  # without --save-detailed: nothing tells which requests failed
        full = whole is not None and len(whole) == completed
        return {"e2el": 1e3 * series(whole or [], "latencies")} if full else {}
    done = [i for i, error in enumerate(errors) if not error]
    columns = {name: items(data, name) for name in ("ttfts", "itls", "output_lens", "latencies")}
    for name, column in columns.items():
        if column is not None and len(column) != len(errors):
            raise DamagedError(f"{name} has {len(column)} entries, and errors {len(errors)}")
    found: dict[str, Floats] = {}
    ttfts, itls, lengths, latencies = (
        None if column is None else [column[i] for i in done] for column in columns.values()
    )
    if itls is not None:
        gaps = [gap for i in range(len(itls)) for gap in items(itls, i) or []]
        found["itl"] = 1e3 * series(gaps, "itls")
    if ttfts is not None:
        found["ttft"] = 1e3 * series(ttfts, "ttfts")
    if latencies is not None:
        found["e2el"] = 1e3 * series(latencies, "latencies")
    if "ttft" in found and "e2el" in found and lengths is not None:
        later = series(lengths, "output_lens") - 1
        later[later < 1] = np.nan
        found["tpot"] = (found["e2el"] - found["ttft"]) / later
    return found
