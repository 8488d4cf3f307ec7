"""Measurements of another tool, under the names and in the units of ``result.json``.

What a file does not hold is None. Readers take values from files with :func:`figure` and its
siblings, which refuse a value of another type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from batchbench.errors import shown
from batchbench.reports.latency import Latencies
from batchbench.reports.metrics import statistics_of
from batchbench.reports.result import Result
from batchbench.reports.result_file import METRICS
from batchbench.reports.served import server_words
from batchbench.reports.statistics import Distribution, Floats

LATENCIES = ("ttft", "tpot", "itl", "e2el")

STATISTICS = ("mean", "std", "median", "p90", "p99", "p99.9")

Figures = Mapping[str, float | None]


class DamagedError(ValueError):
    """A value of a file is not what its tool writes."""


@dataclass(frozen=True, eq=False)
class PeerRun:
    """One measurement: a load, and its metrics."""

    name: str  # the load, such as ``concurrency=4``; of our own result the strategy
    concurrency: int | None
    rate: float | None  # requests per second that were asked for
    failed: int | None
    summary: Figures  # every metric of a result's summary
    latencies: Mapping[str, Distribution]  # in ms, of single requests or gaps, where there are any

    @property
    def requests(self) -> int | None:
        completed = self.summary["completed"]
        return None if completed is None else int(completed) + (self.failed or 0)


@dataclass(frozen=True, eq=False)
class PeerFile:
    """Everything that is known of a result file; at least one run."""

    tool: str  # such as ``vllm bench serve``
    version: str | None
    model: str | None
    backend: str | None  # the server or the kind of endpoint, as the tool calls it
    created: str | None  # the time that the file names, as it stands there
    runs: Sequence[PeerRun]
    doubts: Sequence[str] = ()  # reasons why our own result is stamped suspect

    @property
    def title(self) -> str:
        return " ".join(word for word in (self.tool, self.version) if word)


def make_run(
    given: Figures,
    latencies: Mapping[str, Floats | Distribution] | None = None,
    *,
    name: str | None = None,
    concurrency: float | None = None,
    rate: float | None = None,
    failed: float | None = None,
) -> PeerRun:
    """Return a run with the statistics of its latencies computed from them, if it has them.

    Args:
        given: metrics that the file holds; NaN counts as missing.
        latencies: in ms, by ``LATENCIES``; values of an array that are not finite are left out.
        name: its load, if that is not rate and concurrency.
    """
    found: dict[str, float | None] = {
        **dict.fromkeys(METRICS),
        **{key: v for key, v in given.items() if v is not None and math.isfinite(v)},
    }
    parts = {
        key: Distribution.of(v[np.isfinite(v)]) if isinstance(v, np.ndarray) else v
        for key, v in (latencies or {}).items()
    }
    parts = {key: part for key, part in parts.items() if part.count}
    for key, part in parts.items():
        found |= statistics_of(key, part)
    named = {"rate": rate, "concurrency": concurrency}
    load = ",".join(f"{key}={value:g}" for key, value in named.items() if value is not None)
    whole = [None if value is None else int(value) for value in (concurrency, failed)]
    return PeerRun(name or load or "load-unknown", whole[0], rate, whole[1], found, parts)


def of_result(result: Result) -> PeerFile:
    """Return our own result as another tool's: a run per strategy, latencies pooled over trials."""
    data = result.data
    workload, server, serving = data["workload"], data.get("server"), data["config"]["serving"]
    rate = data["config"]["workload"].get("request_rate")
    # Slots of our own engine do not limit the requests that a timetable sends.
    limit = serving["batch_size"] if server or rate is None else None
    runs = []
    for name, trials in result.recordings.items():
        latencies, summary = Latencies.of(*trials), cast(Any, data["strategies"][name]["summary"])
        run = make_run(
            summary,
            {key: getattr(latencies, key) for key in LATENCIES},
            name=result.label(name),
            concurrency=workload["max_concurrency"] or limit,
            rate=rate,
            failed=workload["num_requests"] - summary["completed"],
        )
        runs.append(run)
    engine = "simulated" if data["simulated"] else f"{serving['engine']} engine"
    backend = server_words(server) if server else engine
    version, doubts = data["batchbench_version"], data["validity"]["reasons"]
    model, created = data["model"]["name"], data["created_at"]
    return PeerFile("batchbench", version, model, backend, created, runs, doubts)


# Values of a file


def at(data: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices; None if there is none."""
    for i, key in enumerate(path):
        if data is None:
            return None
        if isinstance(key, int) and isinstance(data, list):
            data = data[key] if key < len(data) else None
        elif isinstance(key, str) and isinstance(data, dict):
            data = data.get(key)
        else:
            raise _wrong(path[:i], data, "a list" if isinstance(key, int) else "an object")
    return data


def figure(data: Any, *path: str | int) -> float | None:
    """Return a number of at least 0; None if it is missing, null, NaN or infinite."""
    value = at(data, *path)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise _wrong(path, value, "a number of at least 0")
    return value


def text(data: Any, *path: str | int) -> str | None:
    """Return a text; None if it is missing or empty."""
    value = at(data, *path)
    if value is not None and not isinstance(value, str):
        raise _wrong(path, value, "a text")
    return value or None


def items(data: Any, *path: str | int) -> list[Any] | None:
    value = at(data, *path)
    if value is not None and not isinstance(value, list):
        raise _wrong(path, value, "a list")
    return value


def statistics(
    data: Any, latency: str, paths: Mapping[str, tuple[str, ...]], scale: float = 1.0
) -> Figures:
    """Return the statistics of a latency under our names; ``scale`` gives milliseconds."""
    values = {key: figure(data, *path) for key, path in paths.items()}
    return {
        f"{key}_{latency}_ms": None if value is None else value * scale
        for key, value in values.items()
    }


def series(values: Iterable[Any], name: str) -> Floats:
    """Return numbers as an array, with NaN for null."""
    try:
        numbers = [figure(value) for value in values]
    except DamagedError as error:
        raise DamagedError(f"{name}: {error}") from error
    return np.array([math.nan if v is None else v for v in numbers], np.float64)


def needed(value: float | None, name: str) -> float:
    if value is None:
        raise DamagedError(f"{name} is missing")
    return value


def _wrong(path: Sequence[str | int], value: Any, rule: str) -> DamagedError:
    place = ".".join(map(str, path)) or "a value"
    kinds: dict[type, str] = {list: "a list", dict: "an object"}
    kind = kinds.get(type(value)) or shown(repr(value), 40)
    return DamagedError(f"{place} is {kind}; it must be {rule}")
