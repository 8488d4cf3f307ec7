"""What a search for capacity found: sentence, table, ``capacity.json``, picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
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
from batchbench.reports.text import called, clean_text, number, spell_number
from batchbench.studies.capacity.probe import GROWTH, Probe, Verdict
from batchbench.studies.capacity.search import Capacity, CapacityFindings
from batchbench.studies.sweep.facets import ticks_apart, write_tick
from batchbench.version import __version__

_LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E latency"}

_MARKS: Mapping[str, dict[str, Any]] = {
    "sustained": {"marker": "o", "ms": 6.5},
    "border": {"marker": "D", "ms": 5.5, "mfc": "#ffffff", "mew": 1.4},
    "not sustained": {"marker": "o", "ms": 6, "mfc": "#ffffff", "mew": 1.4},
}


def draw_capacity(data: Mapping[str, Any], headline: str, title: str) -> Figure:
    """Attainment over the rate with what was asked for, and each limited latency with its limit.

    Args:
        data: as in ``capacity.json``.
    """
    with house_style():
        return _draw(data, headline, clean_text(title))


def _draw(data: Mapping[str, Any], headline: str, title: str) -> Figure:
    strategies = name_strategies(dict.fromkeys(data["strategies"], ()))
    limits: Mapping[str, float] = data["limits_ms"]
    panels: Sequence[str] = ["attainment", *limits]
    # An odd panel would stand alone below; then the first takes the width of two.
    wide_first = len(panels) % 2 == 1
    rows = -(-(len(panels) + wide_first) // 2)
    height, step = 2.1, 2.1 + 0.95
    notes = (
        "Filled: sustained; hollow: not; diamond: the trials do not tell. Whisker: 95 % interval. "
        "Dotted: what is asked. Vertical line: the highest rate that is sustained."
    )
    card = make_card(headline, title, 0.72 + rows * step - 0.45, notes)
    add_line_legend(card, strategies)
    half = (WIDE - 0.62 - 0.75) / 2
    for k, what in enumerate(panels):
        row, column = divmod(k + wide_first if k else 0, 2)
        width = WIDE - 0.62 if wide_first and not k else half
        left, top = 0.62 + column * (half + 0.75), 0.72 + row * step
        axes = card.axes(left, top, width, height)
        _panel(axes, data, strategies, what)
        _finish(axes, data, width * 72)
    return card.figure


def _panel(axes: Axes, data: Mapping[str, Any], strategies: Sequence[Strategy], what: str) -> None:
    """One figure over the rate, of all strategies."""
    share = 100 * data["slo_attainment"]
    limit = share if what == "attainment" else data["limits_ms"][what]
    axes.axhline(limit, color=INK, lw=1.2, ls=":")
    for strategy in strategies:
        found = data["strategies"][strategy.name]
        probes = sorted(found["probes"], key=lambda probe: probe["rate"])
        rates = [probe["rate"] for probe in probes]
        values = [_value(probe, what) for probe in probes]
        axes.plot(rates, values, **{**strategy.line, "lw": 1.2}, gid=f"{what}-{strategy.index}")
        for probe, value in zip(probes, values, strict=True):
            look = {"mfc": strategy.colour, "mec": strategy.colour, **_MARKS[probe["verdict"]]}
            if what == "attainment":
                ends = [100 * end for end in probe["attainment"]["ci95"]]
                axes.vlines(probe["rate"], *ends, color=strategy.tint(0.3), lw=1.2)
            axes.plot(probe["rate"], value, ls="", **look)
        if found["rate"]:
            axes.axvline(found["rate"], color=strategy.tint(0.2), lw=1.2, zorder=1)
    if what == "attainment":
        axes.set(ylim=(0, 104), yticks=[0, 25, 50, 75, 100])
        title = f"% of requests within all limits; asked: {share:g}"
    else:
        axes.set_yscale("log")
        title = f"{_CALLED[what]} p{share:g} in ms; limit: {limit:g}"
    axes.set_title(title, size=9.5, weight="bold", loc="left", pad=19)


def _value(probe: Mapping[str, Any], what: str) -> float:
    if what == "attainment":
        return 100 * float(probe["attainment"]["share"])
    found = probe["latency_ms"].get(what)
    return np.nan if found is None else float(found)


def _finish(axes: Axes, data: Mapping[str, Any], width: float) -> None:
    """Rates on a logarithmic axis, each capacity named above its line."""
    rates = [p["rate"] for found in data["strategies"].values() for p in found["probes"]]
    low, high = min(rates), max(rates)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.grid(axis="y", color=FAINT, lw=0.7)
    strip_axes(axes, "bottom")
    powers = [2.0**k for k in range(int(np.floor(np.log2(low))), int(np.log2(high)) + 2)]
    ticks = ticks_apart([p for p in powers if low / 1.15 <= p <= high * 1.15] or [low], width)
    axes.set_xticks(ticks, [write_tick(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("requests/s")
    for strategy in name_strategies(dict.fromkeys(data["strategies"], ())):
        rate = data["strategies"][strategy.name]["rate"]
        if rate:
            place: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(
                spell_number(rate),
                (rate, 1),
                (0, 3),
                ha="center",
                size=9,
                weight="bold",
                color=strategy.tint(-0.15),
                **place,
            )


SCHEMA_VERSION = 1

_CALLED = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}


def sentence(found: CapacityFindings) -> str:
    """The answer in one sentence."""
    limits = " and ".join(
        f"{_CALLED[name]} ≤ {limit:g} ms" for name, limit in found.asked.goals.limits_ms.items()
    )
    text = f"with {limits} for {100 * found.asked.attainment:g} % of the requests, "
    if found.experiment.simulated:
        text = f"in simulation, {text}"
    ratio, candidate = found.ratio, found.capacities[-1]
    if ratio is None:
        parts = [f"{_suited(c)} carries {_range(c)} requests/s" for c in found.capacities]
        text += ", ".join(parts)
    else:
        base = found.capacities[0]
        text += (
            f"{_suited(candidate)} carries {ratio.value:.2f}× ({ratio.low:.2f}–{ratio.high:.2f}) "
            f"the load of {_suited(base)}: {_range(candidate)} against {_range(base)} requests/s"
        )
    checked = found.verification
    if checked.requests_checked:
        text += f"; outputs identical for {checked.identical}/{checked.requests_checked} requests"
        if checked.numerical_ties:
            text += f", {checked.numerical_ties} numerical ties"
        if checked.wrong:
            text += f", {checked.wrong} WRONG"
    if found.reasons:
        text += f"; suspect ({'; '.join(found.reasons)})"
    return text + "."


def _suited(capacity: Capacity) -> str:
    return called(capacity.strategy)


def _range(capacity: Capacity) -> str:
    if not capacity.low:
        return f"less than {_rate(capacity.high)}"
    return f"{_rate(capacity.low)} (below {_rate(capacity.high)})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def headline(found: CapacityFindings) -> str:
    """The sentence of the picture."""
    ratio = found.ratio
    if ratio is None:
        first = found.capacities[0]
        return f"Within these limits {_suited(first)} carries {_range(first)} requests/s"
    base, other = found.capacities[0], found.capacities[-1]
    text = f"Within these limits {_suited(other)} carries {ratio.value:.2f}× the load"
    return f"{text} of {_suited(base)}"


def title_of(found: CapacityFindings) -> str:
    """Model, device, batch size and workload in a line."""
    slots = found.experiment.serving.batch_size
    place = (
        "simulated"
        if found.experiment.simulated
        else f"{found.model['device']} {found.model['dtype']}"
    )
    return f"{found.model['name']} · {place} · {slots:,} slots · {found.workload}"


def table(found: CapacityFindings) -> Table:
    """All probes, strategy by strategy, the lowest rate first."""
    share = 100 * found.asked.attainment
    grid = Table(
        title=title_of(found),
        caption=f"95 % intervals over trials; a queue grows if more than {100 * GROWTH:.0f} % of "
        "those that come stay in it" + ("; a step counts as 1 ms" * found.experiment.simulated),
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("strategy", no_wrap=True)
    grid.add_column("req/s", justify="right")
    grid.add_column("trials", justify="right")
    grid.add_column("% of requests\nwithin limits", justify="right")
    grid.add_column("queue\ngrows %", justify="right")
    for name in found.asked.goals.limits_ms:
        grid.add_column(f"{_CALLED[name]}\np{share:g} ms", justify="right")
    grid.add_column("sus-\ntained", no_wrap=True)
    for capacity in found.capacities:
        probes = sorted(capacity.probes, key=lambda probe: probe.rate)
        for i, probe in enumerate(probes):
            grid.add_row(
                capacity.strategy if i == 0 else "",
                *_cells(probe, list(found.asked.goals.limits_ms)),
                Text(*_SUSTAINED[probe.verdict]),
                end_section=i == len(probes) - 1,
            )
    return grid


_SUSTAINED = {
    Verdict.SUSTAINED: ("yes", "green"),
    Verdict.NOT_SUSTAINED: ("no", "red"),
    Verdict.BORDER: ("border", "yellow"),
}


def _cells(probe: Probe, limited: list[str]) -> list[str]:
    share, waits = probe.attainment, probe.latency_ms
    interval = f" ({100 * share.low:.1f}–{100 * share.high:.1f})" if len(probe.trials) > 1 else ""
    return [
        _rate(probe.rate),
        str(len(probe.trials)),
        f"{100 * share.value:.1f}{interval}",
        f"{100 * probe.growth.value:.1f}".replace("-0.0", "0.0"),
        *(number(waits.get(name)) for name in limited),
    ]


def render(found: CapacityFindings) -> RenderableType:
    """Sentence and table."""
    style = "bold red" if found.verification.wrong else "bold yellow" if found.reasons else "bold"
    return Group(Text(sentence(found), style=style), Text(), table(found))


def data_of(found: CapacityFindings, command: str) -> dict[str, Any]:
    """``capacity.json`` as data; what has no meaning is null."""
    ratio = found.ratio
    return {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": found.experiment.simulated,
        "config": {**found.experiment.config(), "goals": settings.as_json(found.asked.goals)},
        "limits_ms": found.asked.goals.limits_ms,
        "slo_attainment": found.asked.attainment,
        "precision": found.precision,
        "max_trials": found.asked.most_trials,
        "confidence": CONFIDENCE,
        "alone_ms": {name: _number(value) for name, value in found.lone_ms.items()},
        "workload": found.workload,
        "model": dict(found.model),
        "environment": dict(found.environment),
        "warm_up": asdict(found.warm_up),
        "strategies": {
            capacity.strategy: {
                "rate": capacity.low or None,
                "interval": [capacity.low, capacity.high],
                "probes": [_probe(probe) for probe in capacity.probes],
            }
            for capacity in found.capacities
        },
        "comparison": None
        if ratio is None
        else {
            "baseline": found.capacities[0].strategy,
            "candidate": found.capacities[-1].strategy,
            "ratio": ratio.value,
            "interval": [ratio.low, ratio.high],
        },
        "verification": {
            "passed": found.verification.passed,
            **{k: v for k, v in asdict(found.verification).items() if k != "findings"},
        },
        "validity": {
            "status": "suspect" if found.reasons else "valid",
            "reasons": list(found.reasons),
        },
    }


def _probe(probe: Probe) -> dict[str, Any]:
    share, growth = probe.attainment, probe.growth
    return {
        "rate": probe.rate,
        "verdict": str(probe.verdict),
        "attainment": {"share": share.value, "ci95": [share.low, share.high]},
        "queue_growth": {"mean": growth.value, "ci95": [_number(growth.low), _number(growth.high)]},
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


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_json(data: Mapping[str, Any]) -> str:
    """``capacity.json``."""
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_capacity(folder: Path, found: CapacityFindings, data: Mapping[str, Any]) -> list[Path]:
    """Write ``capacity.json`` and the picture; the paths."""
    figure = draw_capacity(data, headline(found), title_of(found))
    contents: dict[str, bytes | str] = {"capacity.json": to_json(data)}
    for format in ("png", "svg"):
        contents[f"capacity.{format}"] = figure_bytes(figure, format)
    return write_whole(folder, contents)
