"""A bench serves the workload of one experiment: this machine's engines, or a remote server."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from batchbench.batching import trials
from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.engines import Engine
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import Experiment, ServingSpec
from batchbench.batching.machine import Counter, counters_for, environment
from batchbench.batching.models import ModelCache, Tokenizer, encoder, find_tokenizer
from batchbench.batching.progress import Limited, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.outcome import Agreement, FailedTrial, ServerFacts
from batchbench.batching.strategies import Context, PlugIn, find
from batchbench.batching.trials import WarmUp
from batchbench.batching.verification import NOT_VERIFIED, Verification, draws_by_itself, verify
from batchbench.errors import BatchbenchError, UsageError
from batchbench.workloads import Workload, WorkloadSpec, make_workload

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.models.loading import LoadedModel

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
        """Make a workload; raise UsageError if it cannot be made, or the model cannot take it."""

    @abstractmethod
    def strategy(self, name: str) -> Strategy:
        """Return the strategy of this name."""

    @abstractmethod
    def warm_up(self, *, most: int = 10) -> WarmUp:
        """Serve a short piece of the workload, at most ``most`` times, until its speed settles."""

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

    def serve(self, strategy: Strategy, trial: int, planned: int) -> Recording:
        """Serve one of ``planned`` trials, reported to the watch."""
        self._watch.trial_begins(strategy.name, trial, planned)
        recording = self.observe(strategy, trial)
        self._watch.trial_ends(strategy.name, trial, recording.duration_ns)
        return recording

    # What only one kind of bench has

    def time_small_batches(self) -> list[Recording]:
        """Time steps of fewer rows than slots, for predictions; none where steps are unknown."""
        return []

    def texts(self, recording: Recording) -> list[tuple[str, str]] | None:
        """Return the prompt and the output of each request as text; None if they are unknown."""
        return None

    def server(self) -> ServerFacts | None:
        """Return the facts about the server after the trials."""
        return None

    def agreement(self) -> Agreement | None:
        """Compare the outputs of a server's strategies; this machine's engines verify instead."""
        return None

    def close(self) -> None:  # noqa: B027  # this machine's engines have nothing to close
        """End the processes of the bench."""


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


class LocalBench(Bench):
    """This machine: workload made, model loaded, engine built.

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
        super().__init__(experiment, watch)
        self._forward = forward
        self._models = models or ModelCache()
        self.source = self._models.find(experiment.model, weights=not experiment.simulated)
        self.tokenizer: Tokenizer | None = find_tokenizer(self.source.place)
        self.workload = self.make(experiment.workload)
        self._max_len = max(max_len, self.workload.max_total_tokens)
        self._loaded: LoadedModel | None = None
        self._energy: Sequence[Counter] = ()
        self._memory: Mapping[str, Any] = {}
        self._servings: Mapping[str, int] = {}  # per trial, by strategy; once if it is not there
        self.model = self.source.facts
        self.environment = environment()
        self.engine = self._engine()
        self._plug_ins = self._plug_in_strategies()

    def make(self, spec: WorkloadSpec) -> Workload:
        workload = make_workload(
            spec,
            batch_size=self.experiment.serving.batch_size,
            vocab_size=self.source.vocab_size,
            encode=encoder(self.tokenizer, chat=spec.chat_template),
            context=self.source.context,
            note=self._watch.note,
        )
        check_context(workload, self.source.context, self.source.name)
        return workload

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
            sampling=self.workload.sampling,
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
        if engine.execution_note:
            self._watch.note(f"{self.source.name}: {engine.execution_note}")
        self.environment |= torch_environment(str(loaded.device), loaded.dtype)
        if engine.triton:
            self.environment["gpu_attention"] = "batchbench's, in Triton"
        self._energy = counters_for(str(loaded.device), self.environment["gpu_uuid"])
        return engine

    def _plug_in_strategies(self) -> dict[str, Strategy]:
        serving, loaded = self.experiment.serving, self._loaded
        if loaded is None:
            return {}
        context = Context(
            name="",
            slots=serving.batch_size,
            max_len=self._max_len,
            order=serving.order,
            max_batched_tokens=serving.token_budget,
            source=self.source,
            spec=self.experiment.model,
            load=lambda: loaded,
        )
        strategies: dict[str, Strategy] = {}
        for name in serving.plug_ins:
            plug_in = find(name)
            strategy = plug_in.make(replace(context, name=name))
            strategies[name] = strategy if plug_in.is_ours else _Guarded(plug_in, strategy)
        return strategies

    def strategy(self, name: str) -> Strategy:
        """Return a plug-in, or our scheduler under the policy of this name."""
        return self._plug_ins.get(name) or self.batcher(name)

    def batcher(self, policy: str) -> Batcher:
        """Return our scheduler under a policy, on the session's engine."""
        cost = self.experiment.cost
        about = {"cost": cost.as_dict()} if cost and self.engine.simulated else {}
        return make_batcher(policy, self.experiment.serving, self.engine, about)

    def warm_up(self, *, most: int = 10) -> WarmUp:
        if self.engine.simulated:
            return WarmUp(0, True, None, None)
        self._watch.phase("warming up")
        others = self._plug_ins.values()
        warm_up = trials.warm_up(self.batcher("continuous"), others, self.workload, most)
        if self._loaded is None or self._loaded.device.type != "cuda":
            return warm_up
        strategies, asked = self.strategies(), self.experiment.trials
        steps = int(self.workload.output_tokens.sum()) / self.experiment.serving.batch_size
        trial_s = trials.least_trial_s(self._energy, asked.max_time, asked.trials * len(strategies))
        warm_up, self._servings = trials.warm_up_whole(
            strategies,
            self.workload,
            warm_up,
            self._watch,
            least_steps_s=steps * (warm_up.step_ns or 0) / 1e9,
            trial_s=trial_s,
        )
        return warm_up

    def on(self, workload: Workload) -> Self:
        other = super().on(workload)
        other._servings = {}  # counted for the experiment's own workload
        return other

    def check_time(self, warm_up: WarmUp) -> None:
        limit = self.experiment.trials.max_time
        if limit is None or warm_up.step_ns is None or self.workload.stop_at_eos:
            return
        engine, expected = SimulatedEngine(warm_up.step_ns), 0.0
        for name in self.experiment.serving.strategies:
            policy = "continuous" if name in self._plug_ins else name
            batcher = replace(self.batcher(policy), engine=engine)
            once_s = batcher.serve(self.workload, Watch()).duration_ns / 1e9
            expected += once_s * self._servings.get(name, 1)
        check_pair_time(limit, expected)

    def time_small_batches(self) -> list[Recording]:
        if self.engine.simulated or not self.experiment.serving.policies:
            return []
        batcher = self.batcher("continuous")
        return trials.time_small_batches(batcher, self.workload, self._max_len)

    def rounds(self) -> Iterator[list[Recording]]:
        strategies, planned = self.strategies(), self.experiment.trials.trials
        for trial in range(planned):
            if self._loaded is not None:
                self._memory = trials.measure_memory(self._loaded, self._watch)
            served = {s.name: self.serve(s, trial, planned) for s in in_turn(strategies, trial)}
            yield [served[s.name] for s in strategies]

    def observe(self, strategy: Strategy, trial: int) -> Recording:
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
        return recording

    def verify(
        self, recordings: Sequence[Recording], chosen: Sequence[int] | None = None
    ) -> Verification:
        limit = self.experiment.trials.verify_limit
        if self._loaded is None or (limit == 0 and chosen is None):
            return NOT_VERIFIED
        self._watch.phase("verifying")
        from batchbench.batching.engines.torch.reference import TeacherForced

        reference, eos = TeacherForced(self._loaded), self.source.eos_token_ids
        others = [r for r in recordings if self.workload.sampling and draws_by_itself(r)]
        checked = [r for r in recordings if r not in others]
        if not checked:
            return NOT_VERIFIED
        found = verify(self.workload, checked, reference, eos, limit, chosen)
        if not others or not found.requests_checked:
            return found
        names = ", ".join(dict.fromkeys(r.header.strategy for r in others))
        but = f"; not {names}, whose engine draws tokens from random numbers of its own"
        return replace(found, reference=f"{found.reference}{but}")

    def texts(self, recording: Recording) -> list[tuple[str, str]] | None:
        if self.tokenizer is None or recording.tokens is None:
            return None
        decode, workload = self.tokenizer.decode, self.workload
        return [
            (decode(workload.prompt(i).tolist()), decode(recording.tokens_of(i).tolist()))
            for i in range(len(workload))
        ]


@dataclass(frozen=True)
class _Guarded:
    """A strategy of another package; errors that it raises name that package."""

    plug_in: PlugIn
    strategy: Strategy

    @property
    def name(self) -> str:
        return self.plug_in.name

    def serve(self, workload: Workload, watch: Watch, *, trial: int = 0) -> Recording:
        try:
            recording: object = self.strategy.serve(workload, watch, trial=trial)
        except (BatchbenchError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            raise self.plug_in.fault("failed while serving", error) from error
        if not isinstance(recording, Recording):
            what = f"returned a {type(recording).__name__}"
            raise self.plug_in.fault(what, "serve must return Recording.of_tokens(…)")
        if (served := len(recording.requests.slot)) != len(workload):
            why = f"the workload has {len(workload)}"
            raise self.plug_in.fault(f"returned a recording of {served} requests", why)
        return recording


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


def check_context(workload: Workload, context: int | None, taker: str, more: str = "") -> None:
    """Raise UsageError if a request is longer than the context of a model or a server."""
    total = workload.prompt_tokens + workload.output_tokens
    longest = int(total.argmax())
    if context is not None and total[longest] > context:
        raise UsageError(
            f"request {longest}: {workload.prompt_tokens[longest]} prompt + "
            f"{workload.output_tokens[longest]} output tokens exceed the {context} that "
            f"{taker} takes; lower --long-tokens, --short-tokens or the length of prompts, "
            f"or give --overlong clip, scale or skip{more}"
        )
