"""Pictures of a sweep: those that its grid has options for, and the reason why others are missing.

An option that varies and has no axis in a picture gets panels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    QUIET,
    WIDE,
    Strategy,
    add_line_legend,
    fit_text,
    house_style,
    make_card,
    name_strategies,
    strip_axes,
)
from batchbench.reports.slo import parse_slos
from batchbench.reports.text import spell_option, times
from batchbench.studies.sweep.table import Cells, span_of

LOADS = {"request_rate": "load (requests/s)", "max_concurrency": "load (concurrent requests)"}
"""Options that set the load, with the label of an axis of each."""

KNOBS = ("batch_size", "request_rate", "max_concurrency", "max_batched_tokens", "prefill")
"""Options that trade latency for throughput; others change the workload."""

MOST_PANELS = 9
"""Panels of a picture; more would be too small to read."""

MOST_NAMES = 12
"""Points with a name; of more, only the first and the last have one."""

_LEFT, _GAP, _HEAD, _FOOT, _BETWEEN = 0.62, 0.24, 0.3, 0.5, 0.22  # inches around the panels


@dataclass(frozen=True, eq=False)
class Facet:
    """Rows of the table that one panel shows."""

    label: str
    rows: pd.DataFrame
    metric: str = ""  # if panels differ in their metric


@dataclass(frozen=True, eq=False)
class Sheet:
    """A figure with panels that share both axes."""

    figure: Figure
    panels: list[tuple[Facet, Axes]]
    strategies: list[Strategy]
    columns: int

    def label(self, x_label: str, y_label: str) -> None:
        """Label the x-axes that have no panel below them, and the y-axes at the left."""
        for i, (_, axes) in enumerate(self.panels):
            is_lowest = i + self.columns >= len(self.panels)
            axes.tick_params(axis="x", labelbottom=is_lowest)
            axes.set_xlabel(x_label if is_lowest else "")
            axes.set_ylabel("" if i % self.columns else y_label)


def load_of(cells: Cells) -> str | None:
    """Return the option that varies the load, if there is one."""
    return next((name for name in LOADS if name in cells.varying), None)


def strategies_of(cells: Cells) -> list[Strategy]:
    """Return the strategies with the colours and dashes that they have in every picture."""
    return name_strategies(dict.fromkeys(cells.strategies, ()))


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
    marks: Sequence[tuple[str, int]] = (),
    baseline: bool = True,
) -> Sheet:
    """Make a figure with one panel per facet and a legend of the strategies.

    Args:
        tall: height of a single panel in inches; several are smaller.
        columns: panels in a row; None to choose by their number.
        marks: markers of percentiles, for the legend.
        baseline: whether the first strategy has a line.
    """
    drawn = facets[: MOST_PANELS - MOST_PANELS % (columns or 1)]
    columns = columns or {1: 1, 2: 2, 4: 2}.get(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    height = tall if len(drawn) == 1 else max(1.45, tall * 0.62)
    head = _HEAD if len(drawn) > 1 else 0.08
    body = 0.3 + rows * (head + height) + (rows - 1) * _BETWEEN + _FOOT
    if len(facets) > len(drawn):
        notes = [*notes, f"{len(drawn)} of {len(facets)} panels are drawn; the table has all."]
    card = make_card(headline, cells.title, body, " ".join(notes))
    strategies = strategies_of(cells)
    percentiles = (
        Line2D([], [], ls="", marker=marker, ms=5.5, color=QUIET, label=f"p{q}")
        for marker, q in marks
    )
    add_line_legend(card, strategies if baseline else strategies[1:], *percentiles)
    (left, top), (right, bottom) = card.at(_LEFT, 0.3 + head), card.at(WIDE, body - _FOOT)
    width = (WIDE - _LEFT - (columns - 1) * _GAP) / columns
    area = {"left": left, "top": top, "right": right, "bottom": bottom}
    gaps = {"wspace": _GAP / width, "hspace": (head + _BETWEEN) / height}
    grid = card.figure.add_gridspec(rows, columns, **area, **gaps)
    every: list[Axes] = grid.subplots(sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for spare in every[len(drawn) :]:
        spare.remove()
    panels = list(zip(drawn, every, strict=False))
    for facet, axes in panels:
        label = fit_text(facet.label, width * 72, 9, "bold")
        axes.set_title(label, size=9, weight="bold", loc="left", pad=5)
    return Sheet(card.figure, panels, strategies, columns)


def finish_panels(
    sheet: Sheet, x: Sequence[float], x_label: str, y_label: str, *, log_y: bool = False
) -> None:
    """Set scales and labels, with ticks at the values that were swept."""
    shared, values = sheet.panels[0][1], sorted(set(x))
    log_x = _is_geometric(values)
    if log_x:
        shared.set_xscale("log", base=2)
    if log_y:
        shared.set_yscale("log")
    else:
        shared.set_ylim(bottom=0)
    for _, axes in sheet.panels:
        strip_axes(axes, "bottom")
        axes.grid(axis="y", color=FAINT, lw=0.7)
        axes.tick_params(axis="y", length=0)
    for axis in (shared.xaxis, shared.yaxis):
        axis.set_minor_locator(NullLocator())
    width = shared.get_position().width * sheet.figure.get_figwidth() * 72
    ticks = ticks_apart(values, width, log=log_x)
    shared.set_xticks(ticks, [write_tick(value) for value in ticks])
    sheet.label(x_label, y_label)


def _is_geometric(values: Sequence[float]) -> bool:
    """Return True if the values are spaced more evenly on a logarithmic scale."""
    if len(values) < 3 or values[0] <= 0:
        return False
    plain, logs = np.diff(values), np.diff(np.log(values))
    return bool(logs.std() / logs.mean() < plain.std() / plain.mean())


def ticks_apart(values: Sequence[float], width: float, *, log: bool = True) -> list[float]:
    """Choose values whose tick labels do not overlap on an axis of ``width`` points."""
    places = np.log(values) if log else np.asarray(values, np.float64)
    per_point = max(float(places[-1] - places[0]), 1e-12) / width
    chosen = [len(values) - 1]
    for i in range(len(values) - 2, -1, -1):
        letters = len(write_tick(values[i])) + len(write_tick(values[chosen[-1]]))
        room = 6 + 3 * letters  # points; half of both labels, of 6 points a letter
        if places[chosen[-1]] - places[i] > room * per_point:
            chosen.append(i)
    return [values[i] for i in reversed(chosen)]


def write_tick(value: float) -> str:
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
    """Draw one line per strategy over the cells of a panel."""
    for strategy in strategies:
        own = rows[(rows["strategy"] == strategy.name) & rows[y].notna()].sort_values(x)
        if len(own):
            line = {**strategy.line, "marker": "o", "ms": 4.5, "mec": "#ffffff", "mew": 0.6, **look}
            axes.plot(own[x], own[y] * scale, gid=f"{y}-{strategy.index}", **line)


# Latency over the load

_PERCENTILES = (("o", 50, 4.5, 1), ("D", 99, 5.5, 2))  # marker, percentile, its size, line width


def draw_latency_by_load(cells: Cells) -> Figure:
    """Draw p50 and p99 of TTFT and of E2E latency over the load, two panels per combination."""
    load = load_of(cells)
    assert load is not None
    latencies = {"ttft": "TTFT: time to first token", "e2el": "E2E latency: time to last token"}
    facets = [
        Facet(f"{name.partition(':')[0]} · {facet.label}" if facet.label else name, facet.rows, key)
        for facet in facets_of(cells, [load])
        for key, name in latencies.items()
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
    marks = [(marker, q) for marker, q, *_ in _PERCENTILES]
    sheet = make_sheet(cells, facets, cells.answer("wait_ratio"), notes, columns=2, marks=marks)
    for facet, axes in sheet.panels:
        for marker, q, size, width in _PERCENTILES:
            metric = f"{'median' if q == 50 else f'p{q}'}_{facet.metric}_ms"
            look: dict[str, Any] = {"marker": marker, "ms": size, "lw": width}
            draw_lines(axes, facet.rows, sheet.strategies, load, metric, **look)
        if facet.metric in limits:
            axes.axhline(limits[facet.metric], color=QUIET, lw=1.4, zorder=1)
    loads = cells.typical[load].tolist()
    finish_panels(sheet, loads, LOADS[load], "milliseconds", log_y=True)
    return sheet.figure


# Throughput over latency


def draw_frontier(cells: Cells) -> Figure:
    """Draw output throughput over latency, with a line through the cells that no other beats.

    Latency is the p99 of E2E if the load varies, since queueing shows there, and in simulation,
    where no other latency grows. Otherwise it is the mean time per output token, which a larger
    batch trades for throughput.
    """
    metric, x_label = "mean_tpot_ms", "mean time per output token (ms)"
    if load_of(cells) or cells.simulated:
        metric, x_label = "p99_e2el_ms", "E2E latency p99 (ms)"
    knobs = [name for name in cells.varying if name in KNOBS]
    along = load_of(cells) or knobs[0]
    scale, unit = (UNIT_NS / 1e9, "step") if cells.simulated else (1.0, "s")
    facets = facets_of(cells, knobs)
    others = [knob for knob in knobs if knob != along]
    has_names = len(facets) == 1
    notes = [
        "Up and to the left is better. Dark points: no other cell of the strategy has more "
        f"throughput at as little latency. Thin lines: along {along.replace('_', ' ')}"
        + (", which stands beside the points." if has_names and not others else ".")
    ]
    sheet = make_sheet(cells, facets, _frontier_lead(cells, metric, knobs), notes, tall=3.3)
    for facet, axes in sheet.panels:
        rows = facet.rows.assign(y=facet.rows["output_throughput"] * scale).dropna(subset=[metric])
        for strategy in sheet.strategies:
            own = rows[rows["strategy"] == strategy.name]
            _draw_paths(axes, own, metric, along, others, strategy, has_names=has_names)
            best = own[beats_all(own, metric)].sort_values(metric)
            look = {**strategy.line, "marker": "o", "ms": 6.5, "mec": "#ffffff", "mew": 0.7}
            axes.plot(best[metric], best["y"], gid=f"frontier-{strategy.index}", **look)
    _finish_frontier(sheet, cells.typical[metric].dropna(), x_label, f"output tokens/{unit}")
    return sheet.figure


def _draw_paths(
    axes: Axes,
    rows: pd.DataFrame,
    metric: str,
    along: str,
    others: list[str],
    strategy: Strategy,
    *,
    has_names: bool,
) -> None:
    """Draw a thin line through cells that differ in one option.

    Names are the other options' values, at the end of each line; without others they are the
    values of that option, at the points.
    """
    for values, path in rows.groupby(others, sort=False) if others else [((), rows)]:
        ordered = path.sort_values(along)
        look: dict[str, Any] = {"lw": 0.9, "marker": "o", "ms": 4, "zorder": 1.5}
        axes.plot(ordered[metric], ordered["y"], color=strategy.tint(0.5), **look)
        if not has_names:
            continue
        few = len(ordered) <= MOST_NAMES
        named = ordered.iloc[[-1]] if others else ordered if few else ordered.iloc[[0, -1]]
        for _, row in named.iterrows():
            name = ", ".join(map(spell_option, others, values))
            axes.annotate(
                name or spell_option("", row[along]).strip(),
                (row[metric], row["y"]),
                (5, 4),
                textcoords="offset points",
                size=8,
                color=strategy.tint(-0.2),
                annotation_clip=False,
            )


def beats_all(rows: pd.DataFrame, metric: str) -> pd.Series[bool]:
    """Mark the rows that no other row beats.

    A row is beaten by one with as much throughput at less latency, or more at as little.
    """
    ranked = rows.sort_values([metric, "output_throughput"], ascending=[True, False])
    before = ranked["output_throughput"].cummax().shift(fill_value=-1.0)
    unbeaten: pd.Series[bool] = (ranked["output_throughput"] > before).reindex(rows.index)
    return unbeaten


def _finish_frontier(sheet: Sheet, x: pd.Series[float], x_label: str, y_label: str) -> None:
    """Set the scales; latency is logarithmic if it spans a decade."""
    shared = sheet.panels[0][1]
    if x.min() > 0 and x.max() / x.min() > 10:
        shared.set_xscale("log")
        shared.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        shared.set_xlim(x.min() / 1.3, x.max() * 2)  # room for names
    else:
        shared.set_xlim(0, 1.15 * x.max())  # from 0, so that a difference of 1 % looks small
    shared.set_ylim(bottom=0)
    for _, axes in sheet.panels:
        axes.grid(color=FAINT, lw=0.7)
        strip_axes(axes, "left", "bottom")
        axes.minorticks_off()
    sheet.label(x_label, y_label)


def _frontier_lead(cells: Cells, metric: str, knobs: list[str]) -> str:
    """Compare the last strategy with the baseline, at the latency of the baseline's best cell."""
    strategies = strategies_of(cells)
    baseline, candidate = strategies[0], strategies[-1]
    leads = []
    for facet in facets_of(cells, knobs):
        base, other = (
            facet.rows[facet.rows["strategy"] == s.name].dropna(subset=[metric])
            for s in (baseline, candidate)
        )
        if not len(base):
            continue
        at: Any = base["output_throughput"].idxmax()
        best: Any = base.loc[at]
        within = other[other[metric] <= best[metric]]["output_throughput"]
        if len(within):
            leads.append(within.max() / best["output_throughput"])
    if candidate is baseline or not leads:
        return cells.answer("speedup")
    span = span_of(times(min(leads)), times(max(leads)))
    text = f"Where {baseline.called} yields most output tokens, {candidate.called}"
    return f"{text} yields {span} as many within the same latency"


# Throughput over the batch size


def draw_throughput_by_batch(cells: Cells) -> Figure:
    """Draw output tokens per second (in simulation: per step) against the batch size."""
    scale, unit = (UNIT_NS / 1e9, "step") if cells.simulated else (1.0, "s")
    notes = []
    if cells.trials > 1:
        notes.append(
            f"Point: median of {cells.trials} trials; line through it: slowest to fastest trial."
        )
    elif not cells.simulated:
        notes.append("One trial per cell.")
    if cells.share_follows:
        notes.append("One request per batch is long, so the workload differs with the batch size.")
    if cells.simulated:
        notes.append("Simulated: every step costs the same, whatever the batch size.")
    sheet = make_sheet(cells, facets_of(cells, ["batch_size"]), cells.answer("speedup"), notes)
    for facet, axes in sheet.panels:
        draw_lines(axes, facet.rows, sheet.strategies, "batch_size", "output_throughput", scale)
        if cells.trials == 1:
            continue
        trials = cells.frame[cells.frame["cell"].isin(set(facet.rows["cell"]))]
        for strategy in sheet.strategies:
            own = trials[trials["strategy"] == strategy.name]
            ends = own.groupby("batch_size")["output_throughput"].agg(["min", "max"]) * scale
            axes.vlines(ends.index, ends["min"], ends["max"], color=strategy.colour, lw=1.4)
    sizes = cells.typical["batch_size"].tolist()
    finish_panels(sheet, sizes, "batch size (slots)", f"output tokens/{unit}")
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
    facets, headline = facets_of(cells, ["long_every"]), cells.answer("speedup")
    sheet = make_sheet(cells, facets, headline, notes, baseline=False)
    compared = [s for s in sheet.strategies if s.name != cells.strategies[0]]
    for facet, axes in sheet.panels:
        rows = facet.rows.assign(long_share=100 * facet.rows["long_share"])
        ends = rows[["speedup_low", "speedup_high"]].astype(float)
        axes.axhline(1, color=INK, lw=1.1, ls=":")
        for strategy in compared:
            own = rows["strategy"] == strategy.name
            low, high = (ends[name][own] for name in ends)
            axes.vlines(rows["long_share"][own], low, high, color=strategy.colour, lw=1.4)
        if not cells.simulated:
            look: dict[str, Any] = {"lw": 1, "ls": ":", "color": QUIET, "marker": ""}
            draw_lines(axes, rows, compared, "long_share", "step_ratio", **look)
        draw_lines(axes, rows, compared, "long_share", "speedup")
    drawn = pd.concat([facet.rows for facet, _ in sheet.panels])
    top, whisker = drawn[["speedup", "speedup_high"]].astype(float).fillna(0).max()
    # A whisker far beyond the points would leave them no room.
    sheet.panels[0][1].set_ylim(0, max(1.15, 1.08 * top, min(1.03 * whisker, 1.8 * top)))
    shares = (100 * cells.typical["long_share"]).tolist()
    y_label = f"speed-up over {cells.strategies[0]} (×)"
    finish_panels(sheet, shares, "share of long requests (%)", y_label)
    return sheet.figure


PICTURES: Mapping[str, Callable[[Cells], Figure]] = {
    "throughput": draw_throughput_by_batch,
    "latency": draw_latency_by_load,
    "speedup": draw_speedup_by_share,
    "frontier": draw_frontier,
}


def draw_sweep(cells: Cells) -> tuple[dict[str, Figure], dict[str, str]]:
    """Return the pictures by name, and for each missing one what the grid would need."""
    missing = _missing(cells)
    with house_style():
        figures = {name: draw(cells) for name, draw in PICTURES.items() if name not in missing}
    return figures, missing


def _missing(cells: Cells) -> dict[str, str]:
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
    return missing
