"""Where more slots stop paying: one workload at many batch sizes, on fitted costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from batchbench.batching.experiment import ServingSpec
from batchbench.batching.recording import Recording
from batchbench.errors import UsageError
from batchbench.reports import metrics
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
from batchbench.reports.text import called, clean_text
from batchbench.studies.predict.teacher import Teacher, read_spec
from batchbench.version import __version__
from batchbench.workloads import Workload

SCHEMA_VERSION = 1

PAYS, STILL_PAYS = 0.05, 0.10
"""More slots stop paying at this share below the best throughput; where the last doubling of them
brings more than the other, the best is not among the batch sizes."""

BATCHES = 8
"""Requests that are all there at the start fill the largest batch so many times at least: with
fewer, the beginning and the end would be most of what is shown."""


@dataclass(frozen=True)
class Point:
    """What one strategy would do with so many slots."""

    strategy: str
    batch_size: int
    duration: float
    output_throughput: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float | None
    p99_e2el_ms: float
    seen: bool  # no step goes beyond what the fit saw
    measured: bool  # the batch size of the run itself
    beyond: tuple[str, ...]  # in what it does


@dataclass(frozen=True, eq=False)
class Curve:
    """Predictions of all batch sizes."""

    teacher: Teacher
    points: Sequence[Point]
    requests: int
    closed: bool

    @property
    def strategies(self) -> list[str]:
        """Names, the baseline first."""
        return list(dict.fromkeys(p.strategy for p in self.points))

    @property
    def title(self) -> str:
        """Model, device and workload in a line."""
        return f"{self.teacher.place} · {self.requests:,} requests · predicted"

    def of(self, strategy: str) -> list[Point]:
        """The points of a strategy, by batch size."""
        return sorted(
            (p for p in self.points if p.strategy == strategy), key=lambda p: p.batch_size
        )

    def enough(self, strategy: str) -> Point:
        """The fewest slots with nearly all of the throughput that any number of them has."""
        points = self.of(strategy)
        most = max(p.output_throughput for p in points)
        return next(p for p in points if p.output_throughput >= (1 - PAYS) * most)

    def last_doubling(self, strategy: str) -> tuple[int, int, float] | None:
        """The last doubling of the slots: from, to, and the throughput that it adds, as a share."""
        points = self.of(strategy)
        last = points[-1]
        half = [p for p in points if 2 * p.batch_size <= last.batch_size]
        if not half:
            return None
        gain = last.output_throughput / half[-1].output_throughput - 1
        return half[-1].batch_size, last.batch_size, gain


def predict_slots(teacher: Teacher, sizes: Sequence[int], queue_size: int | None) -> Curve:
    """Serve the result's workload with each number of slots.

    Raises:
        UsageError: a batch size that the other settings do not take, or texts that end early.
    """
    config = teacher.result.data["config"]
    if config["workload"]["stop_at_eos"]:
        raise UsageError(
            f"{teacher.known.source}: its texts end as the model likes (--stop-at-eos), which no "
            "prediction knows; give a result without"
        )
    serving = read_spec(ServingSpec, config["serving"])
    workload = recorded_workload(teacher, queue_size, BATCHES * max(sizes))
    points = []
    for size in sizes:
        told = predict(teacher.known, replace(serving, batch_size=size), workload)
        points += [_point(recording, size, teacher, serving.batch_size) for recording in told]
    return Curve(teacher, points, len(workload), workload.closed)


def _point(recording: Recording, size: int, teacher: Teacher, measured: int) -> Point:
    found = metrics.trial_summary(recording)
    outside = tuple(beyond(teacher.known, [recording]))
    names = ("duration", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
    told: dict[str, Any] = {name: metric(found, name) for name in (*names, "p99_e2el_ms")}
    return Point(
        strategy=recording.header.strategy,
        batch_size=size,
        seen=not outside,
        measured=size == measured,
        beyond=outside,
        **told,
    )


def recorded_workload(teacher: Teacher, queue_size: int | None, at_least: int) -> Workload:
    """The requests of a result again, in turn until there are enough of them.

    Prompts are not in a recording; their lengths and times are, and no step costs more for words.
    Requests that came over time come once: how they would go on is not known.
    """
    first = next(iter(teacher.result.recordings.values()))[0].requests
    told = teacher.result.data
    loop = told["config"]["workload"].get("max_concurrency")
    closed = told["workload"]["closed"] or loop is not None
    count = len(first.due_ns)
    if closed:
        count = queue_size or max(count, at_least)
    elif queue_size is not None:
        count = min(count, queue_size)
    which = np.arange(count) % len(first.due_ns)
    prompts = first.prompt_tokens[which]
    return Workload(
        name=told["workload"]["name"],
        seed=told["workload"]["seed"],
        prompt_ids=np.zeros(int(prompts.sum()), np.int32),
        prompt_offsets=np.concatenate([[0], np.cumsum(prompts)]),
        output_tokens=first.output_tokens[which],
        due_ns=np.zeros(count, np.int64) if closed else first.due_ns[which],
        max_concurrency=loop,
    )


def sentence(curve: Curve) -> str:
    """Where more slots stop paying, strategy by strategy."""
    parts = []
    for name in curve.strategies:
        enough, doubling = curve.enough(name), curve.last_doubling(name)
        slots = f"{enough.batch_size:,} slot{'s' * (enough.batch_size != 1)}"
        text = f"{name} has {1 - PAYS:.0%} of its best throughput with {slots}"
        if doubling and doubling[2] > STILL_PAYS:
            text += f" and still gains {doubling[2]:.0%} from {doubling[0]:,} to {doubling[1]:,}"
        parts.append(text)
    text = "; ".join(parts)
    far = [p for p in curve.points if not p.seen]
    if far:
        first = min(p.batch_size for p in far)
        text += f"; from batch size {first:,} on this goes beyond what the fit saw"
    return f"predicted: {text}."


def headline(curve: Curve) -> str:
    """The last strategy's part, for the picture."""
    name = curve.strategies[-1]
    enough, doubling = curve.enough(name).batch_size, curve.last_doubling(name)
    text = (
        f"{called(name)} has {1 - PAYS:.0%} of its best throughput with {enough:,} "
        f"slot{'s' * (enough != 1)}"
    )
    if doubling is None:
        return text
    return f"{text}; from {doubling[0]:,} to {doubling[1]:,} slots it gains {doubling[2]:.0%}"


def to_json(curve: Curve, command: str) -> str:
    """``predict.json``."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "requests": curve.requests,
        "cost": curve.teacher.known.as_dict(),
        "held_out": curve.teacher.quality.as_dict(),
        "enough": {name: curve.enough(name).batch_size for name in curve.strategies},
        "last_doubling": {name: curve.last_doubling(name) for name in curve.strategies},
        "points": [asdict(point) for point in curve.points],
    }
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def table_of(curve: Curve) -> pd.DataFrame:
    """A row a strategy and batch size."""
    import pandas as pd

    rows = [asdict(p) | {"beyond": "; ".join(p.beyond)} for p in curve.points]
    return pd.DataFrame(rows)


_PANELS = (
    ("output_throughput", "output tokens/s"),
    ("mean_ttft_ms", "TTFT mean (ms)"),
    ("mean_tpot_ms", "TPOT mean (ms)"),
)


def draw_slots(
    points: pd.DataFrame, enough: Mapping[str, int], headline: str, title: str, measured: int
) -> Figure:
    """Three panels over the batch size.

    Args:
        points: a row a strategy and batch size: ``strategy``, ``batch_size``, ``seen``, metrics.
        enough: by strategy, the fewest slots with nearly all of the throughput.
        measured: the batch size of the run that the costs are from.
    """
    strategies = name_strategies(dict.fromkeys(points["strategy"].unique(), ()))
    notes = (
        "Filled points: every step is like those that the fit saw; hollow ones go beyond them. "
        f"Grey line: the batch size that was run, {measured:,}. Ring: the fewest slots with 95 % "
        "of the best throughput."
    )
    with house_style():
        card = make_card(headline, clean_text(title), 3.3, notes)
        add_line_legend(card, strategies)
        width = (WIDE - 0.62 - 2 * 0.62) / 3
        for i, (metric, label) in enumerate(_PANELS):
            axes = card.axes(0.62 + i * (width + 0.62), 0.42, width, 2.4)
            for strategy in strategies:
                own = points[points["strategy"] == strategy.name].dropna(subset=[metric])
                _line(axes, own.sort_values("batch_size"), metric, strategy, enough, ring=not i)
            axes.axvline(measured, color=QUIET, lw=1, zorder=0.5)
            _finish(axes, points["batch_size"].tolist(), label)
    return card.figure


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    metric: str,
    strategy: Strategy,
    enough: Mapping[str, int],
    *,
    ring: bool,
) -> None:
    look: dict[str, Any] = {**strategy.line, "lw": 1.6}
    axes.plot(rows["batch_size"], rows[metric], gid=f"{metric}-{strategy.index}", **look)
    marks = rows.iloc[_spread(rows["batch_size"].tolist())]
    for seen, fill in ((True, strategy.colour), (False, "#ffffff")):
        some = marks[marks["seen"] == seen]
        axes.plot(
            some["batch_size"],
            some[metric],
            ls="",
            marker="o",
            ms=4.5,
            mfc=fill,
            mec=strategy.colour,
            mew=1.1,
        )
    at = rows[rows["batch_size"] == enough[strategy.name]]
    if ring and len(at):
        axes.plot(at["batch_size"], at[metric], ls="", marker="o", ms=11, mfc="none", mec=INK)


def _spread(sizes: Sequence[int]) -> list[int]:
    """Places of the points that get a mark: no two closer than a seventh of a doubling."""
    kept: list[int] = []
    for i, size in enumerate(sizes):
        if not kept or size / sizes[kept[-1]] >= 1.19:
            kept.append(i)
    return kept


def _finish(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    axes.set_xlabel("batch size (slots)")
    axes.set_title(label, size=9, weight="bold", loc="left", pad=5)
