"""A sweep on a terminal: the sentence, a table with what varies, and what could not be served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchbench.reports.cells import Cells
from batchbench.reports.text import called, number, spell_option, spell_value
from batchbench.studies.sweep.report import Findings

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


def render(findings: Findings, cells: Cells | None, lines: Sequence[str]) -> RenderableType:
    """Sentence, table, notes."""
    bad = findings.wrong > 0
    doubtful = findings.failed or findings.suspect
    style = "bold red" if bad else "bold yellow" if doubtful else "bold"
    parts: list[RenderableType] = [Text(sentence(findings, cells), style=style), Text()]
    if cells is not None:
        parts += [table(cells)]
    return Group(*parts, *(Text(line, style="dim") for line in lines))
