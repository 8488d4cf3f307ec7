"""The break-even map on a terminal and in JSON: where the border runs, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.figures.card import (
    INK,
    QUIET,
    WIDE,
    Card,
    Floats,
    house_style,
    make_card,
    name_strategies,
    strip_axes,
)
from batchbench.reports.text import clean_text, number
from batchbench.studies.predict.breakeven import ALL, EVEN, METRICS, BreakEven, Place, rows_of
from batchbench.version import __version__

SCHEMA_VERSION = 1

_CALLED = {"throughput": "throughput", "ttft": "TTFT", "goodput": "goodput"}

_STYLES = {"continuous": "blue", "static": "red", "even": "dim"}


def sentence(found: BreakEven) -> str:
    """Who wins how many cells, metric by metric, and whether the real runs agree."""
    total = len(found.places)
    parts = []
    for metric in METRICS:
        wins = found.wins(metric)
        told = f"on {_CALLED[metric]} continuous wins {len(wins['continuous'])} of {total} cells"
        told += f", static {len(wins['static'])}{_most_static(metric, wins['static'])}"
        parts.append(told)
    if found.measured:
        sides = [place.agrees(m) for place in found.measured for m in METRICS]
        count = len(found.measured)
        parts.append(
            f"{sum(map(bool, sides))} of {len(sides)} comparisons in {count} cells run for real "
            "fall on the side that the map says"
        )
    return "; ".join(parts) + "."


def _most_static(metric: str, places: list[Place]) -> str:
    """Where static's lead is largest."""
    known = [p for p in places if p.contests[metric].ratio]
    if not known:
        return ""
    best = min(known, key=lambda p: p.contests[metric].ratio or 1.0)
    ratio = best.contests[metric].ratio
    assert ratio
    return (
        f" (by {1 / ratio:.2f}× at most: batch size {best.batch_size:,}, spread "
        f"{best.spread:g}, {load_of(best.load)})"
    )


def load_of(load: str) -> str:
    """``load 0.9``."""
    return "all there at once" if load == ALL else f"load {float(load):g}"


def title(found: BreakEven) -> str:
    """Model, device and what all cells share, in a line."""
    spec = found.spec
    return (
        f"{found.teacher.place} · outputs of {spec.mean_tokens:,} tokens on average, prompts of "
        f"{spec.prompt_tokens:,} · {spec.batches} × batch size requests"
    )


def notes(found: BreakEven) -> list[str]:
    """What the numbers are."""
    limits = ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in found.limits_ms.items())
    told = [
        "Numbers: how many times better continuous is (throughput and goodput: continuous ÷ "
        "static, TTFT: static ÷ continuous); simulated on fitted step costs.",
        f"Even: within {EVEN:.0%}. Spread: standard deviation ÷ mean of output lengths. Load: "
        "requests offered ÷ what continuous batching can serve.",
        f"Goodput: requests within {limits}.",
    ]
    far = [place for place in found.places if place.beyond]
    if far:
        worst = max(far, key=lambda p: (len(p.beyond), p.batch_size, p.spread))
        told.append(
            f"Beyond what the fit saw in {len(far)} of {len(found.places)} cells, furthest at "
            f"batch size {worst.batch_size:,}, spread {worst.spread:g}: {'; '.join(worst.beyond)}."
        )
    return told


def render(found: BreakEven) -> RenderableType:
    """Sentence, a table a metric, the real runs, notes."""
    shown: list[RenderableType] = [Text(sentence(found), style="bold"), Text()]
    for metric in METRICS:
        shown += [_table(found, metric), Text()]
    if found.measured:
        shown += [_measured(found), Text()]
    return Group(*shown, *(Text(note, style="dim") for note in notes(found)))


def _table(found: BreakEven, metric: str) -> Table:
    """Batch sizes by loads down, spreads to the right, then the border."""
    spec = found.spec
    grid = Table(
        title=f"{_CALLED[metric]}: how many times better continuous is, by spread",
        title_style="bold",
        pad_edge=False,
    )
    grid.add_column("load", no_wrap=True)
    grid.add_column("slots", justify="right")
    for spread in spec.spreads:
        grid.add_column(f"{spread:g}", justify="right", no_wrap=True)
    grid.add_column("continuous\nwins", justify="right", no_wrap=True)
    for load in spec.loads:
        for i, batch in enumerate(spec.batch_sizes):
            cells = []
            for spread in spec.spreads:
                place = found.by_axes[batch, spread, load]
                contest = place.contests[metric]
                text = spell(contest.ratio, contest.winner)
                text += "*" if place.measured is not None else ""
                cells.append(Text(text, style=_STYLES[contest.winner]))
            last = i == len(spec.batch_sizes) - 1
            border = _border(found, metric, batch, load)
            grid.add_row(load if i == 0 else "", f"{batch:,}", *cells, border, end_section=last)
    return grid


def _border(found: BreakEven, metric: str, batch: int, load: str) -> str:
    """From which spread on continuous is better."""
    at = found.border(metric, batch, load)
    if at == found.spec.spreads[0]:
        return "all"
    return "none" if at is None else f"from {at:.2f}"


def spell(ratio: float | None, winner: str) -> str:
    """``1.35``; ∞ where static has nothing, – where neither has."""
    if ratio is None:
        return "∞" if winner == "continuous" else "–"
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:,.0f}"


def _measured(found: BreakEven) -> Table:
    """The cells that were run, predicted beside measured."""
    grid = Table(
        title="* also run: how many times better continuous is",
        title_style="bold",
        pad_edge=False,
    )
    for name in ("load", "slots", "spread", "metric", "map", "run", "error", "same side"):
        grid.add_column(name, justify="left" if name == "metric" else "right")
    for place in found.measured:
        assert place.measured is not None
        for i, metric in enumerate(METRICS):
            told, real, error = (
                place.contests[metric],
                place.measured[metric],
                place.error(metric),
            )
            where = [place.load, f"{place.batch_size:,}", f"{place.spread:g}"]
            grid.add_row(
                *(where if i == 0 else ["", "", ""]),
                _CALLED[metric],
                spell(told.ratio, told.winner),
                spell(real.ratio, real.winner),
                "N/A" if error is None else f"{error:+.1%}",
                "yes" if place.agrees(metric) else "NO",
                end_section=i == len(METRICS) - 1,
            )
    return grid


def to_json(found: BreakEven, command: str) -> str:
    """``breakeven.json``."""
    spec = found.spec
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "sentence": sentence(found),
        "axes": {
            "batch_size": spec.batch_sizes,
            "spread": spec.spreads,
            "load": spec.loads,
        },
        "mean_tokens": spec.mean_tokens,
        "prompt_tokens": spec.prompt_tokens,
        "limits_ms": dict(found.limits_ms),
        "even_within": EVEN,
        "cost": found.teacher.known.as_dict(),
        "held_out": found.teacher.quality.as_dict(),
        "borders": [
            {
                "metric": metric,
                "batch_size": batch,
                "load": load,
                "spread": found.border(metric, batch, load),
            }
            for metric in METRICS
            for load in spec.loads
            for batch in spec.batch_sizes
        ],
        "cells": list(rows_of(found)),
    }
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def headline(found: BreakEven) -> str:
    """For the picture: the range of the advantage, and whether static ever wins."""
    ratios = [p.contests["throughput"].ratio for p in found.places]
    known = [ratio for ratio in ratios if ratio and math.isfinite(ratio)]
    static = sum(len(found.wins(metric)["static"]) for metric in METRICS)
    total = len(found.places) * len(METRICS)
    won = sum(len(found.wins(metric)["continuous"]) for metric in METRICS)
    return (
        f"Continuous batching wins {won} of {total} comparisons, static {static}; throughput is "
        f"{number(min(known))}× to {number(max(known))}×"
    )


NAMES: Mapping[str, str] = {
    "throughput": "Throughput",
    "ttft": "TTFT mean",
    "goodput": "Goodput",
}

_MOST = 4.0
"""An advantage of this factor has the deepest colour."""

_LEFT, _GAP = 0.62, 0.16  # inches


def draw_breakeven(frame: pd.DataFrame, headline: str, title: str, notes: Sequence[str]) -> Figure:
    """A row of panels a metric, a panel a load; batch size down, spread to the right.

    Args:
        frame: a row a cell and metric: ``batch_size``, ``spread``, ``load``, ``metric``,
            ``advantage``, ``winner``, ``measured_winner``, ``same_side``.
        notes: what the picture leaves unsaid.
    """
    loads, metrics = list(dict.fromkeys(frame["load"])), list(dict.fromkeys(frame["metric"]))
    sizes, spreads = sorted(frame["batch_size"].unique()), sorted(frame["spread"].unique())
    width = (WIDE - _LEFT - (len(loads) - 1) * _GAP) / len(loads)
    tall = min(0.26 * len(sizes), 2.2)
    row = tall + 0.42
    with house_style():
        told = " ".join(notes)
        card = make_card(headline, clean_text(title), 0.3 + row * len(metrics) + 0.5, told)
        _legend(card, measured=bool(frame["measured_winner"].notna().any()))
        for i, metric in enumerate(metrics):
            for j, load in enumerate(loads):
                top = 0.3 + row * i + 0.34
                axes = card.axes(_LEFT + j * (width + _GAP), top, width, tall)
                cells = frame[(frame["metric"] == metric) & (frame["load"] == load)]
                _panel(axes, cells, sizes, spreads, narrow=width / len(spreads) < 0.3)
                what = "all there at once" if load == "all" else f"load {float(load):g}"
                axes.set_title(
                    f"{NAMES[metric]} · {what}", size=8.5, weight="bold", loc="left", pad=4
                )
                axes.tick_params(length=0, labelleft=j == 0, labelbottom=i == len(metrics) - 1)
                if j == 0:
                    axes.set_ylabel("batch size")
                if i == len(metrics) - 1:
                    axes.set_xlabel("spread of output lengths")
    return card.figure


def _panel(
    axes: Axes, cells: pd.DataFrame, sizes: list[int], spreads: list[float], *, narrow: bool
) -> None:
    """Colours, numbers, border and measured cells of one metric and load."""
    static, continuous = name_strategies({"static": (), "continuous": ()})
    colours = LinearSegmentedColormap.from_list(
        "sides", [static.colour, "#ffffff", continuous.colour]
    )
    heights = np.full((len(sizes), len(spreads)), np.nan)
    for row in cells.to_dict("records"):
        place = sizes.index(row["batch_size"]), spreads.index(row["spread"])
        heights[place] = _height(row["advantage"], str(row["winner"]))
    limit = float(np.log(_MOST))
    axes.pcolormesh(
        np.arange(len(spreads) + 1),
        np.arange(len(sizes) + 1),
        np.clip(heights, -limit, limit),
        cmap=colours,
        norm=TwoSlopeNorm(0, -limit, limit),
        edgecolors="#ffffff",
        lw=0.6,
    )
    for row in cells.to_dict("records"):
        x, y = spreads.index(row["spread"]), sizes.index(row["batch_size"])
        dark = abs(heights[y, x]) > 0.75 * limit
        axes.text(
            x + 0.5,
            y + 0.5,
            _spell(row["advantage"], str(row["winner"])),
            ha="center",
            va="center",
            size=6 if narrow else 7.5,
            color="#ffffff" if dark else INK,
        )
        if pd.notna(row["measured_winner"]):
            look: dict[str, Any] = {"fc": "none", "ec": INK, "lw": 1.8}
            look["ls"] = "solid" if row["same_side"] else (0, (2, 1.2))
            box = Rectangle((x + 0.06, y + 0.08), 0.88, 0.84, zorder=4, **look)
            axes.add_patch(box)
    _draw_border(axes, heights)
    axes.set(xlim=(0, len(spreads)), ylim=(len(sizes), 0))
    axes.set_xticks(np.arange(len(spreads)) + 0.5, [f"{s:g}" for s in spreads])
    axes.set_yticks(np.arange(len(sizes)) + 0.5, [f"{s:,}" for s in sizes])
    strip_axes_keep_ticks(axes)


def strip_axes_keep_ticks(axes: Axes) -> None:
    """No frame; the ticks' own words stay."""
    ticks = [(axis, axis.get_major_formatter()) for axis in (axes.xaxis, axes.yaxis)]
    strip_axes(axes)
    for axis, formatter in ticks:
        axis.set_major_formatter(formatter)


def _height(advantage: float | None, winner: str) -> float:
    """The logarithm of the advantage; beyond any scale where the loser has nothing at all."""
    if advantage is None or pd.isna(advantage):
        return float(np.inf) if winner == "continuous" else 0.0
    return float(np.log(advantage)) if advantage > 0 else float(-np.inf)


def _spell(advantage: float | None, winner: str) -> str:
    if advantage is None or pd.isna(advantage):
        return "∞" if winner == "continuous" else "–"
    return f"{advantage:.2f}" if advantage < 9.95 else f"{advantage:.0f}"


def _draw_border(axes: Axes, heights: Floats) -> None:
    """A line along the edges where one side ends and the other begins.

    Between neighbouring cells of which one is won by continuous batching and the other is not.
    """
    won = heights > np.log1p(0.02)
    rows, columns = won.shape
    look: dict[str, Any] = {"color": INK, "lw": 2.2, "solid_capstyle": "round", "zorder": 3}
    for y in range(rows):
        for x in range(1, columns):
            if won[y, x] != won[y, x - 1]:
                axes.plot([x, x], [y, y + 1], **look)
    for y in range(1, rows):
        for x in range(columns):
            if won[y, x] != won[y - 1, x]:
                axes.plot([x, x + 1], [y, y], **look)


def _legend(card: Card, *, measured: bool) -> None:
    static, continuous = name_strategies({"static": (), "continuous": ()})
    handles: list[Any] = [
        Patch(fc=continuous.tint(0.2), label="continuous better"),
        Patch(fc="#ffffff", ec=QUIET, lw=0.6, label="even"),
        Patch(fc=static.tint(0.2), label="static better"),
        Line2D([], [], color=INK, lw=2.2, label="where continuous stops winning"),
    ]
    if measured:
        handles.append(Patch(fc="none", ec=INK, lw=1.8, label="also run"))
    card.figure.legend(
        handles=handles,
        ncols=len(handles),
        loc="upper left",
        bbox_to_anchor=card.at(0, 0),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.6,
        columnspacing=1.3,
        fontsize=8.5,
    )
