"""The pictures of a sweep: those that its grid has axes for, and why the others are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures.card import FAINT, INK, QUIET, Strategy, house_style, strip_axes
from batchbench.reports.slo import parse_slos
from batchbench.reports.text import spell_number, spell_option
from batchbench.studies.sweep.facets import (
    Facet,
    draw_lines,
    facets_of,
    finish_panels,
    make_sheet,
    strategies_of,
)
from batchbench.studies.sweep.table import Cells

LOADS = {
    "request_rate": "load (requests/s)",
    "max_concurrency": "load (requests at a time)",
}
"""Options that set the load, and what an axis of each is called."""


def load_of(cells: Cells) -> str | None:
    """The option that varies the load, if one does."""
    return next((name for name in LOADS if name in cells.varying), None)


_WAITS = (
    ("ttft", "TTFT: time to first token"),
    ("e2el", "E2E latency: time to last token"),
)


def draw_latency_by_load(cells: Cells) -> Figure:
    """p50 and p99 of TTFT and of E2E latency over the load, two panels a combination."""
    load = load_of(cells)
    assert load is not None
    panels = [
        Facet(f"{name.partition(':')[0]} · {facet.label}" if facet.label else name, facet.rows, key)
        for facet in facets_of(cells, [load])
        for key, name in _WAITS
    ]
    notes = ["Latency counts from when a request was due."]
    if cells.trials > 1:
        notes.append(f"Percentiles are medians over {cells.trials} trials.")
    if cells.simulated:
        notes.append("Simulated: a step counts as 1 ms.")
    limits = _limits(cells)
    if limits:
        notes.append("Grey line: the limit that --slo names.")
    sheet = make_sheet(cells, panels, _longest_wait(cells, load), notes, columns=2, marks=_MARKS)
    for facet, axes in sheet.panels:
        for (_, q), look in zip(_MARKS, _LOOKS, strict=True):
            name = "median" if q == 50 else f"p{q}"
            metric = f"{name}_{facet.what}_ms"
            draw_lines(axes, facet.rows, sheet.strategies, load, metric, **look)
        if facet.what in limits:
            axes.axhline(limits[facet.what], color=QUIET, lw=1.4, zorder=1)
    loads = cells.typical[load].tolist()
    finish_panels(sheet, loads, LOADS[load], "milliseconds", log_y=True)
    return sheet.card.figure


_MARKS = (("o", 50), ("D", 99))

_LOOKS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "ms": 4.5, "lw": 1},
    {"marker": "D", "ms": 5.5, "lw": 2},
)


def _limits(cells: Cells) -> dict[str, float]:
    """Limits by latency, as the table's column of options has them."""
    texts = cells.frame.get("slo")
    return {} if texts is None else parse_slos(tuple(str(texts.iloc[0]).split()))


def _longest_wait(cells: Cells, load: str) -> str:
    """Where the strategies' p99 of TTFT differ most."""
    strategies = strategies_of(cells)
    baseline, candidate = strategies[0], strategies[-1]
    wide = cells.typical.pivot_table(
        index=list(cells.varying), columns="strategy", values="p99_ttft_ms", observed=True
    )
    ratio = (wide[baseline.name] / wide[candidate.name]).dropna()
    at: Any = ratio.idxmax()
    row = dict(zip(wide.index.names, at if isinstance(at, tuple) else (at,), strict=True))
    waits = wide.loc[at]
    where = f"{spell_number(row[load])} {'requests/s' if load == 'request_rate' else 'at a time'}"
    others = cells.where(row, less=(load, "strategies"))
    text = f"At {where}{f' ({others})' if others else ''} one request in a hundred waits "
    if candidate is baseline:
        return f"{text}{_ms(waits[baseline.name])} or more for its first token"
    return (
        f"{text}{_ms(waits[baseline.name])} or more for its first token under {baseline.called}, "
        f"{_ms(waits[candidate.name])} under {candidate.called}"
    )


def _ms(value: float) -> str:
    unit, ns = ("s", 1e3) if value >= 1e3 else ("ms", 1.0)
    return f"{spell_number(value / ns)}\N{NO-BREAK SPACE}{unit}"


def draw_frontier(cells: Cells) -> Figure:
    """Output throughput over latency: a path through the cells, and a line where none beats them.

    Latency is the p99 of E2E where the load varies, since there it grows with what waits (and in
    simulation, where no other grows), else the mean time per output token, which a larger batch
    pays its throughput with.
    """
    metric, called = "mean_tpot_ms", "mean time per output token (ms)"
    if load_of(cells) or cells.simulated:
        metric, called = "p99_e2el_ms", "E2E latency p99 (ms)"
    knobs = [name for name in cells.varying if name in KNOBS]
    along = load_of(cells) or knobs[0]
    scale, unit = (UNIT_NS / 1e9, "step") if cells.simulated else (1.0, "s")
    facets = facets_of(cells, knobs)
    others = [knob for knob in knobs if knob != along]
    named = len(facets) == 1
    notes = [
        "Up and to the left is better. Dark points: no other cell of the strategy has more "
        f"throughput at as little latency. Thin lines: along {along.replace('_', ' ')}"
        + (", which stands beside the points." if named and not others else ".")
    ]
    sheet = make_sheet(cells, facets, _frontier_lead(cells, metric, knobs), notes, tall=3.3)
    for facet, axes in sheet.panels:
        rows = facet.rows.assign(y=facet.rows["output_throughput"] * scale).dropna(subset=[metric])
        for strategy in sheet.strategies:
            own = rows[rows["strategy"] == strategy.name]
            best = own[beats_all(own, metric)].sort_values(metric)
            _paths(axes, own, metric, along, others, strategy, named=named)
            look = {**strategy.line, "marker": "o", "ms": 6.5, "mec": "#ffffff", "mew": 0.7}
            axes.plot(best[metric], best["y"], gid=f"frontier-{strategy.index}", **look)
            if named and not others:
                _name_points(axes, own, metric, along, strategy.tint(-0.2))
    _finish_frontier(sheet.panels, sheet.outer, cells, metric, called, f"output tokens/{unit}")
    return sheet.card.figure


def _paths(
    axes: Axes,
    rows: pd.DataFrame,
    metric: str,
    along: str,
    others: list[str],
    strategy: Strategy,
    *,
    named: bool,
) -> None:
    """A thin line through cells that differ in one setting, the others' values at its end."""
    for values, path in rows.groupby(others, sort=False) if others else [((), rows)]:
        ordered = path.sort_values(along)
        look: dict[str, Any] = {"lw": 0.9, "marker": "o", "ms": 4, "zorder": 1.5}
        axes.plot(ordered[metric], ordered["y"], color=strategy.tint(0.5), **look)
        if others and named:
            told = ", ".join(map(spell_option, others, values))
            end = ordered.iloc[-1]
            _write_beside(axes, end[metric], end["y"], told, strategy.tint(-0.2))


def _write_beside(
    axes: Axes, x: float, y: float, text: str, colour: tuple[float, float, float]
) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "size": 8, "color": colour}
    axes.annotate(text, (x, y), (5, 4), annotation_clip=False, **style)


KNOBS = ("batch_size", "request_rate", "max_concurrency", "max_batched_tokens", "prefill")
"""Options with which one trades latency for throughput; others change what is asked."""


def beats_all(rows: pd.DataFrame, metric: str) -> pd.Series[bool]:
    """Which rows no other row beats: none has as much throughput at less latency, or more at as
    little."""
    ranked = rows.sort_values([metric, "output_throughput"], ascending=[True, False])
    before = ranked["output_throughput"].cummax().shift(fill_value=-1.0)
    kept: pd.Series[bool] = (ranked["output_throughput"] > before).reindex(rows.index)
    return kept


MOST_NAMES = 12
"""Points that are named; of more only the first and the last."""


def _name_points(
    axes: Axes, rows: pd.DataFrame, metric: str, knob: str, colour: tuple[float, float, float]
) -> None:
    rows = rows.sort_values(knob)
    named = rows if len(rows) <= MOST_NAMES else rows.iloc[[0, -1]]
    for _, row in named.iterrows():
        told = spell_option("", row[knob]).strip()
        _write_beside(axes, row[metric], row["y"], told, colour)


def _finish_frontier(
    panels: Any, outer: Any, cells: Cells, metric: str, x_label: str, y_label: str
) -> None:
    """One scale for all; latency is logarithmic where it spans a decade."""
    x = cells.typical[metric].dropna()
    top = max(axes.get_ylim()[1] for _, axes in panels)
    wide = x.min() > 0 and x.max() / x.min() > 10
    for i, (_, axes) in enumerate(panels):
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.set_xlim(x.min() / 1.3, x.max() * 2)  # room for names
        else:
            axes.set_xlim(0, 1.15 * x.max())  # a difference of 1 % is to look like one
        axes.set_ylim(0, top)
        axes.grid(color=FAINT, lw=0.7)
        strip_axes(axes, "left", "bottom")
        at_left, at_bottom = outer(i)
        axes.set_xlabel(x_label if at_bottom else "")
        axes.set_ylabel(y_label if at_left else "")
        axes.tick_params(labelleft=at_left)
        axes.minorticks_off()


def _frontier_lead(cells: Cells, metric: str, knobs: list[str]) -> str:
    """What the last strategy yields within the latency at which the baseline yields most."""
    strategies = strategies_of(cells)
    baseline, candidate = strategies[0], strategies[-1]
    most, leads = 0.0, []
    for facet in facets_of(cells, knobs):
        base, other = (
            facet.rows[facet.rows["strategy"] == s.name].dropna(subset=[metric])
            for s in (baseline, candidate)
        )
        if not len(base):
            continue
        best: Any = base["output_throughput"].idxmax()
        most = max(most, base.loc[best, metric])
        within = other[other[metric] <= base.loc[best, metric]]["output_throughput"]
        if len(within):
            leads.append(within.max() / base.loc[best, "output_throughput"])
    if candidate is baseline or not leads:
        ends = (_most(cells, strategy.name, metric) for strategy in strategies)
        told = [f"{s.called} yields most {end}" for s, end in zip(strategies, ends, strict=True)]
        return ", ".join(told)
    low, high = f"{min(leads):.2f}×", f"{max(leads):.2f}×"
    within_that = f"within {_ms(most)}" if len(leads) == 1 else "within the same latency"
    return (
        f"Where {baseline.called} yields most output tokens, {candidate.called} yields "
        f"{low if low == high else f'{low} to {high}'} as many {within_that}"
    )


def _most(cells: Cells, strategy: str, metric: str) -> str:
    """At which latency a strategy's throughput is the highest."""
    rows = cells.typical[cells.typical["strategy"] == strategy].dropna(subset=[metric])
    best: Any = rows["output_throughput"].idxmax()
    throughput, latency = rows.loc[best, "output_throughput"], rows.loc[best, metric]
    return f"({spell_number(throughput)} tokens/s) at {_ms(latency)}"


def draw_throughput_by_batch(cells: Cells) -> Figure:
    """Output tokens a second (in simulation: a step) over the batch size."""
    facets = facets_of(cells, ["batch_size"])
    scale, unit = (UNIT_NS / 1e9, "step") if cells.simulated else (1.0, "s")
    notes = [_medians(cells), _follows(cells)]
    if cells.simulated:
        notes.append("Simulated: every step costs the same, whatever the batch size.")
    sheet = make_sheet(cells, facets, _lead(cells), [n for n in notes if n])
    for facet, axes in sheet.panels:
        draw_lines(axes, facet.rows, sheet.strategies, "batch_size", "output_throughput", scale)
        _whiskers(axes, cells, facet.rows, sheet.strategies, scale)
    sizes = cells.typical["batch_size"].tolist()
    finish_panels(sheet, sizes, "batch size (slots)", f"output tokens/{unit}")
    return sheet.card.figure


def _whiskers(
    axes: Any, cells: Cells, rows: pd.DataFrame, strategies: list[Strategy], scale: float
) -> None:
    """From the slowest to the fastest trial of each cell."""
    if cells.trials == 1:
        return
    trials = cells.frame[cells.frame["cell"].isin(set(rows["cell"]))]
    for strategy in strategies:
        own = trials[trials["strategy"] == strategy.name].groupby("batch_size")["output_throughput"]
        axes.vlines(
            own.min().index, own.min() * scale, own.max() * scale, color=strategy.colour, lw=1.4
        )


def _lead(cells: Cells) -> str:
    """How the lead of the last strategy over the baseline goes with the batch size."""
    strategies = strategies_of(cells)
    baseline, candidate = strategies[0], strategies[-1]
    rows = cells.typical.sort_values("batch_size")
    wide = rows.pivot_table(
        index=list(cells.varying), columns="strategy", values="output_throughput", observed=True
    )
    if candidate is baseline or candidate.name not in wide or baseline.name not in wide:
        most: Any = rows["output_throughput"].idxmax()
        best = rows.loc[most]
        return (
            f"{baseline.called} yields most output tokens at {cells.where(best)}: "
            f"{spell_number(best['output_throughput'])}/s"
        )
    lead = (wide[candidate.name] / wide[baseline.name]).dropna()
    sizes = lead.index.get_level_values("batch_size")
    low, high = sizes.min(), sizes.max()
    at = [_span(lead[sizes == size]) for size in (low, high)]
    return (
        f"{candidate.called} yields {at[0]} the output tokens of {baseline.called} at batch size "
        f"{low:,}, {at[1]} at {high:,}"
    )


def _span(values: pd.Series[float]) -> str:
    low, high = values.min(), values.max()
    return f"{low:.2f}×" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}× to {high:.2f}×"


def _medians(cells: Cells) -> str:
    if cells.trials == 1:
        return "" if cells.simulated else "One trial a cell."
    return f"Point: median of {cells.trials} trials; line through it: slowest to fastest trial."


def _follows(cells: Cells) -> str:
    """That the workload is another one at each batch size, where it is."""
    if cells.share_follows:
        return "One request in every batch size is long: the workload is another at each size."
    return ""


def draw_speedup_by_share(cells: Cells) -> Figure:
    """Speed-up over the share of long requests, beside what the schedules alone give."""
    facets = facets_of(cells, ["long_every"])
    notes = [
        "Solid: measured durations, dotted: forward passes alone."
        if not cells.simulated
        else "Every step costs the same, so that this is what the schedules alone give.",
        "Share: one in --long-every N requests is long.",
    ]
    if cells.trials >= 3:
        notes.append(f"Whisker: 95 % interval over {cells.trials} pairs of trials.")
    sheet = make_sheet(cells, facets, _best_share(cells), notes, baseline=False)
    compared = [s for s in sheet.strategies if s.name != cells.strategies[0]]
    shares = (100 * cells.typical["long_share"]).tolist()
    for facet, axes in sheet.panels:
        rows = facet.rows.assign(long_share=100 * facet.rows["long_share"])
        axes.axhline(1, color=INK, lw=1.1, ls=":")
        for strategy in compared:
            own = rows[rows["strategy"] == strategy.name]
            axes.vlines(
                own["long_share"],
                own["speedup_low"].astype(float),
                own["speedup_high"].astype(float),
                color=strategy.colour,
                lw=1.4,
            )
        if not cells.simulated:
            look: dict[str, Any] = {"lw": 1, "ls": ":", "color": QUIET, "marker": ""}
            draw_lines(axes, rows, compared, "long_share", "step_ratio", **look)
        draw_lines(axes, rows, compared, "long_share", "speedup", ls="solid")
        top = float(rows["speedup"].max())
        whiskers = rows["speedup_high"].astype(float).max()
        # A whisker that is far beyond the points would leave them no room.
        axes.set_ylim(0, max(1.15, 1.08 * top, min(1.03 * whiskers, 1.8 * top)))
    finish_panels(
        sheet, shares, "share of long requests (%)", f"speed-up over {cells.strategies[0]} (×)"
    )
    return sheet.card.figure


def _best_share(cells: Cells) -> str:
    strategies = strategies_of(cells)
    rows = cells.typical[cells.typical["strategy"] == strategies[-1].name]
    ends: tuple[Any, Any] = (rows["speedup"].idxmax(), rows["speedup"].idxmin())
    most, least = (
        f"{rows.loc[at, 'speedup']:.2f}× as fast as {strategies[0].called} where "
        f"{_percent(rows.loc[at, 'long_share'])} of the requests are long"
        f"{_others(cells, rows.loc[at])}"
        for at in ends
    )
    least = least.replace(f" as fast as {strategies[0].called}", "").replace(" of the requests", "")
    return f"{strategies[-1].called} is {most}, {least}"


def _others(cells: Cells, row: pd.Series[Any]) -> str:
    where = cells.where(row, less=("long_every", "strategies"))
    return f" ({where})" if where else ""


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


PICTURES: Mapping[str, Callable[[Cells], Figure]] = {
    "throughput": draw_throughput_by_batch,
    "latency": draw_latency_by_load,
    "speedup": draw_speedup_by_share,
    "frontier": draw_frontier,
}


def draw_sweep(cells: Cells) -> tuple[dict[str, Figure], dict[str, str]]:
    """Pictures by name, and for each of the others what the grid would need."""
    missing = _missing(cells)
    with house_style():
        figures = {name: draw(cells) for name, draw in PICTURES.items() if name not in missing}
    return figures, missing


def _missing(cells: Cells) -> dict[str, str]:
    found = {}
    if "batch_size" not in cells.varying:
        found["throughput"] = "needs several batch sizes, such as --batch-size 1,2,4,8"
    if load_of(cells) is None:
        found["latency"] = "needs several loads, such as --request-rate 1:16:5"
    if "long_every" not in cells.varying:
        found["speedup"] = "needs several shares of long requests, such as --long-every 2,4,8"
    elif cells.typical["speedup"].isna().all():
        found["speedup"] = "needs two strategies in a cell, such as --strategy static,continuous"
    if not any(name in KNOBS for name in cells.varying):
        found["frontier"] = "needs several batch sizes or loads"
    return found
