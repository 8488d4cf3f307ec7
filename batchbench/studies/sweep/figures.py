"""Pictures of a sweep: those that its grid has options for, and the reason why others are missing.

An option that varies and has no axis in a picture gets panels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures import card as cards
from batchbench.reports.slo import parse_slos
from batchbench.reports.text import spell_option
from batchbench.studies.sweep.table import Cells

LOADS = {"request_rate": "load (requests/s)", "max_concurrency": "load (concurrent requests)"}
"""Options that set the load, with the label of an axis of each."""

KNOBS = ("batch_size", "request_rate", "max_concurrency", "max_batched_tokens", "prefill")
"""Options that trade latency for throughput; others change the workload."""

MOST_PANELS = 9
"""Panels of a picture; more would be too small to read."""

MOST_NAMES = 12
"""Points with a name; of more, only the first and the last have one."""


@dataclass(frozen=True, eq=False)
class Facet:
    """Rows of the table that one panel shows."""

    label: str
    rows: pd.DataFrame
    metric: str = ""  # if panels differ in their metric

    def of(self, strategy: cards.Strategy) -> pd.DataFrame:
        return self.rows[self.rows["strategy"] == strategy.name]


@dataclass(frozen=True, eq=False)
class Sheet:
    """A figure with panels that share both axes."""

    figure: Figure
    panels: list[tuple[Facet, Axes]]
    strategies: list[cards.Strategy]
    columns: int

    def label(self, x_label: str, y_label: str) -> None:
        """Label the x-axes that have no panel below them, and the y-axes at the left."""
        for i, (_, axes) in enumerate(self.panels):
            is_lowest = i + self.columns >= len(self.panels)
            axes.tick_params(axis="x", labelbottom=is_lowest)
            axes.set_xlabel(x_label if is_lowest else "")
            axes.set_ylabel("" if i % self.columns else y_label)

    def finish(self, x: pd.Series[Any], x_label: str, y_label: str, *, log_y: bool = False) -> None:
        """Set scales and labels, with ticks at values that were swept."""
        shared, values = self.panels[0][1], sorted(set(x.tolist()))
        log_x = values[0] > 0 and values[-1] >= 4 * values[0]
        if log_x:
            shared.set_xscale("log", base=2)
        if log_y:
            shared.set_yscale("log")
        else:
            shared.set_ylim(bottom=0)
        for facet, axes in self.panels:
            cards.finish_panel(axes, cards.fit_text(facet.label, 500 / self.columns, 9, "bold"))
        ticks = _apart(values, 12 // self.columns, log=log_x)
        shared.set_xticks(ticks, [f"{v:,.0f}" if v >= 1e3 else f"{v:.3g}" for v in ticks])
        self.label(x_label, y_label)


def _apart(values: Sequence[float], most: int, *, log: bool) -> list[float]:
    """Choose the last value, and values before it that are ``1 / most`` of the axis apart."""
    places = np.log(values) if log else np.asarray(values, np.float64)
    step, chosen = 0.99 * (places[-1] - places[0]) / most, [len(values) - 1]
    for i in reversed(range(len(values) - 1)):
        if places[chosen[-1]] - places[i] > step:
            chosen.append(i)
    return [values[i] for i in reversed(chosen)]


def load_of(cells: Cells) -> str | None:
    return next((name for name in LOADS if name in cells.varying), None)


def strategies_of(cells: Cells) -> list[cards.Strategy]:
    """Return the strategies with the colours and dashes that they have in every picture."""
    return cards.name_strategies(dict.fromkeys(cells.strategies, ()))


def facets_of(cells: Cells, axes: Sequence[str]) -> list[Facet]:
    """Group the cells by every option that varies and is not one of ``axes``."""
    others = [name for name in cells.varying if name not in axes]
    if not others:
        return [Facet("", cells.typical)]
    groups = cells.typical.groupby(others, sort=True, dropna=False)
    return [Facet(", ".join(map(spell_option, others, key)), rows) for key, rows in groups]


def make_sheet(
    cells: Cells,
    facets: Sequence[Facet],
    headline: str,
    notes: Sequence[str],
    *,
    tall: float = 2.7,
    columns: int | None = None,
    strategies: Sequence[cards.Strategy] | None = None,
    percentiles: Sequence[Line2D] = (),
) -> Sheet:
    """Make a figure with one panel per facet and a legend of the strategies.

    ``tall`` is the height of a single panel in inches; several are smaller.
    """
    drawn = facets[: MOST_PANELS - MOST_PANELS % (columns or 1)]
    columns = columns or {1: 1, 2: 2, 4: 2}.get(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    height = tall if len(drawn) == 1 else max(1.45, tall * 0.62)
    top = 0.6 if len(drawn) > 1 else 0.38
    if len(facets) > len(drawn):
        notes = [*notes, f"{len(drawn)} of {len(facets)} panels are drawn; the table has all."]
    body = top + rows * (height + 0.52) - 0.02
    card = cards.make_card(headline, cells.title, body, " ".join(notes))
    strategies = list(strategies or strategies_of(cells))
    cards.add_line_legend(card, strategies, *percentiles)
    grid = [axes for row in card.grid((rows, columns), top, height, between=0.52) for axes in row]
    for spare in grid[len(drawn) :]:
        spare.remove()
    return Sheet(card.figure, list(zip(drawn, grid, strict=False)), strategies, columns)


def draw_lines(
    axes: Axes, facet: Facet, strategies: Sequence[cards.Strategy], x: str, y: str, **look: Any
) -> None:
    for strategy in strategies:
        own = facet.of(strategy).dropna(subset=[y]).sort_values(x)
        line = {**strategy.line, "marker": "o", "ms": 4.5, "mec": "#ffffff", "mew": 0.6, **look}
        axes.plot(own[x], own[y], gid=f"{y}-{strategy.index}", **line)


def _rate(cells: Cells) -> tuple[float, str]:
    """Return the factor of the throughput's column, and the label of its axis."""
    factor, unit = (UNIT_NS / 1e9, "step") if cells.simulated else (1.0, "s")
    return factor, f"output tokens/{unit}"


# Latency over the load

_LATENCIES = {"ttft": "TTFT: time to first token", "e2el": "E2E latency: time to last token"}

_PERCENTILES = {  # by the beginning of the metric's name
    "median": Line2D([], [], marker="o", ms=4.5, lw=1, color=cards.QUIET, label="p50"),
    "p99": Line2D([], [], marker="D", ms=5.5, lw=2, color=cards.QUIET, label="p99"),
}


def draw_latency_by_load(cells: Cells) -> Figure:
    """Draw p50 and p99 of TTFT and of E2E latency over the load, two panels per combination."""
    load = load_of(cells)
    assert load is not None
    facets = [
        Facet(f"{name.partition(':')[0]} · {facet.label}" if facet.label else name, facet.rows, key)
        for facet in facets_of(cells, [load])
        for key, name in _LATENCIES.items()
    ]
    slos = cells.frame.get("slo")
    limits = {} if slos is None else parse_slos(tuple(str(slos.iloc[0]).split()))
    notes = ["Latency counts from when a request was due."]
    if cells.trials > 1:
        notes.append(f"Percentiles are medians over {cells.trials} trials.")
    if cells.simulated:
        notes.append("Simulated: a step counts as 1 ms.")
    if limits:
        notes.append("Grey line: the limit of --slo.")
    headline, percentiles = cells.answer("wait_ratio"), list(_PERCENTILES.values())
    sheet = make_sheet(cells, facets, headline, notes, columns=2, percentiles=percentiles)
    for facet, axes in sheet.panels:
        for name, line in _PERCENTILES.items():
            look = {"marker": line.get_marker(), "ms": line.get_markersize()}
            look["lw"], metric = line.get_linewidth(), f"{name}_{facet.metric}_ms"
            draw_lines(axes, facet, sheet.strategies, load, metric, **look)
        if facet.metric in limits:
            axes.axhline(limits[facet.metric], color=cards.QUIET, lw=1.4, zorder=1)
    sheet.finish(cells.typical[load], LOADS[load], "milliseconds", log_y=True)
    return sheet.figure


# Throughput over latency


def draw_frontier(cells: Cells) -> Figure:
    """Draw output throughput over latency, with a line through the cells that no other beats."""
    # A larger batch trades the time per output token for throughput. Queueing shows in the p99 of
    # E2E; in simulation no other latency grows.
    metric, x_label = "mean_tpot_ms", "mean time per output token (ms)"
    if load_of(cells) or cells.simulated:
        metric, x_label = "p99_e2el_ms", "E2E latency p99 (ms)"
    knobs = [name for name in cells.varying if name in KNOBS]
    along = load_of(cells) or knobs[0]
    others = [knob for knob in knobs if knob != along]
    factor, y_label = _rate(cells)
    facets = [
        replace(facet, rows=facet.rows.assign(y=facet.rows["output_throughput"] * factor))
        for facet in facets_of(cells, knobs)
    ]
    facets = [replace(facet, rows=facet.rows.dropna(subset=[metric])) for facet in facets]
    notes = [
        "Up and to the left is better. Dark points: no other cell of the strategy has more "
        f"throughput at as little latency. Thin lines: along {along.replace('_', ' ')}."
    ]
    sheet = make_sheet(cells, facets, cells.answer("speedup"), notes, tall=3.3)
    for facet, axes in sheet.panels:
        axes.set_title(facet.label, size=9, weight="bold", loc="left", pad=5)
        for strategy in sheet.strategies:
            own = facet.of(strategy)
            for values, path in own.groupby(others, sort=False) if others else [((), own)]:
                look: dict[str, Any] = {"lw": 0.9, "marker": "o", "ms": 4, "zorder": 1.5}
                ordered, colour = path.sort_values(along), strategy.tint(0.5)
                axes.plot(ordered[metric], ordered["y"], color=colour, **look)
                if len(facets) == 1:
                    name = ", ".join(map(spell_option, others, values))
                    _name_points(axes, ordered[[metric, "y", along]], name, strategy)
            best = own[beats_all(own, metric)].sort_values(metric)
            look = {**strategy.line, "marker": "o", "ms": 6.5, "mec": "#ffffff", "mew": 0.7}
            axes.plot(best[metric], best["y"], gid=f"frontier-{strategy.index}", **look)
        axes.grid(color=cards.FAINT, lw=0.7)
        cards.strip_axes(axes, "left", "bottom")
    x, shared = cells.typical[metric].dropna(), sheet.panels[0][1]
    if x.min() > 0 and x.max() / x.min() > 10:
        shared.set_xscale("log")
        shared.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        shared.xaxis.set_major_formatter("{x:,.10g}")
        shared.set_xlim(x.min() / 1.3, x.max() * 2)  # room for names
    else:
        shared.set_xlim(0, 1.15 * x.max())  # from 0, so that a difference of 1 % looks small
    shared.set_ylim(bottom=0)
    shared.minorticks_off()
    sheet.label(x_label, y_label)
    return sheet.figure


def _name_points(axes: Axes, path: pd.DataFrame, name: str, strategy: cards.Strategy) -> None:
    """Write a name at the end of a path; without one, the option's values at its points."""
    few = range(len(path)) if len(path) <= MOST_NAMES else (0, -1)
    look: dict[str, Any] = {"size": 8, "color": strategy.tint(-0.2), "annotation_clip": False}
    for i in (-1,) if name else few:
        x, y, value = path.iloc[i]
        text = name or spell_option("", value).strip()
        axes.annotate(text, (x, y), (5, 4), textcoords="offset points", **look)


def beats_all(rows: pd.DataFrame, metric: str) -> pd.Series[bool]:
    """Mark rows; no other has as much throughput at less latency, or more at as little."""
    ranked = rows.sort_values([metric, "output_throughput"], ascending=[True, False])
    before = ranked["output_throughput"].cummax().shift(fill_value=-1.0)
    unbeaten: pd.Series[bool] = (ranked["output_throughput"] > before).reindex(rows.index)
    return unbeaten


# Throughput over the batch size


def draw_throughput_by_batch(cells: Cells) -> Figure:
    """Draw output tokens per second (in simulation: per step) against the batch size."""
    notes = []
    if cells.trials > 1:
        notes.append(
            f"Point: median of {cells.trials} trials; line through it: slowest to fastest trial."
        )
    if cells.share_follows:
        notes.append("One request per batch is long, so the workload differs with the batch size.")
    if cells.simulated:
        notes.append("Simulated: every step costs the same, whatever the batch size.")
    sheet = make_sheet(cells, facets_of(cells, ["batch_size"]), cells.answer("speedup"), notes)
    factor, y_label = _rate(cells)
    column = "output_throughput"
    for facet, axes in sheet.panels:
        scaled = replace(facet, rows=facet.rows.assign(**{column: facet.rows[column] * factor}))
        draw_lines(axes, scaled, sheet.strategies, "batch_size", column)
        trials = cells.frame[cells.frame["cell"].isin(set(facet.rows["cell"]))]
        for strategy in sheet.strategies if cells.trials > 1 else ():
            own = trials[trials["strategy"] == strategy.name]
            ends = own.groupby("batch_size")[column].agg(["min", "max"]) * factor
            axes.vlines(ends.index, ends["min"], ends["max"], color=strategy.colour, lw=1.4)
    sheet.finish(cells.typical["batch_size"], "batch size (slots)", y_label)
    return sheet.figure


# Speed-up over the share of long requests


def draw_speedup_by_share(cells: Cells) -> Figure:
    """Draw the speed-up over the share of long requests, beside the ratio of step counts."""
    notes = [
        "Every step costs the same, so the speed-up is the ratio of step counts."
        if cells.simulated
        else "Coloured: measured durations; grey, dotted: counting steps only.",
        "Share: one in --long-every N requests is long.",
    ]
    if cells.trials >= 3:
        notes.append(f"Whisker: 95 % interval over {cells.trials} pairs of trials.")
    facets = [
        replace(facet, rows=facet.rows.assign(long_share=100 * facet.rows["long_share"]))
        for facet in facets_of(cells, ["long_every"])
    ]
    compared = strategies_of(cells)[1:]
    sheet = make_sheet(cells, facets, cells.answer("speedup"), notes, strategies=compared)
    for facet, axes in sheet.panels:
        axes.axhline(1, color=cards.INK, lw=1.1, ls=":")
        for strategy in compared:
            own = facet.of(strategy)
            low, high = (own[name].astype(float) for name in ("speedup_low", "speedup_high"))
            axes.vlines(own["long_share"], low, high, color=strategy.colour, lw=1.4)
        if not cells.simulated:
            look: dict[str, Any] = {"lw": 1, "ls": ":", "color": cards.QUIET, "marker": ""}
            draw_lines(axes, facet, compared, "long_share", "step_ratio", **look)
        draw_lines(axes, facet, compared, "long_share", "speedup")
    sheet.finish(
        100 * cells.typical["long_share"],
        "share of long requests (%)",
        f"speed-up over {cells.strategies[0]} (×)",
    )
    drawn = pd.concat([facet.rows for facet, _ in sheet.panels])
    top, whisker = drawn[["speedup", "speedup_high"]].astype(float).fillna(0).max()
    # A whisker far beyond the points would leave them no room.
    sheet.panels[0][1].set_ylim(0, max(1.15, 1.08 * top, min(1.03 * whisker, 1.8 * top)))
    return sheet.figure


PICTURES: Mapping[str, Callable[[Cells], Figure]] = {
    "throughput": draw_throughput_by_batch,
    "latency": draw_latency_by_load,
    "speedup": draw_speedup_by_share,
    "frontier": draw_frontier,
}


def draw_sweep(cells: Cells) -> tuple[dict[str, Figure], dict[str, str]]:
    """Return the pictures by name, and for each missing one what the grid would need."""
    missing = {}
    if "batch_size" not in cells.varying:
        missing["throughput"] = "needs several batch sizes, such as --batch-size 1,2,4,8"
    if load_of(cells) is None:
        missing["latency"] = "needs several loads, such as --request-rate 1:16:5"
    if "long_every" not in cells.varying:
        missing["speedup"] = "needs several shares of long requests, such as --long-every 2,4,8"
    elif cells.typical["speedup"].isna().all():
        missing["speedup"] = "needs two strategies in a cell, such as --strategy static,continuous"
    if not any(name in KNOBS for name in cells.varying):
        missing["frontier"] = "needs several batch sizes or loads"
    with cards.house_style():
        figures = {name: draw(cells) for name, draw in PICTURES.items() if name not in missing}
    return figures, missing
