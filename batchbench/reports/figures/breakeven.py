"""The break-even map: who wins where, by how much, and the border between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

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
from batchbench.reports.text import clean_text

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
    _border(axes, heights)
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


def _border(axes: Axes, heights: Floats) -> None:
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
