"""The streams of a probe on one time axis: those that are shown, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
from batchbench.studies.probe.observations import Role, Round, Stream

MOST_STREAMS = 18  # streams of one panel


@dataclass(frozen=True)
class Panel:
    """Streams on one time axis."""

    title: str
    streams: Sequence[Stream]

    @property
    def span_ns(self) -> tuple[int, int]:
        begin = min(s.sent_ns for s in self.streams)
        return begin, max((s.last_ns for s in self.streams if s.times_ns), default=begin)

    def part_ns(self, tokens: float) -> tuple[float, float]:
        """Return the beginning and the end of a part with about so many tokens in a row."""
        begin, end = self.span_ns
        longest = tokens * self._gap_ns
        if end - begin <= longest:
            return begin, end
        long = self.streams[0]
        if long.role is Role.LONG and all(s.times_ns > (long.last_ns,) for s in self.streams[1:]):
            begin = int(min(end - longest, max(begin, long.last_ns - 0.6 * longest)))
        return begin, begin + longest

    @property
    def _gap_ns(self) -> float:
        """The median time between arrivals of one stream."""
        gaps = [np.diff(s.arrivals_ns) for s in self.streams if len(s.arrivals_ns) > 1]
        return float(np.median(np.concatenate(gaps))) if gaps else float(np.inf)

    def name(self, stream: Stream) -> str:
        """Return the label of a stream's row."""
        if stream.role is Role.BURST:
            return str(list(self.streams).index(stream) + 1)
        return stream.role.value


def panels_of(rounds: Sequence[Round]) -> list[Panel]:
    """Return the panels of the rounds that show most."""
    panels = []
    joins = [r for r in rounds if r.is_joining and any(s.times_ns for s in r.streams)]
    if joins:
        best = max(joins, key=lambda r: sum(s.answered for s in r.of(Role.SHORT)))
        panels.append(_panel("Short requests while a long one is running", best.streams))
    bursts = [r for r in rounds if r.is_burst and any(s.times_ns for s in r.streams)]
    if bursts:
        last = max(bursts, key=lambda r: (not any(s.failure for s in r.streams), len(r.streams)))
        ordered = sorted(last.streams, key=lambda s: s.times_ns or (1 << 62,))
        panels.append(_panel(f"{len(ordered)} requests at once", ordered))
    return panels


def _panel(title: str, streams: Sequence[Stream]) -> Panel:
    shown = streams[:MOST_STREAMS]
    hidden = len(streams) - len(shown)
    return Panel(f"{title} (the first {len(shown)})" if hidden else title, shown)


# The picture

_LEFT, _ROW, _BETWEEN = 0.55, 0.17, 0.8  # inches

_NOTES = (
    "A row is one request: dotted while it waits for its first token, then a mark for each token. "
    "Marks in one column are tokens of one step."
)


def draw_streams(panels: Sequence[Panel], headline: str, title: str) -> Figure:
    """Draw each panel with its own time axis."""
    with house_style():
        heights = [max(0.5, _ROW * len(panel.streams)) for panel in panels]
        body = sum(heights) + _BETWEEN * len(panels) - 0.1
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
            axes.text(sent, row, stream.lack, va="center", size=8, color=INK)
            continue
        times = [(time - begin) / 1e9 for time in stream.times_ns]
        axes.plot([sent, times[0]], [row, row], color=colour, lw=1, ls=":")
        axes.plot([times[0], times[-1]], [row, row], color=FAINT, lw=1, zorder=0)
        axes.plot(times, [row] * len(times), ls="", marker="|", ms=8, mew=1.1, color=colour)
    axes.set(ylim=(len(panel.streams) - 0.4, -0.6), xlim=(0, (end - begin) / 1e9 * 1.005 or 1))
    strip_axes(axes, "bottom")  # which formats ticks, so before they get names
    axes.set_yticks(range(len(panel.streams)), [panel.name(s) for s in panel.streams])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel("seconds", size=8.5)
