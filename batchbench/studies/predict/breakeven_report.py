"""The report of a break-even map: sentence, tables, advice, ``breakeven.json`` and the picture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import card as cards
from batchbench.reports.figures import picture_files
from batchbench.reports.formats.terminal import make_table
from batchbench.reports.prediction import is_weak
from batchbench.reports.text import clean_text, number, plural, times
from batchbench.studies.predict.breakeven import (
    EVEN,
    METRICS,
    BreakEven,
    Contest,
    MapCell,
    load_of,
    rows_of,
)
from batchbench.studies.predict.fitted import error_in_words

SCHEMA_VERSION = 1

_STYLES = {"continuous": "blue", "static": "red", "even": "dim"}


def sentence(breakeven: BreakEven) -> str:
    """Return how many cells each strategy wins, and how many measured ones agree, in words."""
    total = len(breakeven.cells)
    parts = []
    if far := breakeven.extrapolated:
        parts.append(f"{len(far)} of {total} cells go beyond the measured steps and are rough")
    for metric in METRICS:
        static = breakeven.won_by("static", metric)
        leads = {1 / (c.contests[metric].ratio or math.inf): c.place for c in static}
        lead = f" (by up to {times(max(leads))}, at {leads[max(leads)]})" if any(leads) else ""
        won = f"{len(breakeven.won_by('continuous', metric))} of {total} cells"
        parts.append(f"on {METRICS[metric]} continuous wins {won}, static {len(static)}{lead}")
    if breakeven.measured:
        agreed = [cell.agrees(metric) for cell in breakeven.measured for metric in METRICS]
        parts.append(
            f"{sum(map(bool, agreed))} of {len(agreed)} comparisons in "
            f"{plural(len(breakeven.measured), 'measured cell')} have the predicted winner"
        )
    return f"{'; '.join(parts)}."


def _won(breakeven: BreakEven) -> tuple[int, int, int]:
    """Return the comparisons that continuous and static batching win, and their total."""
    continuous, static = (
        sum(len(breakeven.won_by(name, metric)) for metric in METRICS)
        for name in ("continuous", "static")
    )
    return continuous, static, len(breakeven.cells) * len(METRICS)


def advice(breakeven: BreakEven) -> str:
    """Return one sentence that says what to do."""
    continuous, static, total = _won(breakeven)
    best, other = ("continuous", "static") if continuous > static else ("static", "continuous")
    most, least = max(continuous, static), min(continuous, static)
    if not most:
        text = f"Use either: nowhere on this map do they differ by more than {EVEN:.0%}"
    elif not least:
        text = f"Use {best} batching: it wins {most} of {total} comparisons and loses none"
    else:
        text = f"Use {best} batching, except where {other} wins: in {least} of {total} comparisons"
    if breakeven.measured:
        return f"{text}."
    weak = "The step-cost fit is weak: check" if is_weak(breakeven.fitted.quality) else "Check"
    return f"{text}. {weak} it with --measure 3."


def cost_sentence(breakeven: BreakEven, price_per_hour: float) -> str:
    """Return a sentence on the cost of a million output tokens, in the median over all cells."""
    contests = [cell.contests["throughput"] for cell in breakeven.cells]
    costs = {}
    for name in ("continuous", "static"):
        rates = [getattr(contest, name) for contest in contests]
        each = [price_per_hour / 3600 / rate * 1e6 for rate in rates if rate]
        costs[name] = number(float(np.median(each)))
    return (
        f"At {price_per_hour:g} an hour, a million output tokens cost {costs['continuous']} with "
        f"continuous and {costs['static']} with static batching (median over all cells)."
    )


def title(breakeven: BreakEven) -> str:
    spec = breakeven.spec
    return (
        f"{breakeven.fitted.place} · outputs of {spec.mean_tokens:,} tokens on average, prompts of "
        f"{spec.prompt_tokens:,} · {spec.batches} × batch size requests"
    )


def notes(breakeven: BreakEven) -> list[str]:
    limits = ", ".join(f"{name.upper()} {ms:g} ms" for name, ms in breakeven.limits_ms.items())
    lines = [
        "Above 1: continuous batching is better. Simulated on fitted step costs.",
        f"Even: within {EVEN:.0%}. Spread: standard deviation ÷ mean of output lengths. Load: "
        "requests offered ÷ what continuous batching can serve.",
        f"Goodput: requests within {limits}.",
    ]
    if far := breakeven.extrapolated:
        worst = max(far, key=lambda cell: (len(cell.beyond), cell.batch_size, cell.spread))
        beyond = "; ".join(worst.beyond)
        lines.append(f"The cell furthest beyond the measured steps is {worst.place}: {beyond}.")
    if len(kinds := breakeven.machines) > 1:
        lines.append(
            f"Suspect: step costs and measured cells are from {len(kinds)} kinds of machines "
            f"({'; '.join(kinds)}), so predictions may be wrong for that reason."
        )
    return lines


def render(breakeven: BreakEven, price_per_hour: float | None) -> RenderableType:
    parts: list[RenderableType] = [Text(sentence(breakeven), style="bold"), Text()]
    for metric in METRICS:
        parts += [_table(breakeven, metric), Text()]
    if breakeven.measured:
        parts += [_measured_table(breakeven), Text()]
    parts += [Text(line, style="dim") for line in [*notes(breakeven), breakeven.fitted.fit]]
    parts.append(Text())
    if price_per_hour is not None:
        parts.append(Text(cost_sentence(breakeven, price_per_hour)))
    return Group(*parts, Text(advice(breakeven), style="bold"))


def _table(breakeven: BreakEven, metric: str) -> Table:
    """Return loads and batch sizes down, spreads to the right, then the break-even spread."""
    spec, rows = breakeven.spec, list[list[str | Text]]()
    for load, batch in itertools.product(spec.loads, spec.batch_sizes):
        row: list[str | Text] = [load if batch == spec.batch_sizes[0] else "", f"{batch:,}"]
        for spread in spec.spreads:
            cell = breakeven.by_axes[batch, spread, load]
            text = spell(cell.contests[metric]) + "*" * (cell.measured is not None)
            row.append(Text(text, _STYLES[cell.contests[metric].winner]))
        spread_at = breakeven.break_even_spread(metric, batch, load)
        wins = "none" if spread_at is None else f"from {spread_at:.2f}"
        rows.append([*row, "all" if spread_at == spec.spreads[0] else wins])
    # Above 1 if continuous is better.
    ratio = "static ÷ continuous" if metric == "ttft" else "continuous ÷ static"
    head = ["load", "slots", *(f"{spread:g}" for spread in spec.spreads), "continuous\nwins"]
    return make_table(f"{METRICS[metric]}: {ratio}, by spread", head, rows, framed=True)


def spell(contest: Contest) -> str:
    """Return the ratio: ``1.35``; ∞ if static has nothing, – if neither has."""
    if contest.ratio is None:
        return "∞" if contest.winner == "continuous" else "–"
    return f"{contest.ratio:.2f}" if contest.ratio < 9.95 else f"{contest.ratio:,.0f}"


def _measured_table(breakeven: BreakEven) -> Table:
    rows = []
    for cell in breakeven.measured:
        axes = [cell.load, f"{cell.batch_size:,}", f"{cell.spread:g}"]
        for metric, real in (cell.measured or {}).items():
            error, predicted = cell.error(metric), cell.contests[metric]
            words = "N/A" if error is None else error_in_words(error).replace("too ", "")
            same = "yes" if predicted.agrees(real) else "NO"
            rows.append([*axes, METRICS[metric], spell(predicted), spell(real), words, same])
            axes = ["", "", ""]
    head = ["load", "slots", "spread", "metric", "predicted", "measured", "prediction", "same"]
    name = "* measured cells: how many times better continuous is"
    return make_table(name, head, rows, left=4, framed=True)


# Files


def write_map(
    folder: Path, breakeven: BreakEven, command: str, price_per_hour: float | None
) -> tuple[list[Path], str]:
    text = to_json(breakeven, command, price_per_hour)
    table = pd.DataFrame(list(rows_of(breakeven))).to_csv(index=False)
    pictures = picture_files({"breakeven": draw_breakeven(breakeven)})
    contents = {"breakeven.json": text, "breakeven.csv": table, **pictures}
    return write_whole(folder, contents), text


def to_json(breakeven: BreakEven, command: str, price_per_hour: float | None) -> str:
    spec, borders = breakeven.spec, list[dict[str, Any]]()
    for metric, load, batch in itertools.product(METRICS, spec.loads, spec.batch_sizes):
        spread = breakeven.break_even_spread(metric, batch, load)
        borders.append({"metric": metric, "batch_size": batch, "load": load, "spread": spread})
    data: dict[str, Any] = {
        **envelope(SCHEMA_VERSION, command),
        "sentence": sentence(breakeven),
        "advice": advice(breakeven),
        "axes": {"batch_size": spec.batch_sizes, "spread": spec.spreads, "load": spec.loads},
        "mean_tokens": spec.mean_tokens,
        "prompt_tokens": spec.prompt_tokens,
        "limits_ms": dict(breakeven.limits_ms),
        "price_per_hour": price_per_hour,
        "even_within": EVEN,
        "cost": breakeven.fitted.known.as_dict(),
        "held_out": breakeven.fitted.quality,
        "machines": list(breakeven.machines),
        "borders": borders,
        "cells": list(rows_of(breakeven)),
    }
    return json_text(data)


# The picture

_MOST = math.log(4)
"""Logarithm of the advantage that has the deepest colour."""


def headline(breakeven: BreakEven) -> str:
    """Return how many comparisons each strategy wins, and the range of the throughput's ratio."""
    ratios = [cell.contests["throughput"].ratio for cell in breakeven.cells]
    known = [ratio for ratio in ratios if ratio]
    continuous, static, total = _won(breakeven)
    return (
        f"Continuous batching wins {continuous} of {total} comparisons, static {static}; "
        f"throughput is {times(min(known))} to {times(max(known))}"
    )


def draw_breakeven(breakeven: BreakEven) -> Figure:
    """Draw one row of panels per metric, one panel per load: batch size down, spread across."""
    spec, static, continuous = (
        breakeven.spec,
        *cards.name_strategies({"static": (), "continuous": ()}),
    )
    tall = min(0.26 * len(spec.batch_sizes), 2.2)
    body, lines = 0.8 + (tall + 0.42) * len(METRICS), " ".join(notes(breakeven))
    with cards.house_style():
        card = cards.make_card(headline(breakeven), clean_text(title(breakeven)), body, lines)
        handles = [
            Patch(fc=continuous.tint(0.2), label="continuous wins"),
            Patch(fc="#ffffff", ec=cards.QUIET, lw=0.6, label="even"),
            Patch(fc=static.tint(0.2), label="static wins"),
            Line2D([], [], color=cards.INK, lw=2.2, label="break-even line"),
            *[Patch(fc="none", ec=cards.INK, lw=1.8, label="measured")] * bool(breakeven.measured),
        ]
        cards.add_line_legend(card, [], *handles)
        colours = LinearSegmentedColormap.from_list(
            "sides", [static.colour, "#ffffff", continuous.colour]
        )
        shape = (len(METRICS), len(spec.loads))
        grid = card.grid(shape, 0.64, tall, gap=0.16, between=0.42)
        for metric, panels in zip(METRICS, grid, strict=True):
            for load, axes in zip(spec.loads, panels, strict=True):
                cells = [
                    [breakeven.by_axes[b, s, load] for s in spec.spreads] for b in spec.batch_sizes
                ]
                _draw_panel(axes, cells, metric, colours)
                label = f"{METRICS[metric]} · {load_of(load)}"
                axes.set_title(label, size=8.5, weight="bold", loc="left", pad=4)
            panels[0].set_ylabel("batch size")
        for axes in grid[-1]:
            axes.set_xlabel("spread of output lengths")
        axes.set_xticks(np.arange(len(spec.spreads)) + 0.5, [f"{s:g}" for s in spec.spreads])
        axes.set_yticks(
            np.arange(len(spec.batch_sizes)) + 0.5, [f"{b:,}" for b in spec.batch_sizes]
        )
    return card.figure


def _draw_panel(axes: Axes, cells: list[list[MapCell]], metric: str, colours: Colormap) -> None:
    """Draw colours, ratios, the break-even line and frames of measured cells."""
    heights = np.array([[cell.contests[metric].height for cell in row] for row in cells])
    shown, norm = np.clip(heights, -_MOST, _MOST), TwoSlopeNorm(0, -_MOST, _MOST)
    axes.pcolormesh(shown, cmap=colours, norm=norm, edgecolors="#ffffff", lw=0.6)
    style: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "size": 6 if len(cells[0]) > 7 else 7.5,
    }
    for (y, x), height in np.ndenumerate(heights):
        cell, colour = cells[y][x], "#ffffff" if abs(height) > 0.75 * _MOST else cards.INK
        axes.text(x + 0.5, y + 0.5, spell(cell.contests[metric]), color=colour, **style)
        if cell.measured is not None:
            dashes: Any = "solid" if cell.agrees(metric) else (0, (2, 1.2))
            look: dict[str, Any] = {
                "fc": "none",
                "ec": cards.INK,
                "lw": 1.8,
                "ls": dashes,
                "zorder": 4,
            }
            axes.add_patch(Rectangle((x + 0.06, y + 0.08), 0.88, 0.84, **look))
    won = heights > math.log1p(EVEN)
    line: dict[str, Any] = {"color": cards.INK, "lw": 2.2, "solid_capstyle": "round", "zorder": 3}
    for y, x in np.argwhere(won[:, 1:] != won[:, :-1]):
        axes.plot([x + 1, x + 1], [y, y + 1], **line)
    for y, x in np.argwhere(won[1:] != won[:-1]):
        axes.plot([x, x + 1], [y + 1, y + 1], **line)
    axes.set(xlim=(0, heights.shape[1]), ylim=(heights.shape[0], 0))
    cards.strip_axes(axes)
    axes.tick_params(length=0)
