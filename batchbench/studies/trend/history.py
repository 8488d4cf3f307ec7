"""A history: what many results tell over time, each read from its ``result.json`` alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of
from batchbench.reports.result_file import read_data, read_time
from batchbench.reports.statistics import paired_ratio
from batchbench.settings import setting

METRICS = ("output_throughput", "speedup", "median_e2el_ms", "p99_itl_ms")
"""What is looked at unless something else is asked for."""

_HIGHER = (
    "_throughput",
    "_goodput",
    "slo_attainment",
    "floor_share",
    "speedup",
    "efficiency",
    "step_ratio",
)

_LOWER = ("_ms", "duration", "energy_joules", "joules_per_output_token", "cost_per_million")

_COMPARED = ("speedup", "efficiency", "step_ratio")


def is_compared(metric: str) -> bool:
    """Whether a metric is of two strategies of one run, and so of no one's summary."""
    return metric in _COMPARED


def higher_is_better(metric: str) -> bool:
    """Which way is up.

    Raises:
        UsageError: neither way: it counts what was asked, or is no metric of a result.
    """
    if any(part in metric for part in _HIGHER):
        return True
    if any(part in metric for part in _LOWER) and "arrival" not in metric:
        return False
    raise UsageError(
        f"--metric {shown(metric)}: has no better and worse; give output_throughput, speedup, "
        "p99_ttft_ms or another rate, ratio or time of docs/metrics.md"
    )


@dataclass(frozen=True)
class TrendSpec:
    """What is looked at, when a change is one, and where it is told."""

    metric: tuple[str, ...] = setting(
        METRICS,
        "A metric of a result's summary, or speedup, efficiency, step_ratio; may be repeated. The "
        "more are looked at, the more each must show.",
        "History",
        metavar="NAME",
    )
    strategy: tuple[str, ...] = setting(
        (), "Only this strategy's; may be repeated.", "History", metavar="NAME", default_text="all"
    )
    last: int = setting(
        200, "Look at the newest N results of each series.", "History", min=2, max=10**6
    )
    floor: float = setting(
        2.0,
        "Percent that a change must exceed, beside being significant.",
        "History",
        min=0.0,
        max=90.0,
        metavar="PERCENT",
        unit="percent",
    )
    confidence: float = setting(
        0.99,
        "Confidence level required to report a change, over all series together.",
        "History",
        min=0.5,
        max=0.9999,
        unit="share",
    )
    fail_on_loss: bool = setting(
        False,
        "Exit code 1 if the newest change of a series is a loss, or it has lost over its whole "
        "length.",
        "Gate",
    )
    accept: str | None = setting(
        None,
        "Commit (its first letters) up to which all changes are known: they are shown and fail "
        "nothing.",
        "Gate",
        metavar="COMMIT",
        default_text="none",
    )
    strict: bool = setting(
        False, "With --fail-on-loss, exit code 3 where it cannot be told.", "Gate"
    )
    output: Path | None = setting(
        None, "Folder for trend.json and the pictures.", "Output", metavar="DIR"
    )
    markdown: Path | None = setting(
        None,
        "File for a table for a pull request; - is standard output.",
        "Output",
        metavar="FILE",
    )
    json: bool = setting(False, "Print trend.json on standard output, and nothing else.", "Output")
    quiet: bool = setting(False, "Show only the sentence.", "Output")

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.metric:
            raise UsageError("--metric: give at least one, such as output_throughput")
        for metric in self.metric:
            higher_is_better(metric)
        if self.accept is not None and len(self.accept) < 4:
            raise UsageError(
                f"--accept {shown(self.accept)}: give at least 4 letters of the commit"
            )
        if self.json and str(self.markdown) == "-":
            raise UsageError("--json and --markdown -: give one of them")


OUTPUTS = "outputs"
"""The counter, so to say, that holds the digest of all output tokens."""

_PACKAGES = ("torch", "transformers", "numpy")

_MACHINE = ("gpu", "gpu_driver", "cuda", "cpu", "cpu_cores", "threads")

Key = tuple[str, str]
"""Metric or counter, and strategy."""


@dataclass(frozen=True)
class Value:
    """A figure of one result, with the 95 % interval of its trials where there are enough."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Entry:
    """What one result tells.

    Attributes:
        asked: workload, model and settings, by name: what must be equal in one series.
        machine: so must this: machine, number format, versions; empty of a simulation.
        reasons: why it is suspect; none if it is valid.
        work: exact counts, and the digest of the outputs; of closed workloads only.
    """

    file: Path
    created: datetime
    commit: str | None
    asked: Mapping[str, Any]
    machine: Mapping[str, Any]
    reasons: Sequence[str] = ()
    values: Mapping[Key, Value] = field(default_factory=dict)
    work: Mapping[Key, int | str] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        """Whether its times count."""
        return not self.reasons

    @property
    def label(self) -> str:
        """Its commit, or when it was made where that is not known."""
        if self.commit is None:
            return f"{self.created:%Y-%m-%d %H:%M}"
        clean = self.commit.removesuffix("+")
        # As git describes it: a tag is a name, a hash is cut to its usual length.
        is_hash = len(clean) > 8 and all(c in "0123456789abcdef" for c in clean)
        return (clean[:8] if is_hash else clean) + "+" * self.commit.endswith("+")


@dataclass(frozen=True, eq=False)
class Series:
    """A metric of a strategy over the results that have it, oldest first."""

    metric: str
    strategy: str
    entries: Sequence[Entry]

    @cached_property
    def values(self) -> list[Value]:
        """Of each entry."""
        return [entry.values[self.metric, self.strategy] for entry in self.entries]

    @cached_property
    def told(self) -> list[int]:
        """Places of the entries that count."""
        return [i for i, entry in enumerate(self.entries) if entry.is_valid]


@dataclass(frozen=True)
class Recount:
    """A count, or the outputs, that differs from the result before."""

    counter: str
    strategy: str
    old: int | str
    new: int | str
    before: Entry
    after: Entry


@dataclass(frozen=True, eq=False)
class Line:
    """Results of one workload, one configuration and one environment, oldest first.

    Attributes:
        facts: those in which it differs from other lines; only those.
        is_current: whether it goes on: it has a result of the newest commit.
        dropped: older results that ``--last`` left out.
    """

    entries: Sequence[Entry]
    facts: Mapping[str, Any]
    is_current: bool
    dropped: int = 0

    @property
    def caption(self) -> str:
        """What tells it from the others."""
        words = {"None": "none", "True": "yes", "False": "no"}
        spelt = {name: str(value) for name, value in self.facts.items()}
        parts = [f"{name} {words.get(value, value)}" for name, value in spelt.items()]
        told = " · ".join(parts) or "One workload, configuration and environment"
        return told if self.is_current else f"{told} · ended: has no result of the newest commit"

    def series(self, metrics: Sequence[str], strategies: Sequence[str]) -> list[Series]:
        """A series of each metric and strategy that any result has."""
        found = dict.fromkeys(key for entry in self.entries for key in entry.values)
        return [
            Series(*key, [entry for entry in self.entries if key in entry.values])
            for metric in metrics
            for key in found
            if key[0] == metric and (not strategies or key[1] in strategies)
        ]

    def recounts(self, strategies: Sequence[str]) -> list[Recount]:
        """Every change of a count or of the outputs; suspect results count as well."""
        found = []
        for counter, strategy in dict.fromkeys(key for e in self.entries for key in e.work):
            if strategies and strategy not in strategies:
                continue
            key = (counter, strategy)
            having = [entry for entry in self.entries if key in entry.work]
            found += [
                Recount(counter, strategy, a.work[key], b.work[key], a, b)
                for a, b in itertools.pairwise(having)
                if a.work[key] != b.work[key]
            ]
        place = {id(entry): i for i, entry in enumerate(self.entries)}
        return sorted(found, key=lambda recount: place[id(recount.after)])


def find_results(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Every ``result.json`` at any depth, each once; and a line for each folder without.

    Raises:
        UsageError: a folder is not there.
    """
    found: dict[Path, Path] = {}
    without = []
    for folder in folders:
        try:
            if not folder.exists():
                raise UsageError(f"{folder}: no such folder; give folders that hold results")
            files = sorted(folder.rglob("result.json")) if folder.is_dir() else [folder]
        except OSError as error:  # its name is too long, or it is not readable
            raise UsageError(f"{folder}: cannot be read: {reason_of(error)}") from error
        # What a run that was cut off had begun to write is no result.
        files = [f for f in files if not any(p.startswith(".writing-") for p in f.parts)]
        if not files:
            without.append(f"{folder}: holds no result.json")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), without


def read_entry(file: Path, metrics: Sequence[str]) -> Entry:
    """What a result tells of these metrics.

    The schema is not gone through, which would take a hundred times as long as reading: what is
    needed is looked at, and must be there and make sense.

    Raises:
        UsageError: it is torn, of another schema version, or not whole.
    """
    data = read_data(file)
    try:
        return _entry(file, data, metrics)
    except KeyError as error:
        raise UsageError(f"{file}: is not a whole result: {error} is missing") from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(f"{file}: is not a whole result: {error}") from error


def _entry(file: Path, data: Mapping[str, Any], metrics: Sequence[str]) -> Entry:
    strategies, validity = data["strategies"], data["validity"]
    if not strategies:
        raise ValueError("it has no strategy")
    if validity["status"] not in ("valid", "suspect"):
        raise ValueError(f"validity {validity['status']!r}")
    reasons = [str(reason) for reason in validity["reasons"]]
    if validity["status"] == "suspect" and not reasons:
        reasons = ["suspect"]
    values = dict(_values(data, metrics))
    commit = data["environment"].get("git_commit")
    return Entry(
        file=file,
        created=read_time(data["created_at"]),
        commit=None if commit is None else str(commit),
        asked=_asked(data),
        machine=_machine(data),
        reasons=reasons,
        values=values,
        work=dict(_work(data)),
    )


def _asked(data: Mapping[str, Any]) -> dict[str, Any]:
    model, workload, serving = data["model"], data["workload"], data["config"]["serving"]
    return {
        "model": model["name"],
        "weights": model["load_format"],
        "simulated": bool(data["simulated"]),
        "workload": workload["name"],
        "workload digest": str(workload["digest"])[:12],
        "max concurrency": workload["max_concurrency"],
        "strategies": ", ".join(data["strategies"]),
        **{name.replace("_", " "): value for name, value in serving.items() if name != "strategy"},
    }


def _machine(data: Mapping[str, Any]) -> dict[str, Any]:
    """What times depend on. A simulation's depend on no machine, and host names come and go."""
    if data["simulated"]:
        return {}
    found, model = data["environment"], data["model"]
    packages = found.get("packages", {})
    return {
        "device": model["device"],
        "dtype": model["dtype"],
        **{name.replace("_", " "): found.get(name) for name in _MACHINE},
        "python": ".".join(str(found.get("python")).split(".")[:2]),
        **{name: packages.get(name) for name in _PACKAGES},
    }


def _values(data: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[tuple[Key, Value]]:
    for metric in metrics:
        if is_compared(metric):
            for compared in data["comparisons"]:
                told = compared[metric]
                value, interval = (
                    (told["median"], told["ci95"]) if metric == "speedup" else (told, None)
                )
                if _counts(value):
                    ends = [float(end) for end in interval or (None, None) if end is not None]
                    yield (metric, compared["candidate"]), Value(float(value), *ends)
            continue
        for name, strategy in data["strategies"].items():
            value = strategy["summary"].get(metric)
            if _counts(value):
                each = [trial.get(metric) for trial in strategy["trials"]]
                yield (metric, name), Value(float(value), *_interval(each))


def _counts(value: Any) -> bool:
    """Whether there is a value that has a logarithm."""
    if value is None:
        return False
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value > 0


def _interval(trials: Sequence[float | None]) -> tuple[float | None, float | None]:
    ratio = paired_ratio(trials, [1.0] * len(trials))
    return (None, None) if ratio is None else (ratio.low, ratio.high)


def _work(data: Mapping[str, Any]) -> Iterator[tuple[Key, int | str]]:
    """Counts are exact where nobody waits for a clock; outputs in float32."""
    if not data["workload"]["closed"]:
        return
    for name, strategy in data["strategies"].items():
        for counter, count in (strategy["counters"] or {}).items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise ValueError(f"{counter}: {count!r} is no count")
            yield (counter, name), count
        if strategy["output_digest"] and data["model"]["dtype"] == "float32":
            yield (OUTPUTS, name), str(strategy["output_digest"])[:12]


def make_lines(entries: Sequence[Entry], last: int) -> list[Line]:
    """The results in lines of like ones, those that go on first, then the newest.

    Args:
        last: how many of the newest results of each line are kept.
    """
    ordered = sorted(entries, key=lambda e: (e.created, str(e.file.resolve())))
    if not ordered:
        return []
    groups: dict[str, list[Entry]] = {}
    for entry in ordered:
        key = json.dumps([entry.asked, entry.machine], sort_keys=True, default=str)
        groups.setdefault(key, []).append(entry)
    facts = [{**group[0].asked, **group[0].machine} for group in groups.values()]
    names = dict.fromkeys(name for each in facts for name in each)
    varying = [name for name in names if len({str(each.get(name)) for each in facts}) > 1]
    if "workload" in varying:  # then its digest tells nothing more to people
        varying = [name for name in varying if name != "workload digest"]
    newest = ordered[-1]

    def goes_on(group: Sequence[Entry]) -> bool:
        if newest.commit is None:
            return group[-1] is newest
        return any(entry.commit == newest.commit for entry in group)

    lines = [
        Line(
            group[-last:],
            {name: own[name] for name in varying if name in own},
            goes_on(group),
            max(0, len(group) - last),
        )
        for group, own in zip(groups.values(), facts, strict=True)
    ]
    lines.sort(key=lambda line: line.entries[-1].created, reverse=True)
    return sorted(lines, key=lambda line: not line.is_current)
