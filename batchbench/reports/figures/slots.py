"""Where more slots stop paying: throughput and latency over the batch size, as predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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
from batchbench.reports.text import clean_text

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
