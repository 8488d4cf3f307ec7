"""How much faster: output tokens and requests a second, every trial, and the paired ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchbench.batching.engines.simulated import UNIT_NS
from batchbench.batching.recording import Recording
from batchbench.reports.figures.card import (
    INK,
    Floats,
    Strategy,
    fit_text,
    make_card,
    strip_axes,
    text_extent,
)
from batchbench.reports.statistics import FEWEST_PAIRS, Ratio, paired_ratio
from batchbench.reports.text import spell_number

_ROW, _BAR = 0.74, 0.36  # inches: a strategy's row, and the bar at its lower end


def draw_throughput(strategies: Sequence[Strategy], title: str) -> Figure:
    """Bars of output tokens/s and requests/s, with every trial and the paired ratios."""
    tall = len(strategies) * _ROW
    notes = _throughput_notes(strategies)
    card = make_card(_throughput_headline(strategies), title, tall + 0.47, notes)
    for left, width, what in ((0.0, 4.75, "tokens"), (5.1, 2.2, "requests")):
        _bars_of_rates(card.axes(left, 0, width, tall + 0.05), strategies, what, width * 72)
    for strategy in strategies:
        ratio = _speedup(strategies[0], strategy) if strategy.index else None
        text = (
            f"{_ratio(ratio)} vs. {fit_text(strategies[0].name, 150, 9.5, 'bold')}" if ratio else ""
        )
        card.label(strategy.index * _ROW + 0.27, strategy, text, dark=True)
    return card.figure


def _bars_of_rates(axes: Axes, strategies: Sequence[Strategy], what: str, width: float) -> None:
    """A bar a strategy in a panel ``width`` points wide; the y axis counts inches downwards."""
    unit = f"{what}/{'step' if strategies[0].in_steps else 's'}"
    right = 0.0
    for strategy in strategies:
        y = (strategy.index + 1) * _ROW - _BAR / 2
        far = _bar_of_rates(axes, strategy, y, what)
        label = f"{spell_number(_typical_rate(strategy, what))} {unit}"
        style: dict[str, Any] = {"size": 9.5, "weight": "bold", "va": "center"}
        axes.annotate(label, (far, y), (7, 0), textcoords="offset points", **style)
        right = max(right, far * width / (width - text_extent(label, 9.5, "bold") - 10))
        if strategy.index:
            level = _typical_rate(strategies[0], what)
            axes.vlines(level, y - _BAR / 2, y + _BAR / 2, color=INK, lw=1.2, ls=":")
    axes.set(xlim=(0, right), ylim=(len(strategies) * _ROW + 0.05, 0), yticks=[])
    axes.set_xlabel(f"output {unit}" if what == "tokens" else unit)
    axes.locator_params(axis="x", nbins=max(3, round(width / 60)))
    strip_axes(axes, "bottom")


def _bar_of_rates(axes: Axes, strategy: Strategy, y: float, what: str) -> float:
    """A bar with its trials in its upper part and the whisker below; how far all of it reaches."""
    rates, value = _rates(strategy, what), _typical_rate(strategy, what)
    axes.barh(y, value, _BAR, color=strategy.tint(0.25), gid=f"{what}-{strategy.index}")
    # Trials from top to bottom in their order, so that a drift shows.
    spread = np.linspace(-0.38, 0.1, len(rates)) if len(rates) > 1 else np.zeros(1)
    dots: dict[str, Any] = {"c": "#ffffff", "ec": INK, "lw": 0.8, "zorder": 3}
    axes.scatter(rates, y + spread * _BAR, s=11, gid=f"{what}-trials-{strategy.index}", **dots)
    far = max(value, float(rates.max()))
    interval = paired_ratio(rates.tolist(), [1.0] * len(rates))
    if interval is None or interval.low is None or interval.high is None:
        return far
    ends, low = [interval.low, interval.high], y + 0.32 * _BAR
    line: dict[str, Any] = {"color": INK, "lw": 1.6, "zorder": 4}
    axes.plot(ends, [low, low], marker="|", ms=6, mew=1.6, **line)
    return max(far, interval.high)


def _rates(strategy: Strategy, what: str) -> Floats:
    """Output tokens or requests a second (in simulation: a step) of each trial."""
    return np.array([_count(t, what) / t.duration_ns for t in strategy.trials]) * _per(strategy)


def _typical_rate(strategy: Strategy, what: str) -> float:
    """Over the median duration, as the summary has it."""
    typical = float(np.median([trial.duration_ns for trial in strategy.trials]))
    return _count(strategy.trials[0], what) / typical * _per(strategy)


def _per(strategy: Strategy) -> float:
    return UNIT_NS if strategy.in_steps else 1e9


def _count(trial: Recording, what: str) -> int:
    tokens = trial.requests.output_tokens
    return int(tokens.sum()) if what == "tokens" else len(tokens)


def _speedup(baseline: Strategy, candidate: Strategy) -> Ratio | None:
    """Output throughput against the baseline's, over the trials that have a partner."""
    pairs = min(len(baseline.trials), len(candidate.trials))
    return paired_ratio(
        _rates(candidate, "tokens")[:pairs].tolist(), _rates(baseline, "tokens")[:pairs].tolist()
    )


def _ratio(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.2f}×"
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def _throughput_headline(strategies: Sequence[Strategy]) -> str:
    per = "step" if strategies[0].in_steps else "second"
    baseline, candidate = strategies[0], strategies[-1]
    ratio = _speedup(baseline, candidate)
    if candidate is baseline or ratio is None:
        rate = spell_number(_typical_rate(baseline, "tokens"))
        return f"{baseline.called} yields {rate} output tokens per {per}"
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        return f"No clear difference in throughput between {candidate.called} and {baseline.called}"
    if f"{ratio.median:.2f}" == "1.00":
        return f"{candidate.called} and {baseline.called} are equally fast"
    return (
        f"{candidate.called} yields {ratio.median:.2f}× the output tokens per {per} "
        f"of {baseline.called}"
    )


def _throughput_notes(strategies: Sequence[Strategy]) -> str:
    trials = len(strategies[0].trials)
    if trials == 1:
        notes = "One trial: no interval."
    else:
        notes = f"Bar: median of {trials} trials. Dot: one trial, the first on top."
    if trials >= FEWEST_PAIRS:
        notes += " Whisker: 95 % interval of the mean."
    elif trials > 1:
        notes += f" No interval below {FEWEST_PAIRS} trials."
    if len(strategies) > 1 and trials > 1:
        notes += " ×: median ratio of paired trials"
        notes += " (95 % interval)." if trials >= FEWEST_PAIRS else "."
    return notes
