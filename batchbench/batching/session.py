"""Running an experiment: warm-up, trials in alternating order, verification."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from batchbench.batching import trials
from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.engines import Engine
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import GENERATE_BATCH, Experiment, ServingSpec
from batchbench.batching.machine import Counter, counters_for, environment
from batchbench.batching.models import ModelCache, Source, Tokenizer, find_tokenizer
from batchbench.batching.progress import Limited, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import NOT_VERIFIED, Verification, verify
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.workloads import Workload, WorkloadSpec, make_workload

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.models.loading import LoadedModel


class StopReason(StrEnum):
    """The reason for which an experiment has fewer trials than planned."""

    INTERRUPTED = "interrupted"
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


def run_experiment(
    experiment: Experiment, watch: Watch | None = None, models: ModelCache | None = None
) -> Outcome:
    """Run an experiment: warm-up, trials in alternating order, verification.

    After Ctrl-C or ``--max-time``, the outcome has the rounds that are finished. Experiments that
    share ``models`` load a model once.

    Raises:
        UsageError: the experiment cannot be run here.
        KeyboardInterrupt: before the first round was finished.
    """
    if experiment.simulated and GENERATE_BATCH in experiment.serving.strategies:
        raise UsageError(
            f"--strategy {GENERATE_BATCH}: it schedules by itself, so its steps are known only in "
            "batchbench run; remove it"
        )
    return run_session(Session(experiment, watch or Watch(), models))


conduct = run_experiment
"""The name of :func:`run_experiment` in the public API."""


def run_session(session: Session) -> Outcome:
    experiment = session.experiment
    if experiment.simulated and session.workload.stop_at_eos:
        raise UsageError("--stop-at-eos: a simulation runs no model, so no text ends; remove it")
    warm_up = session.warm_up()
    session.check_time(warm_up)
    began = time.monotonic()
    small_batches = session.time_small_batches()
    if warm_up.duration_s is not None:
        warm_up = replace(warm_up, duration_s=warm_up.duration_s + time.monotonic() - began)
    rounds, stopped = _finished_rounds(session)
    verification = NOT_VERIFIED
    if stopped is None or stopped.reason is not StopReason.INTERRUPTED:
        try:
            verification = session.verify([r for served in rounds for r in served])
        except KeyboardInterrupt:
            stopped = _interrupted(rounds, experiment.trials.trials)
    names = experiment.serving.strategies
    return Outcome(
        experiment=experiment,
        workload=session.workload,
        recordings={name: [served[i] for served in rounds] for i, name in enumerate(names)},
        verification=verification,
        warm_up=warm_up,
        model=session.model,
        environment=session.environment,
        texts=session.texts(rounds[0][-1]),
        stopped=stopped,
        small_batches=small_batches,
    )


_GRACE = 1.1
"""Multiple of ``--max-time`` after which a trial is stopped; a slightly late pair counts."""


def _finished_rounds(session: Session) -> tuple[list[list[Recording]], Stop | None]:
    rounds: list[list[Recording]] = []
    planned, limit = session.experiment.trials.trials, session.experiment.trials.max_time
    began = time.monotonic()
    try:
        for served in session.within(limit).rounds():
            rounds.append(served)
            spent = time.monotonic() - began
            next_end = spent * (len(rounds) + 1) / len(rounds)
            if limit is not None and len(rounds) < planned and next_end > limit:
                return rounds, _out_of_time(rounds, limit)
    except OutOfTimeError as late:
        assert limit is not None
        if not rounds:
            raise UsageError(
                f"--max-time {limit:g}: the first pair of trials took longer; raise it, "
                "or lower --queue-size"
            ) from late
        return rounds, _out_of_time(rounds, limit)
    except KeyboardInterrupt:
        if not rounds:
            raise
        return rounds, _interrupted(rounds, planned)
    return rounds, None


def _out_of_time(rounds: Sequence[object], limit: float) -> Stop:
    text = f"--max-time {limit:g} s ended it after {len(rounds)} pairs"
    return Stop(StopReason.OUT_OF_TIME, text)


def _interrupted(rounds: Sequence[object], planned: int) -> Stop:
    return Stop(StopReason.INTERRUPTED, f"interrupted after {len(rounds)} of {planned} pairs")


class Session:
    """An experiment on this machine: workload made, model loaded, engine built.

    ``max_len`` is the length in tokens of the longest request of any workload that the session will
    serve, if that is more than the experiment's own. ``forward`` makes the forward pass of the
    slots engine; None for the leanest correct one. Raises UsageError if the experiment cannot run.
    """

    def __init__(
        self,
        experiment: Experiment,
        watch: Watch,
        models: ModelCache | None = None,
        max_len: int = 0,
        forward: Callable[[LoadedModel], Forward] | None = None,
    ) -> None:
        self.experiment, self._watch, self._forward = experiment, watch, forward
        self._models = models or ModelCache()
        self.source = self._models.find(experiment.model, weights=not experiment.simulated)
        self.tokenizer: Tokenizer | None = find_tokenizer(self.source.folder)
        self.workload = self.make(experiment.workload)
        self._max_len = max(max_len, self.workload.max_total_tokens)
        self._loaded: LoadedModel | None = None
        self._energy: Sequence[Counter] = ()
        self._memory: Mapping[str, Any] = {}
        self._servings: Mapping[str, int] = {}  # per trial, by strategy; once if it is not there
        self.model: dict[str, Any] = {
            "name": self.source.name,
            "load_format": self.source.load_format,
            "note": self.source.note,
        }
        self.environment = environment()
        self.engine = self._engine()
        self._own_schedulers = self._strategies_with_own_scheduler()

    def make(self, spec: WorkloadSpec) -> Workload:
        workload = make_workload(
            spec,
            batch_size=self.experiment.serving.batch_size,
            vocab_size=self.source.vocab_size,
            encode=self.tokenizer.encode if self.tokenizer else None,
            context=self.source.context,
            note=self._watch.note,
        )
        check_context(workload, self.source)
        return workload

    def on(self, workload: Workload) -> Session:
        """Return a session with the same engine, for another workload with no longer requests."""
        other = copy.copy(self)
        other.workload, other._servings = workload, {}
        return other

    def within(self, limit: float | None) -> Session:
        """Return the same session, whose trials raise OutOfTimeError when the time is up."""
        if limit is None:
            return self
        other, until = copy.copy(self), time.monotonic() + _GRACE * limit
        other._watch = Limited(self._watch, until, time.monotonic, real=not self.engine.simulated)
        return other

    def _engine(self) -> Engine:
        if self.experiment.simulated:
            self.model |= {"device": "simulated", "dtype": None, "parameters": None}
            cost = self.experiment.cost
            return SimulatedEngine(cost.cost) if cost else SimulatedEngine()
        self._watch.note(self.source.note)
        self._watch.phase("loading")
        from batchbench.batching.engines.torch.build import make_engine
        from batchbench.batching.engines.torch.hardware import torch_environment

        serving = self.experiment.serving
        loaded = self._models.load(self.source, self.experiment.model, self.workload.seed)
        self._loaded = loaded
        digest = loaded.weights_digest  # before an engine packs or moves any weights
        engine, memory = make_engine(
            serving.engine,
            loaded,
            serving.batch_size,
            self._max_len,
            serving.execution,
            self._forward and self._forward(loaded),
            prompt=int(self.workload.prompt_tokens.max()),
            mixes=serving.mixes_prefill,
            budget=serving.max_batched_tokens,
        )
        self.model |= {
            "device": str(loaded.device),
            "dtype": loaded.dtype_name,
            "parameters": sum(p.numel() for p in loaded.module.parameters()),
            "execution": engine.execution,
            "execution_note": engine.execution_note,
            "weights_digest": digest,
            **memory,
        }
        self.environment |= torch_environment(str(loaded.device), loaded.dtype)
        if engine.triton:
            self.environment["gpu_attention"] = "batchbench's, in Triton"
        self._energy = counters_for(str(loaded.device), self.environment["gpu_uuid"])
        return engine

    def _strategies_with_own_scheduler(self) -> dict[str, Strategy]:
        serving = self.experiment.serving
        if self._loaded is None or GENERATE_BATCH not in serving.strategies:
            return {}
        from batchbench.batching.engines.generate_batch import GenerateBatch

        strategy = GenerateBatch(
            self._loaded,
            serving.batch_size,
            self._max_len,
            order=serving.order,
            max_batched_tokens=serving.token_budget,
        )
        return {GENERATE_BATCH: strategy}

    def strategies(self) -> list[Strategy]:
        names = self.experiment.serving.strategies
        return [self._own_schedulers.get(name) or self.batcher(name) for name in names]

    def batcher(self, policy: str) -> Batcher:
        """Return our scheduler under a policy, on the session's engine."""
        cost = self.experiment.cost
        about = {"cost": cost.as_dict()} if cost and self.engine.simulated else {}
        return make_batcher(policy, self.experiment.serving, self.engine, about)

    def warm_up(self, *, most: int = 10, within: float = 0.05) -> WarmUp:
        """Serve a short piece of the workload until the median step stays within 5 %."""
        if self.engine.simulated:
            return WarmUp(0, True, None, None)
        self._watch.phase("warming up")
        batcher, others = self.batcher("continuous"), self._own_schedulers.values()
        warm_up = trials.warm_up(batcher, others, self.workload, most=most, within=within)
        if self._loaded is None or self._loaded.device.type != "cuda":
            return warm_up
        strategies, asked = self.strategies(), self.experiment.trials
        trial_s = trials.least_trial_s(self._energy, asked.max_time, asked.trials * len(strategies))
        slots = self.experiment.serving.batch_size
        warm_up, self._servings = trials.warm_up_whole(
            strategies, self.workload, warm_up, self._watch, slots=slots, trial_s=trial_s
        )
        return warm_up

    def check_time(self, warm_up: WarmUp) -> None:
        """Raise UsageError if one pair of trials takes longer than ``--max-time``."""
        limit = self.experiment.trials.max_time
        if limit is None or warm_up.step_ns is None or self.workload.stop_at_eos:
            return
        engine, expected = SimulatedEngine(warm_up.step_ns), 0.0
        for name in self.experiment.serving.strategies:
            policy = "continuous" if name == GENERATE_BATCH else name
            batcher = replace(self.batcher(policy), engine=engine)
            once_s = batcher.serve(self.workload, Watch()).duration_ns / 1e9
            expected += once_s * self._servings.get(name, 1)
        if expected > limit:
            raise UsageError(
                f"--max-time {limit:g}: one pair of trials takes about {expected:.0f} s here; "
                "raise it, or lower --queue-size"
            )

    def time_small_batches(self) -> list[Recording]:
        """Time steps of fewer rows than slots, for predictions; a simulation skips this."""
        if self.engine.simulated or not self.experiment.serving.policies:
            return []
        batcher = self.batcher("continuous")
        return trials.time_small_batches(batcher, self.workload, self._max_len)

    def rounds(self) -> Iterator[list[Recording]]:
        """Serve the workload once under every strategy in each round.

        The order of strategies alternates (AB BA AB BA …), because the second trial of a round is
        often faster, and so that each strategy is second equally often.
        """
        strategies, planned = self.strategies(), self.experiment.trials.trials
        for trial in range(planned):
            if self._loaded is not None:
                self._memory = trials.measure_memory(self._loaded, self._watch)
            order = strategies if trial % 2 == 0 else strategies[::-1]
            served = {s.name: self.serve(s, trial, planned) for s in order}
            yield [served[s.name] for s in strategies]

    def serve(self, strategy: Strategy, trial: int, planned: int) -> Recording:
        self._watch.trial_begins(strategy.name, trial, planned)
        recording = trials.observe(
            strategy,
            self.workload,
            self._watch,
            trial,
            self._energy,
            simulated=self.engine.simulated,
            about=self._memory,
            servings=self._servings.get(strategy.name, 1),
            gpu=self.environment.get("gpu_uuid"),
        )
        if "gpu_clock_mhz" in recording.header.about:
            self.environment["gpu_clock_mhz"] = recording.header.about["gpu_clock_mhz"]
        self._watch.trial_ends(strategy.name, trial, recording.duration_ns)
        return recording

    def verify(
        self, recordings: Sequence[Recording], chosen: Sequence[int] | None = None
    ) -> Verification:
        """Check the outputs of ``chosen`` requests, or of those that ``--verify`` asks for."""
        limit = self.experiment.trials.verify_limit
        if self._loaded is None or (limit == 0 and chosen is None):
            return NOT_VERIFIED
        self._watch.phase("verifying")
        from batchbench.batching.engines.torch.reference import TeacherForced

        reference = TeacherForced(self._loaded)
        return verify(
            self.workload, recordings, reference, self.source.eos_token_ids, limit, chosen
        )

    def texts(self, recording: Recording) -> list[tuple[str, str]] | None:
        """Return the prompt and the output of each request as text; None without a tokenizer."""
        if self.tokenizer is None or recording.tokens is None:
            return None
        decode, workload = self.tokenizer.decode, self.workload
        return [
            (decode(workload.prompt(i).tolist()), decode(recording.tokens_of(i).tolist()))
            for i in range(len(workload))
        ]


def make_batcher(
    policy: str, serving: ServingSpec, engine: Engine, about: Mapping[str, Any]
) -> Batcher:
    """Return a batcher as ``serving`` says; ``about`` goes into its recordings."""
    return Batcher(
        policy,
        engine,
        serving.batch_size,
        order=serving.order,
        prefill="mixed" if serving.mixes_prefill else "separate",
        max_batched_tokens=serving.token_budget,
        max_wait_ns=round(serving.max_wait * 1e6),
        about={"engine": "simulated" if engine.simulated else serving.engine, **about},
    )


def check_context(workload: Workload, source: Source) -> None:
    """Raise UsageError if a request is longer than the model's context."""
    total, context = workload.prompt_tokens + workload.output_tokens, source.context
    longest = int(total.argmax())
    if context is not None and total[longest] > context:
        raise UsageError(
            f"request {longest}: {workload.prompt_tokens[longest]} prompt + "
            f"{workload.output_tokens[longest]} output tokens exceed the {context} that "
            f"{source.name} takes; lower --long-tokens, --short-tokens or the length of prompts, "
            "or give --overlong clip, scale or skip"
        )
