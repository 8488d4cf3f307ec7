"""The tidy table of a sweep: a row a cell, strategy and trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from batchbench.reports import metrics
from batchbench.reports.result import Result
from batchbench.studies.sweep.grid import Cell
from batchbench.workloads.lengths import Cycle

Row = dict[str, Any]

OPTIONS = ("serving", "workload", "model", "trials", "goals")
"""Parts of a result's config whose settings become columns, named as the options."""


def rows_of(cell: Cell, result: Result) -> list[Row]:
    """The rows of one cell: its options, strategy and trial, what was measured and counted.

    ``--strategy`` is the column ``strategies``: the names that ran side by side, of which
    ``strategy`` is the row's own.
    """
    data = result.data
    options: Row = {"cell": cell.digest, "preset": data["config"]["preset"]}
    for part in OPTIONS:
        for name, value in data["config"].get(part, {}).items():
            told = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            options["strategies" if name == "strategy" else name] = told
    options |= _defaults(cell, result)
    checked = data["verification"]
    judged = {
        "validity": data["validity"]["status"],
        "requests_checked": checked["requests_checked"],
        "wrong": checked["wrong"],
    }
    return [
        {
            **options,
            "strategy": strategy,
            "trial": trial,
            **data["strategies"][strategy]["trials"][trial],
            **(metrics.counters(recording) if recording.has_steps else {}),
            **judged,
        }
        for strategy, recordings in result.recordings.items()
        for trial, recording in enumerate(recordings)
    ]


def _defaults(cell: Cell, result: Result) -> Row:
    """What an option that was left to its default came to, where that depends on others."""
    assert cell.experiment is not None
    spec, slots = cell.experiment.workload, cell.experiment.serving.batch_size
    found: Row = {"queue_size": result.data["workload"]["num_requests"]}
    if spec.trace is None and isinstance(cycle := spec.output_lengths(slots), Cycle):
        found |= {
            "long_every": cycle.every,
            "long_tokens": cycle.long,
            "short_tokens": cycle.short,
        }
    return found


def table_of(rows: Iterable[Row]) -> pd.DataFrame:
    """All rows as a frame; what a row has no value for is empty."""
    frame = pd.DataFrame(list(rows))
    for name, column in frame.items():
        there = column.dropna()
        if column.dtype == "float64" and len(there) and name in _whole(rows):
            frame[name] = column.astype("Int64")  # 8 stays 8 where other rows have nothing
    return frame


def _whole(rows: Iterable[Row]) -> set[str]:
    """Columns whose values are whole numbers wherever they are there."""
    rows = list(rows)
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    return {name for name, found in kinds.items() if found <= {int, type(None)}}


def to_csv(frame: pd.DataFrame) -> bytes:
    """The table as CSV; the same rows give the same bytes."""
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()
