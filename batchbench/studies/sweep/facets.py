"""Small multiples: a panel a combination of the options that a picture has no axis for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from batchbench.reports.figures.card import (
    FAINT,
    QUIET,
    WIDE,
    Card,
    Strategy,
    add_line_legend,
    fit_text,
    make_card,
    name_strategies,
    strip_axes,
    text_extent,
)
from batchbench.reports.text import spell_option
from batchbench.studies.sweep.table import Cells

MOST_PANELS = 9
"""More would be stamps."""

_LEFT, _GAP, _HEAD, _FOOT = 0.62, 0.24, 0.3, 0.5  # inches around and between panels


@dataclass(frozen=True, eq=False)
class Facet:
    """One panel's cells."""

    label: str
    rows: pd.DataFrame
    what: str = ""  # what the panel shows, where panels differ in that


def facets_of(cells: Cells, axes: Sequence[str]) -> list[Facet]:
    """The cells by everything that varies and is not one of ``axes``."""
    others = [name for name in cells.varying if name not in axes]
    typical = cells.typical
    if not others:
        return [Facet("", typical)]
    groups = typical.groupby(others, sort=True, dropna=False)
    return [Facet(", ".join(map(spell_option, others, key)), rows) for key, rows in groups]


@dataclass(frozen=True, eq=False)
class Sheet:
    """A card with panels, and the strategies' looks."""

    card: Card
    panels: list[tuple[Facet, Axes]]
    strategies: list[Strategy]
    columns: int

    def outer(self, i: int) -> tuple[bool, bool]:
        """Whether a panel stands at the left, and whether nothing stands below it."""
        return i % self.columns == 0, i + self.columns >= len(self.panels)


def strategies_of(cells: Cells) -> list[Strategy]:
    """The strategies with the looks that they have in every picture."""
    return name_strategies(dict.fromkeys(cells.strategies, ()))


def make_sheet(
    cells: Cells,
    facets: Sequence[Facet],
    headline: str,
    notes: Sequence[str],
    *,
    tall: float = 2.7,
    columns: int | None = None,
    marks: Sequence[tuple[str, int]] = (),
    baseline: bool = True,
) -> Sheet:
    """A card with a panel a facet, a legend of the strategies above them.

    Args:
        tall: inches of a panel that stands alone; several are smaller.
        columns: panels side by side; as many as suit their number if not given.
        marks: markers of percentiles, for the legend.
        baseline: whether the first strategy has a line of its own.
    """
    drawn = facets[: MOST_PANELS - MOST_PANELS % (columns or 1)]
    columns = columns or {1: 1, 2: 2, 4: 2}.get(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    height = tall if len(drawn) == 1 else max(1.45, tall * 0.62)
    label = _HEAD if len(drawn) > 1 else 0.08
    body = 0.3 + rows * (label + height) + (rows - 1) * 0.22 + _FOOT
    told = list(notes)
    if len(facets) > len(drawn):
        told.append(f"{len(drawn)} of {len(facets)} panels are drawn; the table has all.")
    card = make_card(headline, cells.title, body, " ".join(told))
    strategies = strategies_of(cells)
    signs = (
        Line2D([], [], ls="", marker=marker, ms=5.5, color=QUIET, label=f"p{q}")
        for marker, q in marks
    )
    add_line_legend(card, strategies if baseline else strategies[1:], *signs)
    width = (WIDE - _LEFT - (columns - 1) * _GAP) / columns
    panels: list[tuple[Facet, Axes]] = []
    for i, facet in enumerate(drawn):
        left = _LEFT + (i % columns) * (width + _GAP)
        top = 0.3 + (i // columns) * (label + height + 0.22) + label
        axes = card.axes(left, top, width, height)
        if facet.label:
            text = fit_text(facet.label, width * 72, 9, "bold")
            axes.set_title(text, size=9, weight="bold", loc="left", pad=5)
        panels.append((facet, axes))
    return Sheet(card, panels, strategies, columns)


def finish_panels(
    sheet: Sheet, x: Sequence[float], x_label: str, y_label: str, *, log_y: bool = False
) -> None:
    """One scale for all panels, ticks at the values that were asked for, labels at the rim."""
    values = sorted(set(x))
    log_x = _geometric(values)
    for _, axes in sheet.panels:
        if log_x:
            axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
    spans = [axes.get_ylim() for _, axes in sheet.panels]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    for i, (_, axes) in enumerate(sheet.panels):
        axes.set_ylim(low if log_y else 0, high)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=FAINT, lw=0.7)
        strip_axes(axes, "bottom")
        width = axes.get_position().width * sheet.card.figure.get_figwidth() * 72
        ticks = ticks_apart(values, width, log=log_x)
        axes.set_xticks(ticks, [write_tick(value) for value in ticks])
        axes.tick_params(axis="y", length=0)
        at_left, at_bottom = sheet.outer(i)
        if at_bottom:
            axes.set_xlabel(x_label)
        axes.set_ylabel(y_label if at_left else "")
        axes.tick_params(labelleft=at_left)


def _geometric(values: Sequence[float]) -> bool:
    """Whether values stand more evenly on a logarithmic scale."""
    if len(values) < 3 or values[0] <= 0:
        return False
    plain, logs = np.diff(values), np.diff(np.log(values))
    return bool(logs.std() / logs.mean() < plain.std() / plain.mean())


def ticks_apart(values: Sequence[float], width: float, *, log: bool = True) -> list[float]:
    """Those values whose ticks do not run into one another on an axis of ``width`` points."""
    places = np.log(values) if log else np.asarray(values, np.float64)
    scale = width / max(float(places[-1] - places[0]), 1e-12)
    kept = [len(values) - 1]
    for i in range(len(values) - 2, -1, -1):
        room = (
            text_extent(write_tick(values[i]), 9) + text_extent(write_tick(values[kept[-1]]), 9)
        ) / 2
        if (places[kept[-1]] - places[i]) * scale > room + 6:
            kept.append(i)
    return [values[i] for i in reversed(kept)]


def write_tick(value: float) -> str:
    """A number beside an axis."""
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"


def draw_lines(
    axes: Axes,
    rows: pd.DataFrame,
    strategies: Sequence[Strategy],
    x: str,
    y: str,
    scale: float = 1.0,
    **look: Any,
) -> None:
    """A line a strategy over the cells of a panel."""
    for strategy in strategies:
        own = rows[(rows["strategy"] == strategy.name) & rows[y].notna()].sort_values(x)
        if len(own):
            line = {**strategy.line, "marker": "o", "ms": 4.5, "mec": "#ffffff", "mew": 0.6, **look}
            axes.plot(own[x], own[y] * scale, gid=f"{y}-{strategy.index}", **line)
