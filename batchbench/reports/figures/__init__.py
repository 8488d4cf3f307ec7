"""Pictures: what happened, drawn from recordings alone.

Five pictures answer five questions at a glance: how much faster (throughput), how long people wait
(latency), how full the slots are (occupancy), why (timeline), and where the time went (account).
Each is a card of its own with a headline, so that it can be shown alone, on a light page or a dark
one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from batchbench.batching.recording import Recording
from batchbench.reports.figures.card import (
    DPI,
    MOST_BARS,
    MOST_BARS_A_SLOT,
    MOST_SLOTS,
    Strategy,
    house_style,
    name_strategies,
)
from batchbench.reports.figures.latency import draw_latency
from batchbench.reports.figures.occupancy import draw_occupancy
from batchbench.reports.figures.throughput import draw_throughput
from batchbench.reports.figures.time_budget import draw_account
from batchbench.reports.figures.timeline import draw_timeline
from batchbench.reports.text import clean_text

PICTURES: Mapping[str, Callable[[Sequence[Strategy], str], Figure]] = {
    "throughput": draw_throughput,
    "latency": draw_latency,
    "occupancy": draw_occupancy,
    "timeline": draw_timeline,
    "account": draw_account,  # says of whom there is none
}
"""What draws each picture of a result, from its strategies and its title."""

OF_STEPS = ("occupancy", "timeline", "account")
"""Pictures of steps: there are none where no strategy shows any."""

_OF_STEPS_ALONE = ("occupancy", "timeline")
"""Those in which strategies that show none are left out."""


def draw(recordings: Mapping[str, Sequence[Recording]], title: str) -> dict[str, Figure]:
    """All pictures, by name: throughput, latency, occupancy, timeline, account.

    Occupancy and timeline only of the strategies that show steps; without any they and the
    account are not drawn.

    Args:
        recordings: the trials of each strategy, at least one each; the first is the baseline, and
            trials of equal index are pairs.
        title: model, device and workload in a line; every picture carries it.
    """
    stepped = any(trials[0].has_steps for trials in recordings.values())
    names = [name for name in PICTURES if stepped or name not in OF_STEPS]
    return {name: draw_one(name, recordings, title) for name in names}


def draw_one(name: str, recordings: Mapping[str, Sequence[Recording]], title: str) -> Figure:
    """The picture of that name; arguments as above.

    Raises:
        ValueError: it shows steps, and no strategy does.
    """
    strategies, title = name_strategies(recordings), clean_text(title)
    if name in OF_STEPS:
        hidden = [strategy.name for strategy in strategies if not strategy.typical.has_steps]
        if len(hidden) == len(strategies):
            raise ValueError(f"no {name}: {', '.join(hidden)} schedules for itself, shows no steps")
        if hidden and name in _OF_STEPS_ALONE:
            strategies = [strategy for strategy in strategies if strategy.typical.has_steps]
            title = f"{title} · no steps known of {', '.join(hidden)}"
    with house_style():
        return PICTURES[name](strategies, title)


def figure_bytes(figure: Figure, format: str) -> bytes:
    """A picture as a file: ``png`` (160 dots an inch) or ``svg`` (text stays text).

    The same picture gives the same bytes, on one version of matplotlib.
    """
    out = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    with house_style():
        figure.savefig(out, format=format, dpi=DPI, metadata=metadata)
    return out.getvalue()


__all__ = [
    "MOST_BARS",
    "MOST_BARS_A_SLOT",
    "MOST_SLOTS",
    "PICTURES",
    "draw",
    "draw_one",
    "figure_bytes",
]
