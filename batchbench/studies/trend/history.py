"""Results over time, read from each ``result.json`` alone and grouped into comparable series."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench import settings
from batchbench.batching.machine import HARDWARE, SOFTWARE, facts_of
from batchbench.errors import UsageError, shown
from batchbench.files import STAGING, reason_of
from batchbench.reports.result_file import read_data, read_time
from batchbench.reports.statistics import paired_ratio
from batchbench.settings import setting
from batchbench.studies.gate import spec as gate

METRICS = ("output_throughput", "speedup", "median_e2el_ms", "p99_itl_ms")
"""Metrics that are analysed by default."""

COMPARED = ("speedup", "efficiency", "step_ratio")
"""Metrics that compare two strategies of one run, so they are in no strategy's summary."""

_HIGHER_IS_BETTER = {
    **{name: metric.higher_is_better for name, metric in gate.METRICS.items()},
    "step_ratio": True,
    "cost_per_million_output_tokens": False,
}

OUTPUTS = "outputs"
"""Name under which the digest of all output tokens stands among the counters."""

Key = tuple[str, str]
"""A metric or counter, and a strategy."""


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric; UsageError for one that is unknown or has none."""
    if metric in _HIGHER_IS_BETTER:
        return _HIGHER_IS_BETTER[metric]
    raise UsageError(
        f"--metric {shown(metric)}: has no better and worse; give output_throughput, speedup, "
        "p99_ttft_ms or another rate, ratio or time of docs/metrics.md"
    )


@dataclass(frozen=True)
class TrendSpec:
    """Options of ``trend``."""

    metric: tuple[str, ...] = setting(
        METRICS,
        "Metric to test: any in a result's summary, or speedup, efficiency or step_ratio. Repeat "
        "for several metrics; more metrics make each test stricter.",
        "History",
        metavar="NAME",
    )
    strategy: tuple[str, ...] = setting(
        (), "Strategy to test; repeat for several.", "History", metavar="NAME", default_text="all"
    )
    last: int = setting(
        200, "Use the newest N results of each series.", "History", min=2, max=10**6
    )
    floor: float = setting(
        2.0,
        "Smallest change that counts, in percent; it must also be significant.",
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
        "Exit with code 1 if the newest change of a series is a loss, or its newest results are "
        "worse than its oldest.",
        "Gate",
    )
    accept: str | None = setting(
        None,
        "Commit (or its first characters) up to which changes are shown but do not fail.",
        "Gate",
        metavar="COMMIT",
        default_text="none",
    )
    strict: bool = setting(
        False, "With --fail-on-loss, exit with code 3 if there are too few results.", "Gate"
    )
    output: Path | None = setting(
        None, "Folder for trend.json and the pictures.", "Output", metavar="DIR"
    )
    markdown: Path | None = setting(
        None,
        "Write the report as Markdown, for a pull request; - is standard output.",
        "Output",
        metavar="FILE",
    )
    json: bool = setting(False, "Print only trend.json.", "Output")
    quiet: bool = setting(False, "Print only a one-line summary.", "Output")

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


@dataclass(frozen=True)
class Value:
    """A metric of one result, with the 95 % interval of its trials if there are enough."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Entry:
    """One result."""

    file: Path
    created: datetime
    commit: str | None
    setup: Mapping[str, Any]  # workload, model and settings, by name; equal within a series
    machine: Mapping[str, Any]  # machine and versions; equal too, and empty for a simulation
    reasons: Sequence[str] = ()  # why it is suspect; none if it is valid
    values: Mapping[Key, Value] = field(default_factory=dict)
    work: Mapping[Key, int | str] = field(default_factory=dict)  # counts and digest, if closed

    @property
    def label(self) -> str:
        """The short commit, or the time if the commit is not known."""
        if self.commit is None:
            return f"{self.created:%Y-%m-%d %H:%M}"
        # git describe gives a tag or a hash; only a hash is cut to its usual length.
        return re.sub(r"^([0-9a-f]{8})[0-9a-f]+(\+?)$", r"\1\2", self.commit)


@dataclass(frozen=True, eq=False)
class Series:
    """A metric of a strategy over the results that have it, oldest first."""

    metric: str
    strategy: str
    entries: Sequence[Entry]

    @cached_property
    def values(self) -> list[Value]:
        return [entry.values[self.metric, self.strategy] for entry in self.entries]

    @cached_property
    def valid(self) -> list[int]:
        """Indexes of the valid entries."""
        return [i for i, entry in enumerate(self.entries) if not entry.reasons]


@dataclass(frozen=True)
class CountChange:
    """A count, or the digest of the outputs, that differs from the result before."""

    counter: str
    strategy: str
    old: int | str
    new: int | str
    before: Entry
    after: Entry


@dataclass(frozen=True, eq=False)
class Line:
    """Results with one workload, configuration and environment, oldest first."""

    entries: Sequence[Entry]
    facts: Mapping[str, Any]  # in which it differs from other lines
    is_current: bool  # it has a result of the newest commit
    dropped: int = 0  # older results that --last left out

    @property
    def caption(self) -> str:
        words = {"None": "none", "True": "yes", "False": "no"}
        parts = [f"{name} {words.get(str(fact), fact)}" for name, fact in self.facts.items()]
        text = " · ".join(parts) or "One workload, configuration and environment"
        return text if self.is_current else f"{text} · ended: no result of the newest commit"

    def series(self, metrics: Sequence[str], strategies: Sequence[str]) -> list[Series]:
        """Return a series of each metric and strategy that any result has."""
        keys = dict.fromkeys(key for entry in self.entries for key in entry.values)
        return [
            Series(*key, [entry for entry in self.entries if key in entry.values])
            for metric in metrics
            for key in keys
            if key[0] == metric and (not strategies or key[1] in strategies)
        ]

    def count_changes(self, strategies: Sequence[str]) -> list[CountChange]:
        """Return every change of a count or of the outputs, in suspect results too."""
        changes = []
        for key in dict.fromkeys(key for entry in self.entries for key in entry.work):
            having = [entry for entry in self.entries if key in entry.work]
            changes += [
                CountChange(*key, a.work[key], b.work[key], a, b)
                for a, b in itertools.pairwise(having)
                if a.work[key] != b.work[key] and (not strategies or key[1] in strategies)
            ]
        place = {id(entry): i for i, entry in enumerate(self.entries)}
        return sorted(changes, key=lambda change: place[id(change.after)])


def find_results(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return every ``result.json`` at any depth once, and a line for each folder without one.

    Raises:
        UsageError: a folder does not exist.
    """
    files: dict[Path, Path] = {}
    without = []
    for folder in folders:
        try:
            if not folder.exists():
                raise UsageError(f"{folder}: no such folder; give folders that hold results")
            candidates = sorted(folder.rglob("result.json")) if folder.is_dir() else [folder]
        except OSError as error:  # its name is too long, or it is not readable
            raise UsageError(f"{folder}: cannot be read: {reason_of(error)}") from error
        # A run that was killed may have left a half-written folder.
        whole = [f for f in candidates if not any(p.startswith(STAGING) for p in f.parts)]
        if not whole:
            without.append(f"{folder}: has no result.json")
        for file in whole:
            files.setdefault(file.resolve(), file)
    return list(files.values()), without


def read_entry(file: Path, metrics: Sequence[str]) -> Entry:
    """Read these metrics of a result.

    The schema is not checked, which would take a hundred times as long as reading: only the parts
    that are used must be there and valid.

    Raises:
        UsageError: it is damaged, of another schema version, or incomplete.
    """
    data = read_data(file)
    try:
        if not data["strategies"]:
            raise ValueError("it has no strategy")
        validity, commit = data["validity"], data["environment"].get("git_commit")
        if validity["status"] not in ("valid", "suspect"):
            raise ValueError(f"validity {validity['status']!r}")
        suspect = ["suspect"] if validity["status"] == "suspect" else []
        return Entry(
            file=file,
            created=read_time(data["created_at"]),
            commit=None if commit is None else str(commit),
            setup=_setup(data),
            machine=_machine(data),
            reasons=[str(reason) for reason in validity["reasons"]] or suspect,
            values=dict(_values(data, metrics)),
            work=dict(_work(data)),
        )
    except KeyError as error:
        raise UsageError(f"{file}: is not a complete result: {error} is missing") from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(f"{file}: is not a complete result: {error}") from error


def _setup(data: Mapping[str, Any]) -> dict[str, Any]:
    model, workload, serving = data["model"], data["workload"], data["config"]["serving"]
    server = data.get("server")
    # Another version of a server is a change to find, not another series.
    of_server = {"server": server["name"], "server slots": server["slots"]} if server else {}
    return {
        "model": model["name"],
        **of_server,
        "weights": model["load_format"],
        "simulated": bool(data["simulated"]),
        "workload": workload["name"],
        "workload digest": str(workload["digest"])[:12],
        "max concurrency": workload["max_concurrency"],
        "strategies": ", ".join(data["strategies"]),
        **{name.replace("_", " "): value for name, value in serving.items() if name != "strategy"},
    }


def _machine(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts on which times depend; a simulation depends on no machine."""
    if data["simulated"]:
        return {}
    facts = facts_of(data["environment"], data["model"])
    facts["python"] = ".".join(str(facts.get("python")).split(".")[:2])
    # A version may choose other kernels or CUDA graphs: a change to find, not another series.
    names = (*HARDWARE, *SOFTWARE, "dtype")
    return {name.replace("_", " "): facts.get(name) for name in names}


def _values(data: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[tuple[Key, Value]]:
    """Yield the metrics that have a value with a logarithm."""
    for metric in metrics:
        if metric in COMPARED:
            for comparison in data["comparisons"]:
                value, bounds = comparison[metric], None
                if metric == "speedup":
                    value, bounds = value["median"], value["ci95"]
                if _is_positive(value):
                    yield (metric, comparison["candidate"]), Value(value, *(bounds or ()))
            continue
        for name, strategy in data["strategies"].items():
            value = strategy["summary"].get(metric)
            if _is_positive(value):
                trials = [trial.get(metric) for trial in strategy["trials"]]
                ratio = paired_ratio(trials, [1.0] * len(trials))
                ends = () if ratio is None else (ratio.low, ratio.high)
                yield (metric, name), Value(value, *ends)


def _is_positive(value: Any) -> bool:
    if value is None:
        return False
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value > 0


def _work(data: Mapping[str, Any]) -> Iterator[tuple[Key, int | str]]:
    """Yield the counts that are exact if no request waits for a time, and float32 outputs."""
    if not data["workload"]["closed"]:
        return
    for name, strategy in data["strategies"].items():
        for counter, count in (strategy["counters"] or {}).items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise ValueError(f"{counter}: {count!r} is not a count")
            yield (counter, name), count
        if strategy["output_digest"] and data["model"]["dtype"] == "float32":
            yield (OUTPUTS, name), str(strategy["output_digest"])[:12]


def make_lines(entries: Sequence[Entry], last: int) -> list[Line]:
    """Group comparable results into lines, current ones first, then the newest.

    Args:
        last: number of the newest results of each line to use.
    """
    ordered = sorted(entries, key=lambda e: (e.created, str(e.file.resolve())))
    groups: dict[str, list[Entry]] = {}
    for entry in ordered:
        key = json.dumps([entry.setup, entry.machine], sort_keys=True, default=str)
        groups.setdefault(key, []).append(entry)
    facts = [{**group[0].setup, **group[0].machine} for group in groups.values()]
    names = dict.fromkeys(name for own in facts for name in own)
    varying = [name for name in names if len({str(own.get(name)) for own in facts}) > 1]
    if "workload" in varying:  # its digest then tells people nothing more
        varying = [name for name in varying if name != "workload digest"]
    newest = ordered[-1]
    lines = []
    for group, own in zip(groups.values(), facts, strict=True):
        commits = {entry.commit for entry in group}
        is_current = group[-1] is newest or (newest.commit is not None and newest.commit in commits)
        named = {name: own[name] for name in varying if name in own}
        lines.append(Line(group[-last:], named, is_current, max(0, len(group) - last)))
    lines.sort(key=lambda line: line.entries[-1].created, reverse=True)
    return sorted(lines, key=lambda line: not line.is_current)
