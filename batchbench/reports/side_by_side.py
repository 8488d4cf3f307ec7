"""Several results side by side: the settings in which they differ, and their metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batchbench.errors import shown
from batchbench.reports.result import Result, ratio_of
from batchbench.reports.result_data import metric
from batchbench.reports.text import number, spell_ratio, spell_setting

_SETTINGS = ("batchbench_version", "simulated", "config", "environment", "model", "workload")
"""Parts of a result that hold its options and its machine."""

_OBSERVED = (
    *("model.note", "environment.gpu_clock_mhz", "model.weight_bytes"),
    *("model.packed_weight_bytes", "model.kv_cache_bytes", "workload.total_input_tokens"),
    *("workload.total_output_tokens", "workload.arrival_rate", "workload.output_lengths"),
    *("config.preset", "workload.name"),
)
"""Settings that vary by themselves, or repeat other settings in words."""

FIGURES = (
    ("Duration (s)", "duration"),
    ("Output tok/s", "output_throughput"),
    ("TTFT p99 (ms)", "p99_ttft_ms"),
    ("ITL p99 (ms)", "p99_itl_ms"),
    ("E2E p99 (ms)", "p99_e2el_ms"),
)

HEAD = ("Result", "Strategy", "Speed-up", *(name for name, _ in FIGURES), "Run")


@dataclass(frozen=True, eq=False)
class Labelled:
    label: str
    result: Result


def label_results(folders: Sequence[Path], results: Sequence[Result]) -> list[Labelled]:
    return [Labelled(label, r) for label, r in zip(labels_of(folders), results, strict=True)]


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Name each result by the shortest end of its path that no other has."""
    paths = [folder.resolve().parts for folder in folders]
    labels = [path[-1] if path else "/" for path in paths]
    depth = 1
    while len(set(labels)) < len(labels) and depth < max(map(len, paths)):
        depth += 1
        labels = ["/".join(path[-depth:]) for path in paths]
    return [shown(label, 255) for label in labels]


@dataclass(frozen=True, eq=False)
class SideBySide:
    shown: Sequence[Labelled]

    @property
    def labels(self) -> list[str]:
        return [one.label for one in self.shown]

    @cached_property
    def settings(self) -> list[list[str]]:
        """Settings that vary: the name, and each result's value as text."""
        results: list[Any] = [one.result.data for one in self.shown]
        flat = [
            {name: value for part in _SETTINGS for name, value in flat_settings(part, data[part])}
            for data in results
        ]
        names = dict.fromkeys(name for facts in flat for name in facts)
        columns = {name: [facts.get(name) for facts in flat] for name in names}
        return [
            [spell_name(name), *map(_shorten, values)]
            for name, values in columns.items()
            if any(value != values[0] for value in values) and not name.startswith(_OBSERVED)
        ]

    @cached_property
    def rows(self) -> list[list[str]]:
        """One row per result and strategy, under ``HEAD``."""
        return [row for one in self.shown for row in _rows(one)]

    @cached_property
    def sentence(self) -> str:
        """The highest throughput, and reasons not to compare the results."""
        most, label, strategy = max(
            (strategy["summary"]["output_throughput"], one.label, one.result.label(name))
            for one in self.shown
            for name, strategy in one.result.data["strategies"].items()
        )
        text = (
            f"{len(self.shown)} results side by side: {strategy} in {label} had the highest output "
            f"throughput ({number(most)} tok/s)"
        )
        data = [one.result.data for one in self.shown]
        if len({result["workload"]["digest"] for result in data}) > 1:
            sizes = {result["config"]["serving"]["batch_size"] for result in data}
            default = len(sizes) > 1 and not any(
                result["config"]["workload"].get(name) is not None
                for result in data
                for name in ("long_every", "output_tokens", "trace")
            )
            why = " (--long-every is --batch-size unless it is given)" if default else ""
            text += f"; their workloads differ{why}, so compare speed-ups rather than times"
        if len({result["simulated"] for result in data}) > 1:
            text += "; some are simulated, so their times are not measurements"
        return f"{text}."


def flat_settings(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from flat_settings(f"{name}.{key}", inner)


def spell_name(name: str) -> str:
    """Return ``config.serving.batch_size`` in words, without its part."""
    *before, last = name.split(".")
    if last == "name" or (before and before[0] == "workload"):
        last = f"{before[-1]} {last}"
    if before == ["model"] and last in ("dtype", "device"):
        last = f"{last} used"
    return last.replace("_", " ")


def _shorten(value: Any) -> str:
    text = spell_setting(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]  # the beginning of a digest is enough to tell it from others
    return text if len(text) <= 80 else f"{text[:79]}…"


def _rows(one: Labelled) -> Iterator[list[str]]:
    data, (baseline, *_) = one.result.data, one.result.names
    for name, strategy in data["strategies"].items():
        speedup = "baseline"
        if name != baseline:
            speedup = spell_ratio(ratio_of(data["strategies"], "duration", baseline, name))
        figures = [number(metric(strategy["summary"], key)) for _, key in FIGURES]
        status = data["validity"]["status"]
        yield [one.label, one.result.label(name), speedup, *figures, status]
