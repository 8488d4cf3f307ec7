"""Several results side by side: the settings in which they differ, and their figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench.errors import shown
from batchbench.reports.result import Result, ratio_of
from batchbench.reports.text import number, spell_ratio, spell_value

_TOLD_APART = ("batchbench_version", "simulated", "config", "environment", "model", "workload")
"""Parts of a result that say what was asked and met."""

_OBSERVED = (
    "model.note",
    "environment.gpu_clock_mhz",
    "model.weight_bytes",
    "model.packed_weight_bytes",
    "model.kv_cache_bytes",
    "workload.total_input_tokens",
    "workload.total_output_tokens",
    "workload.arrival_rate",
    "workload.output_lengths",
    "config.preset",
    "workload.name",
)
"""What varies by itself, or only repeats in words what other settings say."""

FIGURES = (
    ("Duration (s)", "duration"),
    ("Output tok/s", "output_throughput"),
    ("TTFT p99 (ms)", "p99_ttft_ms"),
    ("ITL p99 (ms)", "p99_itl_ms"),
    ("E2E p99 (ms)", "p99_e2el_ms"),
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A result, and what it is called beside others."""

    label: str
    result: Result


def label_results(folders: Sequence[Path], results: Sequence[Result]) -> list[Labelled]:
    """Each result with the shortest end of its folder's path that no other has."""
    paths = [folder.resolve().parts for folder in folders]
    labels = [path[-1] if path else "/" for path in paths]
    depth = 1
    while len(set(labels)) < len(labels) and depth < max(map(len, paths)):
        depth += 1
        labels = ["/".join(path[-depth:]) for path in paths]
    return [Labelled(shown(label, 255), r) for label, r in zip(labels, results, strict=True)]


@dataclass(frozen=True)
class Line:
    """One strategy of one result, in the table of figures."""

    label: str
    strategy: str
    figures: tuple[str, ...]  # as FIGURES
    speedup: str  # against the result's own baseline
    throughput: float | None
    status: str


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Results beside one another."""

    shown: Sequence[Labelled]

    @property
    def labels(self) -> list[str]:
        """What the results are called."""
        return [one.label for one in self.shown]

    @cached_property
    def settings(self) -> list[tuple[str, list[str]]]:
        """Settings that vary: name, and each result's value as text."""
        flat = [dict(_facts(one.result)) for one in self.shown]
        names = dict.fromkeys(name for facts in flat for name in facts)
        rows = []
        for name in names:
            values = [facts.get(name) for facts in flat]
            if name not in _OBSERVED and any(value != values[0] for value in values):
                rows.append((_spell(name), [_spell_setting(value) for value in values]))
        return rows

    @cached_property
    def lines(self) -> list[Line]:
        """A line a result and strategy."""
        return [line for one in self.shown for line in _lines(one)]

    @cached_property
    def sentence(self) -> str:
        """What the table shows, in a sentence."""
        best = max(self.lines, key=lambda line: line.throughput or 0.0)
        text = (
            f"{len(self.shown)} results side by side: most output tokens a second had "
            f"{best.strategy} in {best.label} ({number(best.throughput)} tok/s)"
        )
        digests = {one.result.data["workload"]["digest"] for one in self.shown}
        if len(digests) > 1:
            text += "; their workloads differ, so compare speed-ups rather than times"
        if len({one.result.data["simulated"] for one in self.shown}) > 1:
            text += "; some are simulated, and their times are no measurements"
        return f"{text}."


def _facts(result: Result) -> Iterator[tuple[str, Any]]:
    for part in _TOLD_APART:
        yield from _flat(part, result.data[part])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner)


def _spell(name: str) -> str:
    """``config.serving.batch_size`` as one says it; where it stood tells nothing more."""
    *before, last = name.split(".")
    if last == "name" or (before and before[0] == "workload"):
        last = f"{before[-1]} {last}"
    if before == ["model"] and last in ("dtype", "device"):
        last = f"{last} used"
    return last.replace("_", " ")


def _spell_setting(value: Any) -> str:
    if value is None:
        return "N/A"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else spell_value(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]  # a digest, of which the beginning tells it from others
    return text if len(text) <= 80 else f"{text[:79]}…"


def _lines(one: Labelled) -> Iterator[Line]:
    result = one.result
    strategies, names = result.data["strategies"], result.names
    for name in names:
        summary = strategies[name]["summary"]
        own = name == names[0]
        ratio = None if own else ratio_of(strategies, "duration", names[0], name)
        yield Line(
            label=one.label,
            strategy=name,
            figures=tuple(number(summary[key]) for _, key in FIGURES),
            speedup="baseline" if own else spell_ratio(ratio),
            throughput=summary["output_throughput"],
            status=result.data["validity"]["status"],
        )
