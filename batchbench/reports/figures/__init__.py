"""Pictures of a result, drawn from recordings alone.

Five pictures answer five questions: how much faster (throughput), how long requests wait (latency),
how full the slots are (occupancy), why (timeline), and where the time went (account). Each is a
card with a headline of its own, so that it can be shown alone, on a light page or a dark one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from batchbench.batching.recording import Recording
from batchbench.reports.figures.card import DPI, Strategy, house_style, name_strategies
from batchbench.reports.figures.slots import draw_occupancy, draw_timeline
from batchbench.reports.figures.speed import draw_latency, draw_throughput
from batchbench.reports.figures.time_budget import draw_time_budget
from batchbench.reports.text import clean_text

PICTURES: Mapping[str, Callable[[Sequence[Strategy], str], Figure]] = {
    "throughput": draw_throughput,
    "latency": draw_latency,
    "occupancy": draw_occupancy,
    "timeline": draw_timeline,
    "account": draw_time_budget,
}
"""The function that draws each picture, from the strategies and a title."""

_OF_SLOTS = ("occupancy", "timeline")
_OF_STEPS = (*_OF_SLOTS, "account")


def draw(recordings: Mapping[str, Sequence[Recording]], title: str) -> dict[str, Figure]:
    """Draw all pictures, by name; those of steps only if a strategy logs steps.

    ``recordings`` has the trials of each strategy, at least one each. The first strategy is the
    baseline, and trials of equal index are pairs.
    """
    stepped = any(trials[0].has_steps for trials in recordings.values())
    names = [name for name in PICTURES if stepped or name not in _OF_STEPS]
    return {name: draw_one(name, recordings, title) for name in names}


def draw_one(name: str, recordings: Mapping[str, Sequence[Recording]], title: str) -> Figure:
    """Draw one picture; occupancy and timeline leave out strategies that log no steps.

    Raises ValueError if the picture shows steps, and no strategy logs any.
    """
    strategies, title = name_strategies(recordings), clean_text(title)
    stepped = [strategy for strategy in strategies if strategy.typical.has_steps]
    others = ", ".join(s.name for s in strategies if not s.typical.has_steps)
    if name in _OF_STEPS and not stepped:
        raise ValueError(f"no {name}: {others} schedules by itself and logs no steps")
    if name in _OF_SLOTS and others:
        strategies, title = stepped, f"{title} · no steps known of {others}"
    with house_style():
        return PICTURES[name](strategies, title)


def figure_bytes(figure: Figure, format: str) -> bytes:
    """Return a picture as a ``png`` (160 dots an inch) or ``svg`` file (text stays text).

    The same picture gives the same bytes, on one version of matplotlib.
    """
    out = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    with house_style():
        figure.savefig(out, format=format, dpi=DPI, metadata=metadata)
    return out.getvalue()


def picture_files(figures: Mapping[str, Figure]) -> dict[str, bytes | str]:
    """Return each picture as a PNG and as an SVG file, by the name of the file."""
    return {
        f"{name}.{format}": figure_bytes(figure, format)
        for name, figure in figures.items()
        for format in ("png", "svg")
    }
