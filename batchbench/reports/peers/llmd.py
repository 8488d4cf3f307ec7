"""Reader and writer of llm-d's benchmark report, schema 0.2, in JSON or YAML: one load per report.

https://github.com/llm-d/llm-d-benchmark, ``benchmark_report/schema_v0_2.py``.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

import yaml

from batchbench.json_file import json_text
from batchbench.reports.peers.values import (
    STATISTICS,
    DamagedError,
    Figures,
    PeerFile,
    PeerRun,
    at,
    figure,
    items,
    make_run,
    statistics,
    text,
)

VERSIONS = ("0.2", "0.2.1")
"""Schema versions that are read; the second only adds fields. The first is written."""

_OURS = "metrics as batchbench defines them"
"""Description of a load whose report was written here, whatever tool measured it."""

_NAMES = {  # name of a latency, and the end of its unit
    "ttft": ("time_to_first_token", ""),
    "tpot": ("time_per_output_token", "/token"),
    "itl": ("inter_token_latency", "/token"),
    "e2el": ("request_latency", ""),
}

_OTHER_NAMES = {  # what these tools call so is a mean of each request; "" is not there
    "aiperf": {"tpot": ("inter_token_latency", "/token"), "itl": ("", "")},
    "guidellm": {"tpot": ("", ""), "itl": ("", "")},
}

_STATISTICS = dict(zip(STATISTICS, ("mean", "stddev", "p50", "p90", "p99", "p99p9"), strict=True))

_MORE = {"min": 0, "p0p1": 0.1, "p1": 1, "p5": 5, "p10": 10, "p25": 25, "p75": 75, "p95": 95}
"""Percentiles that a result does not have, computed from single requests."""

_RATES = {
    "request_rate": ("request_throughput", "queries/s"),
    "output_token_rate": ("output_throughput", "tokens/s"),
    "total_token_rate": ("total_token_throughput", "tokens/s"),
}

_LENGTHS = {"input_length": "total_input_tokens", "output_length": "total_output_tokens"}

_DURATION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:([0-9.eE+-]+)S)?")


# Reading


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML without references, which can make a small file grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise DamagedError("it has YAML aliases, which no benchmark report has")
        return super().compose_node(parent, index)


def parse_yaml(content: str) -> Any:
    """Parse a report in YAML; raise ValueError if it is none."""
    try:
        return yaml.load(content, _Loader)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def read_llmd(data: Any) -> PeerFile:
    version = str(data["version"])
    if version not in VERSIONS:
        raise DamagedError(
            f"its schema is {version[:20]}; batchbench reads {' and '.join(VERSIONS)}"
        )
    aggregate = at(data, "results", "request_performance", "aggregate")
    if aggregate is None:
        raise DamagedError("results.request_performance.aggregate is missing")
    load = at(data, "scenario", "load", "standardized")
    tool = text(load, "tool")
    ours = at(data, "scenario", "load", "metadata", "description") == _OURS
    lost = [figure(aggregate, "requests", name) for name in ("failures", "incomplete")]
    failed = None if lost == [None, None] else sum(count or 0 for count in lost)
    total = figure(aggregate, "requests", "total")
    completed = None if total is None else total - (failed or 0)
    given = {"duration": _seconds(text(data, "run", "time", "duration")), "completed": completed}
    for rate, (name, _) in _RATES.items():
        given[name] = figure(aggregate, "throughput", rate, "mean")
    for length, name in _LENGTHS.items():
        mean = figure(aggregate, "requests", length, "mean")
        # Other tools divide by requests sent or completed, which differ where requests failed.
        if completed is not None and mean is not None and (ours or not failed):
            given[name] = round(mean * completed)
    names = _NAMES if ours else _NAMES | _OTHER_NAMES.get(tool or "", {})
    for latency, (theirs, per) in names.items():
        given |= _latency(aggregate, latency, theirs, per)
    concurrency = figure(load, "concurrency")
    run = make_run(given, concurrency=concurrency, rate=figure(load, "rate_qps"), failed=failed)
    engines = [at(one, "standardized") for one in items(data, "scenario", "stack") or []]
    engine = next((one for one in engines if at(one, "model") is not None), None)
    end = at(data, "run", "time", "end")
    return PeerFile(
        tool or "llm-d benchmark report",
        text(load, "tool_version"),
        text(engine, "model", "name"),
        text(engine, "tool"),
        None if end is None else str(end),
        [run],
    )


def _latency(aggregate: Any, latency: str, name: str, per: str) -> Figures:
    stated = at(aggregate, "latency", name)
    if stated is None:
        return {}
    scales = {f"ms{per}": 1.0, f"s{per}": 1e3}
    unit = text(stated, "units") or "none"
    if unit not in scales:
        raise DamagedError(f"{name}.units is {unit[:20]}; it must be {' or '.join(scales)}")
    paths = {key: (theirs,) for key, theirs in _STATISTICS.items()}
    return statistics(stated, latency, paths, scales[unit])


def _seconds(duration: str | None) -> float | None:
    match = _DURATION.fullmatch(duration or "")
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


# Writing


def write_llmd(file: PeerFile, run: PeerRun) -> str:
    """Return the report of one run; it leaves out what the run does not have."""
    experiment = uuid.uuid5(uuid.NAMESPACE_URL, f"{file.title} {file.model} {file.created}")
    seconds = run.summary["duration"]
    end = file.created if file.tool == "batchbench" else None  # others name no time zone
    suspect = [f"suspect: {doubt}" for doubt in file.doubts]
    server = uuid.uuid5(uuid.NAMESPACE_URL, f"{file.backend} {file.model}")
    stack = {
        "metadata": {"label": "server", "cfg_id": str(server)},
        # The standard form of an engine asks for an accelerator, which is not known.
        "standardized": {
            "kind": "generic",
            "tool": file.backend or "",
            "tool_version": "",
            "model": {"name": file.model},
        },
        "native": {},
    }
    report = {
        "version": VERSIONS[0],
        "run": {
            "uid": str(uuid.uuid5(experiment, run.name)),
            "eid": str(experiment),
            "time": _known(end=end, duration=None if seconds is None else f"PT{seconds!r}S"),
            "description": ", ".join([file.model or file.tool, run.name, *suspect]),
        },
        "scenario": _known(stack=[stack] if file.model else None, load=_load(file, run)),
        "results": {"request_performance": {"aggregate": _aggregate(run)}},
    }
    return json_text(report)


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _load(file: PeerFile, run: PeerRun) -> dict[str, Any] | None:
    """Return the load; the schema has none without a length of the prompts."""
    tokens, completed = run.summary["total_input_tokens"], run.summary["completed"]
    if tokens is None or not completed:
        return None
    return {
        "metadata": {"description": _OURS},
        "standardized": {
            "tool": file.tool,
            "tool_version": file.version or "",
            "source": "unknown",
            "input_seq_len": {"distribution": "other", "value": tokens / completed},
            **_known(rate_qps=run.rate or None, concurrency=run.concurrency or None),
        },
        "native": {},
    }


def _aggregate(run: PeerRun) -> dict[str, Any]:
    summary, completed = run.summary, run.summary["completed"]
    counts: dict[str, Any] = {}
    if completed is not None:
        counts = {"total": run.requests, **_known(failures=run.failed)}
        for length, name in _LENGTHS.items():
            if (tokens := summary[name]) is not None and completed:
                counts[length] = {"units": "count", "mean": tokens / completed}
    latencies: dict[str, Any] = {}
    for latency, (name, per) in _NAMES.items():
        values = {key: summary[f"{ours}_{latency}_ms"] for ours, key in _STATISTICS.items()}
        if (part := run.latencies.get(latency)) is not None:
            values |= {key: part.percentile(q) for key, q in _MORE.items()} | {"max": part.max}
        if values["mean"] is not None:  # the schema asks for a mean
            latencies[name] = {"units": f"ms{per}", **_known(**values)}
    rates = {
        rate: {"units": unit, "mean": summary[name]}
        for rate, (name, unit) in _RATES.items()
        if summary[name] is not None
    }
    parts = {"requests": counts, "latency": latencies, "throughput": rates}
    return {name: part for name, part in parts.items() if part}
