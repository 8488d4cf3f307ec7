"""Throughput of every trial with paired ratios, and distributions of TTFT and E2E latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures import card
from batchbench.reports.occupancy import MOST_LEVELS
from batchbench.reports.statistics import (
    FEWEST_PAIRS,
    Distribution,
    Floats,
    Ratio,
    mean_interval,
    paired_ratio,
)
from batchbench.reports.text import plural, spell_number, spell_ratio

# Throughput

_ROW, _BAR = 0.74, 0.36  # inches: a strategy's row, and the bar at its lower end


def draw_throughput(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw bars of output tokens/s and requests/s, with every trial and the paired ratios."""
    tall, trials = len(strategies) * _ROW, len(strategies[0].trials)
    notes = f"Bar: median of {plural(trials, 'trial')}. Dot: one trial, the first on top. "
    notes += (
        "Whisker: 95 % interval of the mean. ×: median ratio of paired trials (95 % interval)."
        if trials >= FEWEST_PAIRS
        else f"No interval below {FEWEST_PAIRS} trials."
    )
    picture = card.make_card(_fastest(strategies), title, tall + 0.47, notes)
    for left, width, what in ((0.0, 4.75, "tokens"), (5.1, 2.2, "requests")):
        _draw_rates(picture.axes(left, 0, width, tall + 0.05), strategies, what, width * 72)
    baseline = card.fit_text(strategies[0].name, 150, 9.5, "bold")
    for strategy in strategies:
        ratio = _speedup(strategies[0], strategy) if strategy.index else None
        text = f"{spell_ratio(ratio)} vs. {baseline}" if ratio else ""
        top = strategy.index * _ROW + 0.27
        picture.label(top, strategy, text, color=card.INK, weight="bold")
    return picture.figure


def _draw_rates(axes: Axes, strategies: Sequence[card.Strategy], what: str, width: float) -> None:
    """Draw a bar per strategy, ``width`` points wide; the y axis counts inches downwards."""
    unit = f"{what}/{'step' if strategies[0].in_steps else 's'}"
    (_, baseline), right = _rates(strategies[0], what), 0.0
    for strategy in strategies:
        y = (strategy.index + 1) * _ROW - _BAR / 2
        end = _draw_rate(axes, strategy, y, what)
        label = f"{spell_number(_rates(strategy, what)[1])} {unit}"
        look: dict[str, Any] = {"size": 9.5, "weight": "bold", "va": "center"}
        axes.annotate(label, (end, y), (7, 0), textcoords="offset points", **look)
        right = max(right, end * width / (width - card.text_extent(label, 9.5, "bold") - 10))
        if strategy.index:
            axes.vlines(baseline, y - _BAR / 2, y + _BAR / 2, color=card.INK, lw=1.2, ls=":")
    axes.set(xlim=(0, right), ylim=(len(strategies) * _ROW + 0.05, 0), yticks=[])
    axes.set_xlabel(f"output {unit}" if what == "tokens" else unit)
    axes.locator_params(axis="x", nbins=max(3, round(width / 60)))
    card.strip_axes(axes, "bottom")


def _draw_rate(axes: Axes, strategy: card.Strategy, y: float, what: str) -> float:
    """Draw a bar, its trials in its upper part, the whisker below; return the right end."""
    rates, value = _rates(strategy, what)
    axes.barh(y, value, _BAR, color=strategy.tint(0.25), gid=f"{what}-{strategy.index}")
    # Trials from top to bottom in their order, so that a drift shows.
    spread = np.linspace(-0.38, 0.1, len(rates)) if len(rates) > 1 else np.zeros(1)
    dots: dict[str, Any] = {"c": "#ffffff", "ec": card.INK, "lw": 0.8, "zorder": 3}
    axes.scatter(rates, y + spread * _BAR, s=11, gid=f"{what}-trials-{strategy.index}", **dots)
    if len(rates) < FEWEST_PAIRS:
        return max(value, float(rates.max()))
    low, high = mean_interval(rates)
    line: dict[str, Any] = {"color": card.INK, "lw": 1.6, "zorder": 4, "marker": "|", "mew": 1.6}
    axes.plot([low, high], [y + 0.32 * _BAR] * 2, ms=6, **line)
    return max(value, float(rates.max()), high)


def _rates(strategy: card.Strategy, what: str) -> tuple[Floats, float]:
    """Return the rate of each trial per second (in simulation: per step), and at the median."""
    requests = [trial.requests.output_tokens for trial in strategy.trials]
    counts = np.array([n.sum() if what == "tokens" else len(n) for n in requests])
    unit = UNIT_NS if strategy.in_steps else 1e9
    durations = np.array([trial.duration_ns for trial in strategy.trials]) / unit
    return counts / durations, float(counts[0] / np.median(durations))


def _speedup(baseline: card.Strategy, candidate: card.Strategy) -> Ratio | None:
    pairs = min(len(baseline.trials), len(candidate.trials))
    rates = (_rates(strategy, "tokens")[0][:pairs].tolist() for strategy in (candidate, baseline))
    return paired_ratio(*rates)


def _fastest(strategies: Sequence[card.Strategy]) -> str:
    unit = "step" if strategies[0].in_steps else "second"
    baseline, candidate = strategies[0], strategies[-1]
    ratio = _speedup(baseline, candidate)
    if candidate is baseline or ratio is None:
        rate = spell_number(_rates(baseline, "tokens")[1])
        return f"{baseline.called} yields {rate} output tokens per {unit}"
    low, high = ratio.low, ratio.high
    even = low is not None and high is not None and low <= 1 <= high
    if even or f"{ratio.median:.2f}" == "1.00":
        return f"No clear difference in throughput between {candidate.called} and {baseline.called}"
    return (
        f"{candidate.called} yields {ratio.median:.2f}× the output tokens per {unit} "
        f"of {baseline.called}"
    )


# Latency

_MARKS = ((50, "o", "●"), (99, "D", "◆"))  # percentile, its marker in the plot and in text


def draw_latency(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw CDFs of TTFT and E2E latency over the requests of all trials, and their p50 and p99."""
    trials, requests = len(strategies[0].trials), len(strategies[0].trials[0].requests.slot)
    pooled = f" × {trials} trials, pooled" if trials > 1 else ""
    notes = f"{plural(requests, 'request')}{pooled}. Arrival is when a request was due."
    panels = {
        "TTFT: time to first token": [s.latencies.ttft for s in strategies],
        "E2E latency: time to last token": [s.latencies.e2el for s in strategies],
    }
    body = 3.25 + 0.22 * len(strategies)
    picture = card.make_card(_soonest(strategies), title, body, notes)
    for left, (label, values) in zip((0.55, 4.3), panels.items(), strict=True):
        axes = picture.axes(left, 0.3, 2.75, 2.3)
        axes.set_title(label, size=10, weight="bold", loc="left", pad=7)
        _draw_distributions(axes, strategies, values)
    picture.figure.axes[0].set_ylabel("requests (%)")
    return picture.figure


def _draw_distributions(
    axes: Axes, strategies: Sequence[card.Strategy], distributions: Sequence[Distribution]
) -> None:
    """Draw the staircases of one latency, and a legend with percentiles below them."""
    unit = card.Unit.of(strategies, max(d.values[-1] for d in distributions) * 1e6)
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
    for q, _, sign in _MARKS:
        axes.axhline(q, color=card.FAINT, lw=0.8, zorder=0)
        axes.annotate(
            f"{sign} p{q}", (1, q), (4, 0), textcoords="offset points", color=card.QUIET, **place
        )
    for strategy, values in zip(strategies, distributions, strict=True):
        x, y = staircase(values)
        percentiles = [(values.percentile(q) or 0) * 1e6 for q, *_ in _MARKS]
        texts = (
            f"{sign} {unit.text(at)}" for at, (*_, sign) in zip(percentiles, _MARKS, strict=True)
        )
        label = f"{card.fit_text(strategy.name, 75, 9)}  {'  '.join(texts)}"
        look: dict[str, Any] = {"drawstyle": "steps-post", "gid": f"cdf-{strategy.index}"}
        axes.plot(x * 1e6 / unit.ns, y * 100, label=label, **look, **strategy.line)
        for at, (q, marker, _) in zip(percentiles, _MARKS, strict=True):
            look = {"color": strategy.tint(-0.2), "ms": 6.5, "mec": "#ffffff", "mew": 1}
            axes.plot(at / unit.ns, q, marker, **look)
    axes.set(xlim=(0, None), ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
    axes.set_xlabel(f"time since arrival ({unit.name})")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), frameon=False, handlelength=3)
    card.strip_axes(axes, "left", "bottom")


def staircase(values: Distribution, most: int = MOST_LEVELS) -> tuple[Floats, Floats]:
    """Return the corners of the distribution function, from (smallest, 0) to (largest, 1)."""
    x, where = np.unique(values.values, return_index=True)
    y = np.add.reduceat(values.weights, where).cumsum() / values.count
    if len(x) > most:
        corners = np.unique(np.searchsorted(y, np.linspace(0, 1, most)).clip(0, len(x) - 1))
        x, y = x[corners], y[corners]
    return np.concatenate([x[:1], x]), np.concatenate([[0.0], y])


def _soonest(strategies: Sequence[card.Strategy]) -> str:
    medians = [(s.latencies.ttft.percentile(50) or 0) * 1e6 for s in strategies]
    unit = card.Unit.of(strategies, max(medians))
    text = f"Half of the requests have their first token after {unit.text(medians[-1])}"
    text += f" under {strategies[-1].called}"
    if len(strategies) == 1:
        return text
    return f"{text}, after {unit.text(medians[0])} under {strategies[0].called}"
