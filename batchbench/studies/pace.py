"""How long the rest of a sweep takes, going by what is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median

from batchbench.batching.dry_run import estimate
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.errors import UsageError

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
