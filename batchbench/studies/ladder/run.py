"""The ladder: one workload served in ever faster ways, in turns, beside what the machine allows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import (
    GENERATE_BATCH,
)
from batchbench.batching.machine import PeakMemory, counters_for, environment, torch_environment
from batchbench.batching.models import find_model, find_tokenizer
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import check_context
from batchbench.batching.step_cost import Ceiling
from batchbench.batching.trials import beginning, observe
from batchbench.batching.verification import (
    NOT_VERIFIED,
    Reference,
    Remembered,
    Verification,
    verify,
)
from batchbench.errors import UsageError
from batchbench.reports.metrics import decode_steps, full_kv_tokens
from batchbench.studies.ladder.rungs import ALL, Climb, Rung, choose_rungs
from batchbench.workloads import make_workload

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.engines.torch.measure import ModelClock
    from batchbench.batching.models.loading import LoadedModel

_WARM_UP_TOKENS, _WARM_UPS = 12, 2


@dataclass(frozen=True, eq=False)
class Climbed:
    """What a ladder yields, rung by rung from the ground up."""

    rungs: Sequence[Rung]
    recordings: Mapping[str, Sequence[Recording]]  # by rung, one a round
    verifications: Mapping[str, Verification]
    ceilings: Sequence[Mapping[str, Ceiling]]  # before each round, and after the last
    stopped: str | None


@dataclass(frozen=True, eq=False)
class _Standing:
    """A rung that is ready to serve."""

    rung: Rung
    model: LoadedModel
    strategy: Strategy
    clock: ModelClock
    memory: Mapping[str, int]


class _Renamed(Watch):
    """Tells of a strategy under its rung's name."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def progressed(self, progress: Progress) -> None:
        progress.strategy = self._name
        self._watch.progressed(progress)

    def idles(self, progress: Progress) -> None:
        progress.strategy = self._name
        self._watch.idles(progress)


class Ladder:
    """Made ready: workload made, models loaded, every rung's engine built.

    Raises:
        UsageError: what is asked cannot be done here, such as a rung that this device lacks.
    """

    def __init__(self, asked: Climb, watch: Watch) -> None:
        self.asked = asked
        self.source = find_model(asked.model)
        tokenizer = find_tokenizer(self.source.folder)
        self.workload = make_workload(
            asked.workload,
            batch_size=asked.serving.batch_size,
            vocab_size=self.source.vocab_size,
            encode=tokenizer.encode if tokenizer else None,
            context=self.source.context,
            note=watch.note,
        )
        check_context(self.workload, self.source)
        if not self.workload.closed:
            raise UsageError(
                "a ladder tells how fast a queue is served: all requests must be there at the "
                "start and run to their asked length; drop what lets them come over time"
            )
        watch.note(self.source.note)
        watch.phase("loading")
        # As in a run: threads that wait for one another should soon give way (docs/log.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        from batchbench.batching.models.loading import set_threads

        set_threads(asked.model)
        self._models: dict[str | None, LoadedModel] = {}
        base = self._model(None)
        self.left_out: dict[str, str] = {}
        self._standing = [
            self._stand(rung)
            for rung in choose_rungs(asked.ladder.rungs)
            if self._offers(rung, base)
        ]
        if not self._standing:
            name, why = next(iter(self.left_out.items()))
            raise UsageError(f"--rungs {asked.ladder.rungs}: {name}: {why}")
        device = str(base.device)
        torch_facts = torch_environment(device)
        self.environment = environment() | torch_facts
        self._energy = counters_for(device, torch_facts["gpu_uuid"])
        self.model = {
            "name": self.source.name,
            "load_format": self.source.load_format,
            "note": self.source.note,
            "device": device,
            "dtype": base.dtype_name,
            "parameters": sum(p.numel() for p in base.module.parameters()),
        }

    @property
    def rungs(self) -> Sequence[Rung]:
        """Those that are climbed, from the ground up, with their dtype resolved."""
        return [replace(s.rung, dtype=s.model.dtype_name) for s in self._standing]

    @property
    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes of weights, packed weights and cache that each rung asks for."""
        return {s.rung.name: s.memory for s in self._standing}

    def _model(self, dtype: str | None) -> LoadedModel:
        """The model in a number format, loaded once."""
        if dtype not in self._models:
            from batchbench.batching.models.loading import load_model

            spec = self.asked.model if dtype is None else replace(self.asked.model, dtype=dtype)
            self._models[dtype] = load_model(self.source, spec, self.workload.seed)
        return self._models[dtype]

    def _offers(self, rung: Rung, base: LoadedModel) -> bool:
        """Whether this device has that rung; if it was asked for by name, an error says why not."""
        why, by_name = _lacking(rung, base), self.asked.ladder.rungs != ALL
        if (
            why is None
            and rung.execution == "compile"
            and base.device.type == "cpu"
            and not by_name
        ):
            why = "compiling takes half a minute a size; name it in --rungs to see"
        if why is None:
            return True
        if by_name:
            raise UsageError(f"--rungs {rung.name}: {why}")
        self.left_out[rung.name] = why
        return False

    def _stand(self, rung: Rung) -> _Standing:
        from batchbench.batching.engines.generate_batch import GenerateBatch
        from batchbench.batching.engines.torch.attention import kv_token_bytes
        from batchbench.batching.engines.torch.build import make_engine
        from batchbench.batching.engines.torch.measure import ModelClock

        serving, longest = self.asked.serving, self.workload.max_total_tokens
        model, clock = self._model(rung.dtype), ModelClock()
        if rung.policy == GENERATE_BATCH:
            theirs = GenerateBatch(
                model,
                serving.batch_size,
                longest,
                order=serving.order,
                max_batched_tokens=serving.token_budget,
            )
            cached = theirs.cache_tokens * kv_token_bytes(model.module.config, model.dtype)
            memory = {"weight_bytes": model.weight_bytes, "kv_cache_bytes": cached}
            return _Standing(rung, model, theirs, clock, memory)
        forward = None if rung.forward is None else _forward(rung, model)
        if forward is not None and rung.execution != "compile":  # which takes it apart
            forward = clock.timed(forward)
        engine, memory = make_engine(
            rung.engine, model, serving.batch_size, longest, rung.execution, forward
        )
        batcher = Batcher(
            rung.policy,
            engine,
            serving.batch_size,
            order=serving.order,
            prefill=rung.prefill,
            max_batched_tokens=serving.token_budget,
            about={"engine": rung.engine},
        )
        return _Standing(rung, model, batcher, clock, memory)

    def measure(self, watch: Watch) -> Mapping[str, Ceiling]:
        """What this machine allows, by number format, measured now."""
        from batchbench.batching.engines.torch.measure import (
            measure_bandwidth,
            measure_products,
            reading_of,
        )

        watch.phase("measuring what this machine allows")
        rows, cached = self._full_step()
        models = {s.model.dtype_name: s.model for s in self._standing}
        bandwidth = measure_bandwidth(next(iter(models.values())).device)
        return {
            dtype: Ceiling(
                bandwidth, reading_of(model), measure_products(model, rows), rows, cached
            )
            for dtype, model in models.items()
        }

    def _full_step(self) -> tuple[int, float]:
        """Rows of the fullest decode steps of continuous batching, and their cached tokens."""
        serving = self.asked.serving
        batcher = Batcher(
            "continuous",
            SimulatedEngine(),
            serving.batch_size,
            order=serving.order,
            prefill="mixed",
            max_batched_tokens=serving.token_budget,
        )
        planned = batcher.serve(self.workload, Watch())
        cached = full_kv_tokens(planned)
        if cached is None:
            raise UsageError(
                "this workload has no decode step to measure: every request asks for one token; "
                "raise --long-tokens"
            )
        return decode_steps(planned).full_rows, cached

    def climb(self, watch: Watch, allowed: Mapping[str, Ceiling]) -> Climbed:
        """Warm up, serve in turns, verify. Ctrl-C keeps the rounds that are finished.

        What the machine allows is measured again after each round, since its speed may drift.

        Args:
            allowed: what :meth:`measure` told before.
        """
        watch.phase("warming up")
        piece = beginning(self.workload, self.asked.serving.batch_size, _WARM_UP_TOKENS)
        for standing in self._standing:
            for _ in range(_WARM_UPS):
                standing.strategy.serve(piece, Watch())
        rounds = self.asked.ladder.rounds
        done: list[dict[str, Recording]] = []
        ceilings = [allowed]
        stopped = None
        try:
            for number in range(rounds):
                turn = self._standing if number % 2 == 0 else self._standing[::-1]
                served = {s.rung.name: self._serve(s, watch, number) for s in turn}
                ceilings.append(self.measure(watch))
                done.append(served)
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = f"interrupted after {len(done)} of {rounds} rounds"
        recordings = {
            s.rung.name: [by_rung[s.rung.name] for by_rung in done] for s in self._standing
        }
        verifications = dict.fromkeys(recordings, NOT_VERIFIED)
        if stopped is None:
            verifications = self._verify(recordings, watch)
        return Climbed(self.rungs, recordings, verifications, ceilings, stopped)

    def _serve(self, standing: _Standing, watch: Watch, number: int) -> Recording:
        name = standing.rung.name
        watch.trial_begins(name, number, self.asked.ladder.rounds)
        device = standing.model.device
        with PeakMemory(str(device)) as peak, standing.clock.on(standing.model.module) as clock:
            found = observe(
                standing.strategy, self.workload, _Renamed(watch, name), number, self._energy
            )
        watch.trial_ends(name, number, found.duration_ns)
        about = {
            **found.header.about,
            "rung": name,
            "model_ns": clock.ns if device.type == "cpu" and clock.ns else None,
            "peak_growth_bytes": peak.growth_bytes,
        }
        return replace(found, header=replace(found.header, strategy=name, about=about))

    def _verify(
        self, recordings: Mapping[str, Sequence[Recording]], watch: Watch
    ) -> dict[str, Verification]:
        from batchbench.batching.engines.torch.reference import TeacherForced

        limit = self.asked.trials.verify_limit
        if limit == 0:
            return dict.fromkeys(recordings, NOT_VERIFIED)
        watch.phase("verifying")
        references: dict[int, Reference] = {}
        found = {}
        for s in self._standing:
            if id(s.model) not in references:
                references[id(s.model)] = Remembered(TeacherForced(s.model))
            found[s.rung.name] = verify(
                self.workload,
                recordings[s.rung.name],
                references[id(s.model)],
                self.source.eos_token_ids,
                limit,
            )
        return found


def _lacking(rung: Rung, base: LoadedModel) -> str | None:
    """Why this model on this device has no such rung; None where it has."""
    from batchbench.batching.engines.torch.forward import is_plain_gpt2
    from batchbench.batching.engines.torch.kernels import native
    from batchbench.batching.engines.torch.linear import onednn
    from batchbench.batching.models.loading import resolve_dtype

    if rung.dtype is not None:
        if base.dtype_name != "float32":
            return f"the model is in {base.dtype_name} already; give --dtype float32"
        try:
            resolve_dtype(rung.dtype, base.device)
        except UsageError as error:
            return str(error)
    own = is_plain_gpt2(base.module.config)
    if rung.forward in _MOST and not own and rung.dtype is None:
        return "only the GPT-2 family has a forward pass of its own"
    if rung.execution == "graph" and base.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if rung.dtype is not None or rung.forward not in ("packed", "own"):
        return None
    if base.device.type != "cpu":
        return "weights are laid out anew on a CPU only"
    if rung.forward == "packed" and onednn(base.dtype) is None:
        return f"this build of torch packs no {base.dtype_name} weights"
    if rung.forward == "own" and native() is None:
        return "batchbench's own kernels need AVX-512, Linux and g++"
    return None


_MOST = {"lean": "PLAIN", "packed": "PACKED", "own": "OWN"}
"""What a rung's forward pass may compute with, by the names of ``Kernels``."""


def _forward(rung: Rung, model: LoadedModel) -> Forward:
    from batchbench.batching.engines.torch.forward import TransformersForward, make_forward
    from batchbench.batching.engines.torch.linear import Kernels

    if rung.forward is None or rung.forward == "transformers":
        return TransformersForward(model)
    return make_forward(model, Kernels[_MOST[rung.forward]])
