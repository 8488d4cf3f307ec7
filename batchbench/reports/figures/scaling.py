"""What a sweep shows of size and shape: throughput by slots, speed-up by long requests."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.cells import Cells
from batchbench.reports.figures.card import INK, QUIET, Strategy
from batchbench.reports.text import spell_number
from batchbench.studies.sweep.facets import (
    draw_lines,
    facets_of,
    finish_panels,
    make_sheet,
    strategies_of,
)


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
