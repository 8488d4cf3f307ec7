"""What a sweep would do: its cells, and the forward passes of each, by simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from batchbench.batching.dry_run import estimate
from batchbench.batching.progress import Watch
from batchbench.errors import UsageError
from batchbench.reports.text import spell_option
from batchbench.studies.sweep.grid import Cell, Grid


def lines_of(grid: Grid) -> Iterator[str]:
    """A line a cell, then the sum; each is simulated when its line is asked for."""
    total = impossible = 0
    for number, cell in enumerate(grid.cells, 1):
        told, steps = _passes(cell)
        total += steps
        impossible += not steps
        which = ", ".join(spell_option(name, cell.chosen[name]) for name in grid.varying)
        yield f"{number:>{len(str(len(grid.cells)))}}  {which or 'the one cell'}: {told}"
    failing = f", {impossible} of them cannot be served" if impossible else ""
    yield f"{len(grid.cells)} cells{failing}; {total:,} forward passes with all trials"


def _passes(cell: Cell) -> tuple[str, int]:
    """What a cell takes, for people; and the passes of all its trials, 0 where it is impossible."""
    try:
        if cell.experiment is None:
            raise UsageError(cell.fault)
        found = estimate(replace(cell.experiment, simulated=True), Watch())
    except UsageError as error:
        return f"cannot be served: {error}", 0
    about = "" if found.exact else "at most "
    counts = ", ".join(f"{name} {about}{steps:,}" for name, steps in found.steps.items())
    trials = f" × {found.trials} trials" if found.trials > 1 else ""
    return f"{counts} forward passes{trials}", sum(found.steps.values()) * found.trials
