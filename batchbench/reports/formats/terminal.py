"""The result on a terminal: the sentence, then one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.batching.policies import POLICIES
from batchbench.reports.result import Result, ratio_of
from batchbench.reports.side_by_side import FIGURES, SideBySide
from batchbench.reports.statistics import FEWEST_PAIRS, Ratio
from batchbench.reports.text import called, decimals_of, fixed, number
from batchbench.reports.time_budget import CAUSES, NAMES

_SAVED = CAUSES | {"useful_decode_s": "cheaper steps for the same tokens"}

_LOST = CAUSES | {"useful_decode_s": "dearer steps for the same tokens"}

MENTIONED = 0.05
"""Effects smaller than this share of the whole difference are not put into words."""

EQUAL = 0.005
"""A difference smaller than this share of the baseline's time has no causes worth words."""


def causes(result: Result) -> list[str]:
    """A line a candidate: what the time that it saved or lost was."""
    explain: Any = result.data["explain"]
    lines = []
    for fall in explain["waterfall"]:
        whole = explain["strategies"][fall["baseline"]]["wall_s"]
        if abs(fall["saved_s"]) >= EQUAL * whole:
            lines.append(_cause(fall, several=len(explain["waterfall"]) > 1))
    return lines


def _cause(fall: Mapping[str, Any], *, several: bool) -> str:
    whole = fall["saved_s"]
    sign = 1 if whole > 0 else -1
    decimals = decimals_of(max(abs(whole), *(abs(step["saved_s"]) for step in fall["steps"])))

    def spelt(sign: int, words: Mapping[str, str]) -> str:
        effects = sorted((-sign * step["saved_s"], step["part"]) for step in fall["steps"])
        told = [(-s, part) for s, part in effects if -s >= MENTIONED * abs(whole)]
        return ", ".join(f"{s:,.{decimals}f} s {words[part]}" for s, part in told)

    words, other_words = (_SAVED, _LOST) if sign > 0 else (_LOST, _SAVED)
    verb, other = ("saved", "lost") if sign > 0 else ("lost", "saved")
    by = f" by {fall['candidate']}" if several else ""
    text = f"Of the {abs(whole):,.{decimals}f} s {verb}{by}: {spelt(sign, words)}"
    against = spelt(-sign, other_words)
    return f"{text}; {other}: {against}." if against else f"{text}."


def account_table(result: Result) -> Table:
    """Part × strategies in seconds, with shares where there is room; of two, what was saved."""
    explain = result.data["explain"]
    accounts: Mapping[str, Any] = explain["strategies"]
    shares, saved = len(accounts) < 3, len(explain["waterfall"]) == len(accounts) - 1 == 1
    grid = Table(
        title="Where the time went, in seconds",
        caption="; ".join(_notes(result)),
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    grid.add_column("Part", overflow="fold")
    for name in accounts:
        grid.add_column(name.replace("-", "-\n"), justify="right", overflow="fold")
        if shares:
            grid.add_column("%", justify="right", style="dim", overflow="fold")
    if saved:
        grid.add_column("saved", justify="right", overflow="fold")
    shortest = min((a["wall_s"] for a in accounts.values() if a), default=1.0)
    decimals = max(2, decimals_of(shortest))
    for part, label in {**NAMES, "wall_s": "wall time"}.items():
        each = {name: _value(account, part) for name, account in accounts.items()}
        if part not in ("residual_s", "wall_s") and not any(each.values()):
            continue
        if part == "wall_s":
            grid.add_section()
        cells = [label.capitalize()]
        for name, value in each.items():
            cells.append("N/A" if value is None else fixed(value, decimals))
            if shares:
                whole = accounts[name]["wall_s"] if accounts[name] else 0.0
                cells.append("" if value is None or not whole else f"{100 * value / whole:.1f}")
        if saved:
            before, after = each.values()
            assert before is not None  # there is a waterfall
            assert after is not None
            cells.append(fixed(before - after, decimals, sign="+"))
        grid.add_row(*cells)
    return grid


def _value(account: Mapping[str, Any] | None, part: str) -> float | None:
    if account is None:
        return None
    value: float = account["wall_s"] if part == "wall_s" else account["parts"][part]
    return value


def _notes(result: Result) -> list[str]:
    accounts = result.data["explain"]["strategies"]
    trials = len(result.recordings[result.names[0]])
    notes = []
    if trials > 1:
        notes.append("the trial of median duration" if trials % 2 else "mean of the middle trials")
    warm_up = next((a["warm_up_s"] for a in accounts.values() if a), None)
    if warm_up is not None:
        notes.append(f"before all trials a warm-up of {warm_up:.{decimals_of(warm_up)}f} s")
    hidden = [name for name, account in accounts.items() if account is None]
    if hidden:
        notes.append(f"{', '.join(hidden)} shows no steps")
    return notes


def sentence(result: Result, *, reasons: bool = True) -> str:
    """The answer in one sentence; ``reasons`` of a suspect run may be told elsewhere."""
    data = result.data
    parts = [_speed(result)]
    checked = data["verification"]
    if checked["requests_checked"]:
        parts.append(_outputs(checked))
    elif not data["simulated"]:
        parts.append("outputs not verified")
    validity = data["validity"]
    parts.append(f"run {validity['status']}")
    if validity["reasons"] and reasons:
        parts[-1] += f" ({'; '.join(validity['reasons'])})"
    return "; ".join(parts) + "."


def _speed(result: Result) -> str:
    comparison, strategies = result.data["comparison"], result.data["strategies"]
    if comparison is None:
        name = result.names[0]
        summary = strategies[name]["summary"]
        return (
            f"{called(name)} served {number(summary['completed'])} requests in "
            f"{number(summary['duration'])} s, {number(summary['output_throughput'])} output "
            "tokens/s"
        )
    if result.data["workload"]["arrival_rate"] is not None:
        return _latency(result)
    speedup = comparison["speedup"]
    who = called(comparison["candidate"])
    median, interval = speedup["median"], speedup["ci95"]
    than = "" if comparison["baseline"] == "static" else f" than {comparison['baseline']}"
    text = f"{who} was {_faster(median)}{than}"
    if result.data["simulated"]:
        text = f"in simulation, {_simulated_how(result)}, {text}"
    elif interval is None:
        pairs = len(result.recordings[comparison["candidate"]])
        text += f" ({pairs} pair{'s' * (pairs > 1)} of trials: too few for an interval)"
    else:
        low, high = sorted(bound ** (1 if median >= 1 else -1) for bound in interval)
        text += f" (95 % CI {low:.2f}–{high:.2f})"
    text += _against_the_best_static(result)
    if result.data["simulated"] and not result.data.get("cost"):
        return text
    alone = comparison["step_ratio"]
    return text if alone is None else f"{text}; the schedules alone give {alone:.2f}×"


def _simulated_how(result: Result) -> str:
    """Where a simulation has its time from."""
    cost = result.data.get("cost")
    return f"on the step costs of {cost['source']}" if cost else "where every step costs the same"


def _faster(ratio: float) -> str:
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def _against_the_best_static(result: Result) -> str:
    """What is left of the gain where static batching is at its best, if several forms ran."""
    statics = [name for name in result.names if name in POLICIES and name.startswith("static")]
    candidate = result.names[-1]
    if len(statics) < 2 or candidate in statics:
        return ""
    strategies = result.data["strategies"]
    best = min(statics, key=lambda name: float(strategies[name]["summary"]["duration"]))
    ratio = ratio_of(strategies, "duration", best, candidate)
    return "" if ratio is None else f", and {_faster(ratio.median)} than {best}, the best static"


def _latency(result: Result) -> str:
    """Of requests that come in their own time: how long they wait, which is what can differ."""
    rate = result.data["workload"]["arrival_rate"]
    strategies = result.data["strategies"]
    baseline, candidate = result.names[0], result.names[-1]
    low, high = (strategies[n]["summary"]["p99_ttft_ms"] for n in (candidate, baseline))
    text = (
        f"at {number(rate)} req/s p99 TTFT was {number(low)} ms under {called(candidate)}, "
        f"{number(high)} ms under {called(baseline)}"
    )
    good = [strategies[n]["summary"]["slo_attainment"] for n in (candidate, baseline)]
    shares = [f"{100 * share:.0f} %" for share in good if share is not None]
    if len(shares) < len(good):
        return text
    return f"{text}; {' against '.join(shares)} of requests within the SLOs"


def _outputs(checked: Mapping[str, Any]) -> str:
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
    value: Callable[[Mapping[str, Any]], float | None]


def _of_summary(label: str, unit: str, metric: str) -> _Row:
    return _Row(label, unit, metric, lambda strategy: strategy["summary"].get(metric))


def _of_counters(label: str, unit: str, value: Callable[[dict[str, int]], float]) -> _Row:
    return _Row(
        label, unit, None, lambda strategy: value(c) if (c := strategy["counters"]) else None
    )


def _share(summary: Mapping[str, Any]) -> float | None:
    share = summary["slo_attainment"]
    return None if share is None else 100 * share


_ROWS = (
    _of_summary("Duration", "s", "duration"),
    _of_summary("Output throughput", "tok/s", "output_throughput"),
    _of_summary("Request throughput", "req/s", "request_throughput"),
    _of_summary("Goodput", "req/s", "request_goodput"),
    _Row("Within SLOs", "%", None, lambda strategy: _share(strategy["summary"])),
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
    _of_summary("Energy", "J", "energy_joules"),
    _of_summary("Energy an output token", "J", "joules_per_output_token"),
    _of_summary("Cost of 1M output tok", "$", "cost_per_million_output_tokens"),
)

_ROWS_OF_ARRIVALS = (
    _of_summary("Queue time mean", "ms", "mean_queue_ms"),
    _of_summary("Queue time p99", "ms", "p99_queue_ms"),
    _of_summary("Arrival rate", "req/s", "arrival_rate"),
    _of_summary("Arrival lag mean", "ms", "mean_arrival_lag_ms"),
    _of_summary("Arrival lag p99", "ms", "p99_arrival_lag_ms"),
)
"""Of workloads whose requests are not all there at the start."""


def _rows_of_lengths(result: Result) -> list[_Row]:
    """Mean slow-down of each class of output lengths, where there are several."""
    classes = result.data["strategies"][result.names[0]]["by_output_length"]
    rows = []
    for i, found in enumerate(classes if len(classes) > 1 else []):
        low, high = found["min_output_tokens"], found["max_output_tokens"]
        name = f"{low:,}" if low == high else f"{low:,}–{high:,}"

        def value(strategy: Mapping[str, Any], i: int = i) -> float | None:
            mean: float | None = strategy["by_output_length"][i]["mean_slowdown"]
            return mean

        rows.append(_Row(f"Slow-down {name} tok", "×", None, value))
    return rows


def cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """The table as text: its head, and a row a metric; of two strategies their ratio beside."""
    strategies, names = result.data["strategies"], result.names
    beside = len(names) == 2
    head = ["Metric", "Unit", *names, *([f"÷ {names[0]}"] if beside else [])]
    rows = [*_ROWS, *_rows_of_lengths(result)]
    if not result.data["workload"]["closed"]:
        rows += _ROWS_OF_ARRIVALS
    found = []
    for row in rows:
        values = {name: row.value(strategies[name]) for name in names}
        if all(value is None for value in values.values()):
            continue
        texts = [row.label, row.unit, *(number(values[name]) for name in names)]
        found.append([*texts, *([_against(result, row, values, *names)] if beside else [])])
    return head, found


def table(result: Result) -> Table:
    """Metric × strategies; of two the second's ratio to the first stands beside it."""
    names = result.names
    grid = Table(
        title=result.title,
        caption="; ".join(notes(result)) or None,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        box=box.HEAVY_HEAD if len(names) < 3 else box.SIMPLE_HEAD,
        padding=(0, 1) if len(names) < 3 else (0, 1, 0, 0),
        collapse_padding=len(names) > 2,
    )
    head, rows = cells(result)
    grid.add_column("Metric", overflow="fold")
    grid.add_column("Unit", style="dim", overflow="fold")
    for name in head[2:]:
        # A name of several words takes a line a word: five strategies fit into 80 columns.
        name = name if name.startswith("÷") else name.replace("-", "-\n")
        grid.add_column(name, justify="right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def notes(result: Result) -> list[str]:
    """What a reader of the table should know of its numbers."""
    trials = len(result.recordings[result.names[0]])
    if result.data["simulated"]:
        fitted = result.data.get("cost") is not None
        return [f"simulated: {'step costs are fitted' if fitted else 'a step counts as 1 ms'}"]
    if len(result.names) < 2:
        return []
    told = [f"median and pool of {trials} trial{'s' * (trials > 1)}"]
    if len(result.names) == 2:
        told.append("÷ is the median of paired trials" + " (95 % CI)" * (trials >= FEWEST_PAIRS))
    return told


_COMPARED = (
    _of_summary("Duration", "", "duration"),
    _of_counters("Passes", "", lambda c: c["forward_passes"]),
    _of_summary("TTFT p99", "", "p99_ttft_ms"),
    _of_summary("E2E p99", "", "p99_e2el_ms"),
)


def comparisons(result: Result) -> Table:
    """Each strategy's ratios to the baseline, a line a strategy."""
    strategies, names = result.data["strategies"], result.names
    trials = len(result.recordings[names[0]])
    grid = Table(
        title=f"÷ {names[0]}",
        caption="medians of paired trials" if trials > 1 else None,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    grid.add_column("Strategy", overflow="fold")
    for row in _COMPARED:
        grid.add_column(row.label, justify="right", overflow="fold")
    for name in names[1:]:
        cells = []
        for row in _COMPARED:
            values = {n: row.value(strategies[n]) for n in (names[0], name)}
            cells.append(_against(result, row, values, names[0], name))
        grid.add_row(name, *cells)
    return grid


def stall_lines(result: Result) -> list[str]:
    """The longest stall of each strategy that has any, and which step it was."""
    lines = []
    for name in result.names:
        for stall in result.data["strategies"][name]["stalls"][:1]:
            whose = f"{stall['requests']:,} request{'s' * (stall['requests'] > 1)}"
            at = "" if stall["step"] is None else f"step {stall['step']:,}, "
            lines.append(
                f"Longest stall, {name}: {number(stall['gap_ms'])} ms between two tokens of "
                f"{whose}: {at}{stall['cause']}"
            )
    return lines


def floor_lines(result: Result) -> list[str]:
    """How near each strategy's decode steps come to what memory allows, where that is known."""
    lines = []
    for name in result.names:
        found = result.data["strategies"][name].get("decode_step")
        if found is not None:
            rows = f"{found['rows']:,} row{'s' * (found['rows'] != 1)}"
            read, speed = found["read_bytes"] / 1e6, number(found["bytes_per_s"] / 1e9)
            lines.append(
                f"Decode step, {name}: {number(found['took_ms'])} ms for {rows}, "
                f"{found['floor_share']:.0%} of the floor: its {read:,.0f} MB take at least "
                f"{number(found['floor_ms'])} ms at {speed} GB/s"
            )
    return lines


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


def render(result: Result) -> RenderableType:
    """The sentence and what it comes from, tables, the account of the time, stalls."""
    status = result.data["validity"]["status"]
    wrong = result.data["verification"]["passed"] is False
    style = "bold red" if wrong else "bold" if status == "valid" else "bold yellow"
    parts: list[RenderableType] = [Text(sentence(result), style=style)]
    parts += [*map(Text, causes(result)), Text(), table(result)]
    if len(result.names) > 2:
        parts += [Text(), comparisons(result)]
    parts += [Text(), account_table(result)]
    for lines in (floor_lines(result), stall_lines(result), prediction_lines(result)):
        parts += [Text(), *map(Text, lines)] if lines else []
    return Group(*parts)


def prediction_lines(result: Result) -> list[str]:
    """Predicted beside measured, and how well the cost of a step is known."""
    found: Any = result.data.get("prediction")
    told = [
        f"Predicted from the steps of {found['fitted_on']}: {each['strategy']} takes "
        f"{number(each['duration'])} s; measured {number(each['measured_duration'])} s "
        f"({each['error']:+.1%})."
        for each in (_predicted(found) if found else ())
    ]
    return told + fit_lines(result)


def fit_lines(result: Result) -> list[str]:
    """Where a prediction goes beyond what taught it, and how well the fit tells steps held out."""
    found = result.data.get("prediction")
    lines = _extrapolation(cost["extrapolates"] if (cost := result.data.get("cost")) else [])
    if found is None:
        return lines
    for told in _predicted(found):
        lines += _extrapolation(told["extrapolates"])
    held = found["held_out"]
    r2 = "" if held["r2"] is None else f"R² {held['r2']:.2f}, "
    lines.append(
        f"Of the {held['steps']:,} steps of {found['fitted_on']}, held out in turn: {r2}a step is "
        f"off by {held['median_error']:.1%} (median), all together by {held['total_error']:+.1%}."
    )
    return lines


def _predicted(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The strategies that were not fitted themselves; if there are none, the one that was."""
    strategies: list[Mapping[str, Any]] = found["strategies"]
    return [s for s in strategies if s["strategy"] != found["fitted_on"]] or strategies


def _extrapolation(reasons: list[str]) -> list[str]:
    return [f"Beyond what the fit saw: {'; '.join(reasons)}."] if reasons else []


def render_side_by_side(together: SideBySide) -> RenderableType:
    """The sentence, the settings that vary, a line a result and strategy."""
    parts: list[RenderableType] = [Text(together.sentence, style="bold"), Text()]
    if together.settings:
        settings = _grid("What differs", ["Setting", *together.labels], left=99)
        for name, values in together.settings:
            settings.add_row(*map(Text, (name, *values)))
        parts += [settings, Text()]
    # Units stand in the head's second line; a table of five figures fits into 80 columns.
    names = [name.replace(" (", "\n(") for name, _ in FIGURES[:3]]
    figures = _grid("Side by side", ["Result", "Strategy", "Speed-up", *names], left=2)
    for line in together.lines:
        mark = "" if line.status == "valid" else f" ({line.status})"
        figures.add_row(
            *map(Text, (line.label + mark, line.strategy, line.speedup, *line.figures[:3]))
        )
    return Group(*parts, figures)


def _grid(title: str, head: list[str], left: int) -> Table:
    grid = Table(
        title=title,
        title_style="bold",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    for i, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    return grid
