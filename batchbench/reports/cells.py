"""Cells of a sweep side by side: medians over trials, paired speed-ups, what varies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from batchbench.reports.comparison import paired_ratio
from batchbench.reports.text import spell_option


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
