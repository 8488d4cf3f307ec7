"""A workload as a picture: how long prompts and outputs are, and when requests come."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchbench.reports.figures.card import INK, QUIET, WIDE, house_style, make_card, strip_axes
from batchbench.reports.text import clean_text, spell_number
from batchbench.reports.workload_profile import bars, pace, spread
from batchbench.workloads.outline import Outline
from batchbench.workloads.ragged import Ints

_PANEL = 1.5  # inches: height of a panel
_BARS = 40

_PROMPT, _OUTPUT = "#009E73", "#E69F00"  # Okabe and Ito's; not those of the strategies


def draw_portrait(outline: Outline) -> Figure:
    """Histograms of lengths and, where requests come over time, their number over time."""
    timed = bool(outline.due_ns.any())
    half = (WIDE - 0.55) / 2
    with house_style():
        card = make_card(
            _headline(outline),
            clean_text(outline.name),
            0.1 + _PANEL + 0.45 + timed * (_PANEL + 0.55),
            _notes(outline, timed),
        )
        for left, lengths, colour, what in (
            (0.0, outline.prompt_tokens, _PROMPT, "prompt"),
            (half + 0.55, outline.output_tokens, _OUTPUT, "output"),
        ):
            axes = card.axes(left + 0.35, 0.1, half - 0.35, _PANEL)
            _draw_lengths(axes, lengths, colour, what)
        if timed:
            _draw_arrivals(card.axes(0.35, 0.1 + _PANEL + 0.65, WIDE - 0.35, _PANEL), outline)
        return card.figure


def _draw_lengths(axes: Axes, lengths: Ints, colour: str, what: str) -> None:
    found = bars(lengths, _BARS)
    left = np.array([bar.low for bar in found]) - 0.5
    width = found[0].high - found[0].low + 1
    axes.bar(left, [bar.count for bar in found], width, align="edge", color=colour, gid=what)
    mean = spread(lengths).mean
    axes.axvline(mean, color=INK, lw=1.2, ls=":")
    right = mean > (left[0] + left[-1] + width) / 2
    axes.annotate(
        f"mean {spell_number(mean)}",
        (mean, 1.0),
        (-4 if right else 4, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        size=8.5,
    )
    if len(found) == 1:  # a bar of all requests should not fill the panel
        axes.set_xlim(lengths[0] - 10 * width, lengths[0] + 10 * width)
    axes.set_xlabel(f"{what} tokens of a request")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")


def _draw_arrivals(axes: Axes, outline: Outline) -> None:
    seconds = outline.due_ns / 1e9
    come = np.arange(1, len(seconds) + 1)
    # A line of more points than pixels is no clearer.
    shown = np.unique(np.linspace(0, len(seconds) - 1, 2_000).astype(np.int64))
    axes.plot([0, seconds[-1]], [1, len(seconds)], color=QUIET, lw=1.2, ls=":")
    axes.plot(seconds[shown], come[shown], drawstyle="steps-post", color=INK, lw=1.6, gid="come")
    axes.set(xlim=(0, seconds[-1]), ylim=(0, len(seconds) * 1.02))
    axes.set_xlabel("s since the first arrival")
    axes.set_title("requests that have come", loc="left", size=8.5, color=QUIET)
    axes.locator_params(axis="y", nbins=4, integer=True)
    strip_axes(axes, "bottom")


def _headline(outline: Outline) -> str:
    prompt, output = spread(outline.prompt_tokens), spread(outline.output_tokens)
    rate = pace(outline.due_ns).per_second
    return (
        f"{spell_number(prompt.mean)} prompt and {spell_number(output.mean)} output tokens a "
        f"request, {'all at once' if rate is None else f'{spell_number(rate)} requests/s'}"
    )


def _notes(outline: Outline, timed: bool) -> str:
    text = "Bars: number of requests. Dotted: the mean."
    if timed:
        variation = pace(outline.due_ns).variation
        told = (
            "" if variation is None else f"; the gaps' coefficient of variation is {variation:.2f}"
        )
        told += "" if variation is None else " (Poisson: 1)"
        text += f" Below, dotted: an even rate. Arrivals: {outline.arrivals}{told}."
    return clean_text(text)
