"""Files of other tools, alone or side by side with our results: a sentence, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from batchbench.json_file import json_text
from batchbench.reports.formats.markdown import escape
from batchbench.reports.formats.markdown import table as markdown_table
from batchbench.reports.formats.terminal import make_table
from batchbench.reports.peers.values import LATENCIES, PeerFile, PeerRun
from batchbench.reports.side_by_side import FIGURES
from batchbench.reports.statistics import mean_interval
from batchbench.reports.text import MISSING, interval, number, plural

Named = Sequence[tuple[str, PeerFile]]
"""Files with the labels by which tables name them."""

_MOST_COLUMNS = 4
"""Runs in one table, so that it fits into 80 columns."""

_FACTS = ("Tool", "Model", "Server", "Load", "At once", "Requests", "Failed")

_ROWS = (
    *(*FIGURES[:2], ("Requests/s", "request_throughput"), FIGURES[2]),
    *(("TPOT p99 (ms)", "p99_tpot_ms"), *FIGURES[3:]),
)


class Part(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


def sentence(named: Named) -> str:
    """Return the highest throughput, and a warning where tools differ."""
    runs = [(label, run) for label, file in named for run in file.runs]
    label, best = max(runs, key=lambda pair: pair[1].summary["output_throughput"] or 0)
    rate = f"{number(best.summary['output_throughput'])} output tok/s"
    if len(runs) == 1:
        failed = "" if best.failed is None else f", {best.failed:,} failed"
        requests = "" if best.requests is None else f", {plural(best.requests, 'request')}{failed}"
        return f"{named[0][1].title} measured {rate} ({best.name}{requests})."
    tools = {file.tool for _, file in named}
    warning = "; the tools define some metrics differently" if len(tools) > 1 else ""
    return f"{len(runs)} measurements: {label}, {best.name}, had the most {rate}{warning}."


def parts(named: Named) -> Iterator[Part]:
    runs = [(label, file, run) for label, file in named for run in file.runs]
    for chunk in (runs[i : i + _MOST_COLUMNS] for i in range(0, len(runs), _MOST_COLUMNS)):
        columns = [
            [file.title, file.model or MISSING, file.backend or MISSING, run.name]
            + [number(value) for value in (run.concurrency, run.requests, run.failed)]
            + [number(run.summary[key]) for _, key in _ROWS]
            for _, file, run in chunk
        ]
        names = [*_FACTS, *(name for name, _ in _ROWS)]
        rows = [list(row) for row in zip(names, *columns, strict=True)]
        yield Part("Measurements", ["", *(label for label, *_ in chunk)], rows)
    if len(runs) == 1:
        head = ["ms", "Mean", "95% CI of mean", "Median", "p90", "p99", "Std"]
        yield Part("Latencies", head, [_latency(runs[0][2], name) for name in LATENCIES])


def _latency(run: PeerRun, name: str) -> list[str]:
    mean, *others = (
        number(run.summary[f"{key}_{name}_ms"]) for key in ("mean", "median", "p90", "p99", "std")
    )
    known, spelled = run.latencies.get(name), MISSING
    if known is not None and known.count > 1:
        spelled = interval(*mean_interval(np.repeat(known.values, known.weights)))
    return [name.upper().replace("E2EL", "E2E"), mean, spelled, *others]


def notes(named: Named) -> Iterator[str]:
    runs = [run for _, file in named for run in file.runs]
    for label, file in named:
        yield from (f"{label} is marked suspect: {doubt}." for doubt in file.doubts[:1])
    if any(run.latencies for run in runs):
        yield (
            "Statistics are computed from single requests where a file holds them. An interval "
            "over the requests of one run does not tell how much another run would differ."
        )
    if any(not run.latencies for run in runs):
        yield (
            "A file without single requests gives statistics as it states them, and no interval."
        )
    if any(value is None for run in runs for value in run.summary.values()):
        yield f"{MISSING}: the file does not hold it. Definitions: docs/other-tools.md."


def render(named: Named) -> RenderableType:
    found = [Text(sentence(named), style="bold"), Text()]
    tables = [make_table(part.title, part.head, part.rows) for part in parts(named)]
    return Group(*found, *tables, *map(Text, notes(named)))


def render_markdown(named: Named) -> str:
    lines = [f"**{escape(sentence(named))}**", ""]
    for part in parts(named):
        lines += markdown_table(part.head, part.rows, left=1)
    lines += [f"{escape(note)}\n" for note in notes(named)]
    return "\n".join(lines).rstrip() + "\n"


def render_json(named: Named) -> str:
    """Return all values under our names; null where a file does not hold one."""
    files = []
    for label, file in named:
        runs = [
            {k: value for k, value in vars(run).items() if k != "latencies"} for run in file.runs
        ]
        files.append({"file": label, **vars(file), "runs": runs})
    return json_text({"files": files})
