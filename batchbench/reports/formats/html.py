"""The page: one HTML file that holds everything, for a browser, for paper, to pass on.

It asks nothing of the network and works without JavaScript, which adds only that one can ask a bar
of the timeline for its times and zoom. However large a run, the page stays small: its timelines
have at most ``MOST_BARS`` bars together, and curves as many corners as a screen has pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from batchbench.reports.figures.card import name_strategies
from batchbench.reports.figures.occupancy import which_trial
from batchbench.reports.formats import charts
from batchbench.reports.formats.terminal import (
    causes,
    cells,
    fit_lines,
    floor_lines,
    notes,
    sentence,
    stall_lines,
)
from batchbench.reports.latency import Latencies
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import FIGURES, Labelled, SideBySide
from batchbench.reports.text import clean_text, decimals_of, fixed, number
from batchbench.reports.time_budget import NAMES

MOST_BARS = 12_000
"""Bars of all timelines of a page together: 2 MB at most."""

FEWEST_BARS = 200
"""Bars that a timeline has room for however many there are: more than its lanes."""

_CURVES = (
    ("ttft", "TTFT", "arrival to first token"),
    ("tpot", "TPOT", "time per later token"),
    ("itl", "ITL", "gap between two tokens"),
    ("e2el", "E2E latency", "arrival to last token"),
)


@dataclass(frozen=True)
class _Part:
    """A part of the account: its key, share of the longest wall time, and the words for it."""

    key: str
    label: str
    share: float
    text: str


@dataclass(frozen=True)
class _Fall:
    """A row of a waterfall: from where to where, as shares of the widest row."""

    label: str
    look: str
    left: float
    width: float
    text: str


def render(shown: Sequence[Labelled]) -> str:
    """The page of one result, or of several side by side."""
    lanes = sum(len(one.result.names) for one in shown)
    most_bars = max(FEWEST_BARS, MOST_BARS // lanes)
    together = SideBySide(shown) if len(shown) > 1 else None
    most = max((line.throughput or 0.0 for line in together.lines), default=0) if together else 0
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=clean_text(
                " · ".join(one.label for one in shown) if together else shown[0].result.title
            ),
            together=together,
            figures=[name for name, _ in FIGURES],
            most_throughput=most or 1.0,
            results=[_of_result(i, one, most_bars) for i, one in enumerate(shown)],
            version=shown[0].result.data["batchbench_version"],
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """The templates; every text is escaped, and a name that is not there is an error."""
    loader = PackageLoader("batchbench.reports.formats", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["included"] = lambda name: Markup(loader.get_source(environment, name)[0])
    environment.filters["number"] = number
    environment.filters["compact"] = lambda value: htmlsafe_json_dumps(
        value, separators=(",", ":"), allow_nan=False
    )
    return environment


def _capital(text: str) -> str:
    """With a capital, unless it begins with somebody's own name."""
    ours = text.startswith(("static", "continuous", "in simulation", "at "))
    return text[0].upper() + text[1:] if ours else text


def _of_result(index: int, one: Labelled, most_bars: int) -> dict[str, Any]:
    """What the template shows of one result."""
    result, data = one.result, one.result.data
    strategies = name_strategies(result.recordings)
    timelines, window, ticks, unit = charts.draw_timelines(strategies, most_bars)
    levels, level_ticks = charts.draw_levels(strategies)
    pooled = [Latencies.pooled([Latencies.of(t) for t in s.trials]) for s in strategies]
    head, rows = cells(result)
    return {
        "id": f"r{index}",
        "label": one.label,
        "title": result.title,
        "sentence": _capital(sentence(result, reasons=False)),
        "causes": causes(result) if data.get("explain") else [],
        "tiles": _tiles(result),
        "status": data["validity"]["status"],
        "reasons": data["validity"]["reasons"],
        "strategies": strategies,
        "head": head,
        "rows": rows,
        "notes": notes(result),
        "lines": [*floor_lines(result), *stall_lines(result)],
        "timelines": timelines,
        "cut": _left_out(result, timelines, window),
        "axis": {"window": window / 1000, "unit": unit.ns / 1000, "name": unit.name},
        "ticks": ticks,
        "trial": which_trial(strategies).strip(),
        "curves": [
            charts.draw_curves(strategies, [getattr(p, key) for p in pooled], name, about)
            for key, name, about in _CURVES
        ],
        "levels": levels,
        "level_ticks": level_ticks,
        "accounts": _accounts(result),
        "falls": _falls(result),
        "prediction": data.get("prediction"),
        "fit": fit_lines(result),
        "settings": _settings(data["config"]),
        "environment": _environment_rows(data),
        "verification": _verification(data["verification"]),
        "command": data["command"],
        "created_at": data["created_at"],
        "simulated": data["simulated"],
    }


def _tiles(result: Result) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: name, value, what it is held against."""
    data, compared = result.data, result.data["comparison"]
    last = data["strategies"][result.names[-1]]
    if compared is None:
        tiles = []
    else:
        interval = compared["speedup"]["ci95"]
        spread = f"95 % CI {interval[0]:.2f}–{interval[1]:.2f}" if interval else "no interval"
        if data["simulated"]:
            spread = "simulated"
        tiles = [
            ("Speed-up", f"{compared['speedup']['median']:.2f}×", spread),
        ]
        if compared["step_ratio"] is not None:
            alone = f"{compared['step_ratio']:.2f}×"
            tiles.append(("By the schedules alone", alone, "fewer forward passes"))
    first = data["strategies"][result.names[0]]

    def beside(text: str) -> str:
        return f"{result.names[0]}: {text}" if compared else ""

    for name, metric, unit in (
        ("Output throughput", "output_throughput", "tok/s"),
        ("TTFT p99", "p99_ttft_ms", "ms"),
    ):
        value, other = (
            f"{number(cast('float | None', s['summary'].get(metric)))} {unit}"
            for s in (last, first)
        )
        tiles.append((name, value, beside(other)))
    shares = [
        f"{100 * c['useful_slot_steps'] / c['slot_steps']:.0f} %" if c else "N/A"
        for c in (last["counters"], first["counters"])
    ]
    tiles.append(("Slot utilisation", shares[0], beside(shares[1])))
    return tiles


def _left_out(result: Result, timelines: Sequence[charts.Timeline], window: int) -> str:
    """What a timeline does not show, in words."""
    told = [
        f"{name} shows no steps, so its slots are not known."
        for name, trials in result.recordings.items()
        if not trials[0].has_steps
    ]
    slots = max((timeline.slots for timeline in timelines), default=0)
    if slots > charts.MOST_LANES:
        told.append(f"Shown are slots 0 to {charts.MOST_LANES - 1} of {slots:,}.")
    longest = max(r.duration_ns for trials in result.recordings.values() for r in trials)
    if any(timeline.end_at is None for timeline in timelines):
        shown = 100 * window / longest
        part = f"{shown:.0f} %" if shown >= 1 else "less than 1 %"
        requests = result.data["workload"]["num_requests"]
        told.append(
            f"Of {requests:,} requests the beginning is shown, {part} of the time; "
            "requests.csv has them all."
        )
    return " ".join(told)


def _accounts(result: Result) -> list[dict[str, Any]]:
    """Each strategy's wall time in parts, as shares of the longest."""
    explain: Any = result.data.get("explain")
    accounts: Mapping[str, Any] = explain["strategies"] if explain else {}
    known = {name: account for name, account in accounts.items() if account}
    longest = max((account["wall_s"] for account in known.values()), default=0.0) or 1.0
    decimals = decimals_of(longest)
    shown = []
    for i, name in enumerate(result.names):
        if name not in known:
            continue
        wall = known[name]["wall_s"]
        parts = [
            _Part(
                key.removesuffix("_s"),
                label.capitalize(),
                max(0.0, known[name]["parts"][key]) / longest,
                f"{fixed(known[name]['parts'][key], decimals)} s, "
                f"{100 * known[name]['parts'][key] / (wall or 1.0):.1f} %",
            )
            for key, label in NAMES.items()
            if abs(known[name]["parts"][key]) >= 0.0005 * longest
        ]
        shown.append({"name": name, "series": i, "wall": number(wall), "parts": parts})
    return shown


def _falls(result: Result) -> list[dict[str, Any]]:
    """The waterfall from the baseline to each candidate."""
    explain: Any = result.data.get("explain")
    shown = []
    for fall in explain["waterfall"] if explain else ():
        whole = explain["strategies"][fall["baseline"]]["wall_s"]
        ends = whole - fall["saved_s"]
        edges, at = [whole, ends], whole
        told = [step for step in fall["steps"] if abs(step["saved_s"]) >= 0.001 * (whole or 1.0)]
        for step in told:
            at -= step["saved_s"]
            edges.append(at)
        widest, decimals = max(edges) or 1.0, decimals_of(max(edges))
        rows = [_Fall(fall["baseline"], "whole", 0, whole / widest, f"{number(whole)} s")]
        at = whole
        for step in told:
            saved = step["saved_s"]
            low = min(at, at - saved)
            rows.append(
                _Fall(
                    NAMES[step["part"]].capitalize(),
                    "saved" if saved > 0 else "lost",
                    max(0.0, low) / widest,
                    abs(saved) / widest,
                    f"{fixed(-saved, decimals, sign='+').replace('-', '−')} s",
                )
            )
            at -= saved
        rows.append(_Fall(fall["candidate"], "whole", 0, ends / widest, f"{number(ends)} s"))
        shown.append({"baseline": fall["baseline"], "candidate": fall["candidate"], "rows": rows})
    return shown


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, but for what was left alone."""
    rows = []
    for part in config.values():
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if value not in (None, [], False, ""):
                rows.append((name.replace("_", " "), _spelt(value)))
    return rows


def _environment_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and the model as it was found."""
    found = data["environment"]
    rows = [(name, value) for name, value in found.items() if not isinstance(value, Mapping)]
    rows += list(found.get("packages", {}).items())
    rows += [(f"model {name}", value) for name, value in data["model"].items()]
    return [(name.replace("_", " "), _spelt(value)) for name, value in rows]


def _spelt(value: Any) -> str:
    if value is None or value == "":
        return "N/A"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return ", ".join(map(_spelt, value)) if isinstance(value, list) else str(value)


def _verification(checked: Mapping[str, Any]) -> str:
    """What was checked of the outputs, and against what."""
    if not checked["requests_checked"]:
        return "Outputs were not checked."
    against = checked["reference"] or "each prompt generated alone"
    return (
        f"{checked['requests_checked']:,} requests checked against {against}: "
        f"{checked['identical']:,} identical, {checked['numerical_ties']:,} numerical ties, "
        f"{checked['wrong']:,} wrong."
    )
