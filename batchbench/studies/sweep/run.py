"""Serve every cell of a sweep once, and keep each finished cell in the sweep's folder."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from batchbench.batching.dry_run import estimate
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import facts_of
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.remote.dialects import Dialect, discover
from batchbench.batching.remote.exchange import ServerError
from batchbench.batching.remote.outcome import TrialFailed
from batchbench.batching.session import Outcome, StopReason, conduct
from batchbench.errors import IncompleteError, Interrupted, UsageError
from batchbench.files import STAGING, write_whole
from batchbench.json_file import read_json
from batchbench.reports.result import Result, load_result, make_result, recording_files, to_json
from batchbench.reports.text import plural, spell_option
from batchbench.studies.executors.jobs import (
    MOST_RERUNS,
    Done,
    Executor,
    Failed,
    Job,
    run_jobs,
)
from batchbench.studies.sweep.grid import Cell, Grid

MOST_REQUESTS = 20_000
"""Requests of the largest workload that is simulated to estimate how long it takes."""


@dataclass(frozen=True)
class Store:
    """Finished cells, in ``cells/<digest>/`` of a sweep's folder, each written whole.

    A served cell is a result's folder without tables and pictures, which ``batchbench report``
    can add. One that could not be served has ``failed.json`` with the reason.
    """

    folder: Path

    @property
    def _cells(self) -> Path:
        return self.folder / "cells"

    def tidy(self) -> None:
        """Remove cells that a killed sweep left half-written; the folder must be claimed."""
        for leftover in self._cells.glob(f"{STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def __len__(self) -> int:
        """Number of cells, including those of other grids."""
        return sum(not place.name.startswith(".") for place in self._cells.glob("*"))

    def place(self, cell: Cell) -> Path:
        return self._cells / cell.digest

    def holds(self, cell: Cell) -> bool:
        return cell.experiment is not None and self.place(cell).is_dir()

    def failure(self, cell: Cell) -> str | None:
        """Return the reason why the cell could not be served; None if it was served."""
        file = self.place(cell) / "failed.json"
        try:
            return str(read_json(file)["reason"])
        except FileNotFoundError:
            return None
        except (OSError, UsageError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: is not readable; remove {file.parent}") from error

    def load(self, cell: Cell) -> Result:
        try:
            return load_result(self.place(cell))
        except UsageError as error:
            raise UsageError(f"{error}; remove {self.place(cell)} to run the cell again") from error

    def unfinished(self, grid: CellsQuery) -> list[Experiment]:
        return [c.experiment for c in grid.cells if c.experiment and not self.holds(c)]

    def machine(self, grid: CellsQuery) -> dict[str, Any] | None:
        """Return the facts of the machine of the first served cell; None if there is none."""
        for cell in grid.cells:
            if self.holds(cell) and self.failure(cell) is None:
                return facts_of(read_json(self.place(cell) / "result.json")["environment"], {})
        return None

    def keep_failure(self, cell: Cell, reason: str) -> None:
        failure = {"reason": reason, "config": _experiment(cell).config()}
        self.keep_files(cell, {"failed.json": json.dumps(failure, indent=2) + "\n"})

    def forget_failure(self, cell: Cell) -> None:
        """Remove a failure, so that the cell is tried again."""
        if self.holds(cell) and self.failure(cell) is not None:
            shutil.rmtree(self.place(cell))

    def keep_files(self, cell: Cell, contents: Mapping[str, bytes | str]) -> None:
        try:
            write_whole(self.place(cell), contents, durable=True)
        except UsageError as error:
            raise UsageError(f"--output {self.folder}: {error}") from error


def files_of(result: Result) -> dict[str, bytes | str]:
    return {"result.json": to_json(result), **recording_files(result.recordings)}


def _experiment(cell: Cell) -> Experiment:
    assert cell.experiment is not None
    return cell.experiment


def ask_servers(grid: Grid) -> dict[str, str]:
    """Return what the server of each ``--target`` says it is, by target."""
    targets = {cell.experiment.target for cell in grid.cells if cell.experiment is not None}
    known = [target for target in targets if target is not None and target.target is not None]
    return {str(t.target): identity_of(discover(t.setup_address)) for t in known}


def identity_of(server: Dialect) -> str:
    """Return what tells one server from another in words: other facts, another server."""
    facts = (server.name, server.version, server.slots, server.context, *server.served_models)
    return " ".join(map(str, facts))


def work_of(experiment: Experiment) -> float:
    """Return the forward passes of all trials, or the requests if a simulation would be slow."""
    requests, trials = experiment.workload.queue_size or 1, experiment.trials.trials
    if experiment.target is not None or experiment.simulated or requests > MOST_REQUESTS:
        return float(requests * trials * len(experiment.serving.strategies))
    try:
        steps = estimate(replace(experiment, simulated=True), Watch()).steps
    except UsageError:  # it cannot be served, which the cell itself will say
        return 0.0
    return float(sum(steps.values()) * trials)


@dataclass
class Pace:
    """Estimate of the time left, from the work of each cell that is not done, by digest."""

    work: dict[str, float]
    _seconds_per_work: list[float] = field(default_factory=list)

    def done(self, digest: str, seconds: float) -> None:
        if work := self.work.pop(digest, 0.0):
            self._seconds_per_work.append(seconds / work)

    def left_s(self, at_once: int = 1) -> float | None:
        """Return the seconds until all is done, several cells at once; None before the first."""
        if not self._seconds_per_work:
            return None
        return median(self._seconds_per_work) * sum(self.work.values()) / at_once


Conduct = Callable[[Experiment, Watch, ModelCache], Outcome]


class CellsQuery(Protocol):
    """Cells to serve: a grid, or a list of cells."""

    @property
    def cells(self) -> Sequence[Cell]:
        """The experiments."""

    @property
    def varying(self) -> tuple[str, ...]:
        """Options by which cells are named."""


class SweepWatch(Watch):
    """The observer of a sweep's progress; this base class shows nothing."""

    def cells_begin(self, cells: int, kept: int) -> None:
        """Start a sweep of ``cells`` cells, of which ``kept`` are finished already."""

    def cell_begins(self, number: int, cells: int, cell: Cell) -> None:
        """Start the ``number``-th cell; again if it was lost."""

    def cells_run(self, nodes: Sequence[str], machines: int) -> None:
        """Receive the node of each cell that runs elsewhere now, and the machines that are held."""

    def cell_ran(self, cell: Cell, node: str, seconds: float) -> None:
        """Receive the node on which a cell ran that now ends; not called if it ran here."""

    def cell_ends(self, cell: Cell, reason: str | None, left_s: float | None) -> None:
        """Finish a cell, with the reason if it failed and the seconds left if known."""


@dataclass(frozen=True)
class CellWork:
    """The serving of one cell, wherever it runs."""

    experiment: Experiment
    serve: Conduct = conduct

    def __call__(self, watch: Watch, models: ModelCache) -> Done | Failed:
        try:
            outcome = self.serve(self.experiment, watch, models)
        except ServerError as error:  # it has gone, which says nothing about the cell
            raise UsageError(f"{error}; {_CONTINUES}") from error
        except (UsageError, TrialFailed) as error:
            return Failed(str(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            return Failed("it ran out of memory; lower --batch-size or the lengths of requests")
        if outcome.stopped is not None and outcome.stopped.reason is StopReason.INTERRUPTED:
            raise KeyboardInterrupt  # an incomplete cell would look complete
        return Done(files_of(make_result(outcome)))


_CONTINUES = "the same command continues from the cells that are kept"


def run_cells(
    grid: CellsQuery,
    store: Store,
    watch: SweepWatch | None = None,
    serve: Conduct = conduct,
    *,
    executor: Executor | None = None,
) -> None:
    """Serve all cells that are not finished, and keep each as soon as it is.

    Cells with the same model are served one after the other, so that it is loaded once. The caller
    has claimed the store's folder. Without an executor, this process serves them.

    Raises:
        Interrupted: by Ctrl-C; the cells that were being served are not kept.
        IncompleteError: cells were lost with their machines, each several times.
    """
    watch = watch or SweepWatch()
    executor = executor or Executor(watch)
    store.tidy()
    possible = list({c.digest: c for c in grid.cells if c.experiment is not None}.values())
    pending = {cell.digest: cell for cell in _by_model(c for c in possible if not store.holds(c))}
    done = len(possible) - len(pending)
    numbers = {digest: number for number, digest in enumerate(pending, done + 1)}
    watch.cells_begin(len(possible), done)
    watch.cells_run([], executor.machines)
    experiments = {digest: _experiment(cell) for digest, cell in pending.items()}
    pace = Pace({digest: work_of(experiment) for digest, experiment in experiments.items()})
    jobs = [Job(digest, CellWork(e, serve), e.server) for digest, e in experiments.items()]

    def begins(job: Job) -> None:
        watch.cell_begins(numbers[job.key], len(possible), pending[job.key])

    def waited() -> None:
        watch.cells_run(list(executor.running.values()), executor.machines)

    lost = []
    try:
        for ended in run_jobs(jobs, executor, begins, waited):
            cell, outcome = pending[ended.key], ended.outcome
            reason = ended.reason
            if isinstance(outcome, Done):
                store.keep_files(cell, outcome.files)
            elif isinstance(outcome, Failed):
                store.keep_failure(cell, outcome.reason)
            else:
                lost.append((cell, str(reason)))
            pace.done(cell.digest, ended.seconds)
            waited()
            if ended.node:
                watch.cell_ran(cell, ended.node, ended.seconds)
            watch.cell_ends(cell, reason, pace.left_s(len(executor.running) + 1))
            done += 1
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; {done - len(lost)} of {len(possible)} cells are kept in {store.folder}: "
            "the same command continues from there"
        ) from error
    if lost:
        raise IncompleteError(_missing(grid, lost))


def _missing(grid: CellsQuery, lost: Sequence[tuple[Cell, str]]) -> str:
    names = [name_of(grid, cell) or cell.digest for cell, _ in lost]
    return (
        f"{plural(len(lost), 'cell')} missing, since each was lost {MOST_RERUNS + 1} times with "
        f"its machine: {'; '.join(names)} ({lost[-1][1]}); {_CONTINUES}"
    )


def name_of(grid: CellsQuery, cell: Cell) -> str:
    return ", ".join(spell_option(name, cell.chosen[name]) for name in grid.varying)


def _by_model(cells: Iterable[Cell]) -> Iterator[Cell]:
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        experiment = _experiment(cell)
        groups.setdefault((experiment.model, experiment.workload.seed), []).append(cell)
    return itertools.chain.from_iterable(groups.values())


def lines_of(grid: Grid) -> Iterator[str]:
    """Yield one line per cell with its forward passes, then their sum.

    Each cell is simulated when its line is asked for.
    """
    total = impossible = 0
    for number, cell in enumerate(grid.cells, 1):
        text, steps = _passes(cell)
        total += steps
        impossible += not steps and (cell.experiment is None or cell.experiment.target is None)
        name = name_of(grid, cell) or "the one cell"
        yield f"{number:>{len(str(len(grid.cells)))}}  {name}: {text}"
    failing = f", {impossible} of them cannot be served" if impossible else ""
    cells = plural(len(grid.cells), "cell")
    served = any(cell.experiment and cell.experiment.target for cell in grid.cells)
    passes = "" if served else f"; {total:,} forward passes with all trials"
    yield f"{cells}{failing}{passes}"


def _passes(cell: Cell) -> tuple[str, int]:
    """Return the forward passes of a cell in words and as a number, which is 0 if it fails."""
    try:
        if cell.experiment is None:
            raise UsageError(cell.fault)
        if cell.experiment.target is not None:
            return f"served by {cell.experiment.target.place}", 0
        needed = estimate(replace(cell.experiment, simulated=True), Watch())
    except UsageError as error:
        return f"cannot be served: {error}", 0
    bound = "" if needed.exact else "at most "
    counts = ", ".join(f"{name} {bound}{steps:,}" for name, steps in needed.steps.items())
    trials = f" × {needed.trials} trials" if needed.trials > 1 else ""
    return f"{counts} forward passes{trials}", sum(needed.steps.values()) * needed.trials
