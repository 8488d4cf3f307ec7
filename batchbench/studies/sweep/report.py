"""What came of a sweep: read from its finished cells, and told as rows, sentence and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.batching.machine import environment
from batchbench.files import write_whole
from batchbench.reports.figures import figure_bytes
from batchbench.reports.result import regoaled
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.text import called, number, spell_option, spell_value
from batchbench.studies.sweep.figures import PICTURES, draw_sweep
from batchbench.studies.sweep.grid import Cell, Grid
from batchbench.studies.sweep.store import Store
from batchbench.studies.sweep.table import Cells, Row, rows_of, table_of, to_csv
from batchbench.version import __version__

SCHEMA_VERSION = 1

_TOLD = ("model", "workload", "environment", "verification", "validity", "comparisons")
"""Parts of a cell's result that ``sweep.json`` repeats."""


@dataclass(frozen=True)
class Finding:
    """What came of one cell."""

    cell: Cell
    data: Mapping[str, Any] | None  # parts of its result; None if it failed
    reason: str | None = None  # why it failed


@dataclass(frozen=True)
class Findings:
    """What came of a sweep."""

    grid: Grid
    goals: GoalsSpec
    cells: Sequence[Finding]
    rows: Sequence[Row]
    others: int  # cells of other grids that the folder holds as well

    @property
    def served(self) -> list[Finding]:
        """Cells with a result."""
        return [cell for cell in self.cells if cell.data is not None]

    @property
    def failed(self) -> list[Finding]:
        """Cells that could not be served."""
        return [cell for cell in self.cells if cell.data is None]

    @property
    def wrong(self) -> int:
        """Requests that got wrong tokens, in all cells."""
        return sum(found.data["verification"]["wrong"] for found in self.cells if found.data)

    @property
    def suspect(self) -> int:
        """Cells whose run is suspect."""
        return sum(
            found.data["validity"]["status"] == "suspect" for found in self.cells if found.data
        )

    @property
    def machines(self) -> list[str]:
        """Where the cells were measured; more than one is not one measurement."""
        names = ("hostname", "cpu", "gpu")
        found = [c.data["environment"] for c in self.cells if c.data and not self.grid.simulated]
        told = [
            " ".join(str(e[name]) for name in names if e.get(name))
            + f", torch {e['packages']['torch']}"
            for e in found
        ]
        return list(dict.fromkeys(told))


def read_findings(grid: Grid, store: Store, goals: GoalsSpec) -> Findings:
    """The grid's finished cells, held against ``goals``; cells of other grids are left alone."""
    cells, rows = [], []
    for cell in grid.cells:
        reason = cell.fault
        if reason is None and not store.holds(cell):
            raise ValueError(f"{cell.digest} is not finished")
        if reason is None:
            reason = store.failure(cell)
        if reason is not None:
            cells.append(Finding(cell, None, reason))
            continue
        result = regoaled(store.load(cell), goals)
        rows += rows_of(cell, result)
        data: Any = result.data
        cells.append(Finding(cell, {name: data[name] for name in _TOLD}))
    own = {cell.digest for cell in grid.cells if cell.fault is None}
    return Findings(grid, goals, cells, rows, len(store) - len(own))


def to_json(findings: Findings, command: str, not_drawn: Mapping[str, str]) -> str:
    """``sweep.json``: what was asked and what came of each cell."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": findings.grid.simulated,
        "axes": {name: _plain(values) for name, values in findings.grid.axes.items()},
        "goals": settings.as_json(findings.goals),
        "environment": environment(),
        "cells": [_cell(found) for found in findings.cells],
        "pictures_not_drawn": not_drawn,
    }
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _cell(found: Finding) -> dict[str, Any]:
    cell = found.cell
    return {
        "digest": None if cell.experiment is None else cell.digest,
        "options": {name: _plain(value) for name, value in cell.chosen.items()},
        "status": "failed" if found.data is None else "done",
        "reason": found.reason,
        "config": None if cell.experiment is None else cell.experiment.config(),
        **(found.data or {}),
    }


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


MOST_CELLS = 40
"""A longer table is a file."""

MOST_REASONS = 4
"""Reasons to suspect cells that are told; sweep.json has all."""

_COLUMNS = (
    ("tok/s", "output_throughput"),
    ("TTFT p99 ms", "p99_ttft_ms"),
)

_MORE = ("E2E p99 ms", "p99_e2el_ms")

_GOOD = ("within SLO %", "slo_attainment")


def sentence(findings: Findings, cells: Cells | None) -> str:
    """The answer in one sentence."""
    parts = [_answer(cells)] if cells is not None else []
    total, failed = len(findings.cells), len(findings.failed)
    if failed:
        parts.append(f"{failed} of {total} cells could not be served")
    if findings.wrong:
        parts.append(f"{findings.wrong} requests got WRONG tokens")
    if findings.suspect:
        parts.append(f"{findings.suspect} of {total} cells are suspect")
    return "; ".join(parts) + "."


def _answer(cells: Cells) -> str:
    """How much better, from where to where; or how much comes of one strategy alone."""
    typical = cells.typical
    count = typical["cell"].nunique()
    over = f"over {count} cells" if count > 1 else "in its one cell"
    begin = "in simulation, where every step costs the same, " if cells.simulated else ""
    name, candidate = (called(s) for s in (cells.strategies[0], cells.strategies[-1]))
    compared = typical[typical["speedup"].notna() & (typical["strategy"] == cells.strategies[-1])]
    if not len(compared):
        low, high, at = _range(cells, typical, "output_throughput")
        span = low if low == high else f"{low} to {high}"
        return f"{begin}{name} yields {span} output tokens/s {over}{at}"
    if cells.timed:
        low, high, at = _range(cells, compared, "wait_ratio", "×")
        span = low if low == high else f"{low} to {high}"
        return f"{begin}TTFT p99 was {span} as long under {name} as under {candidate} {over}{at}"
    low, high, at = _range(cells, compared, "speedup", "×")
    span = low if low == high else f"{low} to {high}"
    return f"{begin}{candidate} was {span} as fast as {name} {over}{at}"


def _range(cells: Cells, rows: pd.DataFrame, metric: str, sign: str = "") -> tuple[str, str, str]:
    """The smallest and the largest value, and where the largest is."""
    values = rows[metric]
    largest: Any = values.idxmax()
    at = cells.where(rows.loc[largest], less=("strategies",))
    low, high = (
        f"{value:.2f}{sign}" if sign else number(value) for value in (values.min(), values.max())
    )
    return low, high, f", most at {at}" if at and low != high else ""


def table(cells: Cells) -> Table:
    """Of the options only those that vary; up to two strategies stand side by side."""
    grid = Table(
        title=cells.title,
        caption=_caption(cells),
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in cells.varying:
        grid.add_column(name.replace("_", "\n"), justify="right", overflow="fold")
    side_by_side = len(cells.strategies) <= 2 and "strategies" not in cells.varying
    _fill = _rows_of_cells if side_by_side else _rows_of_strategies
    _fill(cells, grid, list(dict.fromkeys(cells.typical["cell"]))[:MOST_CELLS])
    return grid


def _rows_of_cells(cells: Cells, grid: Table, shown: Sequence[str]) -> None:
    """A row a cell."""
    columns = [_COLUMNS[0], _GOOD] if _held_to_goals(cells) else _COLUMNS
    for label, _ in columns:
        for name in cells.strategies:
            grid.add_column(f"{label}\n{name}", justify="right")
    compared = len(cells.strategies) > 1 and not cells.timed
    if compared:
        grid.add_column(f"speed-up\nover {cells.strategies[0]}", justify="right")
    by_cell = cells.typical.set_index(["cell", "strategy"])
    for cell in shown:
        rows: list[Any] = [by_cell.loc[(cell, name)] for name in cells.strategies]
        varying = [spell_value(rows[0][name]) for name in cells.varying]
        values = [_metric(row, metric) for _, metric in columns for row in rows]
        grid.add_row(*varying, *values, *(_speedup(row) for row in rows[1:] if compared))


def _rows_of_strategies(cells: Cells, grid: Table, shown: Sequence[str]) -> None:
    """A row a cell and strategy."""
    columns = [*_COLUMNS, _GOOD if _held_to_goals(cells) else _MORE]
    grid.add_column("strategy", no_wrap=True)
    for label, _ in columns:
        head = label.replace(" ", "\n", 1)
        grid.add_column(head, justify="right")
    grid.add_column("speed-\nup", justify="right")
    for cell in shown:
        rows = cells.typical[cells.typical["cell"] == cell]
        for i, (_, row) in enumerate(rows.iterrows()):
            varying = [spell_value(row[name]) if i == 0 else "" for name in cells.varying]
            values = [_metric(row, metric) for _, metric in columns]
            last = i == len(rows) - 1
            grid.add_row(*varying, row["strategy"], *values, _speedup(row), end_section=last)


def _held_to_goals(cells: Cells) -> bool:
    return "slo_attainment" in cells.frame and bool(cells.frame["slo_attainment"].notna().any())


def _metric(row: Any, name: str) -> str:
    value = row[name]
    if value is None or pd.isna(value):
        return "N/A"
    return f"{100 * value:.1f}" if name == "slo_attainment" else number(value)


def _caption(cells: Cells) -> str | None:
    """What the table leaves unsaid."""
    total = cells.typical["cell"].nunique()
    notes = ["simulated: a step counts as 1 ms"] if cells.simulated else []
    if cells.trials > 1:
        notes.append(f"medians of {cells.trials} trials")
    if total > MOST_CELLS:
        notes.append(f"the first {MOST_CELLS} of {total} cells; sweep.csv has all")
    return "; ".join(notes) or None


def _speedup(row: pd.Series[Any]) -> str:
    if pd.isna(row["speedup"]):  # the baseline's own
        return "–"
    text = f"{row['speedup']:.2f}×"
    if pd.isna(row["speedup_low"]):
        return text
    return f"{text} ({row['speedup_low']:.2f}–{row['speedup_high']:.2f})"


def notes(findings: Findings, cells: Cells | None, not_drawn: dict[str, str]) -> list[str]:
    """What else a reader should know, a line each."""
    lines = []
    for found in findings.failed:
        names = findings.grid.varying
        which = ", ".join(spell_option(name, found.cell.chosen[name]) for name in names)
        lines.append(f"failed: {which or 'the cell'}: {found.reason}")
    lines += _reasons(findings)
    if cells is not None and cells.share_follows:
        lines.append(
            "note: the workload changes with the batch size (one long request a batch); "
            "--long-every N would hold it"
        )
    if len(findings.machines) > 1:
        lines.append(
            f"note: cells are from {len(findings.machines)} machines or versions of torch "
            f"({'; '.join(findings.machines)}): times do not compare"
        )
    if findings.others:
        lines.append(
            f"note: the folder keeps {findings.others} cells of other sweeps as well; they are in "
            "no table and no picture"
        )
    lines += [f"not drawn: {name}: {why}" for name, why in not_drawn.items()]
    return lines


def _reasons(findings: Findings) -> list[str]:
    """Why cells are suspect; reasons that differ in their numbers are told once."""
    told = [r for found in findings.served for r in (found.data or {})["validity"]["reasons"]]
    kinds: dict[str, list[str]] = {}
    for reason in told:
        kinds.setdefault(re.sub(r"[\d.,]+", "#", reason), []).append(reason)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    lines = [
        f"suspect: {kind[0]}" + (f", and {len(kind) - 1} more like it" if len(kind) > 1 else "")
        for kind in ranked[:MOST_REASONS]
    ]
    if len(ranked) > MOST_REASONS:
        lines.append(f"suspect: {len(ranked) - MOST_REASONS} other reasons; sweep.json has all")
    return lines


def render_screen(findings: Findings, cells: Cells | None, lines: Sequence[str]) -> RenderableType:
    """Sentence, table, notes."""
    bad = findings.wrong > 0
    doubtful = findings.failed or findings.suspect
    style = "bold red" if bad else "bold yellow" if doubtful else "bold"
    parts: list[RenderableType] = [Text(sentence(findings, cells), style=style), Text()]
    if cells is not None:
        parts += [table(cells)]
    return Group(*parts, *(Text(line, style="dim") for line in lines))


@dataclass(frozen=True)
class Written:
    """What was written, and what is shown of it."""

    files: Sequence[Path]
    json: str
    cells: Cells | None  # None where no cell could be served
    not_drawn: dict[str, str]  # by picture, why


def write_sweep(folder: Path, findings: Findings, command: str) -> Written:
    """Write ``sweep.json``, ``sweep.csv`` and the pictures; those of an older grid go."""
    cells = cells_of(findings)
    figures, not_drawn = draw_sweep(cells) if cells is not None else ({}, {})
    json = to_json(findings, command, not_drawn)
    contents: dict[str, bytes | str] = {"sweep.json": json}
    contents["sweep.csv"] = to_csv(table_of(findings.rows))
    for name, figure in figures.items():
        for format in ("png", "svg"):
            contents[f"{name}.{format}"] = figure_bytes(figure, format)
    stale = [f"{name}.{format}" for name in PICTURES for format in ("png", "svg")]
    return Written(write_whole(folder, contents, stale), json, cells, not_drawn)


def cells_of(findings: Findings) -> Cells | None:
    """The table with a title; None where no cell was served."""
    if not findings.rows:
        return None
    frame = table_of(findings.rows)
    columns = {"strategy": "strategies"}
    asked = (columns.get(name, name) for name in findings.grid.varying)
    # Of an option all but one of whose values failed nothing can be drawn.
    varying = tuple(n for n in asked if n in frame and frame[n].nunique(dropna=False) > 1)
    return Cells(frame, varying, findings.grid.simulated, _title(findings))


def _title(findings: Findings) -> str:
    """Model, device, and the options that were given and do not vary."""
    models = [found.data["model"] for found in findings.served if found.data is not None]
    names = list(dict.fromkeys(model["name"] for model in models))
    places = list(
        dict.fromkeys(
            "simulated" if findings.grid.simulated else f"{m['device']} {m['dtype']}"
            for m in models
        )
    )
    parts = [
        names[0] if len(names) == 1 else f"{len(names)} models",
        places[0] if len(places) == 1 else f"{len(places)} devices or number formats",
    ]
    parts += [
        spell_option(name, values[0])
        for name, values in findings.grid.axes.items()
        if len(values) == 1 and name not in ("model", "dtype", "device", "strategy", "trials")
    ]
    return " · ".join(parts)
