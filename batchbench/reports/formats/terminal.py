"""The result on a terminal: the answer, its causes and a table; with ``verbose`` everything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.batching.policies import POLICIES
from batchbench.batching.trials import servings_note
from batchbench.reports.prediction import describe_fit, is_weak
from batchbench.reports.result import Result, ratio_of
from batchbench.reports.result_data import StrategyData, VerificationFacts
from batchbench.reports.served import agreement_words, server_lines
from batchbench.reports.side_by_side import HEAD, SideBySide
from batchbench.reports.statistics import FEWEST_PAIRS
from batchbench.reports.text import (
    MISSING,
    called,
    decimals_of,
    fixed,
    number,
    percent,
    plural,
    span,
    spell_ratio,
    times,
)
from batchbench.reports.time_budget import LOST_TO, NAMES, SAVED_BY

MENTIONED = 0.05
"""Parts below this share of the whole difference are not put into words."""

EQUAL = 0.005
"""Differences below this share of the baseline's time are not explained."""

_COST = "cost_per_million_output_tokens"


# The sentence


def sentence(result: Result, *, reasons: bool = True) -> str:
    """Return the answer in one sentence, with the ``reasons`` of a suspect run or without."""
    return f"{_answer(result)}; {_trust(result, reasons=reasons)}."


def _trust(result: Result, *, reasons: bool) -> str:
    """Return words on the outputs and on the validity of a run."""
    data = result.data
    agreement, checked, validity = data.get("agreement"), data["verification"], data["validity"]
    parts = []
    if checked["requests_checked"]:
        parts.append(_outputs(checked, served=result.served))
    if agreement is not None:
        parts.append(agreement_words(data, agreement))
    if not (parts or data["simulated"]):
        parts.append("outputs not verified")
    why = f" ({'; '.join(validity['reasons'])})" if validity["reasons"] and reasons else ""
    return "; ".join([*parts, f"run {validity['status']}{why}"])


def as_fast(ratio: float, candidate: str, baseline: str, interval: str = "") -> str:
    """Return "A was 3.08× as fast as B", with an interval in brackets or without."""
    if f"{ratio:.2f}" == "1.00":
        interval = f"1.00×, {interval}" if interval else "1.00×"
        return f"{candidate} and {baseline} showed no difference ({interval})"
    text = f"{candidate} was {times(ratio)} as fast as {baseline}"
    return f"{text} ({interval})" if interval else text


def _answer(result: Result) -> str:
    data = result.data
    comparison, simulated, cost = data["comparison"], data["simulated"], data.get("cost")
    if comparison is None:
        name = result.names[0]
        summary = data["strategies"][name]["summary"]
        return (
            f"{called(result.label(name))} served {number(summary['completed'])} requests in "
            f"{number(summary['duration'])} s, {number(summary['output_throughput'])} output "
            "tokens/s"
        )
    if data["workload"]["arrival_rate"] is not None:
        return _latency(result)
    interval, ci95 = "", comparison["speedup"]["ci95"]
    if not simulated and ci95:
        interval = "95 % CI {:.2f}–{:.2f}".format(*ci95)
    elif not simulated:
        pairs = len(result.recordings[comparison["candidate"]])
        interval = f"{plural(pairs, 'pair')} of trials: too few for an interval"
    candidate, baseline = (
        called(result.label(comparison[side])) for side in ("candidate", "baseline")
    )
    fast = as_fast(comparison["speedup"]["median"], candidate, baseline, interval)
    text = _simulation(result) + fast + _other_candidates(result)
    ratio = comparison["step_ratio"]
    if ratio is None or (simulated and not cost):
        return text
    how = "the schedules alone would give"
    if not result.served:
        how = "counting steps only:"
    elif comparison.get("step_ratio_source") == "server":
        how = "by the server's own count of forward passes:"
    return f"{text}; {how} {times(ratio)}"


def _simulation(result: Result) -> str:
    """Return words that begin the answer of a simulation; none for a run."""
    if cost := result.data.get("cost"):
        return f"in simulation, with the step costs of {cost['source']}, "
    if not result.data["simulated"]:
        return ""
    timed = result.data["workload"]["arrival_rate"] is not None
    return f"in simulation, where every step {'takes 1 ms' if timed else 'costs the same'}, "


def _other_candidates(result: Result) -> str:
    *others, last = result.data["comparisons"]
    if not others:
        return ""
    text, strategies = "", result.data["strategies"]
    statics = [name for name in result.names if name in POLICIES and name.startswith("static")]
    if len(statics) > 1 and last["candidate"] not in statics:
        best = min(statics, key=lambda name: strategies[name]["summary"]["duration"])
        ratio = ratio_of(strategies, "duration", best, last["candidate"])
        if ratio is not None and best != last["baseline"]:
            speed = times(ratio.median)
            text = f", and {'' if speed == '1.00×' else f'{speed} '}as fast as {best}"
            text += ", the fastest form of static batching"
    listed = ", ".join(f"{c['candidate']} {times(c['speedup']['median'])}" for c in others)
    return f"{text}; the others over {last['baseline']}: {listed}"


def _latency(result: Result) -> str:
    rate = result.data["workload"]["arrival_rate"]
    strategies = result.data["strategies"]
    baseline, *others, candidate = result.names
    order = (candidate, baseline, *others)
    words = [name if name in others else called(result.label(name)) for name in order]
    waits = [number(strategies[name]["summary"]["p99_ttft_ms"]) for name in order]
    under = (f"{wait} ms under {name}" for wait, name in zip(waits, words, strict=True))
    text = f"{_simulation(result)}at {number(rate)} req/s, p99 TTFT was {', '.join(under)}"
    good, base = (strategies[name]["summary"]["slo_attainment"] for name in order[:2])
    if good is None or base is None:
        return text
    return f"{text}; {percent(good)} against {percent(base)} of requests within the SLOs"


def _outputs(checked: VerificationFacts, *, served: bool) -> str:
    total, own = checked["requests_checked"], " to unbatched generation" * served
    text = f"outputs identical{own} for {checked['identical']}/{total} requests"
    if checked["numerical_ties"]:
        ties = plural(checked["numerical_ties"], "numerical tie")
        text += f", {ties} (logits {checked['max_logit_gap']:.2g} apart at most)"
    if checked["wrong"]:
        first = next(f for f in checked["findings"] if f["verdict"] == "wrong")
        text += (
            f", {checked['wrong']} WRONG (first: request {first['request']} under "
            f"{first['strategy']}, {first['reason']})"
        )
    return text


def causes(result: Result) -> list[str]:
    """Return a line per candidate on where it saved or lost time."""
    explain, comparison = result.data["explain"], result.data["comparison"]
    interval = comparison["speedup"]["ci95"] if comparison else None
    if interval and interval[0] <= 1 <= interval[1] and not result.data["simulated"]:
        return []  # no difference was shown, so there is none to explain
    lines = []
    for fall in explain["waterfall"]:
        whole, before = fall["saved_s"], explain["strategies"][fall["baseline"]]
        if before and abs(whole) < EQUAL * before["wall_s"]:
            continue
        saved = {step["part"]: step["saved_s"] for step in fall["steps"]}
        decimals = decimals_of(max(map(abs, [whole, *saved.values()])))
        told = {part: s for part, s in saved.items() if abs(s) >= MENTIONED * abs(whole)}
        # The largest cause comes first: savings of a faster candidate, losses of a slower one.
        effects = [
            (told[part], SAVED_BY[part] if told[part] > 0 else LOST_TO[part])
            for part in sorted(told, key=told.__getitem__, reverse=whole > 0)
        ]
        rest = whole - sum(told.values())
        if fixed(abs(rest), decimals) != fixed(0, decimals):
            effects.append((rest, "elsewhere"))
        verb, total = "saved" if whole > 0 else "lost", fixed(abs(whole), decimals)
        parts = (
            f"{fixed(abs(part), decimals)} s {'saved' if part > 0 else 'lost'} {words}"
            for part, words in effects
        )
        head = f"{fall['candidate']} {verb} {total} s against {fall['baseline']}"
        lines.append(f"{head}: {', '.join(parts)}.")
    return lines


# Tables


def make_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    left: int = 1,
    notes: Sequence[str] = (),
    framed: bool = False,
) -> Table:
    """Return a table whose first ``left`` columns are texts and the others numbers.

    Args:
        head: names of columns; "%" and "Unit" are drawn faintly.
        notes: sentences below the table.
        framed: lines around and between the columns.
    """
    table = Table(
        title=title,
        caption="; ".join(notes) or None,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        box=box.HEAVY_HEAD if framed else box.SIMPLE_HEAD,
        padding=(0, 1) if framed else (0, 1, 0, 0),
        collapse_padding=not framed,
    )
    for i, name in enumerate(head):
        style = "dim" if name in ("%", "Unit") else ""
        # A strategy of two words takes two lines: five strategies fit into 80 columns.
        text = Text(re.sub(r"-(?=\w{4})", "-\n", name) if i >= left else name)
        justify: Any = "left" if i < left else "right"
        table.add_column(text, justify=justify, style=style, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


class _Row(NamedTuple):
    label: str
    unit: str
    metric: str | int  # of the summary or the counters; or the index of a class of lengths
    note: str = ""  # the reason why the row is there, or its meaning


_ROWS = (
    _Row("Duration", "s", "duration"),
    _Row("Output throughput", "tok/s", "output_throughput"),
    _Row("Request throughput", "req/s", "request_throughput"),
    _Row("Goodput", "req/s", "request_goodput", "goodput: requests that met every SLO"),
    _Row("Within SLOs", "%", "slo_attainment"),
    _Row("TTFT mean", "ms", "mean_ttft_ms"),
    _Row("TTFT p99", "ms", "p99_ttft_ms"),
    _Row("TPOT mean", "ms", "mean_tpot_ms"),
    _Row("ITL median", "ms", "median_itl_ms"),
    _Row("ITL p99", "ms", "p99_itl_ms"),
    _Row("E2E latency mean", "ms", "mean_e2el_ms"),
    _Row("E2E latency p99", "ms", "p99_e2el_ms"),
    _Row("Forward passes", "", "forward_passes"),
    _Row("Slot utilisation", "%", "utilisation"),
    _Row("KV cache peak", "tok", "kv_tokens_peak"),
    _Row("Energy", "J", "energy_joules", "energy: from the machine's own counters"),
    _Row("Energy per output token", "J", "joules_per_output_token"),
    _Row("Cost of 1M output tok", "$", _COST, "cost: from --price-per-hour"),
)

_ROWS_OF_ARRIVALS = (
    _Row("Queue time mean", "ms", "mean_queue_ms", "queue time: arrival to first step"),
    _Row("Queue time p99", "ms", "p99_queue_ms"),
    _Row("Arrival rate", "req/s", "arrival_rate"),
    _Row("Arrival lag mean", "ms", "mean_arrival_lag_ms", "arrival lag: from due to noticed"),
    _Row("Arrival lag p99", "ms", "p99_arrival_lag_ms"),
)
"""Rows of workloads whose requests arrive over time."""

_COMPARED = (
    _Row("Duration", "", "duration"),
    _Row("Passes", "", "forward_passes"),
    _Row("TTFT p99", "", "p99_ttft_ms"),
    _Row("E2E p99", "", "p99_e2el_ms"),
)

_MOST_TELLING = (
    *("output_throughput", "duration", "p99_ttft_ms", "slo_attainment", "request_goodput", _COST),
    *("mean_ttft_ms", "mean_tpot_ms", "p99_e2el_ms", "forward_passes", "utilisation"),
    "mean_e2el_ms",
)
MOST_ROWS = 10
"""The rows of a short table: the first ten that are known."""


def _rows_of(result: Result) -> list[_Row]:
    strategies = result.data["strategies"]
    classes = strategies[result.names[0]]["by_output_length"]
    rows = list(_ROWS)
    for i, length in enumerate(classes if len(classes) > 1 else []):
        low, high = length["min_output_tokens"], length["max_output_tokens"]
        note = "" if i else "E2E ÷ unloaded: latency over that of the same request alone"
        rows.append(_Row(f"E2E ÷ unloaded, {span(low, high)} tok", "×", i, note))
    rows += () if result.data["workload"]["closed"] else _ROWS_OF_ARRIVALS
    known = strategies.values()
    return [row for row in rows if any(_value(strategy, row) is not None for strategy in known)]


def _value(strategy: StrategyData, row: _Row) -> float | None:
    metric, counters = row.metric, strategy["counters"]
    value: float | None
    if isinstance(metric, int):
        value = strategy["by_output_length"][metric]["mean_slowdown"]
    elif metric == "utilisation":
        value = counters["useful_slot_steps"] / counters["slot_steps"] if counters else None
    elif metric == "forward_passes" and not counters:
        value = strategy.get("computed_passes")
    else:
        known: dict[str, Any] = {**(counters or {}), **strategy["summary"]}
        value = known.get(metric)
    return 100 * value if value is not None and row.unit == "%" else value


def figures(
    result: Result, *, verbose: bool = True
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the main table as text: its head, a row per metric, and notes on the numbers.

    Of two strategies it also has their ratio. It is short unless it is ``verbose``.
    """
    strategies, names, shown = result.data["strategies"], result.names, _rows_of(result)
    if not verbose:
        known = {row.metric for row in shown}
        telling = [metric for metric in _MOST_TELLING if metric in known][:MOST_ROWS]
        shown = [row for row in shown if row.metric in telling]
    labels, two = [result.label(name) for name in names], len(names) == 2
    rows = []
    for row in shown:
        values = [number(_value(strategies[name], row)) for name in names]
        ratio = [_ratio(result, row, *names)] if two else []
        rows.append([row.label, row.unit, *values, *ratio])
    head = ["Metric", "Unit", *labels, *([f"÷ {labels[0]}"] if two else [])]
    return head, rows, [*_notes(result), *(row.note for row in shown if row.note)]


def _ratio(result: Result, row: _Row, baseline: str, name: str) -> str:
    """Return the ratio of two strategies: paired where trials were measured, else plain."""
    strategies = result.data["strategies"]
    measured = row.metric in strategies[name]["summary"] and row.unit != "%"
    if isinstance(row.metric, str) and measured and row.metric != _COST:
        return spell_ratio(ratio_of(strategies, row.metric, name, baseline))
    above, below = (_value(strategies[side], row) for side in (name, baseline))
    return times(above / below if above and below else None)


def _notes(result: Result) -> list[str]:
    strategies, trials = result.data["strategies"], len(result.recordings[result.names[0]])
    lines = []
    if result.data["simulated"]:
        fitted = result.data.get("cost") is not None
        lines.append(f"simulated: {'step costs are fitted' if fitted else 'a step counts as 1 ms'}")
    elif len(result.names) > 1:
        lines.append(f"medians of {trials} trials, latencies pooled" if trials > 1 else "one trial")
        if len(result.names) == 2:
            interval = " (95 % CI)" * (trials >= FEWEST_PAIRS)
            lines.append(f"÷ is the median of paired trials{interval}")
    note = servings_note({name: data.get("servings", 1) for name, data in strategies.items()})
    lines += [] if note is None else [note]
    classes = strategies[result.names[0]]["by_output_length"]
    if result.served and all(length["mean_slowdown"] is None for length in classes):
        lines.append("each output came in one piece: ITL, TPOT and E2E ÷ unloaded are not known")
    return lines


def table(result: Result, *, verbose: bool = True) -> Table:
    head, rows, notes = figures(result, verbose=verbose)
    framed = len(result.names) < 3
    return make_table(result.title, head, rows, left=2, notes=notes, framed=framed)


def comparisons(result: Result) -> Table:
    baseline, *others = result.names
    several = len(result.recordings[baseline]) > 1
    return make_table(
        f"÷ {result.label(baseline)}",
        ["Strategy", *(row.label for row in _COMPARED)],
        [[name, *(_ratio(result, row, baseline, name) for row in _COMPARED)] for name in others],
        notes=["medians of paired trials"] if several else [],
    )


def time_budget_table(result: Result) -> Table:
    """Return part × strategies in seconds, with shares where there is room; of two also saved."""
    explain = result.data["explain"]
    budgets: dict[str, Any] = {
        name: budget and {**budget["parts"], "wall_s": budget["wall_s"]}
        for name, budget in explain["strategies"].items()
    }
    shares, saved = len(budgets) < 3, len(explain["waterfall"]) == len(budgets) - 1 == 1
    walls = [budget["wall_s"] for budget in budgets.values() if budget]
    decimals = max(2, decimals_of(min(walls, default=1.0)))
    rows = []
    for part, label in {**NAMES, "wall_s": "wall time"}.items():
        seconds = [budget and budget[part] for budget in budgets.values()]
        if part != "residual_s" and not any(seconds):
            continue
        row = [label.capitalize()]
        for value, budget in zip(seconds, budgets.values(), strict=True):
            row.append(MISSING if value is None else fixed(value, decimals))
            if shares:
                row.append(f"{100 * value / budget['wall_s']:.1f}" if budget else "")
        if saved:
            row.append(fixed(seconds[0] - seconds[1], decimals, sign="+"))
        rows.append(row)
    columns = [head for name in budgets for head in ([name, "%"] if shares else [name])]
    head, title = ["Part", *columns, *["saved"] * saved], "Where the time went, in seconds"
    notes, trials = [], len(result.recordings[result.names[0]])
    if trials > 1:
        notes.append("the trial of median duration" if trials % 2 else "mean of the middle trials")
    warm_up = next((one["warm_up_s"] for one in explain["strategies"].values() if one), None)
    if warm_up is not None:
        notes.append(f"a warm-up of {fixed(warm_up, decimals_of(warm_up))} s ran before all trials")
    if hidden := [name for name, budget in budgets.items() if budget is None]:
        verb = "logs" if len(hidden) == 1 else "log"
        notes.append(f"{', '.join(hidden)} {verb} no steps")
    table = make_table(title, head, rows, notes=notes)
    for row_above in table.rows[-2:-1]:
        row_above.end_section = True  # a line above the total
    return table


# Lines below the tables


def step_lines(result: Result) -> list[str]:
    """Return each strategy's decode step beside the limit of the memory, and its longest gap."""
    lines = []
    for name in result.names:
        step = result.data["strategies"][name].get("decode_step")
        if step is not None:
            read, speed = step["read_bytes"] / 1e6, number(step["bytes_per_s"] / 1e9)
            rows, share = plural(step["rows"], "row"), percent(step["floor_share"])
            lines.append(
                f"Decode step, {name}: {number(step['took_ms'])} ms for {rows}, {share} of the "
                f"memory-bandwidth limit: reading its {read:,.0f} MB at {speed} GB/s takes "
                f"{number(step['floor_ms'])} ms."
            )
    for name in result.names:
        for stall in result.data["strategies"][name]["stalls"][:1]:
            requests = plural(stall["requests"], "request")
            during = "" if stall["step"] is None else f"step {stall['step']:,}, which computed a "
            lines.append(
                f"Longest gap between two tokens, {result.label(name)}: "
                f"{number(stall['gap_ms'])} ms for {requests}, during {during}{stall['cause']}."
            )
    return lines


def prediction_lines(result: Result) -> list[str]:
    """Return predicted beside measured durations, and the quality of the fit."""
    prediction, cost = result.data.get("prediction"), result.data.get("cost")
    lines = _extrapolation(cost)
    if prediction is None:
        return lines
    fit, source = prediction["held_out"], prediction["fitted_on"]
    strategies = [] if is_weak(fit) else prediction["strategies"]
    for predicted in [one for one in strategies if one["strategy"] != source] or strategies:
        side = "below" if predicted["error"] < 0 else "above"
        lines.append(
            f"Predicted from the steps of {source}: {predicted['strategy']} takes "
            f"{number(predicted['duration'])} s, {percent(abs(predicted['error']), 1)} {side} the "
            f"measured {number(predicted['measured_duration'])} s."
        )
        lines += _extrapolation(predicted)
    return [*lines, describe_fit(fit, source)]


def _extrapolation(fitted: Mapping[str, Any] | None) -> list[str]:
    reasons = fitted["extrapolates"] if fitted else []
    return [f"Beyond the fitted range: {'; '.join(reasons)}."] if reasons else []


# The whole


def render(result: Result, *, verbose: bool = True) -> RenderableType:
    """Return the answer, its causes and a table of at most ten rows; everything if ``verbose``."""
    status = result.data["validity"]["status"]
    wrong = result.data["verification"]["passed"] is False
    style = "bold red" if wrong else "green" if status == "valid" else "bold yellow"
    answer, trust = _answer(result), _trust(result, reasons=True)
    parts: list[RenderableType] = [
        Text(f"{answer[:1].upper()}{answer[1:]}.", style="bold"),
        Text(f"{trust[:1].upper()}{trust[1:]}.", style=style),
        *(Text(f"Why: {line}") for line in causes(result)),
        Text(),
        table(result, verbose=verbose),
    ]
    if len(result.names) > 2:
        parts += [Text(), comparisons(result)]
    below = [server_lines(result.data) + _extrapolation(result.data.get("cost"))]
    if verbose:
        parts += [] if result.served else [Text(), time_budget_table(result)]
        below = [server_lines(result.data), step_lines(result), prediction_lines(result)]
    for lines in below:
        parts += [Text(), *map(Text, lines)] if lines else []
    return Group(*parts)


def render_side_by_side(together: SideBySide) -> RenderableType:
    parts: list[RenderableType] = [Text(together.sentence, style="bold"), Text()]
    if together.settings:
        head = ["Setting", *together.labels]
        parts += [make_table("What differs", head, together.settings, left=99), Text()]
    # Units stand in the second line of the head; a table of five figures fits into 80 columns.
    head = [name.replace(" (", "\n(") for name in HEAD[:6]]
    rows = []
    for label, *cells, status in together.rows:
        mark = "" if status == "valid" else f" ({status})"
        rows.append([label + mark, *cells[:5]])
    return Group(*parts, make_table("Side by side", head, rows, left=2))
