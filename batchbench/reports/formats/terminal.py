"""The result on a terminal: the sentence, then one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.comparison import FEWEST_PAIRS, Ratio
from batchbench.reports.result import Result, ratio_of

SUITED = {"static": "static batching", "continuous": "continuous batching"}


def sentence(result: Result) -> str:
    """The answer in one sentence."""
    data = result.data
    parts = [_speed(result)]
    checked = data["verification"]
    if checked["requests_checked"]:
        parts.append(_outputs(checked))
    elif not data["simulated"]:
        parts.append("outputs not verified")
    validity = data["validity"]
    parts.append(f"run {validity['status']}")
    if validity["reasons"]:
        parts[-1] += f" ({'; '.join(validity['reasons'])})"
    return "; ".join(parts) + "."


def _speed(result: Result) -> str:
    comparison = result.data["comparison"]
    if comparison is None:
        name = result.names[0]
        summary = result.data["strategies"][name]["summary"]
        return (
            f"{SUITED.get(name, name)} served {number(summary['completed'])} requests in "
            f"{number(summary['duration'])} s, {number(summary['output_throughput'])} output "
            "tokens/s"
        )
    speedup = comparison["speedup"]
    who = SUITED.get(comparison["candidate"], comparison["candidate"])
    median, interval = speedup["median"], speedup["ci95"]
    faster, sign = ("faster", 1) if median >= 1 else ("slower", -1)
    than = "" if comparison["baseline"] == "static" else f" than {comparison['baseline']}"
    text = f"{who} was {median**sign:.2f}× {faster}{than}"
    if result.data["simulated"]:
        cost = result.data.get("cost")
        how = (
            f"on the step costs of {cost['source']}" if cost else "where every step costs the same"
        )
        text = f"in simulation, {how}, {text}"
        return f"{text}; the schedules alone give {comparison['step_ratio']:.2f}×" if cost else text
    if interval is None:
        pairs = len(result.recordings[comparison["candidate"]])
        text += f" ({pairs} pair{'s' * (pairs > 1)} of trials: too few for an interval)"
    else:
        low, high = sorted(bound**sign for bound in interval)
        text += f" (95 % CI {low:.2f}–{high:.2f})"
    return f"{text}; the schedules alone give {comparison['step_ratio']:.2f}×"


def _outputs(checked: dict[str, Any]) -> str:
    total = checked["requests_checked"]
    text = f"outputs identical for {checked['identical']}/{total} requests"
    if checked["numerical_ties"]:
        ties, gap = checked["numerical_ties"], checked["max_logit_gap"]
        text += f", {ties} numerical tie{'s' * (ties > 1)} (logits {gap:.2g} apart at most)"
    if checked["wrong"]:
        first = next(f for f in checked["findings"] if f["verdict"] == "wrong")
        text += (
            f", {checked['wrong']} WRONG (first: request {first['request']} under "
            f"{first['strategy']}, {first['reason']})"
        )
    return text


class _Row(NamedTuple):
    label: str
    unit: str
    metric: str | None  # name in the summary, for the paired ratio
    value: Callable[[dict[str, Any]], float | None]


def _of_summary(label: str, unit: str, metric: str) -> _Row:
    return _Row(label, unit, metric, lambda strategy: strategy["summary"].get(metric))


def _of_counters(label: str, unit: str, value: Callable[[dict[str, int]], float]) -> _Row:
    return _Row(label, unit, None, lambda strategy: value(strategy["counters"]))


_ROWS = (
    _of_summary("Duration", "s", "duration"),
    _of_summary("Output throughput", "tok/s", "output_throughput"),
    _of_summary("Request throughput", "req/s", "request_throughput"),
    _of_summary("TTFT mean", "ms", "mean_ttft_ms"),
    _of_summary("TTFT p99", "ms", "p99_ttft_ms"),
    _of_summary("TPOT mean", "ms", "mean_tpot_ms"),
    _of_summary("ITL median", "ms", "median_itl_ms"),
    _of_summary("ITL p99", "ms", "p99_itl_ms"),
    _of_summary("E2E latency mean", "ms", "mean_e2el_ms"),
    _of_summary("E2E latency p99", "ms", "p99_e2el_ms"),
    _of_counters("Forward passes", "", lambda c: c["forward_passes"]),
    _of_counters("Slot utilisation", "%", lambda c: 100 * c["useful_slot_steps"] / c["slot_steps"]),
    _of_counters("KV cache peak", "tok", lambda c: c["kv_tokens_peak"]),
    _of_summary("Cost of 1M output tok", "$", "cost_per_million_output_tokens"),
)


def table(result: Result) -> Table:
    """Metric × strategies, and each strategy's ratio to the baseline with its interval."""
    strategies, names = result.data["strategies"], result.names
    trials = len(result.recordings[names[0]])
    notes = []
    if result.data["simulated"]:
        fitted = result.data.get("cost") is not None
        notes.append(f"simulated: {'step costs are fitted' if fitted else 'a step counts as 1 ms'}")
    elif len(names) > 1:
        notes.append(f"median and pool of {trials} trial{'s' * (trials > 1)}")
        notes.append("÷ is the median of paired trials" + " (95 % CI)" * (trials >= FEWEST_PAIRS))
    grid = Table(
        title=result.title,
        caption="; ".join(notes) or None,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
    )
    grid.add_column("Metric", overflow="fold")
    grid.add_column("Unit", style="dim")
    for name in names:
        grid.add_column(name, justify="right", overflow="fold")
        if name != names[0]:
            grid.add_column(f"÷ {names[0]}", justify="right", overflow="fold")
    for row in _ROWS:
        values = {name: row.value(strategies[name]) for name in names}
        if all(value is None for value in values.values()):
            continue
        cells = [row.label, row.unit]
        for name in names:
            cells.append(number(values[name]))
            if name != names[0]:
                cells.append(_against(result, row, values, names[0], name))
        grid.add_row(*cells)
    return grid


def _against(
    result: Result, row: _Row, values: dict[str, float | None], baseline: str, name: str
) -> str:
    """The ratio of two strategies: paired where trials were measured, plain where counted."""
    if row.metric is not None and row.metric != "cost_per_million_output_tokens":
        ratio = ratio_of(result.data["strategies"], row.metric, name, baseline)
        return "N/A" if ratio is None else _ratio(ratio)
    above, below = values[name], values[baseline]
    return f"{above / below:.2f}×" if above and below else "N/A"


def _ratio(ratio: Ratio) -> str:
    text = f"{ratio.median:.2f}×"
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} ({ratio.low:.2f}–{ratio.high:.2f})"


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; N/A where there is no meaning."""
    if value is None:
        return "N/A"
    if value == int(value) or abs(value) >= 999.95:
        return f"{value:,.0f}"
    decimals = 3 - (math.floor(math.log10(abs(value))) if abs(value) >= 1e-6 else -6)
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


def render(result: Result) -> RenderableType:
    """Sentence and table."""
    status = result.data["validity"]["status"]
    wrong = result.data["verification"]["passed"] is False
    style = "bold red" if wrong else "bold" if status == "valid" else "bold yellow"
    shown: list[RenderableType] = [Text(sentence(result), style=style), Text(), table(result)]
    told = prediction_lines(result)
    return Group(*shown, *([Text(), *map(Text, told)] if told else []))


def prediction_lines(result: Result) -> list[str]:
    """Predicted beside measured, and how well the cost of a step is known."""
    found = result.data.get("prediction")
    lines = _extrapolation((result.data.get("cost") or {}).get("extrapolates", []))
    if found is None:
        return lines
    others = [s for s in found["strategies"] if s["strategy"] != found["fitted_on"]]
    for told in others or found["strategies"]:
        lines.append(
            f"Predicted from the steps of {found['fitted_on']}: {told['strategy']} takes "
            f"{number(told['duration'])} s; measured {number(told['measured_duration'])} s "
            f"({told['error']:+.1%})."
        )
        lines += _extrapolation(told["extrapolates"])
    held = found["held_out"]
    r2 = "" if held["r2"] is None else f"R² {held['r2']:.2f}, "
    lines.append(
        f"Of its {held['steps']:,} steps, held out in turn: {r2}a step is off by "
        f"{held['median_error']:.1%} (median), all together by {held['total_error']:+.1%}."
    )
    return lines


def _extrapolation(reasons: list[str]) -> list[str]:
    return [f"Beyond what the fit saw: {'; '.join(reasons)}."] if reasons else []
