"""What a search for capacity saw: who stays within the limits at which rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from batchbench.reports.figures.card import (
    FAINT,
    INK,
    WIDE,
    Strategy,
    add_line_legend,
    house_style,
    make_card,
    name_strategies,
    strip_axes,
)
from batchbench.reports.text import clean_text, spell_number
from batchbench.studies.sweep.facets import ticks_apart, write_tick

_CALLED = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E latency"}

_MARKS: Mapping[str, dict[str, Any]] = {
    "sustained": {"marker": "o", "ms": 6.5},
    "border": {"marker": "D", "ms": 5.5, "mfc": "#ffffff", "mew": 1.4},
    "not sustained": {"marker": "o", "ms": 6, "mfc": "#ffffff", "mew": 1.4},
}


def draw_capacity(data: Mapping[str, Any], headline: str, title: str) -> Figure:
    """Attainment over the rate with what was asked for, and each limited latency with its limit.

    Args:
        data: as in ``capacity.json``.
    """
    with house_style():
        return _draw(data, headline, clean_text(title))


def _draw(data: Mapping[str, Any], headline: str, title: str) -> Figure:
    strategies = name_strategies(dict.fromkeys(data["strategies"], ()))
    limits: Mapping[str, float] = data["limits_ms"]
    panels: Sequence[str] = ["attainment", *limits]
    # An odd panel would stand alone below; then the first takes the width of two.
    wide_first = len(panels) % 2 == 1
    rows = -(-(len(panels) + wide_first) // 2)
    height, step = 2.1, 2.1 + 0.95
    notes = (
        "Filled: sustained; hollow: not; diamond: the trials do not tell. Whisker: 95 % interval. "
        "Dotted: what is asked. Vertical line: the highest rate that is sustained."
    )
    card = make_card(headline, title, 0.72 + rows * step - 0.45, notes)
    add_line_legend(card, strategies)
    half = (WIDE - 0.62 - 0.75) / 2
    for k, what in enumerate(panels):
        row, column = divmod(k + wide_first if k else 0, 2)
        width = WIDE - 0.62 if wide_first and not k else half
        left, top = 0.62 + column * (half + 0.75), 0.72 + row * step
        axes = card.axes(left, top, width, height)
        _panel(axes, data, strategies, what)
        _finish(axes, data, width * 72)
    return card.figure


def _panel(axes: Axes, data: Mapping[str, Any], strategies: Sequence[Strategy], what: str) -> None:
    """One figure over the rate, of all strategies."""
    share = 100 * data["slo_attainment"]
    limit = share if what == "attainment" else data["limits_ms"][what]
    axes.axhline(limit, color=INK, lw=1.2, ls=":")
    for strategy in strategies:
        found = data["strategies"][strategy.name]
        probes = sorted(found["probes"], key=lambda probe: probe["rate"])
        rates = [probe["rate"] for probe in probes]
        values = [_value(probe, what) for probe in probes]
        axes.plot(rates, values, **{**strategy.line, "lw": 1.2}, gid=f"{what}-{strategy.index}")
        for probe, value in zip(probes, values, strict=True):
            look = {"mfc": strategy.colour, "mec": strategy.colour, **_MARKS[probe["verdict"]]}
            if what == "attainment":
                ends = [100 * end for end in probe["attainment"]["ci95"]]
                axes.vlines(probe["rate"], *ends, color=strategy.tint(0.3), lw=1.2)
            axes.plot(probe["rate"], value, ls="", **look)
        if found["rate"]:
            axes.axvline(found["rate"], color=strategy.tint(0.2), lw=1.2, zorder=1)
    if what == "attainment":
        axes.set(ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
        title = f"% of requests within all limits; asked: {share:g}"
    else:
        axes.set_yscale("log")
        title = f"{_CALLED[what]} p{share:g} in ms; limit: {limit:g}"
    axes.set_title(title, size=9.5, weight="bold", loc="left", pad=19)


def _value(probe: Mapping[str, Any], what: str) -> float:
    if what == "attainment":
        return 100 * float(probe["attainment"]["share"])
    found = probe["latency_ms"].get(what)
    return np.nan if found is None else float(found)


def _finish(axes: Axes, data: Mapping[str, Any], width: float) -> None:
    """Rates on a logarithmic axis, each capacity named above its line."""
    rates = [p["rate"] for found in data["strategies"].values() for p in found["probes"]]
    low, high = min(rates), max(rates)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    powers = [2.0**k for k in range(int(np.floor(np.log2(low))), int(np.log2(high)) + 2)]
    ticks = ticks_apart([p for p in powers if low / 1.15 <= p <= high * 1.15] or [low], width)
    axes.set_xticks(ticks, [write_tick(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("requests/s")
    for strategy in name_strategies(dict.fromkeys(data["strategies"], ())):
        rate = data["strategies"][strategy.name]["rate"]
        if rate:
            place: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(
                spell_number(rate),
                (rate, 1),
                (0, 3),
                ha="center",
                size=9,
                weight="bold",
                color=strategy.tint(-0.15),
                **place,
            )
