"""The report of predicted batch sizes: sentence, table, ``predict.json`` and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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

from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
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
from batchbench.reports.text import clean_text, joined, number, percent, plural
from batchbench.studies.predict.batch_sizes import NEARLY_ALL, Curve, Point

SCHEMA_VERSION = 1

MOST_ROWS = 14
"""Batch sizes that a terminal shows; predict.csv has all."""


def sentence(curve: Curve) -> str:
    """Return the number of slots at which throughput stops growing, by strategy, in words."""
    text = f"predicted: {'; '.join(_reached(curve, name) for name in curve.strategies)}."
    at_edge = [name for name in curve.strategies if curve.is_at_edge(name)]
    if at_edge:
        largest = max(point.batch_size for point in curve.points)
        text += (
            f" The best of {joined(at_edge)} lies at the edge of the searched range: search "
            f"further, such as --batch-size 1:{2 * largest}."
        )
    far = [p.batch_size for p in curve.points if not p.seen]
    if far:
        text += f" From batch size {min(far):,} on, the prediction goes beyond the measured steps."
    return text


def _reached(curve: Curve, name: str) -> str:
    slots, doubling = plural(curve.sufficient(name), "slot"), curve.last_doubling(name)
    text = f"{name} reaches {NEARLY_ALL:.0%} of its best throughput with {slots}"
    if doubling is None or not curve.is_at_edge(name):
        return text
    first, last, gain = doubling
    return f"{text} (still {percent(gain, 0, '+')} from {first:,} to {last:,})"


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
        **envelope(SCHEMA_VERSION, command),
        "requests": curve.requests,
        "cost": curve.fitted.known.as_dict(),
        "held_out": curve.fitted.quality,
        "enough": {name: curve.sufficient(name) for name in curve.strategies},
        "last_doubling": {name: curve.last_doubling(name) for name in curve.strategies},
        "points": [asdict(point) for point in curve.points],
    }
    return json_text(data)


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
        card = make_card(_reached(curve, curve.strategies[-1]), clean_text(curve.title), 3.3, notes)
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
