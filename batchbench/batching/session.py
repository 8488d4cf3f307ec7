"""Conducting an experiment: warm-up, trials in alternating order, verification."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from batchbench.batching import warming
from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.energy import Counter, EnergyMeter, counters_for
from batchbench.batching.engines import Engine
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import GENERATE_BATCH, Experiment, ServingSpec
from batchbench.batching.machine import LoadMeter, environment, torch_environment
from batchbench.batching.models import ModelCache, Source, Tokenizer, find_tokenizer
from batchbench.batching.progress import Limited, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.verification import NOT_VERIFIED, Verification, verify
from batchbench.batching.warming import WarmUp
from batchbench.errors import OutOfTimeError, UsageError
from batchbench.workloads import Workload, WorkloadSpec, make_workload

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.models.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that an experiment yields; what people read is a function of it."""

    experiment: Experiment
    workload: Workload
    recordings: Mapping[str, Sequence[Recording]]  # by strategy, a recording a trial
    verification: Verification
    warm_up: WarmUp
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    texts: Sequence[tuple[str, str]] | None  # prompt and output of each request, if readable
    stopped: str | None = None  # why there are fewer trials than asked, if so
    small_batches: Sequence[Recording] = ()  # steps of fewer rows, timed in the warm-up


class Session:
    """One experiment on this machine: workload made, model loaded, engine built.

    Args:
        models: where the model comes from; experiments that share a cache load it once.
        max_len: tokens of the longest request of any workload that it will serve, if that is more
            than the experiment's own.
        forward: make the slots engine's forward pass; None for the leanest that is right.

    Raises:
        UsageError: what is asked cannot be done here.
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
        self.model: dict[str, Any] = {
            "name": self.source.name,
            "load_format": self.source.load_format,
            "note": self.source.note,
        }
        self.environment = environment()
        self.engine = self._engine()
        self._of_their_own = self._schedulers_of_their_own()

    def make(self, spec: WorkloadSpec) -> Workload:
        """The workload that a spec describes, for the experiment's model."""
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
        """The same model and engine, for another workload with no longer requests."""
        other = copy.copy(self)
        other.workload = workload
        return other

    def _engine(self) -> Engine:
        if self.experiment.simulated:
            self.model |= {"device": "simulated", "dtype": None, "parameters": None}
            cost = self.experiment.cost
            return SimulatedEngine(cost.cost) if cost else SimulatedEngine()
        self._watch.note(self.source.note)
        self._watch.phase("loading")
        from batchbench.batching.engines.torch.build import make_engine

        serving = self.experiment.serving
        loaded = self._models.load(self.source, self.experiment.model, self.workload.seed)
        self._loaded = loaded
        digest = loaded.weights_digest  # before an engine packs or moves any of them
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
            "weights_digest": digest,
            **memory,
        }
        self.environment |= torch_environment(str(loaded.device))
        self._energy = counters_for(str(loaded.device), self.environment["gpu_uuid"])
        return engine

    def _schedulers_of_their_own(self) -> dict[str, Strategy]:
        """Strategies that are no policy of ours, by name, on the same loaded model."""
        serving = self.experiment.serving
        if self._loaded is None or GENERATE_BATCH not in serving.strategies:
            return {}
        from batchbench.batching.engines.generate_batch import GenerateBatch

        theirs = GenerateBatch(
            self._loaded,
            serving.batch_size,
            self._max_len,
            order=serving.order,
            max_batched_tokens=serving.token_budget,
        )
        return {GENERATE_BATCH: theirs}

    def strategies(self) -> list[Strategy]:
        """The strategies of the experiment: ours on its one engine, and others on their own."""
        names = self.experiment.serving.strategies
        return [self._of_their_own.get(name) or self.batcher(name) for name in names]

    def batcher(self, policy: str) -> Batcher:
        """Our scheduler under a policy."""
        cost = self.experiment.cost
        about = {"cost": cost.as_dict()} if cost and self.engine.simulated else {}
        return make_batcher(policy, self.experiment.serving, self.engine, about)

    def warm_up(self, *, most: int = 10, within: float = 0.05) -> WarmUp:
        """Serve a short piece of the workload until the median step stays within 5 %."""
        if self.engine.simulated:
            return WarmUp(0, True, None, None)
        self._watch.phase("warming up")
        began = time.monotonic()
        piece = beginning(self.workload, self.experiment.serving.batch_size, output_tokens=12)
        for theirs in self._of_their_own.values():
            theirs.serve(piece, Watch())
        found = warming.warm_up(self.batcher("continuous"), piece, most=most, within=within)
        return replace(found, duration_s=time.monotonic() - began)

    def time_small_batches(self) -> list[Recording]:
        """Time steps of fewer rows than slots, for predictions; none in a simulation."""
        if self.engine.simulated or not self.experiment.serving.policies:
            return []
        batcher = self.batcher("continuous")
        return warming.time_small_batches(batcher, self.workload, self._max_len)

    def within(self, limit: float | None) -> Session:
        """Return the same session; its trials raise OutOfTimeError when the time is up."""
        if limit is None:
            return self
        other, until = copy.copy(self), time.monotonic() + _GRACE * limit
        other._watch = Limited(self._watch, until, time.monotonic, real=not self.engine.simulated)
        return other

    def rounds(self) -> Iterator[list[Recording]]:
        """Each round serves the workload once under every strategy.

        The order turns round from one to the next (AB BA AB BA …): what runs second is often
        faster, and so that falls on both alike.
        """
        strategies, trials = self.strategies(), self.experiment.trials.trials
        for trial in range(trials):
            self._memory = self._measure_memory()
            turn = strategies if trial % 2 == 0 else strategies[::-1]
            done = {b.name: self.serve(b, trial, trials) for b in turn}
            yield [done[b.name] for b in strategies]

    def serve(self, strategy: Strategy, trial: int, trials: int) -> Recording:
        """Serve the workload once."""
        self._watch.trial_begins(strategy.name, trial, trials)
        recording = observe(
            strategy,
            self.workload,
            self._watch,
            trial,
            self._energy,
            simulated=self.engine.simulated,
            about=self._memory,
        )
        self._watch.trial_ends(strategy.name, trial, recording.duration_ns)
        return recording

    def _measure_memory(self) -> dict[str, Any]:
        """What a decode step has to read and how fast memory is read now, for a trial's header.

        Nothing where the last-level cache holds all that is read: memory then sets no floor.
        """
        if self._loaded is None:
            return {}
        from batchbench.batching.engines.torch.measure import (
            cache_bytes,
            measure_bandwidth,
            reading_of,
        )

        reading, device = reading_of(self._loaded), self._loaded.device
        if reading.step_weight_bytes <= (cache_bytes(device) or 0):
            return {}
        self._watch.phase("measuring memory")
        bandwidth = measure_bandwidth(device)
        if bandwidth.beyond_cache is False:  # there was no room for a buffer that large
            return {}
        return {"memory": {"bytes_per_s": bandwidth.bytes_per_s, "reading": asdict(reading)}}

    def verify(
        self, recordings: Sequence[Recording], chosen: Sequence[int] | None = None
    ) -> Verification:
        """Check outputs against the model alone: of ``chosen`` requests, or as the trials say."""
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
        """Prompt and output of each request as text, where there is a tokenizer."""
        if self.tokenizer is None or recording.tokens is None:
            return None
        return [
            (
                self.tokenizer.decode(self.workload.prompt(i).tolist()),
                self.tokenizer.decode(recording.tokens_of(i).tolist()),
            )
            for i in range(len(self.workload))
        ]


def make_batcher(
    policy: str, serving: ServingSpec, engine: Engine, about: Mapping[str, Any]
) -> Batcher:
    """Our scheduler under a policy, as ``serving`` says; ``about`` goes into its recordings."""
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


def conduct(
    experiment: Experiment, watch: Watch | None = None, models: ModelCache | None = None
) -> Outcome:
    """Run an experiment: warm-up, trials in alternating order, verification.

    Ctrl-C and ``--max-time`` keep the rounds that are finished.

    Args:
        models: shared by experiments on the same model, so that it is loaded once.

    Raises:
        UsageError: what is asked cannot be done here.
        KeyboardInterrupt: before the first round was finished.
    """
    watch = watch or Watch()
    if experiment.simulated and GENERATE_BATCH in experiment.serving.strategies:
        raise UsageError(
            f"--strategy {GENERATE_BATCH}: it schedules for itself, so its steps show only in "
            "batchbench run; drop it"
        )
    return conduct_session(Session(experiment, watch, models))


def conduct_session(session: Session) -> Outcome:
    """As :func:`conduct`, where the workload is made and the model loaded already."""
    experiment = session.experiment
    if experiment.simulated and session.workload.stop_at_eos:
        raise UsageError("--stop-at-eos: a simulation runs no model, so no text ends; drop it")
    warm_up, limit = session.warm_up(), experiment.trials.max_time
    if limit is not None and warm_up.step_ns is not None:
        expected = expected_round_s(session, warm_up.step_ns)
        if expected > limit:
            raise UsageError(
                f"--max-time {limit:g}: one pair of trials takes about {expected:.0f} s here; "
                "raise it, or lower --queue-size"
            )
    began = time.monotonic()
    small_batches = session.time_small_batches()
    if warm_up.duration_s is not None:
        spent_s = warm_up.duration_s + time.monotonic() - began
        warm_up = replace(warm_up, duration_s=spent_s)
    rounds, stopped = _finished_rounds(session, limit)
    verification = NOT_VERIFIED
    if stopped is None or not stopped.startswith(_INTERRUPTED):
        try:
            verification = session.verify([r for done in rounds for r in done])
        except KeyboardInterrupt:
            stopped = f"{_INTERRUPTED} after {len(rounds)} of {experiment.trials.trials} pairs"
    names = experiment.serving.strategies
    return Outcome(
        experiment=experiment,
        workload=session.workload,
        recordings={name: [done[i] for done in rounds] for i, name in enumerate(names)},
        verification=verification,
        warm_up=warm_up,
        model=session.model,
        environment=session.environment,
        texts=session.texts(rounds[0][-1]),
        stopped=stopped,
        small_batches=small_batches,
    )


_INTERRUPTED = "interrupted"

_GRACE = 1.1
"""Multiple of ``--max-time`` after which a trial is stopped; a slightly late pair counts."""


def _finished_rounds(
    session: Session, limit: float | None
) -> tuple[list[list[Recording]], str | None]:
    """Return the finished rounds, and the reason if they are fewer than planned."""
    rounds: list[list[Recording]] = []
    began, trials = time.monotonic(), session.experiment.trials.trials
    try:
        for done in session.within(limit).rounds():
            rounds.append(done)
            spent, more = time.monotonic() - began, len(rounds) < trials
            if limit is not None and more and spent * (len(rounds) + 1) / len(rounds) > limit:
                return rounds, f"--max-time {limit:g} s ended it after {len(rounds)} pairs"
    except OutOfTimeError as late:
        if not rounds:
            raise UsageError(
                f"--max-time {limit:g}: the first pair of trials took longer; raise it, "
                "or lower --queue-size"
            ) from late
        return rounds, f"--max-time {limit:g} s ended it after {len(rounds)} pairs"
    except KeyboardInterrupt:
        if not rounds:
            raise
        return rounds, f"{_INTERRUPTED} after {len(rounds)} of {trials} pairs"
    return rounds, None


def observe(
    strategy: Strategy,
    workload: Workload,
    watch: Watch,
    trial: int = 0,
    energy: Sequence[Counter] = (),
    *,
    simulated: bool = False,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Recording:
    """One trial, undisturbed by the garbage collector; its header tells what else went on.

    Args:
        about: what the header is to tell besides.
    """
    if not simulated:  # a collection takes 0.1 s, and nothing is timed
        gc.collect()
    gc.disable()
    try:
        load = LoadMeter()
        with EnergyMeter(energy) as meter:
            recording = strategy.serve(workload, watch, trial=trial)
        foreign = None if simulated else load.foreign_cores()
    finally:
        gc.enable()
    told = {**recording.header.about, **about, "foreign_cores": foreign, **meter.about()}
    return replace(recording, header=replace(recording.header, about=told))


def expected_round_s(session: Session, step_ns: int) -> float:
    """Seconds that one round should take, going by a simulation with steps of ``step_ns``."""
    if session.workload.stop_at_eos:
        return 0.0  # how many steps it takes is not known beforehand
    engine, spent = SimulatedEngine(step_ns), 0
    for name in session.experiment.serving.strategies:
        policy = "continuous" if name == GENERATE_BATCH else name  # which is what it does
        planned = replace(session.batcher(policy), engine=engine)
        spent += planned.serve(session.workload, Watch()).duration_ns
    return spent / 1e9


def beginning(workload: Workload, count: int, output_tokens: int) -> Workload:
    """The first ``count`` requests, with outputs cut to ``output_tokens``."""
    count = min(count, len(workload))
    offsets = workload.prompt_offsets[: count + 1]
    return Workload(
        name=f"beginning of {workload.name}",
        seed=workload.seed,
        prompt_ids=workload.prompt_ids[: offsets[-1]],
        prompt_offsets=offsets,
        output_tokens=np.minimum(workload.output_tokens[:count], output_tokens),
        due_ns=np.zeros(count, np.int64),
    )


def check_context(workload: Workload, source: Source) -> None:
    """Raise UsageError where a request is longer than the model's context."""
    total = workload.prompt_tokens + workload.output_tokens
    context = source.context
    longest = int(total.argmax())
    if context is not None and total[longest] > context:
        raise UsageError(
            f"request {longest}: {workload.prompt_tokens[longest]} prompt + "
            f"{workload.output_tokens[longest]} output tokens exceed the {context} that "
            f"{source.name} takes; lower --long-tokens, --short-tokens or the prompts' length, "
            "or say --overlong clip, scale or skip"
        )
