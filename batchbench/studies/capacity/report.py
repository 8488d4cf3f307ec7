"""The report of a search for capacity: sentence, table, ``capacity.json`` and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.files import write_whole
from batchbench.reports.figures import figure_bytes
from batchbench.reports.figures.card import (
    FAINT,
    INK,
    WIDE,
    Strategy,
    add_line_legend,
    house_style,
    make_card,
    name_strategies,
    strip_axes,
)
from batchbench.reports.statistics import CONFIDENCE
from batchbench.reports.text import called, clean_text, number, percent, spell_number, times_within
from batchbench.studies.capacity.probe import GROWTH, Probe, Verdict
from batchbench.studies.capacity.search import Capacity, CapacityFindings
from batchbench.version import __version__

SCHEMA_VERSION = 1

_LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}


def sentence(findings: CapacityFindings) -> str:
    """Return the answer in one sentence."""
    query, checked = findings.query, findings.verification
    limits = " and ".join(
        f"{_LABELS[name]} ≤ {limit:g} ms" for name, limit in query.goals.limits_ms.items()
    )
    text = f"with {limits} for {100 * query.attainment:g} % of the requests, {_answer(findings)}"
    if findings.experiment.simulated:
        text = f"in simulation, {text}"
    if checked.requests_checked:
        text += f"; outputs identical for {checked.identical}/{checked.requests_checked} requests"
        if checked.numerical_ties:
            text += f", {checked.numerical_ties} numerical ties"
        if checked.wrong:
            text += f", {checked.wrong} WRONG"
    if findings.reasons:
        text += f"; suspect ({'; '.join(findings.reasons)})"
    return text + "."


def _answer(findings: CapacityFindings) -> str:
    ratio, first, last = findings.ratio, findings.capacities[0], findings.capacities[-1]
    if ratio is None:
        return ", ".join(
            f"{called(c.strategy)} sustains {_range(c)} requests/s" for c in findings.capacities
        )
    return (
        f"{called(last.strategy)} sustains {times_within(ratio.value, ratio.low, ratio.high)} the "
        f"load of {called(first.strategy)}: {_range(last)} against {_range(first)} requests/s"
    )


def _range(capacity: Capacity) -> str:
    if not capacity.low:
        return f"less than {_rate(capacity.high)}"
    return f"{_rate(capacity.low)} (below {_rate(capacity.high)})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def title_of(findings: CapacityFindings) -> str:
    """Return model, device, batch size and workload in a line."""
    model, slots = findings.model, findings.experiment.serving.batch_size
    simulated = findings.experiment.simulated
    place = "simulated" if simulated else f"{model['device']} {model['dtype']}"
    return f"{model['name']} · {place} · {slots:,} slots · {findings.workload}"


def table(findings: CapacityFindings) -> Table:
    """Return a row for each probe, strategy by strategy, the lowest rate first."""
    share, limits = 100 * findings.query.attainment, findings.query.goals.limits_ms
    grid = Table(
        title=title_of(findings),
        caption=f"Intervals: 95 % over trials. Sustained: at least {share:g} % of requests within "
        f"limits, and at most {100 * GROWTH:.0f} % of arrivals added to the queue."
        + " A step counts as 1 ms."
        * findings.experiment.simulated,
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    grid.add_column("strategy", no_wrap=True)
    names = [f"{_LABELS[name]}\np{share:g} ms" for name in limits]
    for name in ("req/s", "trials", "% of requests\nwithin limits", "queue\ngrows", *names):
        grid.add_column(name, justify="right", overflow="fold")
    grid.add_column("sus-\ntained")
    for capacity in findings.capacities:
        probes = sorted(capacity.probes, key=lambda probe: probe.rate)
        for i, probe in enumerate(probes):
            name = "" if i else capacity.strategy
            verdict = _verdict(probe, findings.query.attainment)
            grid.add_row(name, *_cells(probe, limits), verdict, end_section=i == len(probes) - 1)
    return grid


def _cells(probe: Probe, limited: Mapping[str, float]) -> list[str]:
    share, several = probe.attainment, len(probe.trials) > 1
    interval = f" ({100 * share.low:.3g}–{100 * share.high:.3g})" if several else ""
    return [
        _rate(probe.rate),
        str(len(probe.trials)),
        f"{100 * share.value:.3g}{interval}",
        percent(probe.growth.value, 1),
        *(number(probe.latency_ms.get(name)) for name in limited),
    ]


def _verdict(probe: Probe, attainment: float) -> Text:
    """Return yes or no; of a borderline rate, the value that its interval includes."""
    if probe.verdict is Verdict.SUSTAINED:
        return Text("yes", "green")
    if probe.verdict is Verdict.NOT_SUSTAINED:
        return Text("no", "red")
    unclear = probe.attainment.low < attainment
    why = f"{100 * attainment:g} % in\ninterval" if unclear else "queue\nmay grow"
    return Text(f"borderline\n{why}", "yellow")


def render(findings: CapacityFindings) -> RenderableType:
    suspect = "bold yellow" if findings.reasons else "bold"
    style = "bold red" if findings.verification.wrong else suspect
    return Group(Text(sentence(findings), style=style), Text(), table(findings))


def data_of(findings: CapacityFindings, command: str) -> dict[str, Any]:
    """Return the data of ``capacity.json``; a value without meaning is null."""
    ratio, capacities, checked = findings.ratio, findings.capacities, findings.verification
    comparison = ratio and {
        "baseline": capacities[0].strategy,
        "candidate": capacities[-1].strategy,
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": findings.experiment.simulated,
        "config": {**findings.experiment.config(), "goals": settings.as_json(findings.query.goals)},
        "limits_ms": findings.query.goals.limits_ms,
        "slo_attainment": findings.query.attainment,
        "precision": findings.precision,
        "max_trials": findings.query.most_trials,
        "confidence": CONFIDENCE,
        "alone_ms": {name: _finite(value) for name, value in findings.unloaded_ms.items()},
        "workload": findings.workload,
        "model": dict(findings.model),
        "environment": dict(findings.environment),
        "warm_up": asdict(findings.warm_up),
        "strategies": {
            capacity.strategy: {
                "rate": capacity.low or None,
                "interval": [capacity.low, capacity.high],
                "probes": [_probe(probe) for probe in capacity.probes],
            }
            for capacity in capacities
        },
        "comparison": comparison,
        "verification": {
            "passed": checked.passed,
            **{name: value for name, value in asdict(checked).items() if name != "findings"},
        },
        "validity": {
            "status": "suspect" if findings.reasons else "valid",
            "reasons": list(findings.reasons),
        },
    }


def _probe(probe: Probe) -> dict[str, Any]:
    share, growth = probe.attainment, probe.growth
    return {
        "rate": probe.rate,
        "verdict": probe.verdict.value,
        "attainment": {"share": share.value, "ci95": [share.low, share.high]},
        "queue_growth": {"mean": growth.value, "ci95": [_finite(growth.low), _finite(growth.high)]},
        "latency_ms": probe.latency_ms,
        "trials": [
            {
                "requests": trial.requests,
                "met": trial.met,
                "queue_growth": trial.growth,
                "latency_ms": dict(trial.latency_ms),
            }
            for trial in probe.trials
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_capacity(folder: Path, findings: CapacityFindings, data: Mapping[str, Any]) -> list[Path]:
    """Write ``capacity.json`` and the picture; return their paths."""
    figure = draw_capacity(data, _answer(findings), title_of(findings))
    pictures = {f"capacity.{format}": figure_bytes(figure, format) for format in ("png", "svg")}
    return write_whole(folder, {"capacity.json": to_json(data), **pictures})


_MARKS: Mapping[str, dict[str, Any]] = {
    "sustained": {"marker": "o", "ms": 6.5},
    "border": {"marker": "D", "ms": 5.5, "mfc": "#ffffff", "mew": 1.4},
    "not sustained": {"marker": "o", "ms": 6, "mfc": "#ffffff", "mew": 1.4},
}

_LEFT, _TOP, _BETWEEN = 0.62, 0.72, 0.75  # inches: around the panels, and between columns

_HEIGHT, _STEP = 2.1, 3.05  # inches: of a panel, and from one row to the next

_MOST_TICKS = 7


def draw_capacity(data: Mapping[str, Any], headline: str, title: str) -> Figure:
    """Draw attainment over the rate, and each limited latency with its limit."""
    with house_style():
        strategies = name_strategies(dict.fromkeys(data["strategies"], ()))
        panels: Sequence[str] = ["attainment", *data["limits_ms"]]
        wide_first = len(panels) % 2  # an odd number: the first panel is as wide as two
        rows = (len(panels) + wide_first) // 2
        notes = (
            "Filled: sustained; hollow: not; diamond: borderline, the trials do not decide. "
            "Whisker: 95 % interval. Dotted: the limit. Vertical line: the highest sustained rate."
        )
        card = make_card(headline, clean_text(title), _TOP + rows * _STEP - 0.45, notes)
        add_line_legend(card, strategies)
        half = (WIDE - _LEFT - _BETWEEN) / 2
        for k, panel in enumerate(panels):
            row, column = divmod(k + wide_first if k else 0, 2)
            width = WIDE - _LEFT if wide_first and not k else half
            left = _LEFT + column * (half + _BETWEEN)
            axes = card.axes(left, _TOP + row * _STEP, width, _HEIGHT)
            _draw_panel(axes, data, strategies, panel)
            _finish_axes(axes, data, strategies)
    return card.figure


def _draw_panel(
    axes: Axes, data: Mapping[str, Any], strategies: Sequence[Strategy], panel: str
) -> None:
    share = 100 * data["slo_attainment"]
    limit = share if panel == "attainment" else data["limits_ms"][panel]
    axes.axhline(limit, color=INK, lw=1.2, ls=":")
    for strategy in strategies:
        probes = sorted(data["strategies"][strategy.name]["probes"], key=lambda p: p["rate"])
        values = [_value(probe, panel) for probe in probes]
        line = {**strategy.line, "lw": 1.2}
        axes.plot([p["rate"] for p in probes], values, **line, gid=f"{panel}-{strategy.index}")
        for probe, value in zip(probes, values, strict=True):
            look = {"mfc": strategy.colour, "mec": strategy.colour, **_MARKS[probe["verdict"]]}
            if panel == "attainment":
                ends = [100 * end for end in probe["attainment"]["ci95"]]
                axes.vlines(probe["rate"], *ends, color=strategy.tint(0.3), lw=1.2)
            axes.plot(probe["rate"], value, ls="", **look)
    if panel == "attainment":
        axes.set(ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
        title = f"% of requests within all limits; needed: {share:g}"
    else:
        axes.set_yscale("log")
        title = f"{_LABELS[panel]} p{share:g} in ms; limit: {limit:g}"
    axes.set_title(title, size=9.5, weight="bold", loc="left", pad=19)


def _value(probe: Mapping[str, Any], panel: str) -> float:
    if panel == "attainment":
        return 100 * float(probe["attainment"]["share"])
    return float(probe["latency_ms"].get(panel, math.nan))


def _finish_axes(axes: Axes, data: Mapping[str, Any], strategies: Sequence[Strategy]) -> None:
    """Make the rates logarithmic, and mark each capacity with a line and its rate."""
    rates = [p["rate"] for result in data["strategies"].values() for p in result["probes"]]
    low, high = min(rates) / 1.15, max(rates) * 1.15
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    powers = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    ticks = powers[:: -(-len(powers) // _MOST_TICKS) or 1] or [min(rates)]
    axes.set_xticks(ticks, [_rate(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("requests/s")
    for strategy in strategies:
        if rate := data["strategies"][strategy.name]["rate"]:
            axes.axvline(rate, color=strategy.tint(0.2), lw=1.2, zorder=1)
            axes.annotate(
                spell_number(rate),
                (rate, 1),
                (0, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                size=9,
                weight="bold",
                color=strategy.tint(-0.15),
            )
