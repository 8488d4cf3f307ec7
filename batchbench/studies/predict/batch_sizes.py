"""Prediction of other batch sizes: one workload served with each number of slots, simulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.batching.experiment import ServingSpec
from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.reports import metrics
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    QUIET,
    WIDE,
    Strategy,
    add_line_legend,
    house_style,
    make_card,
    name_strategies,
    strip_axes,
)
from batchbench.reports.prediction import beyond, predict
from batchbench.reports.result_file import metric
from batchbench.reports.text import called, clean_text, joined, number, percent, plural
from batchbench.studies.predict.fitted import FittedRun
from batchbench.version import __version__
from batchbench.workloads import Workload

SCHEMA_VERSION = 1

NEARLY_ALL = 0.95
"""Share of the best throughput with which a batch size suffices."""

STILL_GAINS = 0.10
"""Gain of the last doubling of slots above which the best lies at the edge of the range."""

BATCHES = 8
"""Batches of requests at the largest batch size, at least, if all are there at the start.

With fewer, most of the time would be the beginning and the end.
"""

MOST_ROWS = 14
"""Batch sizes that a terminal shows; predict.csv has all."""


@dataclass(frozen=True)
class Point:
    """Prediction of one strategy with one number of slots."""

    strategy: str
    batch_size: int
    duration: float
    output_throughput: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float | None
    p99_e2el_ms: float
    seen: bool  # no step goes beyond the fitted ones
    measured: bool  # the batch size of the run itself
    beyond: tuple[str, ...]  # in which respects a step does


@dataclass(frozen=True, eq=False)
class Curve:
    """Predictions for all batch sizes."""

    fitted: FittedRun
    points: Sequence[Point]
    requests: int
    closed: bool

    @property
    def strategies(self) -> list[str]:
        """Names, the baseline first."""
        return list(dict.fromkeys(p.strategy for p in self.points))

    @property
    def title(self) -> str:
        return f"{self.fitted.place} · {self.requests:,} requests · predicted"

    @property
    def measured(self) -> int:
        """The batch size of the run that the costs are from."""
        return int(self.fitted.result.data["config"]["serving"]["batch_size"])

    def of(self, strategy: str) -> list[Point]:
        """Return the points of a strategy, by batch size."""
        return sorted(
            (p for p in self.points if p.strategy == strategy), key=lambda p: p.batch_size
        )

    def sufficient(self, strategy: str) -> int:
        """Return the fewest slots with nearly all of the best throughput."""
        points = self.of(strategy)
        most = max(p.output_throughput for p in points)
        return next(p.batch_size for p in points if p.output_throughput >= NEARLY_ALL * most)

    def last_doubling(self, strategy: str) -> tuple[int, int, float] | None:
        """Return the last doubling of slots and the throughput that it adds, as a share."""
        points = self.of(strategy)
        last = points[-1]
        half = [p for p in points if 2 * p.batch_size <= last.batch_size]
        if not half:
            return None
        gain = last.output_throughput / half[-1].output_throughput - 1
        return half[-1].batch_size, last.batch_size, gain


def predict_slots(fitted: FittedRun, sizes: Sequence[int], queue_size: int | None) -> Curve:
    """Serve the result's workload with each number of slots.

    Raises:
        UsageError: the other settings exclude a batch size, or texts end early.
    """
    config = fitted.result.data["config"]
    if config["workload"]["stop_at_eos"]:
        raise UsageError(
            f"{fitted.known.source}: its texts end where the model ends them (--stop-at-eos), "
            "which cannot be predicted; give a result without --stop-at-eos"
        )
    serving = settings.from_json(ServingSpec, config["serving"], drop_unknown=True)
    workload = recorded_workload(fitted, queue_size, BATCHES * max(sizes))
    points = [
        _point(recording, size, fitted, serving.batch_size)
        for size in sizes
        for recording in predict(fitted.known, replace(serving, batch_size=size), workload)
    ]
    return Curve(fitted, points, len(workload), workload.closed)


def _point(recording: Recording, size: int, fitted: FittedRun, measured: int) -> Point:
    summary = metrics.trial_summary(recording)
    outside = tuple(beyond(fitted.known, [recording]))
    names = ("duration", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
    values: dict[str, Any] = {name: metric(summary, name) for name in (*names, "p99_e2el_ms")}
    return Point(
        strategy=recording.header.strategy,
        batch_size=size,
        seen=not outside,
        measured=size == measured,
        beyond=outside,
        **values,
    )


def recorded_workload(fitted: FittedRun, queue_size: int | None, at_least: int) -> Workload:
    """Return the requests of a result, repeated in turn until there are enough.

    Prompts are not in a recording; their lengths and times are, which is all that step costs
    depend on. Requests that came over time are not repeated, since later arrivals are unknown.
    """
    first = next(iter(fitted.result.recordings.values()))[0].requests
    data = fitted.result.data
    loop = data["config"]["workload"].get("max_concurrency")
    closed = data["workload"]["closed"] or loop is not None
    count = len(first.due_ns)
    if closed:
        count = queue_size or max(count, at_least)
    elif queue_size is not None:
        count = min(count, queue_size)
    which = np.arange(count) % len(first.due_ns)
    prompts = first.prompt_tokens[which]
    return Workload(
        name=data["workload"]["name"],
        seed=data["workload"]["seed"],
        prompt_ids=np.zeros(int(prompts.sum()), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(prompts)]),
        output_tokens=first.output_tokens[which],
        due_ns=np.zeros(count, np.int64) if closed else first.due_ns[which],
        max_concurrency=loop,
    )


# In words


def sentence(curve: Curve) -> str:
    """Say with how many slots throughput stops growing, by strategy."""
    parts = []
    at_edge: dict[str, tuple[int, int, float]] = {}
    for name in curve.strategies:
        doubling = curve.last_doubling(name)
        slots = plural(curve.sufficient(name), "slot")
        parts.append(f"{name} reaches {NEARLY_ALL:.0%} of its best throughput with {slots}")
        if doubling and doubling[2] > STILL_GAINS:
            parts[-1] += f" (still {doubling[2]:+.0%} from {doubling[0]:,} to {doubling[1]:,})"
            at_edge[name] = doubling
    text = f"predicted: {'; '.join(parts)}."
    if at_edge:
        largest = max(last for _, last, _ in at_edge.values())
        text += (
            f" The best of {joined(list(at_edge))} lies at the edge of the searched range: search "
            f"further, such as --batch-size 1:{2 * largest}."
        )
    far = [p.batch_size for p in curve.points if not p.seen]
    if far:
        text += f" From batch size {min(far):,} on, the prediction goes beyond the measured steps."
    return text


def headline(curve: Curve) -> str:
    """Describe the last strategy, for the picture."""
    name = curve.strategies[-1]
    slots, doubling = plural(curve.sufficient(name), "slot"), curve.last_doubling(name)
    text = f"{called(name)} reaches {NEARLY_ALL:.0%} of its best throughput with {slots}"
    if doubling is None:
        return text
    return f"{text}; from {doubling[0]:,} to {doubling[1]:,} slots it gains {percent(doubling[2])}"


def render(curve: Curve) -> RenderableType:
    """Return the sentence, the table and the quality of the fit."""
    return Group(
        Text(sentence(curve), style="bold"), Text(), _table(curve), Text(), Text(curve.fitted.fit)
    )


def _table(curve: Curve) -> Table:
    """Return batch sizes down, strategies side by side."""
    grid = Table(
        title=curve.title,
        caption="> measured batch size; = 95 % of the best throughput; * beyond the measured steps",
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
    )
    grid.add_column("batch\nsize", justify="right")
    names = curve.strategies
    for label in ("tok/s", "TTFT ms", "TPOT ms"):
        for name in names:
            grid.add_column(f"{label}\n{name}", justify="right", overflow="fold")
    points = {name: {p.batch_size: p for p in curve.of(name)} for name in names}
    sufficient = {curve.sufficient(name) for name in names}
    for size in shown_sizes(sorted(points[names[0]]), {curve.measured, *sufficient}):
        row = [points[name][size] for name in names]
        mark = ">" * (size == curve.measured) + "=" * (size in sufficient)
        mark += "*" * (not all(p.seen for p in row))
        values = [
            number(getattr(p, column))
            for column in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
            for p in row
        ]
        grid.add_row(f"{mark} {size:,}".strip(), *values)
    return grid


def shown_sizes(sizes: Sequence[int], always: set[int]) -> list[int]:
    """Return all sizes if they are few; else some at even ratios, and those of ``always``."""
    if len(sizes) <= MOST_ROWS:
        return list(sizes)
    even = np.geomspace(sizes[0], sizes[-1], MOST_ROWS - 2)
    chosen = {min(sizes, key=lambda size: abs(size - target)) for target in even}
    return sorted(chosen | (always & set(sizes)))


# Files


def write_prediction(folder: Path, curve: Curve, command: str) -> tuple[list[Path], str]:
    """Write ``predict.json``, ``predict.csv`` and the picture; return them and the JSON text."""
    text, figure = to_json(curve, command), draw_slots(curve)
    rows = [asdict(p) | {"beyond": "; ".join(p.beyond)} for p in curve.points]
    contents: dict[str, bytes | str] = {"predict.json": text}
    contents["predict.csv"] = pd.DataFrame(rows).to_csv(index=False)
    contents |= {f"slots.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return write_whole(folder, contents), text


def to_json(curve: Curve, command: str) -> str:
    """Return ``predict.json``."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "requests": curve.requests,
        "cost": curve.fitted.known.as_dict(),
        "held_out": curve.fitted.quality,
        "enough": {name: curve.sufficient(name) for name in curve.strategies},
        "last_doubling": {name: curve.last_doubling(name) for name in curve.strategies},
        "points": [asdict(point) for point in curve.points],
    }
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


# The picture

_PANELS = (
    ("output_throughput", "output tokens/s"),
    ("mean_ttft_ms", "TTFT mean (ms)"),
    ("mean_tpot_ms", "TPOT mean (ms)"),
)

_GAP = 0.62  # inches to the left of each panel


def draw_slots(curve: Curve) -> Figure:
    """Draw throughput, TTFT and TPOT over the batch size."""
    strategies = name_strategies(dict.fromkeys(curve.strategies, ()))
    notes = (
        "Filled points: every step is like the measured ones; hollow points go beyond them. Grey "
        f"line: the measured batch size, {curve.measured:,}. Ring: the fewest slots with 95 % of "
        "the best throughput."
    )
    sizes = sorted({p.batch_size for p in curve.points})
    with house_style():
        card = make_card(headline(curve), clean_text(curve.title), 3.3, notes)
        add_line_legend(card, strategies)
        width = WIDE / len(_PANELS) - _GAP
        for i, (metric, label) in enumerate(_PANELS):
            axes = card.axes(_GAP + i * (width + _GAP), 0.42, width, 2.4)
            for strategy in strategies:
                _draw_line(axes, curve, metric, strategy)
            axes.axvline(curve.measured, color=QUIET, lw=1, zorder=0.5)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlim=(sizes[0] / 1.15, sizes[-1] * 1.15), xlabel="batch size (slots)")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=FAINT, lw=0.7)
            strip_axes(axes, "bottom")
            axes.set_title(label, size=9, weight="bold", loc="left", pad=5)
    return card.figure


def _draw_line(axes: Axes, curve: Curve, metric: str, strategy: Strategy) -> None:
    points = [p for p in curve.of(strategy.name) if getattr(p, metric) is not None]
    values = {p.batch_size: getattr(p, metric) for p in points}
    look: dict[str, Any] = {**strategy.line, "lw": 1.6}
    axes.plot(list(values), list(values.values()), gid=f"{metric}-{strategy.index}", **look)
    marked: list[Point] = []
    for point in points:  # no two marks closer than a quarter of a doubling
        if not marked or point.batch_size / marked[-1].batch_size >= 1.19:
            marked.append(point)
    mark: dict[str, Any] = {"ls": "", "marker": "o"}
    for seen, fill in ((True, strategy.colour), (False, "#ffffff")):
        some = [p.batch_size for p in marked if p.seen is seen]
        outline: dict[str, Any] = {"ms": 4.5, "mfc": fill, "mec": strategy.colour, "mew": 1.1}
        axes.plot(some, [values[size] for size in some], **mark, **outline)
    ring = curve.sufficient(strategy.name)
    if metric == "output_throughput":
        axes.plot([ring], [values[ring]], **mark, ms=11, mfc="none", mec=INK)
