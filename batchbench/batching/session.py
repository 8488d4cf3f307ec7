"""Running an experiment: warm-up, trials in alternating order, verification."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from batchbench.batching.bench import Bench, LocalBench
from batchbench.batching.experiment import Experiment
from batchbench.batching.models import ModelCache
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial, ServerFacts
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import NOT_VERIFIED, Verification
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.remote.clients import Start


class StopReason(StrEnum):
    """The reason for which an experiment has fewer trials than planned."""

    INTERRUPTED = "interrupted"
    FAILED = "failed requests"
    OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Stop:
    """An early end of an experiment; ``text`` says why in a result."""

    reason: StopReason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of an experiment, from which every report is derived."""

    experiment: Experiment
    workload: Workload
    recordings: Mapping[str, Sequence[Recording]]  # by strategy, one recording per trial
    verification: Verification
    warm_up: WarmUp
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    texts: Sequence[tuple[str, str]] | None  # prompt and output of each request, if readable
    stopped: Stop | None = None
    small_batches: Sequence[Recording] = ()  # steps of fewer rows, timed in the warm-up
    server: ServerFacts | None = None  # with --target only, as are the next two
    agreement: Agreement | None = None
    failures: Sequence[FailedTrial] = ()


def conduct(
    experiment: Experiment,
    watch: Watch | None = None,
    models: ModelCache | None = None,
    start: Start | None = None,
) -> Outcome:
    """Run an experiment: warm-up, trials in alternating order, verification.

    After Ctrl-C or ``--max-time``, the outcome has the rounds that are finished. Experiments that
    share ``models`` load a model once. ``start`` starts the clients of a server on other machines.
    Raises UsageError if it cannot run here, and KeyboardInterrupt before one round is finished.
    """
    if experiment.simulated and experiment.serving.plug_ins:
        why = "it schedules by itself, so its steps are known only in batchbench run; remove it"
        raise UsageError(f"--strategy {experiment.serving.plug_ins[0]}: {why}")
    return run_on(open_bench(experiment, watch or Watch(), models, start=start))


def open_bench(
    experiment: Experiment,
    watch: Watch,
    models: ModelCache | None = None,
    max_len: int = 0,
    start: Start | None = None,
) -> Bench:
    """Return the bench of an experiment: this machine, or the server that it names.

    ``max_len`` is the length in tokens of the longest request of any workload that the bench will
    serve, if that is more than the experiment's own. Raises UsageError if it cannot run.
    """
    if experiment.target is not None:
        from batchbench.batching.remote.bench import RemoteBench

        return RemoteBench(experiment, watch, models, start)
    return LocalBench(experiment, watch, models, max_len)


def run_on(bench: Bench) -> Outcome:
    """Run an experiment on its bench, and close that."""
    with closing(bench):
        return _run_on(bench)


def _run_on(bench: Bench) -> Outcome:
    experiment = bench.experiment
    if experiment.simulated and bench.workload.stop_at_eos:
        raise UsageError("--stop-at-eos: a simulation runs no model, so no text ends; remove it")
    warm_up = bench.warm_up()
    bench.check_time(warm_up)
    began = time.monotonic()
    small_batches = bench.time_small_batches()
    if warm_up.duration_s is not None:
        warm_up = replace(warm_up, duration_s=warm_up.duration_s + time.monotonic() - began)
    rounds, stopped = _finished_rounds(bench)
    verification = NOT_VERIFIED
    if stopped is None or stopped.reason is not StopReason.INTERRUPTED:
        try:
            verification = bench.verify([r for served in rounds for r in served])
        except KeyboardInterrupt:
            stopped = _interrupted(rounds, experiment.trials.trials)
    names, texts = experiment.serving.strategies, bench.texts(rounds[0][-1])
    if len({recording.tokens is None for served in rounds for recording in served}) > 1:
        # A server that left out the ids of one trial: a result has them of all trials or of none.
        rounds = [[replace(recording, tokens=None) for recording in served] for served in rounds]
    return Outcome(
        experiment=experiment,
        workload=bench.workload,
        recordings={name: [served[i] for served in rounds] for i, name in enumerate(names)},
        verification=verification,
        warm_up=warm_up,
        model=bench.model,
        environment=bench.environment,
        texts=texts,
        stopped=stopped,
        small_batches=small_batches,
        server=bench.server(),
        agreement=bench.agreement(),
        failures=tuple(bench.failures),
    )


def _finished_rounds(bench: Bench) -> tuple[list[list[Recording]], Stop | None]:
    rounds: list[list[Recording]] = []
    planned, limit = bench.experiment.trials.trials, bench.experiment.trials.max_time
    began = time.monotonic()
    try:
        for served in bench.within(limit).rounds():
            rounds.append(served)
            spent = time.monotonic() - began
            next_end = spent * (len(rounds) + 1) / len(rounds)
            if limit is not None and len(rounds) < planned and next_end > limit:
                return rounds, _out_of_time(rounds, limit)
    except OutOfTimeError as late:
        assert limit is not None
        if not rounds:
            why = "the first pair of trials took longer; raise it, or lower --queue-size"
            raise UsageError(f"--max-time {limit:g}: {why}") from late
        return rounds, _out_of_time(rounds, limit)
    except KeyboardInterrupt:
        if not rounds:
            raise
        return rounds, _interrupted(rounds, planned)
    done = f"{len(rounds)} of {planned} pairs"
    failed = Stop(StopReason.FAILED, f"requests failed, so only {done} were finished")
    return rounds, failed if len(rounds) < planned else None


def _out_of_time(rounds: Sequence[object], limit: float) -> Stop:
    text = f"--max-time {limit:g} s ended it after {len(rounds)} pairs"
    return Stop(StopReason.OUT_OF_TIME, text)


def _interrupted(rounds: Sequence[object], planned: int) -> Stop:
    return Stop(StopReason.INTERRUPTED, f"interrupted after {len(rounds)} of {planned} pairs")
