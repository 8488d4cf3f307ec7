"""What a search for capacity found: sentence, table, ``capacity.json``, picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import batchbench
from batchbench.files import write_whole
from batchbench.reports.comparison import CONFIDENCE
from batchbench.reports.figures import render as render_figure
from batchbench.reports.figures.capacity import draw_capacity
from batchbench.reports.slo import as_config
from batchbench.reports.text import called, number
from batchbench.studies.bench import Probe
from batchbench.studies.capacity.probe import GROWTH, Verdict
from batchbench.studies.capacity.search import Capacity, CapacityFindings

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
        "batchbench_version": batchbench.__version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": found.experiment.simulated,
        "config": {**found.experiment.config(), "goals": as_config(found.asked.goals)},
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
        contents[f"capacity.{format}"] = render_figure(figure, format)
    return write_whole(folder, contents)
