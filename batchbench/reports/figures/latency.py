"""Distributions of TTFT and of end-to-end latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batchbench.reports.figures import card
from batchbench.reports.occupancy import MOST_LEVELS
from batchbench.reports.statistics import Distribution, Floats
from batchbench.reports.text import plural

_MARKS = ((50, "o", "●"), (99, "D", "◆"))  # percentile, its marker in the plot and in text

Panel = tuple[str, Sequence[Distribution], card.Unit]  # TTFT or E2E, of each strategy


def draw_latency(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw CDFs of TTFT and E2E latency over the requests of all trials, and their p50 and p99."""
    panels: list[Panel] = []
    for name, values in (
        ("TTFT", [s.latencies.ttft for s in strategies]),
        ("E2E", [s.latencies.e2el for s in strategies]),
    ):
        longest = max(d.values[-1] for d in values)
        panels.append((name, values, card.Unit.of(strategies, longest * 1e6)))
    body = 2.95 + 0.62 + 0.27 * len(strategies)
    picture = card.make_card(_headline(strategies, panels[0]), title, body, _notes(strategies))
    titles = ("TTFT: time to first token", "E2E latency: time to last token")
    for left, text, panel in zip((0.55, 4.3), titles, panels, strict=True):
        axes = picture.axes(left, 0.3, 2.75, 2.3)
        axes.set_title(text, size=10, weight="bold", loc="left", pad=7)
        _cdfs(axes, strategies, panel)
    picture.figure.axes[0].set_ylabel("requests (%)")
    _percentiles(picture, strategies, panels, 3.3)
    return picture.figure


def _cdfs(axes: Axes, strategies: Sequence[card.Strategy], panel: Panel) -> None:
    _, distributions, unit = panel
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
    for q, _, sign in _MARKS:
        axes.axhline(q, color=card.FAINT, lw=0.8, zorder=0)
        axes.annotate(
            f"{sign} p{q}", (1, q), (4, 0), textcoords="offset points", color=card.QUIET, **place
        )
    for strategy, values in zip(strategies, distributions, strict=True):
        x, y = staircase(values)
        look: dict[str, Any] = {"drawstyle": "steps-post", "gid": f"cdf-{strategy.index}"}
        axes.plot(x * 1e6 / unit.ns, y * 100, **look, **strategy.line)
        for q, marker, _ in _MARKS:
            at, height = _on_staircase(values, q)
            look = {"ms": 6.5, "mec": "#ffffff", "mew": 1}
            axes.plot(at * 1e6 / unit.ns, height, marker, color=strategy.tint(-0.2), **look)
    axes.set(xlim=(0, None), ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
    axes.set_xlabel(f"time since arrival ({unit.name})")
    axes.locator_params(axis="x", nbins=5)
    card.strip_axes(axes, "left", "bottom")


def staircase(values: Distribution, most: int = MOST_LEVELS) -> tuple[Floats, Floats]:
    """Return the corners of the distribution function, from (smallest, 0) to (largest, 1)."""
    x, where = np.unique(values.values, return_index=True)
    y = np.add.reduceat(values.weights, where).cumsum() / values.count
    if len(x) > most:
        corners = np.unique(np.searchsorted(y, np.linspace(0, 1, most)).clip(0, len(x) - 1))
        x, y = x[corners], y[corners]
    return np.concatenate([x[:1], x]), np.concatenate([[0.0], y])


def _on_staircase(values: Distribution, q: float) -> tuple[float, float]:
    """Return the q-th percentile (ms), and the height (%) nearest to q of the staircase there.

    A percentile between two observations is interpolated, and the staircase is flat there.
    """
    at = values.percentile(q) or 0.0
    below, upto = (np.searchsorted(values.values, at, side=side) for side in ("left", "right"))
    weights = np.concatenate([[0], np.cumsum(values.weights)])
    low, high = 100 * weights[[below, upto]] / values.count
    return at, float(np.clip(q, low, high))


def _percentiles(
    picture: card.Card, strategies: Sequence[card.Strategy], panels: Sequence[Panel], top: float
) -> None:
    rights = iter((4.0, 5.1, 6.2, 7.3))
    for name, values, unit in panels:
        for q, _, sign in _MARKS:
            right = next(rights)
            picture.write(right, top, f"{name} {sign} p{q}", ha="right", size=9, color=card.QUIET)
            for i in range(len(strategies)):
                text = unit.text((values[i].percentile(q) or 0) * 1e6)
                picture.write(right, top + 0.27 * (i + 1), text, ha="right", size=10)
    for i, strategy in enumerate(strategies):
        y = top + 0.27 * (i + 1)
        ends = zip(picture.at(0, y + 0.07), picture.at(0.42, y + 0.07), strict=True)
        line = Line2D(*ends, transform=picture.figure.transFigure, **strategy.line)
        picture.figure.add_artist(line)
        look: dict[str, Any] = {"size": 10, "weight": "bold", "color": strategy.tint(-0.15)}
        picture.write(0.5, y, card.fit_text(strategy.name, 175, 10, "bold"), **look)


def _headline(strategies: Sequence[card.Strategy], panel: Panel) -> str:
    _, values, unit = panel
    medians = [unit.text((ttft.percentile(50) or 0) * 1e6) for ttft in values]
    text = f"Half of the requests have their first token after {medians[-1]}"
    if len(strategies) == 1:
        return f"{text} under {strategies[0].called}"
    return f"{text} under {strategies[-1].called}, after {medians[0]} under {strategies[0].called}"


def _notes(strategies: Sequence[card.Strategy]) -> str:
    trials, requests = len(strategies[0].trials), len(strategies[0].trials[0].requests.slot)
    text = plural(requests, "request")
    if trials > 1:
        text += f" × {trials} trials, pooled"
    return f"{text}. Arrival is when a request was due."
