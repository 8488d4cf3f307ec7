"""The tidy table of a sweep: a row a cell, strategy and trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from batchbench.reports import metrics
from batchbench.reports.result import Result
from batchbench.reports.statistics import paired_ratio
from batchbench.reports.text import spell_option
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
    data: Any = result.data
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


@dataclass(frozen=True, eq=False)
class Cells:
    """A tidy table, a row a cell, strategy and trial, and what its pictures and screens need.

    Args:
        frame: columns named as the options, then ``strategy``, ``trial``, metrics and counters.
        varying: columns of options that have more than one value.
        simulated: whether a step counts as a millisecond.
        title: model, device and what all cells share, in a line.
    """

    frame: pd.DataFrame
    varying: tuple[str, ...]
    simulated: bool
    title: str

    @cached_property
    def strategies(self) -> list[str]:
        """Names in the order of their first appearance, the baseline first."""
        return list(dict.fromkeys(self.frame["strategy"]))

    @cached_property
    def trials(self) -> int:
        """Most trials that a cell has."""
        return int(self.frame["trial"].max()) + 1

    @property
    def timed(self) -> bool:
        """Whether requests come over time in some cell, so that durations say little."""
        columns = ("request_rate", "max_concurrency", "arrivals", "trace")
        return any(self.frame[name].notna().any() for name in columns if name in self.frame)

    @property
    def share_follows(self) -> bool:
        """Whether the share of long requests goes with another option (the batch size)."""
        several = "long_every" in self.frame and self.frame["long_every"].nunique() > 1
        return several and "long_every" not in self.varying

    @cached_property
    def typical(self) -> pd.DataFrame:
        """A row a cell and strategy: medians over its trials, and how it compares.

        Added are ``baseline`` (the first strategy of the cell), ``speedup`` with ``speedup_low``
        and ``speedup_high`` (95 %, where there are trials enough), ``step_ratio``, the
        ``wait_ratio`` of the p99s of TTFT, baseline over this, and the ``long_share`` of requests.
        """
        return pd.DataFrame(list(self._typical()))

    def _typical(self) -> Iterator[dict[str, Any]]:
        for _, cell in self.frame.groupby("cell", sort=False):
            baseline = cell["strategy"].iloc[0]
            base = cell[cell["strategy"] == baseline]
            for name, rows in cell.groupby("strategy", sort=False):
                measured = rows.select_dtypes("number").median()
                first: dict[Any, Any] = rows.iloc[0].to_dict()
                yield (
                    first
                    | {key: value for key, value in measured.items() if key not in self.varying}
                    | {"baseline": baseline, "long_share": _long_share(first)}
                    | _against(base, rows, own=name == baseline)
                )

    def where(self, row: Any, *, less: tuple[str, ...] = ()) -> str:
        """A row's values of what varies: ``batch size 8, prefill mixed``."""
        return ", ".join(spell_option(name, row[name]) for name in self.varying if name not in less)


def _against(base: pd.DataFrame, rows: pd.DataFrame, *, own: bool) -> dict[str, float | None]:
    """How much faster a strategy's trials were than the baseline's, pair by pair."""
    ratio = paired_ratio(base["duration"].tolist(), rows["duration"].tolist())
    if own or ratio is None:
        names = ("speedup", "speedup_low", "speedup_high", "step_ratio", "wait_ratio")
        return dict.fromkeys(names)
    # A strategy that schedules for itself shows no passes.
    passes = [[None if pd.isna(n) else n for n in part["forward_passes"]] for part in (base, rows)]
    steps = paired_ratio(*passes)
    return {
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "step_ratio": None if steps is None else steps.median,
        "wait_ratio": float(base["p99_ttft_ms"].median() / rows["p99_ttft_ms"].median()),
    }


def _long_share(row: dict[str, Any]) -> float | None:
    """Share of long requests in the classic cycle, of which one in ``long_every`` is."""
    every = row.get("long_every")
    return None if every is None or pd.isna(every) else 1 / every
