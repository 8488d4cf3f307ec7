"""Output tokens and requests per second, of every trial, and the paired ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.reports.figures import card
from batchbench.reports.statistics import FEWEST_PAIRS, Floats, Ratio, paired_ratio
from batchbench.reports.text import spell_number, spell_ratio

_ROW, _BAR = 0.74, 0.36  # inches: a strategy's row, and the bar at its lower end


def draw_throughput(strategies: Sequence[card.Strategy], title: str) -> Figure:
    """Draw bars of output tokens/s and requests/s, with every trial and the paired ratios."""
    tall = len(strategies) * _ROW
    picture = card.make_card(_headline(strategies), title, tall + 0.47, _notes(strategies))
    for left, width, what in ((0.0, 4.75, "tokens"), (5.1, 2.2, "requests")):
        _panel(picture.axes(left, 0, width, tall + 0.05), strategies, what, width * 72)
    baseline = card.fit_text(strategies[0].name, 150, 9.5, "bold")
    for strategy in strategies:
        ratio = _speedup(strategies[0], strategy) if strategy.index else None
        text = f"{spell_ratio(ratio)} vs. {baseline}" if ratio else ""
        picture.label(strategy.index * _ROW + 0.27, strategy, text, dark=True)
    return picture.figure


def _panel(axes: Axes, strategies: Sequence[card.Strategy], what: str, width: float) -> None:
    """Draw a bar per strategy, ``width`` points wide; the y axis counts inches downwards."""
    unit = f"{what}/{'step' if strategies[0].in_steps else 's'}"
    (_, baseline), right = _rates(strategies[0], what), 0.0
    for strategy in strategies:
        y = (strategy.index + 1) * _ROW - _BAR / 2
        end = _bar(axes, strategy, y, what)
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


def _bar(axes: Axes, strategy: card.Strategy, y: float, what: str) -> float:
    """Draw a bar, its trials in its upper part, the whisker below; return the right end."""
    rates, value = _rates(strategy, what)
    axes.barh(y, value, _BAR, color=strategy.tint(0.25), gid=f"{what}-{strategy.index}")
    # Trials from top to bottom in their order, so that a drift shows.
    spread = np.linspace(-0.38, 0.1, len(rates)) if len(rates) > 1 else np.zeros(1)
    dots: dict[str, Any] = {"c": "#ffffff", "ec": card.INK, "lw": 0.8, "zorder": 3}
    axes.scatter(rates, y + spread * _BAR, s=11, gid=f"{what}-trials-{strategy.index}", **dots)
    end = max(value, float(rates.max()))
    interval = paired_ratio(rates.tolist(), [1.0] * len(rates))
    if interval is None or interval.low is None or interval.high is None:
        return end
    line: dict[str, Any] = {"color": card.INK, "lw": 1.6, "zorder": 4, "marker": "|", "mew": 1.6}
    axes.plot([interval.low, interval.high], [y + 0.32 * _BAR] * 2, ms=6, **line)
    return max(end, interval.high)


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


def _headline(strategies: Sequence[card.Strategy]) -> str:
    unit = "step" if strategies[0].in_steps else "second"
    baseline, candidate = strategies[0], strategies[-1]
    ratio = _speedup(baseline, candidate)
    if candidate is baseline or ratio is None:
        rate = spell_number(_rates(baseline, "tokens")[1])
        return f"{baseline.called} yields {rate} output tokens per {unit}"
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        return f"No clear difference in throughput between {candidate.called} and {baseline.called}"
    if f"{ratio.median:.2f}" == "1.00":
        return f"{candidate.called} and {baseline.called} are equally fast"
    return (
        f"{candidate.called} yields {ratio.median:.2f}× the output tokens per {unit} "
        f"of {baseline.called}"
    )


def _notes(strategies: Sequence[card.Strategy]) -> str:
    trials = len(strategies[0].trials)
    if trials == 1:
        return "One trial: no interval."
    notes = f"Bar: median of {trials} trials. Dot: one trial, the first on top."
    enough = trials >= FEWEST_PAIRS
    notes += (
        " Whisker: 95 % interval of the mean."
        if enough
        else f" No interval below {FEWEST_PAIRS} trials."
    )
    if len(strategies) > 1:
        notes += f" ×: median ratio of paired trials{' (95 % interval)' * enough}."
    return notes
