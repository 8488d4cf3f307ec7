"""Pictures: what happened, drawn from recordings alone.

Five pictures answer five questions at a glance: how much faster (throughput), how long people wait
(latency), how full the slots are (occupancy), why (timeline), and where the time went (account).
Each is a card of its own with a headline, so that it can be shown alone, on a light page or a dark
one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from batchbench.batching.recording import Recording
from batchbench.reports.figures.account import draw_account
from batchbench.reports.figures.card import (
    DPI,
    MOST_BARS,
    MOST_BARS_A_SLOT,
    MOST_SLOTS,
    clean_text,
    house_style,
    name_strategies,
)
from batchbench.reports.figures.latency import draw_latency
from batchbench.reports.figures.occupancy import draw_occupancy
from batchbench.reports.figures.throughput import draw_throughput
from batchbench.reports.figures.timeline import draw_timeline


def draw(recordings: Mapping[str, Sequence[Recording]], title: str) -> dict[str, Figure]:
    """The five pictures, by name: throughput, latency, occupancy, timeline, account.

    Occupancy and timeline only of the strategies that show steps; without any they and the
    account are not drawn.

    Args:
        recordings: the trials of each strategy, at least one each; the first is the baseline, and
            trials of equal index are pairs.
        title: model, device and workload in a line; every picture carries it.
    """
    strategies = name_strategies(recordings)
    title = clean_text(title)
    stepped = [strategy for strategy in strategies if strategy.typical.has_steps]
    hidden = [strategy.name for strategy in strategies if not strategy.typical.has_steps]
    title_of_stepped = f"{title} · no steps known of {', '.join(hidden)}" if hidden else title
    with house_style():
        pictures = {
            "throughput": draw_throughput(strategies, title),
            "latency": draw_latency(strategies, title),
        }
        if stepped:
            pictures["occupancy"] = draw_occupancy(stepped, title_of_stepped)
            pictures["timeline"] = draw_timeline(stepped, title_of_stepped)
            pictures["account"] = draw_account(strategies, title)  # says of whom there is none
        return pictures


def render(figure: Figure, format: str) -> bytes:
    """A picture as a file: ``png`` (160 dots an inch) or ``svg`` (text stays text).

    The same picture gives the same bytes, on one version of matplotlib.
    """
    out = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    with house_style():
        figure.savefig(out, format=format, dpi=DPI, metadata=metadata)
    return out.getvalue()


__all__ = ["MOST_BARS", "MOST_BARS_A_SLOT", "MOST_SLOTS", "draw", "render"]
