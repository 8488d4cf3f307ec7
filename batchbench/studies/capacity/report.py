"""The report of a search for capacity: sentence, table, ``capacity.json`` and picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import card as cards
from batchbench.reports.figures import picture_files
from batchbench.reports.served import place_of
from batchbench.reports.statistics import CONFIDENCE
from batchbench.reports.text import (
    called,
    clean_text,
    label_of,
    number,
    percent,
    plural,
    spell_number,
    times_within,
)
from batchbench.studies.capacity.search import GROWTH, CapacityFindings, Probe

SCHEMA_VERSION = 1

Data = Mapping[str, Any]
"""The data of ``capacity.json``, or a part of it."""

_LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}


def sentence(data: Data) -> str:
    limits = " and ".join(f"{_LABELS[n]} ≤ {limit:g} ms" for n, limit in data["limits_ms"].items())
    text = "in simulation, " if data["simulated"] else ""
    text += f"with {limits} for {100 * data['slo_attainment']:g} % of the requests, {_answer(data)}"
    checked, reasons = data["verification"], data["validity"]["reasons"]
    if checked["requests_checked"]:
        text += (
            f"; outputs identical for {checked['identical']}/{checked['requests_checked']} requests"
        )
        for name, words in (("numerical_ties", "numerical ties"), ("wrong", "WRONG")):
            text += f", {checked[name]} {words}" if checked[name] else ""
    return f"{text}; suspect ({'; '.join(reasons)})." if reasons else f"{text}."


def _answer(data: Data) -> str:
    ranges = {name: _range(*result["interval"]) for name, result in data["strategies"].items()}
    ratio, names = data["comparison"], {name: called(_label(data, name)) for name in ranges}
    if ratio is None:
        return ", ".join(f"{names[n]} sustains {text} requests/s" for n, text in ranges.items())
    first, last = ratio["baseline"], ratio["candidate"]
    return (
        f"{names[last]} sustains {times_within(ratio['ratio'], *ratio['interval'])} the load of "
        f"{names[first]}: {ranges[last]} against {ranges[first]} requests/s"
    )


def _label(data: Data, name: str) -> str:
    return label_of(name, has_steps=not data.get("server"))


def _range(low: float, high: float) -> str:
    return f"{_rate(low)} (below {_rate(high)})" if low else f"less than {_rate(high)}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def title_of(data: Data) -> str:
    """Return model, device, batch size and workload in a line."""
    model, slots = data["model"], data["config"]["serving"]["batch_size"]
    place = "simulated" if data["simulated"] else place_of(data)
    size = f"waves of {slots:,}" if data.get("server") else plural(slots, "slot")
    return f"{model['name']} · {place} · {size} · {data['workload']}"


def table(data: Data) -> Table:
    """Return a row for each probe, strategy by strategy, the lowest rate first."""
    share, limits = 100 * data["slo_attainment"], data["limits_ms"]
    step = " A step counts as 1 ms." if data["simulated"] else ""
    grid = Table(
        title=title_of(data),
        caption=f"Intervals: 95 % over trials. Sustained: at least {share:g} % of requests within "
        f"limits, and at most {100 * GROWTH:.0f} % of arrivals added to the queue.{step}",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,  # three limits fit into 80 columns
    )
    grid.add_column("strategy", no_wrap=True)
    names = [f"{_LABELS[name]}\np{share:g} ms" for name in limits]
    for name in ("req/s", "trials", "% of requests\nwithin limits", "queue\ngrows", *names):
        grid.add_column(name, justify="right", overflow="fold")
    grid.add_column("sus-\ntained")
    for strategy, result in data["strategies"].items():
        name = _label(data, strategy)
        for probe in sorted(result["probes"], key=lambda probe: probe["rate"]):
            grid.add_row(name, *_cells(probe, limits, data["slo_attainment"]))
            name = ""
        grid.add_section()
    return grid


def _cells(probe: Data, limits: Collection[str], attainment: float) -> list[str | Text]:
    trials, (low, high) = len(probe["trials"]), probe["attainment"]["ci95"]
    verdicts = {"sustained": Text("yes", "green"), "not sustained": Text("no", "red")}
    # A borderline rate says which value its interval includes.
    why = f"{100 * attainment:g} % in\ninterval" if low < attainment else "queue\nmay grow"
    return [
        _rate(probe["rate"]),
        str(trials),
        f"{100 * probe['attainment']['share']:.3g}"
        + (f" ({100 * low:.3g}–{100 * high:.3g})" if trials > 1 else ""),
        percent(probe["queue_growth"]["mean"], 1),
        *(number(probe["latency_ms"].get(name)) for name in limits),
        verdicts.get(probe["verdict"], Text(f"borderline\n{why}", "yellow")),
    ]


def render(data: Data) -> RenderableType:
    suspect = "bold yellow" if data["validity"]["reasons"] else "bold"
    style = "bold red" if data["verification"]["wrong"] else suspect
    nodes = [f"{_label(data, name)} ran on {n}" for name, n in (data.get("nodes") or {}).items()]
    if clients := data.get("clients"):
        nodes.append(f"{len(clients)} clients share the requests ({', '.join(clients)})")
    notes = [Text("; ".join(nodes), style="dim")] * bool(nodes)
    return Group(Text(sentence(data), style=style), Text(), table(data), *notes)


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
        **envelope(SCHEMA_VERSION, command),
        "simulated": findings.experiment.simulated,
        "config": {**findings.experiment.config(), "goals": settings.as_json(findings.query.goals)},
        "limits_ms": findings.query.goals.limits_ms,
        "slo_attainment": findings.query.attainment,
        "precision": findings.query.precision,
        "max_trials": findings.query.most_trials,
        "confidence": CONFIDENCE,
        "alone_ms": {name: _finite(value) for name, value in findings.unloaded_ms.items()},
        "workload": findings.workload,
        "model": dict(findings.model),
        "environment": dict(findings.environment),
        "server": findings.server and {n: getattr(findings.server, n) for n in _OF_SERVER},
        "clients": (findings.server and list(findings.server.clients)) or None,
        "nodes": findings.nodes and dict(findings.nodes),
        "machines": list(findings.machines),
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


_OF_SERVER = ("name", "version", "slots")


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


def write_capacity(folder: Path, data: Data) -> list[Path]:
    pictures = picture_files({"capacity": draw_capacity(data)})
    return write_whole(folder, {"capacity.json": json_text(data), **pictures})


# The picture

_MARKS: Mapping[str, dict[str, Any]] = {
    "sustained": {"marker": "o", "ms": 6.5},
    "border": {"marker": "D", "ms": 5.5, "mfc": "#ffffff", "mew": 1.4},
    "not sustained": {"marker": "o", "ms": 6, "mfc": "#ffffff", "mew": 1.4},
}

_TALL, _BETWEEN = 1.7, 0.55  # inches: a panel, and from one panel to the next


def draw_capacity(data: Data) -> Figure:
    """Draw attainment over the rate, and each limited latency with its limit."""
    notes = (
        "Filled: sustained; hollow: not; diamond: borderline, the trials do not decide. "
        "Whisker: 95 % interval. Dotted: the limit. Vertical line: the highest sustained rate."
    )
    results = {_label(data, name): result for name, result in data["strategies"].items()}
    panels = ["attainment", *data["limits_ms"]]
    body = 0.8 + len(panels) * (_TALL + _BETWEEN)
    with cards.house_style():
        strategies = cards.name_strategies(dict.fromkeys(results, ()))
        headline, title = f"Within these limits {_answer(data)}", clean_text(title_of(data))
        card = cards.make_card(headline, title, body, notes)
        cards.add_line_legend(card, strategies)
        shape = (len(panels), 1)
        grid = card.grid(shape, 0.75, _TALL, between=_BETWEEN, share="col")
        for (axes,), panel in zip(grid, panels, strict=True):
            for strategy in strategies:
                _draw_probes(axes, strategy, results[strategy.name]["probes"], panel)
            _finish(axes, data, panel)
        rates = [probe["rate"] for result in results.values() for probe in result["probes"]]
        axes.set(xlim=(min(rates) / 1.15, max(rates) * 1.15), xlabel="requests/s")
        for strategy in strategies:
            if rate := results[strategy.name]["rate"]:
                _mark_capacity([axes for (axes,) in grid], strategy, rate)
    return card.figure


def _draw_probes(axes: Axes, strategy: cards.Strategy, probes: Sequence[Data], panel: str) -> None:
    probes = sorted(probes, key=lambda probe: probe["rate"])
    values = [_value(probe, panel) for probe in probes]
    line = {**strategy.line, "lw": 1.2, "gid": f"{panel}-{strategy.index}"}
    axes.plot([probe["rate"] for probe in probes], values, **line)
    for probe, value in zip(probes, values, strict=True):
        if panel == "attainment":
            ends = [100 * end for end in probe["attainment"]["ci95"]]
            axes.vlines(probe["rate"], *ends, color=strategy.tint(0.3), lw=1.2)
        look = {"mfc": strategy.colour, "mec": strategy.colour, **_MARKS[probe["verdict"]]}
        axes.plot(probe["rate"], value, ls="", **look)


def _value(probe: Data, panel: str) -> float:
    if panel == "attainment":
        return 100 * float(probe["attainment"]["share"])
    return float(probe["latency_ms"].get(panel, math.nan))


def _finish(axes: Axes, data: Data, panel: str) -> None:
    share = 100 * data["slo_attainment"]
    cards.count_doublings(axes)
    if panel == "attainment":
        limit, title = share, f"% of requests within all limits; needed: {share:g}"
        axes.set(ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
    else:
        limit = data["limits_ms"][panel]
        title = f"{_LABELS[panel]} p{share:g} in ms; limit: {limit:g}"
        axes.set_yscale("log")
    axes.axhline(limit, color=cards.INK, lw=1.2, ls=":")
    cards.finish_panel(axes, title, 9.5)


def _mark_capacity(panels: Sequence[Axes], strategy: cards.Strategy, rate: float) -> None:
    """Draw a line through all panels, with the rate at its end."""
    for axes in panels:
        axes.axvline(rate, color=strategy.tint(0.2), lw=1.2, zorder=1)
    look: dict[str, Any] = {"ha": "center", "va": "top", "size": 9, "weight": "bold"}
    look |= {"textcoords": "offset points", "color": strategy.tint(-0.15)}
    across = panels[0].get_xaxis_transform()
    panels[0].annotate(spell_number(rate), (rate, 1), (0, 30), xycoords=across, **look)
