"""The climb: each rung's throughput, and its decode step beside what the machine allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from batchbench.reports.figures.card import (
    INK,
    QUIET,
    Card,
    house_style,
    make_card,
    strip_axes,
    text_extent,
)
from batchbench.reports.text import clean_text, spell_number, spell_percent
from batchbench.studies.ladder.result import LadderResult

_ROW, _BAR, _HEAD = 0.46, 0.3, 0.4  # inches: a rung's row, its bar, and legend and titles above
_NAMES, _RATES, _STEPS = 1.55, 2.4, 2.7  # inches: the three columns
_GAP = 0.35

_KINDS = {
    "notebook": ("the notebook's way", "#D55E00"),
    "generate_batch": ("transformers' generate_batch", "#CC79A7"),
    "slots": ("slots engine", "#0072B2"),
}

Rung = Mapping[str, Any]


def draw_ladder(result: LadderResult) -> Figure:
    """A row a rung, from the ground up: tokens/s on the left, ms a decode step on the right."""
    rungs = result.data["rungs"]
    with house_style():
        tall = _ROW * len(rungs)
        card = make_card(
            _headline(rungs), clean_text(result.title), _HEAD + tall + 0.42, _notes(result)
        )
        _legend(card, rungs)
        for i, rung in enumerate(rungs):
            y = _HEAD + _ROW * i
            colour = _KINDS[rung["engine"]][1]
            card.write(0, y + 0.09, clean_text(rung["name"]), size=10, weight="bold", color=colour)
            card.write(0, y + 0.25, clean_text(rung["change"]), size=8, color=QUIET)
        left = _NAMES
        _rates(card.axes(left, _HEAD, _RATES, tall), rungs)
        left += _RATES + _GAP
        _steps(card.axes(left, _HEAD, _STEPS, tall), rungs, result.data["card"]["formats"])
    return card.figure


def _rates(axes: Axes, rungs: Sequence[Rung]) -> None:
    """Output tokens a second, every round a dot."""
    far = 0.0
    for i, rung in enumerate(rungs):
        value = rung["summary"]["output_throughput"]
        each = np.array([trial["output_throughput"] for trial in rung["trials"]])
        _bar(axes, i, value, rung, f"rate-{i}")
        axes.scatter(each, np.full(len(each), i), s=9, c="#ffffff", ec=INK, lw=0.7, zorder=3)
        reach = max(value, float(each.max()))
        far = max(far, _write(axes, i, reach, spell_number(value), _RATES))
    axes.set(xlim=(0, far), xlabel="output tokens/s")
    _rows(axes, len(rungs), 4)


def _steps(axes: Axes, rungs: Sequence[Rung], formats: Mapping[str, Any]) -> None:
    """Milliseconds a decode step, and the least that its number format allows."""
    far = 0.0
    for i, rung in enumerate(rungs):
        if (took := rung["decode_step_ms"]) is None:
            continue
        _bar(axes, i, took, rung, f"step-{i}")
        known = formats[rung["dtype"]]
        for value, style in ((known["floor_ms"], "-"), (known["products_ms"], ":")):
            axes.plot([value] * 2, [i - 0.42, i + 0.42], color=INK, lw=1.6, ls=style, zorder=3)
            far = max(far, value * 1.05)
        text = f"{spell_number(took)} ms, {spell_percent(rung['floor_share'])}"
        reach = max(took, known["products_ms"], known["floor_ms"])
        far = max(far, _write(axes, i, reach, text, _STEPS))
    axes.set(xlim=(0, far or 1), xlabel="ms a decode step, and the share of the floor reached")
    _rows(axes, len(rungs), 5)


def _bar(axes: Axes, row: int, value: float, rung: Rung, gid: str) -> None:
    colour = _KINDS[rung["engine"]][1]
    axes.barh(row, value, _BAR / _ROW, color=colour, alpha=0.75, lw=0, gid=gid)


def _write(axes: Axes, row: int, far: float, text: str, width: float) -> float:
    """A figure behind its bar; where the axis must end so that it has room."""
    style: dict[str, Any] = {"size": 9, "weight": "bold", "va": "center"}
    axes.annotate(text, (far, row), (5, 0), textcoords="offset points", **style)
    points = width * 72
    return far * points / (points - text_extent(text, 9, "bold") - 8)


def _rows(axes: Axes, rows: int, ticks: int) -> None:
    axes.set(ylim=(rows - 0.5, -0.5), yticks=[])
    axes.locator_params(axis="x", nbins=ticks, prune="upper")
    strip_axes(axes, "bottom")


def _legend(card: Card, rungs: Sequence[Rung]) -> None:
    """Whose way a bar is, and the two lines."""
    engines = list(dict.fromkeys(rung["engine"] for rung in rungs))
    handles: list[Any] = [Patch(fc=_KINDS[e][1], alpha=0.75, lw=0) for e in engines]
    labels = [_KINDS[e][0] for e in engines]
    for name, style in (("floor", "-"), ("matrix products alone", ":")):
        handles.append(Line2D([0], [0], color=INK, lw=1.6, ls=style))
        labels.append(name)
    card.figure.legend(
        handles,
        labels,
        ncols=len(labels),
        loc="upper left",
        bbox_to_anchor=card.at(0, 0.05),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _headline(rungs: Sequence[Rung]) -> str:
    best = max(rungs, key=lambda rung: rung["summary"]["output_throughput"])
    text = f"{best['name']} yields {spell_number(best['summary']['output_throughput'])} tokens/s"
    ratios = {name: ratio for name, ratio in best["speedup"].items() if ratio is not None}
    if ratios:
        text += ", " + " and ".join(
            f"{ratio['median']:.2f}× {name}" for name, ratio in ratios.items()
        )
    return clean_text(text)


def _notes(result: LadderResult) -> str:
    card, rounds = result.data["card"], result.data["config"]["ladder"]["rounds"]
    speed = card["bandwidth"]["bytes_per_s"] / 1e9
    notes = [
        f"Floor: (weights + KV read) / {speed:.3g} GB/s, the bandwidth measured in the same run.",
        f"Decode steps of {card['rows']} rows, medians.",
        f"Bars: median of {rounds} rounds in turns; dots: the rounds."
        if rounds > 1
        else "One round.",
    ]
    return " ".join(notes)
