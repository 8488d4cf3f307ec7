"""What came of a sweep: read from its finished cells, and told as rows, sentence and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import batchbench
from batchbench.batching.machine import environment
from batchbench.reports.result import regoaled
from batchbench.reports.slo import GoalsSpec, as_config
from batchbench.studies.sweep.grid import Cell, Grid
from batchbench.studies.sweep.store import Store
from batchbench.studies.sweep.table import Row, rows_of

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
        cells.append(Finding(cell, {name: result.data[name] for name in _TOLD}))
    own = {cell.digest for cell in grid.cells if cell.fault is None}
    return Findings(grid, goals, cells, rows, len(store) - len(own))


def to_json(findings: Findings, command: str, not_drawn: Mapping[str, str]) -> str:
    """``sweep.json``: what was asked and what came of each cell."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "batchbench_version": batchbench.__version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "simulated": findings.grid.simulated,
        "axes": {name: _plain(values) for name, values in findings.grid.axes.items()},
        "goals": as_config(findings.goals),
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
