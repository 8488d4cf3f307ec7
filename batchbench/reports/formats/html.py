"""The page: one HTML file that holds everything, for a browser, for paper, to pass on.

It needs no network and works without JavaScript, which only adds zooming and the times of a bar of
the timeline. However large a run, the page stays small: its timelines have at most ``MOST_BARS``
bars together, and curves as many corners as a screen has pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from batchbench.reports.figures.card import Unit, capitalize, name_strategies
from batchbench.reports.figures.occupancy import which_trial
from batchbench.reports.figures.time_budget import STACKED, budgets_of, waterfalls
from batchbench.reports.formats import charts
from batchbench.reports.formats.terminal import (
    causes,
    cells,
    fit_lines,
    floor_lines,
    notes,
    sentence,
    side_by_side_cells,
    stall_lines,
)
from batchbench.reports.prediction import worth_showing
from batchbench.reports.result import Result
from batchbench.reports.side_by_side import Labelled, SideBySide
from batchbench.reports.text import clean_text, number
from batchbench.reports.time_budget import NAMES

MOST_BARS = 12_000
"""Bars of all timelines of a page together: 2 MB at most."""

FEWEST_BARS = 200
"""Bars that each timeline may have however many timelines there are."""

_CURVES = (
    ("ttft", "TTFT", "arrival to first token"),
    ("tpot", "TPOT", "time per later token"),
    ("itl", "ITL", "gap between two tokens"),
    ("e2el", "E2E latency", "arrival to last token"),
)


def render(shown: Sequence[Labelled]) -> str:
    """Return the page of one result, or of several side by side."""
    timelines = sum(len(one.result.names) for one in shown)
    most_bars = max(FEWEST_BARS, MOST_BARS // timelines)
    together = SideBySide(shown) if len(shown) > 1 else None
    most = max((line.throughput or 0.0 for line in together.lines), default=0) if together else 0
    title = " · ".join(one.label for one in shown) if together else shown[0].result.title
    head, rows = side_by_side_cells(together) if together else ([], [])
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=clean_text(title),
            together=together,
            setting_rows=[[name, *values] for name, values in together.settings]
            if together
            else [],
            figure_head=head,
            figure_rows=rows,
            most_throughput=most or 1.0,
            results=[_of_result(i, one, most_bars) for i, one in enumerate(shown)],
            version=shown[0].result.data["batchbench_version"],
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the templates; they escape every text, and an unknown name is an error."""
    loader = PackageLoader("batchbench.reports.formats", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["included"] = lambda name: Markup(loader.get_source(environment, name)[0])
    environment.globals["labels"] = {part: NAMES[part] for part in STACKED}
    environment.filters["number"] = number
    environment.filters["compact"] = lambda value: htmlsafe_json_dumps(
        value, separators=(",", ":"), allow_nan=False
    )
    return environment


def _of_result(index: int, one: Labelled, most_bars: int) -> dict[str, Any]:
    result, data = one.result, one.result.data
    strategies = name_strategies(result.recordings)
    timelines, window, ticks, unit = charts.draw_timelines(strategies, most_bars)
    levels, level_ticks = charts.draw_levels(strategies)
    head, rows = cells(result)
    budgets = budgets_of(strategies) if data.get("explain") else []
    longest = max((budget.wall_s for _, budget in budgets), default=0.0) or 1.0
    return {
        "id": f"r{index}",
        "label": one.label,
        "title": result.title,
        "data": data,
        "sentence": capitalize(sentence(result, reasons=False)),
        "causes": causes(result) if budgets else [],
        "names": result.names,
        "strategies": strategies,
        "head": head,
        "rows": rows,
        "notes": [*notes(result), *floor_lines(result), *stall_lines(result)],
        "timelines": timelines,
        "left_out": _left_out(result, timelines, window),
        "axis": {"window": window / 1000, "unit": unit.ns / 1000, "name": unit.name},
        "ticks": ticks,
        "trial": which_trial(strategies).strip(),
        "curves": [
            charts.draw_curves(strategies, [getattr(s.latencies, key) for s in strategies], *words)
            for key, *words in _CURVES
        ],
        "levels": levels,
        "level_ticks": level_ticks,
        "budgets": budgets,
        "waterfalls": waterfalls(budgets),
        "longest_s": longest,
        "unit": Unit.of(strategies, longest * 1e9),
        "prediction": [
            [
                p["strategy"],
                number(p["duration"]),
                number(p["measured_duration"]),
                f"{100 * p['error']:+.1f} %",
            ]
            for p in worth_showing(data.get("prediction"))
        ],
        "fit": fit_lines(result),
        "settings": _settings(data["config"]),
        "environment": _environment_rows(data),
    }


def _left_out(result: Result, timelines: Sequence[charts.Timeline], window: float) -> str:
    sentences = [
        f"{name} logs no steps, so its slots are not known."
        for name, trials in result.recordings.items()
        if not trials[0].has_steps
    ]
    slots = max((timeline.slots for timeline in timelines), default=0)
    if slots > charts.MOST_SLOTS:
        sentences.append(f"Only slots 0 to {charts.MOST_SLOTS - 1} of {slots:,} are shown.")
    if any(timeline.end_at is None for timeline in timelines):
        longest = max(r.duration_ns for trials in result.recordings.values() for r in trials)
        shown = 100 * window / longest
        part = f"{shown:.0f} %" if shown >= 1 else "less than 1 %"
        sentences.append(
            f"Only the beginning is shown, {part} of the time: "
            f"all {result.data['workload']['num_requests']:,} requests are in requests.csv."
        )
    return " ".join(sentences)


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that are not at their empty default."""
    return [
        (name.replace("_", " "), _spell(value))
        for part in config.values()
        for name, value in (part.items() if isinstance(part, Mapping) else ())
        if value not in (None, [], False, "")
    ]


def _environment_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = data["environment"]
    rows = [(name, value) for name, value in environment.items() if not isinstance(value, Mapping)]
    rows += list(environment.get("packages", {}).items())
    rows += [(f"model {name}", value) for name, value in data["model"].items()]
    return [(name.replace("_", " "), _spell(value)) for name, value in rows]


def _spell(value: Any) -> str:
    if value is None or value == "":
        return "N/A"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return ", ".join(map(_spell, value)) if isinstance(value, list) else str(value)
