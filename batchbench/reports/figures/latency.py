"""How long people wait: distributions of TTFT and of end-to-end latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batchbench.reports.figures.card import (
    FAINT,
    QUIET,
    Card,
    Floats,
    Strategy,
    Unit,
    fit_text,
    make_card,
    strip_axes,
)
from batchbench.reports.latency import e2el_ms, ttft_ms
from batchbench.reports.occupancy import MOST_LEVELS
from batchbench.reports.statistics import Distribution

_MARKS = ((50, "o", "●"), (99, "D", "◆"))  # percentile, its marker in the plot and in text


def draw_latency(strategies: Sequence[Strategy], title: str) -> Figure:
    """CDFs of TTFT and E2E latency over the requests of all trials, with a table of p50 and p99."""
    found = [
        [Distribution.pooled([Distribution.of(of(t)) for t in s.trials]) for s in strategies]
        for of in (ttft_ms, e2el_ms)
    ]
    units = [Unit.of(strategies, max(d.values[-1] for d in kind) * 1e6) for kind in found]
    body = 2.95 + 0.62 + 0.27 * len(strategies)
    card = make_card(
        _latency_headline(strategies, found[0], units[0]), title, body, _pool(strategies)
    )
    names = ("TTFT: time to first token", "E2E latency: time to last token")
    for left, name, kind, unit in zip((0.55, 4.3), names, found, units, strict=True):
        axes = card.axes(left, 0.3, 2.75, 2.3)
        axes.set_title(name, size=10, weight="bold", loc="left", pad=7)
        _cdfs(axes, strategies, kind, unit)
        if left < 1:
            axes.set_ylabel("requests (%)")
    _percentiles(card, strategies, found, units, 3.3)
    return card.figure


def _cdfs(
    axes: Axes, strategies: Sequence[Strategy], kind: Sequence[Distribution], unit: Unit
) -> None:
    """A staircase a strategy."""
    for q, _, sign in _MARKS:
        axes.axhline(q, color=FAINT, lw=0.8, zorder=0)
        axes.annotate(
            f"{sign} p{q}",
            (1, q),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=QUIET,
        )
    for strategy, values in zip(strategies, kind, strict=True):
        x, y = staircase(values)
        axes.plot(
            x * 1e6 / unit.ns,
            y * 100,
            drawstyle="steps-post",
            **strategy.line,
            gid=f"cdf-{strategy.index}",
        )
        for q, marker, _ in _MARKS:
            at, height = _on_staircase(values, q)
            look: dict[str, Any] = {"ms": 6.5, "mec": "#ffffff", "mew": 1}
            axes.plot(at * 1e6 / unit.ns, height, marker, color=strategy.tint(-0.2), **look)
    axes.set(xlim=(0, None), ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
    axes.set_xlabel(f"time since arrival ({unit.name})")
    axes.locator_params(axis="x", nbins=5)
    strip_axes(axes, "left", "bottom")


def staircase(values: Distribution) -> tuple[Floats, Floats]:
    """Corners of the empirical distribution function, from (smallest, 0) to (largest, 1)."""
    x, where = np.unique(values.values, return_index=True)
    y = np.add.reduceat(values.weights, where).cumsum() / values.count
    if len(x) > MOST_LEVELS:
        kept = np.unique(np.searchsorted(y, np.linspace(0, 1, MOST_LEVELS)).clip(0, len(x) - 1))
        x, y = x[kept], y[kept]
    return np.concatenate([x[:1], x]), np.concatenate([[0.0], y])


def _on_staircase(values: Distribution, q: float) -> tuple[float, float]:
    """The q-th percentile (ms), and the height (%) nearest to q that the staircase has there.

    A percentile between two observations is interpolated, and the staircase is flat there.
    """
    at = values.percentile(q) or 0.0
    below, upto = (np.searchsorted(values.values, at, side=side) for side in ("left", "right"))
    weights = np.concatenate([[0], np.cumsum(values.weights)])
    low, high = 100 * weights[[below, upto]] / values.count
    return at, float(np.clip(q, low, high))


def _percentiles(
    card: Card,
    strategies: Sequence[Strategy],
    found: Sequence[Sequence[Distribution]],
    units: Sequence[Unit],
    top: float,
) -> None:
    """Which line is whose, and its p50 and p99."""
    columns = [(k, q, sign) for k in range(len(found)) for q, _, sign in _MARKS]
    rights = (4.0, 5.1, 6.2, 7.3)
    for right, (k, q, sign) in zip(rights, columns, strict=True):
        head = f"{('TTFT', 'E2E')[k]} {sign} p{q}"
        card.write(right, top, head, ha="right", size=9, color=QUIET)
    for i, strategy in enumerate(strategies):
        y = top + 0.27 * (i + 1)
        _sample(card, y + 0.07, strategy)
        name = fit_text(strategy.name, 175, 10, "bold")
        colour = strategy.tint(-0.15)
        card.write(0.5, y, name, size=10, weight="bold", color=colour)
        for right, (k, q, _) in zip(rights, columns, strict=True):
            value = units[k].text((found[k][i].percentile(q) or 0) * 1e6)
            card.write(right, y, value, ha="right", size=10)


def _sample(card: Card, top: float, strategy: Strategy) -> None:
    """A piece of the strategy's line."""
    (x, y), (stop, _) = card.at(0, top), card.at(0.42, top)
    line = Line2D([x, stop], [y, y], transform=card.figure.transFigure, **strategy.line)
    card.figure.add_artist(line)


def _latency_headline(
    strategies: Sequence[Strategy], ttft: Sequence[Distribution], unit: Unit
) -> str:
    halves = [unit.text((values.percentile(50) or 0) * 1e6) for values in ttft]
    text = f"Half of the requests have their first token after {halves[-1]}"
    if len(strategies) == 1:
        return f"{text} under {strategies[0].called}"
    return f"{text} under {strategies[-1].called}, after {halves[0]} under {strategies[0].called}"


def _pool(strategies: Sequence[Strategy]) -> str:
    trials, requests = len(strategies[0].trials), len(strategies[0].trials[0].requests.slot)
    text = f"{requests:,} request{'s' * (requests > 1)}"
    if trials > 1:
        text += f" × {trials} trials, pooled"
    return f"{text}. Arrival is when a request was due."
