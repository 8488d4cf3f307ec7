"""A sweep: every cell of a grid is served once, and what is finished is never served again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

from batchbench.batching.dry_run import estimate
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.session import Outcome, StopReason, conduct
from batchbench.errors import Interrupted, UsageError
from batchbench.reports.result import make_result
from batchbench.reports.text import spell_option
from batchbench.studies.sweep.grid import Cell, Grid
from batchbench.studies.sweep.store import Store

MOST_REQUESTS = 20_000
"""A larger workload is not simulated only to know how long it will take."""


def work_of(experiment: Experiment) -> float:
    """Forward passes of all trials, by simulation; where that would take long, requests."""
    workload, trials = experiment.workload, experiment.trials.trials
    if experiment.simulated or (workload.queue_size or 0) > MOST_REQUESTS:
        return float((workload.queue_size or 1) * trials * len(experiment.serving.strategies))
    try:
        found = estimate(replace(experiment, simulated=True), Watch())
    except UsageError:  # it cannot be served, which the cell itself will say
        return 0.0
    return float(sum(found.steps.values()) * trials)


@dataclass
class Pace:
    """Seconds a piece of work, and from it the time left."""

    work: dict[str, float]  # of the cells that are not done, by digest
    _seconds_each: list[float] = field(default_factory=list)

    def done(self, digest: str, seconds: float) -> None:
        """A cell is finished, after so long."""
        work = self.work.pop(digest, 0.0)
        if work:
            self._seconds_each.append(seconds / work)

    def left_s(self) -> float | None:
        """Seconds until all is done; None before the first cell is."""
        if not self._seconds_each:
            return None
        return median(self._seconds_each) * sum(self.work.values())


Conduct = Callable[[Experiment, Watch, ModelCache], Outcome]


class Asked(Protocol):
    """What is swept: a grid, or cells chosen otherwise."""

    @property
    def cells(self) -> Sequence[Cell]:
        """The experiments."""

    @property
    def varying(self) -> tuple[str, ...]:
        """Options with more than one value, by which a cell is called."""


class SweepWatch(Watch):
    """Hears of cells as well; says nothing of them."""

    def cells_begin(self, cells: int, kept: int) -> None:
        """``cells`` are asked for, of which ``kept`` are finished already."""

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        """The ``number``-th of ``cells`` is served now; counts from 1, kept ones included."""

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        """It is kept; ``reason`` says why it failed, ``left_s`` how long the others take."""


def run_cells(
    grid: Asked, store: Store, watch: SweepWatch | None = None, serve: Conduct = conduct
) -> None:
    """Serve the cells that are not finished, and keep each as soon as it is.

    Cells on the same model are served one after the other, so that it is loaded once. The caller
    has claimed the store's folder.

    Raises:
        Interrupted: by Ctrl-C; the cell that was being served is not kept.
    """
    watch = watch or SweepWatch()
    store.tidy()
    possible = list({c.digest: c for c in grid.cells if c.experiment is not None}.values())
    to_do = _by_model([cell for cell in possible if not store.holds(cell)])
    watch.cells_begin(len(possible), len(possible) - len(to_do))
    pace, models = Pace({cell.digest: work_of(_asked(cell)) for cell in to_do}), ModelCache()
    done = len(possible) - len(to_do)
    for number, cell in enumerate(to_do, done + 1):
        watch.cell_begins(number, len(possible), cell)
        began = time.monotonic()
        try:
            reason = _serve(cell, store, watch, serve, models)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; {number - 1} of {len(possible)} cells are kept in {store.folder}: "
                "the same command goes on from there"
            ) from error
        pace.done(cell.digest, time.monotonic() - began)
        watch.cell_ends(cell, reason, pace.left_s())


def _serve(
    cell: Cell, store: Store, watch: Watch, serve: Conduct, models: ModelCache
) -> str | None:
    """Serve one cell and keep what came of it; why it failed, if so."""
    try:
        outcome = serve(_asked(cell), watch, models)
    except UsageError as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        reason = "it ran out of memory; lower --batch-size or the lengths of requests"
    else:
        if outcome.stopped is not None and outcome.stopped.reason is StopReason.INTERRUPTED:
            raise KeyboardInterrupt  # what is there of the cell would look like all of it
        store.keep(cell, make_result(outcome))
        return None
    store.keep_failure(cell, reason)
    return reason


def _asked(cell: Cell) -> Experiment:
    assert cell.experiment is not None
    return cell.experiment


def _by_model(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with those on the same model together, else in their order."""
    seen: dict[object, int] = {}
    for cell in cells:
        seen.setdefault((_asked(cell).model, _asked(cell).workload.seed), len(seen))
    return sorted(cells, key=lambda c: seen[(_asked(c).model, _asked(c).workload.seed)])


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
