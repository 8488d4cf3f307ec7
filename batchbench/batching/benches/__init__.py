"""A bench serves the workload of one experiment: this machine's engines, or a remote server."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

from batchbench.batching.batcher import Strategy
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Limited, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial, ServerFacts
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import Verification
from batchbench.errors import UsageError
from batchbench.workloads import Workload, WorkloadSpec

S = TypeVar("S", bound=Strategy)

GRACE = 1.1
"""Multiple of ``--max-time`` after which a trial is stopped; a slightly late pair counts."""


class Bench(ABC):
    """The place where an experiment runs, with its workload made and its engine or server ready.

    ``model`` and ``environment`` are facts for the result. ``simulated`` is True if time is
    virtual and no model runs. ``failures`` lists the trials in which a request failed.
    """

    def __init__(self, experiment: Experiment, watch: Watch) -> None:
        self.experiment, self.simulated, self._watch = experiment, experiment.simulated, watch
        self.workload: Workload
        self.model: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.failures: list[FailedTrial] = []

    @abstractmethod
    def make(self, spec: WorkloadSpec) -> Workload:
        """Make a workload for the model of this bench.

        Raises:
            UsageError: the workload cannot be made, or the model cannot take it.
        """

    @abstractmethod
    def strategy(self, name: str) -> Strategy:
        """Return the strategy of this name."""

    @abstractmethod
    def warm_up(self, *, most: int = 10, within: float = 0.05) -> WarmUp:
        """Serve a short piece of the workload until its speed changes by less than ``within``."""

    @abstractmethod
    def check_time(self, warm_up: WarmUp) -> None:
        """Raise UsageError if one pair of trials is known to take longer than ``--max-time``."""

    @abstractmethod
    def rounds(self) -> Iterator[list[Recording]]:
        """Serve the workload once under every strategy in each round; yield finished rounds.

        The order of strategies alternates (AB BA AB BA …), because the second trial of a round is
        often faster, and so that each strategy is second equally often.
        """

    @abstractmethod
    def verify(
        self, recordings: Sequence[Recording], chosen: Sequence[int] | None = None
    ) -> Verification:
        """Check the outputs of ``chosen`` requests, or of those that ``--verify`` asks for."""

    @abstractmethod
    def observe(self, strategy: Strategy, trial: int) -> Recording:
        """Serve one trial; the header of its recording gets what was observed beside it."""

    def strategies(self) -> list[Strategy]:
        """Return the strategies that the experiment compares, the baseline first."""
        return [self.strategy(name) for name in self.experiment.serving.strategies]

    def on(self, workload: Workload) -> Self:
        """Return the same bench for another workload with no longer requests."""
        other = copy.copy(self)
        other.workload = workload
        return other

    def within(self, limit: float | None) -> Self:
        """Return the same bench, whose trials raise OutOfTimeError when the time is up."""
        if limit is None:
            return self
        other, until = copy.copy(self), time.monotonic() + GRACE * limit
        other._watch = Limited(self._watch, until, time.monotonic, real=not self.simulated)
        return other

    def time_small_batches(self) -> list[Recording]:
        """Time steps of fewer rows than slots, for predictions; none where steps are unknown."""
        return []

    def serve(self, strategy: Strategy, trial: int, planned: int) -> Recording:
        """Serve one of ``planned`` trials, reported to the watch."""
        self._watch.trial_begins(strategy.name, trial, planned)
        recording = self.observe(strategy, trial)
        self._watch.trial_ends(strategy.name, trial, recording.duration_ns)
        return recording

    def texts(self, recording: Recording) -> list[tuple[str, str]] | None:
        """Return the prompt and the output of each request as text; None if they are unknown."""
        return None

    def server(self) -> ServerFacts | None:
        """Return the facts about the server after the trials; None on this machine's engines."""
        return None

    def close(self) -> None:
        """End the processes of the bench; there are none on this machine's engines."""
        return

    def agreement(self) -> Agreement | None:
        """Compare the outputs of the strategies; None on this machine's engines, which verify."""
        return None


def check_pair_time(limit: float, expected_s: float) -> None:
    """Raise UsageError if a pair of trials takes longer than ``--max-time``."""
    if expected_s > limit:
        digits = 0 if expected_s >= 10 else 2
        raise UsageError(
            f"--max-time {limit:g}: one pair of trials takes about {expected_s:.{digits}f} s here; "
            "raise it, or lower --queue-size"
        )


def in_turn(strategies: Sequence[S], round_number: int) -> Sequence[S]:
    """Return the strategies in the order of a round; it alternates."""
    return strategies if round_number % 2 == 0 else strategies[::-1]
