"""Cells for tests of executors, and an executor that ends jobs in a bad order."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.session import Outcome, conduct
from batchbench.reports.slo import GoalsSpec
from batchbench.studies.executors.jobs import (
    Done,
    Ended,
    Executor,
    Failed,
    Job,
    Lost,
    Unlike,
    Worker,
)
from batchbench.studies.sweep.grid import Grid, digest_of
from batchbench.studies.sweep.report import read_sweep
from batchbench.studies.sweep.run import Conduct, Store, run_cells
from batchbench.studies.sweep.table import table_of, to_csv


def grid_of(cells: int, queue_size: int = 12) -> Grid:
    """A simulated grid of so many cells."""
    return Grid({"seed": tuple(range(cells)), "queue_size": (queue_size,)}, simulated=True)


def swept(
    folder: Path, grid: Grid, executor: Executor | None = None, serve: Conduct = conduct
) -> bytes:
    """The table of a sweep, run to its end by an executor."""
    store = Store(folder)
    run_cells(grid, store, serve=serve, executor=executor)
    return to_csv(table_of(read_sweep(grid, store, GoalsSpec()).rows))


class Adversary:
    """Ends jobs in any order, and loses or refuses each at most ``losses`` times."""

    machines = 1

    def __init__(self, seed: int, slots: int, losses: int = 2) -> None:
        self._chance, self._slots, self._losses = random.Random(seed), slots, losses
        self._jobs: list[Job] = []
        self.begun, self.lost, self.refused = Counter[str](), Counter[str](), Counter[str]()

    @property
    def free(self) -> int:
        return self._slots - len(self._jobs)

    @property
    def running(self) -> Mapping[str, str]:
        return {job.key: "somewhere" for job in self._jobs}

    def submit(self, job: Job) -> None:
        assert self.free > 0
        self._jobs.append(job)

    def wait(self) -> Sequence[Ended]:
        count = self._chance.randint(0, len(self._jobs))
        ended, self._jobs = self._jobs[:count], self._jobs[count:]
        self._chance.shuffle(self._jobs)
        return [Ended(job.key, self._outcome(job), "somewhere") for job in ended]

    def _outcome(self, job: Job) -> Done | Failed | Lost | Unlike:
        for kind, count in ((Lost, self.lost), (Unlike, self.refused)):
            if count[job.key] < self._losses and self._chance.random() < 0.4:
                count[job.key] += 1
                return kind("it was unlucky")
        self.begun[job.key] += 1
        return job.work(Watch(), ModelCache())

    def close(self) -> None:
        """Do nothing."""


class Threads:
    """Runs ``free`` jobs at once, each in a thread of this process."""

    machines = 1

    def __init__(self, slots: int) -> None:
        self._slots, self._ended = slots, SimpleQueue[Ended]()
        self.running: dict[str, str] = {}

    @property
    def free(self) -> int:
        return self._slots - len(self.running)

    def submit(self, job: Job) -> None:
        def run() -> None:
            self._ended.put(Worker("", timed=False).run(job))

        self.running[job.key] = "a-thread"
        threading.Thread(target=run, daemon=True).start()

    def wait(self) -> Sequence[Ended]:
        try:
            ended = self._ended.get(timeout=0.05)
        except Empty:
            return []
        del self.running[ended.key]
        return [ended]

    def close(self) -> None:
        assert not self.running


@dataclass(frozen=True)
class Logged:
    """Serves as ``conduct`` does, a little later, and writes down each cell that it begins.

    Args:
        log: file for a line per begin: the seed, and ``held`` if the sweep has kept the cell.
        sweep: the sweep's folder.
        pause_s: time in seconds that each cell takes at least.
        kills: seeds whose processes die once.
    """

    log: Path
    sweep: Path
    pause_s: float = 0.0
    kills: tuple[int, ...] = ()

    def __call__(self, experiment: Experiment, watch: Watch, models: ModelCache) -> Outcome:
        held = (self.sweep / "cells" / digest_of(experiment)).exists()
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{experiment.workload.seed} {'held' if held else 'new'}\n")
        seed = experiment.workload.seed
        if seed in self.kills and self.begun().count(seed) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause_s)
        return conduct(experiment, watch, models)

    def begun(self) -> list[int]:
        """Return the seeds of the cells that were begun."""
        lines = self.log.read_text("utf-8").splitlines() if self.log.exists() else []
        return [int(line.split()[0]) for line in lines]

    def repeated(self) -> bool:
        """Return True if a cell was begun after it had been kept."""
        return self.log.exists() and "held" in self.log.read_text("utf-8")


FACTS: dict[str, Any] = {"hostname": "a", "cpu": "X", "gpu": "none", "torch": "2.9"}
