"""The table of a sweep: one row per cell, strategy and trial."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from batchbench import settings
from batchbench.batching.experiment import PARTS
from batchbench.reports import metrics
from batchbench.reports.result import Result
from batchbench.reports.served import passes_of
from batchbench.reports.statistics import paired_ratio
from batchbench.reports.text import called, number, spell_option, times
from batchbench.studies.sweep.grid import Cell
from batchbench.workloads.lengths import Cycle

Row = dict[str, Any]

OPTIONS = ("target", "serving", "workload", "model", "trials", "goals")
"""Parts of a result's config whose settings become columns, named as the options."""


def rows_of(cell: Cell, result: Result) -> list[Row]:
    """Return the rows of one cell: options, strategy, trial, metrics and counters.

    ``--strategy`` is the column ``strategies``; ``strategy`` is the one of the row.
    """
    data = result.data
    configs: Mapping[str, Any] = data["config"]
    options: Row = {"cell": cell.digest, "preset": configs["preset"]}
    for part in OPTIONS:
        config = configs.get(part, {})
        omitted = settings.omitted(PARTS[part]) if config and part in PARTS else {}
        for name, value in {**omitted, **config}.items():
            plain = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            options["strategies" if name == "strategy" else name] = plain
    options |= _defaults(cell, result)
    checked = data["verification"]
    judgement: Row = {"validity": data["validity"]["status"]}
    judgement |= {"requests_checked": checked["requests_checked"], "wrong": checked["wrong"]}
    return [
        {
            **options,
            "strategy": result.label(strategy),
            "trial": trial,
            **data["strategies"][strategy]["trials"][trial],
            **_counts(result, strategy, trial),
            **judgement,
        }
        for strategy, recordings in result.recordings.items()
        for trial, recording in enumerate(recordings)
    ]


def _counts(result: Result, strategy: str, trial: int) -> Row:
    """Return a trial's counters; of a server only its forward passes, if it counts them."""
    recording, server = result.recordings[strategy][trial], result.data.get("server")
    if recording.has_steps:
        return {**metrics.counters(recording)}
    passes = [] if server is None else passes_of(server, strategy)
    return {"forward_passes": passes[trial] if passes else None}


def _defaults(cell: Cell, result: Result) -> Row:
    """Return the values of options whose defaults depend on other options."""
    assert cell.experiment is not None
    spec, slots = cell.experiment.workload, cell.experiment.serving.batch_size
    defaults: Row = {"queue_size": result.data["workload"]["num_requests"]}
    if spec.trace is None and isinstance(cycle := spec.output_lengths(slots), Cycle):
        defaults |= {"long_every": cycle.every}
        defaults |= {"long_tokens": cycle.long, "short_tokens": cycle.short}
    return defaults


def table_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Return all rows as a frame, in which whole numbers stay whole beside missing values."""
    frame = pd.DataFrame(list(rows))
    for name, column in frame.items():
        if column.dtype == "float64" and column.notna().any():
            values = (row.get(str(name)) for row in rows)
            if all(value is None or type(value) is int for value in values):
                frame[name] = column.astype("Int64")
    return frame


def to_csv(frame: pd.DataFrame) -> bytes:
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()


@dataclass(frozen=True, eq=False)
class Cells:
    """A sweep's table, with what its pictures and reports need."""

    frame: pd.DataFrame  # options, then ``strategy``, ``trial``, metrics and counters
    varying: tuple[str, ...]  # columns of options that have more than one value
    simulated: bool  # a step counts as a millisecond
    title: str  # model, device and what all cells share

    @cached_property
    def strategies(self) -> list[str]:
        """Names in the order of their first appearance, the baseline first."""
        return list(dict.fromkeys(self.frame["strategy"]))

    @cached_property
    def trials(self) -> int:
        """Trials of the cell that has most."""
        return int(self.frame["trial"].max()) + 1

    @property
    def timed(self) -> bool:
        """True if requests come over time in some cell, so that durations say little."""
        columns = ("request_rate", "max_concurrency", "arrivals", "trace")
        return any(self.frame[name].notna().any() for name in columns if name in self.frame)

    @property
    def has_slo(self) -> bool:
        return "slo_attainment" in self.frame and bool(self.frame["slo_attainment"].notna().any())

    @property
    def share_follows(self) -> bool:
        """True if the share of long requests follows another option, the batch size."""
        several = "long_every" in self.frame and self.frame["long_every"].nunique() > 1
        return several and "long_every" not in self.varying

    @cached_property
    def typical(self) -> pd.DataFrame:
        """One row per cell and strategy: medians over its trials, and its comparison.

        Added columns are ``baseline`` (the first strategy of the cell), ``speedup`` with
        ``speedup_low`` and ``speedup_high`` (95 %, with trials enough), ``step_ratio``,
        ``wait_ratio`` (p99 of TTFT, baseline over this) and ``long_share`` of requests.
        """
        return pd.DataFrame(list(self._typical()))

    def _typical(self) -> Iterator[dict[str, Any]]:
        for _, cell in self.frame.groupby("cell", sort=False):
            baseline = cell["strategy"].iloc[0]
            base = cell[cell["strategy"] == baseline]
            for name, rows in cell.groupby("strategy", sort=False):
                medians = rows.select_dtypes("number").median()
                first: dict[Any, Any] = rows.iloc[0].to_dict()
                every = first.get("long_every")
                yield (
                    first
                    | {key: value for key, value in medians.items() if key not in self.varying}
                    | {"baseline": baseline}
                    | {"long_share": None if every is None or pd.isna(every) else 1 / every}
                    | _comparison(base, rows, is_baseline=name == baseline)
                )

    def by_cell(self, most: int) -> list[list[Any]]:
        """Return the typical rows of the first ``most`` cells, cell by cell."""
        groups = itertools.islice(self.typical.groupby("cell", sort=False), most)
        return [[row for _, row in rows.iterrows()] for _, rows in groups]

    def answer(self, metric: str, over: str = "") -> str:
        """Compare the last strategy with the baseline in a metric; ``over`` follows the range."""
        baseline, candidate = called(self.strategies[0]), called(self.strategies[-1])
        text, at = self.span(metric)
        if not text:
            text, at = self.span("output_throughput")
            return f"{candidate} yields {text} output tokens/s{over}{at}"
        if metric == "wait_ratio":
            return f"TTFT p99 is {text} as long under {baseline} as under {candidate}{over}{at}"
        return f"{candidate} is {text} as fast as {baseline}{over}{at}"

    def span(self, metric: str) -> tuple[str, str]:
        """Return a metric's range under the last strategy, and the cell of its largest value.

        Such as ``1.36× to 3.08×`` and ``, most at batch size 32``; empty if no cell has the metric.
        """
        is_last = self.typical["strategy"] == self.strategies[-1]
        values = self.typical.loc[is_last, metric].dropna()
        if not len(values):
            return "", ""
        spell = times if metric in ("speedup", "wait_ratio") else number
        text = " to ".join(dict.fromkeys([spell(values.min()), spell(values.max())]))
        largest: Any = values.idxmax()
        row = self.typical.loc[largest]
        names = [name for name in self.varying if name != "strategies"]
        where = ", ".join(spell_option(name, row[name]) for name in names)
        return text, f", most at {where}" if where and " to " in text else ""


def _comparison(
    base: pd.DataFrame, rows: pd.DataFrame, *, is_baseline: bool
) -> dict[str, float | None]:
    """Compare a strategy's trials with the baseline's, pair by pair."""
    ratio = paired_ratio(base["duration"].tolist(), rows["duration"].tolist())
    if is_baseline or ratio is None:
        names = ("speedup", "speedup_low", "speedup_high", "step_ratio", "wait_ratio")
        return dict.fromkeys(names)
    # A strategy that schedules by itself reports no passes.
    passes = [[None if pd.isna(n) else n for n in part["forward_passes"]] for part in (base, rows)]
    steps = paired_ratio(*passes)
    return {
        "speedup": ratio.median,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "step_ratio": None if steps is None else steps.median,
        "wait_ratio": float(base["p99_ttft_ms"].median() / rows["p99_ttft_ms"].median()),
    }
