"""The report of a sweep: a sentence and a table, ``sweep.json``, ``sweep.csv`` and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench import settings
from batchbench.batching.machine import environment
from batchbench.errors import UsageError
from batchbench.files import write_whole
from batchbench.json_file import envelope, json_text
from batchbench.reports.figures import picture_files
from batchbench.reports.formats.terminal import make_table
from batchbench.reports.result import regoaled
from batchbench.reports.served import place_of
from batchbench.reports.slo import GoalsSpec
from batchbench.reports.text import (
    number,
    percent,
    plural,
    spell_option,
    spell_value,
    times_within,
)
from batchbench.studies.executors.jobs import kinds_of
from batchbench.studies.sweep.figures import PICTURES, draw_sweep
from batchbench.studies.sweep.grid import Cell, Grid
from batchbench.studies.sweep.run import Store, name_of
from batchbench.studies.sweep.table import Cells, Row, rows_of, table_of, to_csv

SCHEMA_VERSION = 1

MOST_CELLS = 40
"""Rows of the table on a terminal."""

MOST_REASONS = 4
"""Reasons to suspect cells that a terminal shows."""

_REPEATED = ("model", "workload", "environment", "verification", "validity", "comparisons")
_OF_SERVER = ("server", "agreement", "failures")
"""Parts of a cell's result that ``sweep.json`` repeats."""


@dataclass(frozen=True)
class CellResult:
    """Parts of one cell's result, which are empty if it failed, or the reason."""

    cell: Cell
    data: Mapping[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class SweepResult:
    grid: Grid
    goals: GoalsSpec
    cells: Sequence[CellResult]
    rows: Sequence[Row]
    others: int  # cells of other grids in the same folder

    @property
    def served(self) -> list[CellResult]:
        return [cell for cell in self.cells if cell.data]

    @property
    def failed(self) -> list[CellResult]:
        return [cell for cell in self.cells if not cell.data]

    @property
    def wrong(self) -> int:
        """Requests with wrong tokens, in all cells."""
        return sum(cell.data["verification"]["wrong"] for cell in self.served)

    @property
    def broken(self) -> int:
        """Trials that were left out, since requests failed in them, in all cells."""
        return sum(len(cell.data.get("failures", ())) for cell in self.served)

    @property
    def suspect(self) -> int:
        return sum(cell.data["validity"]["status"] == "suspect" for cell in self.served)

    @property
    def machines(self) -> list[str]:
        """Kinds of machines on which cells were measured, each with its nodes."""
        simulated = self.grid.simulated
        return [] if simulated else kinds_of(cell.data["environment"] for cell in self.served)


def read_sweep(grid: Grid, store: Store, goals: GoalsSpec) -> SweepResult:
    """Read the grid's finished cells and evaluate them against ``goals``."""
    cells, rows = [], []
    for cell in grid.cells:
        if cell.fault is None and not store.holds(cell):
            raise UsageError(
                f"{store.folder}: cell {cell.digest} is missing; run the sweep again, which "
                "serves only missing cells"
            )
        if (reason := cell.fault or store.failure(cell)) is not None:
            cells.append(CellResult(cell, {}, reason))
            continue
        result = regoaled(store.load(cell), goals)
        rows += rows_of(cell, result)
        data: Any = result.data
        known = [*_REPEATED, *(name for name in _OF_SERVER if data.get(name) is not None)]
        cells.append(CellResult(cell, {name: data[name] for name in known}))
    own = {cell.digest for cell in grid.cells if cell.fault is None}
    return SweepResult(grid, goals, cells, rows, len(store) - len(own))


def cells_of(swept: SweepResult) -> Cells | None:
    """Return the table with its title; None if no cell was served."""
    if not swept.rows:
        return None
    frame = table_of(swept.rows)
    names = ["strategies" if name == "strategy" else name for name in swept.grid.varying]
    # An option has no axis if all but one of its values failed.
    varying = tuple(n for n in names if n in frame and frame[n].nunique(dropna=False) > 1)
    return Cells(frame, varying, swept.grid.simulated, _title(swept))


def _title(swept: SweepResult) -> str:
    """Return model, device, and the options that were given and do not vary."""
    cells = [cell.data for cell in swept.served]
    models = {data["model"]["name"] for data in cells}
    places = {"simulated" if swept.grid.simulated else place_of(data) for data in cells}
    kind = "servers" if all(data.get("server") for data in cells) else "devices or number formats"
    parts = [
        models.pop() if len(models) == 1 else f"{len(models)} models",
        places.pop() if len(places) == 1 else f"{len(places)} {kind}",
    ]
    parts += [
        spell_option(name, values[0])
        for name, values in swept.grid.axes.items()
        if len(values) == 1 and name not in ("model", "dtype", "device", "strategy", "trials")
    ]
    return " · ".join(parts)


# Files


def write_sweep(
    folder: Path, swept: SweepResult, command: str
) -> tuple[list[Path], str, dict[str, str]]:
    """Write ``sweep.json``, ``sweep.csv`` and the pictures; remove those of an older grid.

    Returns:
        The files, the text of ``sweep.json``, and by picture the reason why it is missing.
    """
    cells = cells_of(swept)
    figures, not_drawn = draw_sweep(cells) if cells is not None else ({}, {})
    text, table = to_json(swept, command, not_drawn), to_csv(table_of(swept.rows))
    stale = [f"{name}.{format}" for name in PICTURES for format in ("png", "svg")]
    contents = {"sweep.json": text, "sweep.csv": table, **picture_files(figures)}
    return write_whole(folder, contents, stale), text, not_drawn


def to_json(swept: SweepResult, command: str, not_drawn: Mapping[str, str]) -> str:
    cells = [
        {
            "digest": None if result.cell.fault else result.cell.digest,
            "options": {name: _plain(value) for name, value in result.cell.chosen.items()},
            "status": "done" if result.data else "failed",
            "reason": result.reason,
            "config": result.cell.experiment and result.cell.experiment.config(),
            **result.data,
        }
        for result in swept.cells
    ]
    axes = {name: list(map(_plain, values)) for name, values in swept.grid.axes.items()}
    data = {
        **envelope(SCHEMA_VERSION, command),
        "simulated": swept.grid.simulated,
        "axes": axes,
        "goals": settings.as_json(swept.goals),
        "environment": environment(),
        "machines": swept.machines,
        "cells": cells,
        "pictures_not_drawn": not_drawn,
    }
    return json_text(data)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# Terminal


def render(swept: SweepResult, cells: Cells | None, not_drawn: Mapping[str, str]) -> RenderableType:
    doubtful = swept.failed or swept.suspect or len(swept.machines) > 1
    style = "bold red" if swept.wrong else "bold yellow" if doubtful else "bold"
    parts: list[RenderableType] = [Text(sentence(swept, cells), style=style), Text()]
    if cells is not None:
        parts.append(table(cells))
    return Group(*parts, *(Text(line, style="dim") for line in notes(swept, cells, not_drawn)))


def sentence(swept: SweepResult, cells: Cells | None) -> str:
    parts = []
    if cells is not None:
        count = cells.typical["cell"].nunique()
        over = f" over {count} cells" if count > 1 else " in its one cell"
        begin = "in simulation, where every step costs the same, " if cells.simulated else ""
        parts.append(begin + cells.answer("wait_ratio" if cells.timed else "speedup", over))
    total = len(swept.cells)
    if swept.failed:
        parts.append(f"{len(swept.failed)} of {total} cells could not be served")
    if swept.wrong:
        parts.append(f"{plural(swept.wrong, 'request')} got WRONG tokens")
    if swept.broken:
        parts.append(f"requests failed in {plural(swept.broken, 'trial')}, which are left out")
    if swept.suspect:
        parts.append(f"{swept.suspect} of {total} cells are suspect")
    if len(swept.machines) > 1:
        parts.append(f"cells ran on {len(swept.machines)} kinds of machines")
    return "; ".join(parts) + "."


_THROUGHPUT, _TTFT = ("tok/s", "output_throughput"), ("TTFT p99 ms", "p99_ttft_ms")
_E2E, _WITHIN_SLO = ("E2E p99 ms", "p99_e2el_ms"), ("within SLO %", "slo_attainment")


def table(cells: Cells) -> Table:
    """Return one row per cell, with columns for the options that vary.

    Up to two strategies stand side by side; more have rows of their own.
    """
    together = len(cells.strategies) <= 2 and "strategies" not in cells.varying
    head, rows = _by_cell(cells) if together else _by_strategy(cells)
    varying = [name.replace("_", "\n") for name in cells.varying]
    left, total = 0 if together else len(varying) + 1, cells.typical["cell"].nunique()
    below = ["simulated: a step counts as 1 ms"] * cells.simulated
    below += [f"medians of {cells.trials} trials"] * (cells.trials > 1)
    if total > MOST_CELLS:
        below.append(f"the first {MOST_CELLS} of {total} cells; sweep.csv has all")
    return make_table(cells.title, varying + head, rows, left=left, notes=below, framed=True)


def _by_cell(cells: Cells) -> tuple[list[str], list[list[str]]]:
    columns, names = [_THROUGHPUT, _WITHIN_SLO if cells.has_slo else _TTFT], cells.strategies
    head = [f"{label}\n{name}" for label, _ in columns for name in names]
    compared = len(names) > 1 and not cells.timed
    rows = []
    for cell in cells.by_cell(MOST_CELLS):
        varying = [spell_value(cell[0][name]) for name in cells.varying]
        values = [_metric(row, metric) for _, metric in columns for row in cell]
        rows.append([*varying, *values, *(_speedup(row) for row in cell[1:] if compared)])
    return head + [f"speed-up\nover {names[0]}"] * compared, rows


def _by_strategy(cells: Cells) -> tuple[list[str], list[list[str]]]:
    columns = [_THROUGHPUT, _TTFT, _WITHIN_SLO if cells.has_slo else _E2E]
    rows = []
    for cell in cells.by_cell(MOST_CELLS):
        for row in cell:
            varying = [spell_value(row[name]) if row is cell[0] else "" for name in cells.varying]
            values = [_metric(row, metric) for _, metric in columns]
            rows.append([*varying, row["strategy"], *values, _speedup(row)])
    labels = (label.replace(" ", "\n", 1) for label, _ in columns)
    return ["strategy", *labels, "speed-up"], rows


def _metric(row: Any, name: str) -> str:
    value = None if pd.isna(row[name]) else row[name]
    return percent(value, 1).rstrip("%") if name == "slo_attainment" else number(value)


def _speedup(row: Any) -> str:
    if pd.isna(row["speedup"]):  # the baseline's own
        return "–"
    ends = (None if pd.isna(end) else end for end in (row["speedup_low"], row["speedup_high"]))
    return times_within(row["speedup"], *ends)


def notes(swept: SweepResult, cells: Cells | None, not_drawn: Mapping[str, str]) -> list[str]:
    """Return failures, reasons for suspicion, warnings and missing pictures, one per line."""
    lines = []
    for result in swept.failed:
        name = name_of(swept.grid, result.cell) or "the cell"
        lines.append(f"failed: {name}: {result.reason}")
    lines += _reasons(swept)
    if cells is not None and cells.share_follows:
        lines.append(
            "note: the workload changes with the batch size (one long request per batch); "
            "give --long-every N to keep it the same"
        )
    if len(swept.machines) > 1:
        lines.append(
            f"suspect: cells ran on {len(swept.machines)} kinds of machines "
            f"({'; '.join(swept.machines)}), so compare strategies within a cell, not across cells"
        )
    if swept.others:
        others = plural(swept.others, "cell")
        lines.append(f"note: the folder has {others} of other sweeps, which are not shown")
    return lines + [f"not drawn: {name}: {why}" for name, why in not_drawn.items()]


def _reasons(swept: SweepResult) -> list[str]:
    """Return the reasons why cells are suspect; those that differ in numbers only appear once."""
    kinds: dict[str, list[str]] = {}
    for result in swept.served:
        for reason in result.data["validity"]["reasons"]:
            kinds.setdefault(re.sub(r"[\d.,]+", "#", reason), []).append(reason)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    lines = [
        f"suspect: {kind[0]}" + (f", and {len(kind) - 1} more like it" if len(kind) > 1 else "")
        for kind in ranked[:MOST_REASONS]
    ]
    if len(ranked) > MOST_REASONS:
        others = plural(len(ranked) - MOST_REASONS, "other reason")
        lines.append(f"suspect: {others}; sweep.json has all")
    return lines
