"""The picture of a probe: the streams of a round on one time axis, a mark for each token."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchbench.reports.figures.card import (
    FAINT,
    INK,
    LOOKS,
    WIDE,
    capitalize,
    house_style,
    make_card,
    strip_axes,
)
from batchbench.reports.text import clean_text
from batchbench.studies.probe.observations import Role
from batchbench.studies.probe.pictured import Panel

_LEFT, _ROW, _BETWEEN = 0.55, 0.17, 0.62  # inches

_NOTES = (
    "A row is one request: dotted while it waits for its first token, then a mark for each token. "
    "Marks in one column are tokens of one step."
)


def draw_streams(panels: Sequence[Panel], headline: str, title: str) -> Figure:
    """Draw each panel with its own time axis."""
    with house_style():
        heights = [max(0.5, _ROW * len(panel.streams)) for panel in panels]
        body = sum(heights) + _BETWEEN * len(panels) + 0.1
        text = headline[:1].upper() + headline[1:]
        card = make_card(capitalize(text), clean_text(title), body, _NOTES if panels else "")
        top = 0.28
        for panel, height in zip(panels, heights, strict=True):
            card.write(0, top - 0.26, panel.title, size=10.5, weight="bold")
            axes = card.axes(_LEFT, top, WIDE - _LEFT, height)
            _draw(axes, panel)
            top += height + _BETWEEN
    return card.figure


def _draw(axes: Axes, panel: Panel) -> None:
    begin, end = panel.span_ns
    long, short = LOOKS["continuous"][0], LOOKS["static"][0]
    for row, stream in enumerate(panel.streams):
        colour = short if stream.role is Role.SHORT else long
        sent = (stream.sent_ns - begin) / 1e9
        if not stream.times_ns:
            text = "refused" if stream.refused else "failed"
            axes.text(sent, row, text, va="center", size=8, color=INK)
            continue
        times = [(time - begin) / 1e9 for time in stream.times_ns]
        axes.plot([sent, times[0]], [row, row], color=colour, lw=1, ls=":")
        axes.plot([times[0], times[-1]], [row, row], color=FAINT, lw=1, zorder=0)
        axes.plot(times, [row] * len(times), ls="", marker="|", ms=8, mew=1.1, color=colour)
    axes.set(ylim=(len(panel.streams) - 0.4, -0.6), xlim=(0, (end - begin) / 1e9 * 1.005 or 1))
    axes.set_yticks(range(len(panel.streams)), [panel.name(s) for s in panel.streams])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel("seconds", size=8.5)
    strip_axes(axes, "bottom")
    axes.set_yticks(range(len(panel.streams)), [panel.name(s) for s in panel.streams])
