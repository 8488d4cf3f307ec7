"""Run a ladder: serve one workload on several engines in turn, and measure the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchbench.batching.bench import LocalBench
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import PeakMemory
from batchbench.batching.models import ModelCache
from batchbench.batching.policies import POLICIES
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.step_cost import Ceiling
from batchbench.batching.verification import NOT_VERIFIED, Remembered, Verification, verify
from batchbench.errors import UsageError, reason_in_short
from batchbench.reports.metrics import decode_steps, full_kv_tokens
from batchbench.studies.ladder.rungs import ALL, LadderSpec, Rung, choose_rungs

if TYPE_CHECKING:
    import torch

    from batchbench.batching.engines.torch.architecture import Architecture
    from batchbench.batching.engines.torch.forward import Forward
    from batchbench.batching.engines.torch.hardware import ModelClock
    from batchbench.batching.models.loading import LoadedModel

_WARM_UP_ROUNDS = 2


@dataclass(frozen=True, eq=False)
class OpenRung:
    """A rung that is ready to serve; its ``dtype`` is resolved."""

    rung: Rung
    session: LocalBench
    model: LoadedModel
    clock: ModelClock

    @property
    def memory(self) -> Mapping[str, int]:
        """The bytes of weights, packed weights and cache."""
        names = ("weight_bytes", "packed_weight_bytes", "kv_cache_bytes")
        memory = {name: self.session.model[name] for name in names}
        (strategy,) = self.session.strategies()
        return memory | {"kv_cache_bytes": getattr(strategy, "cache_bytes", memory[names[-1]])}

    def serve(self, trial: int, trials: int) -> Recording:
        """Serve the workload once; add the time in the model and memory growth to the header."""
        (strategy,) = self.session.strategies()
        device = self.model.device
        with PeakMemory(str(device)) as peak, self.clock.on(self.model.module) as clock:
            recording = self.session.serve(strategy, trial, trials)
        about = {
            **recording.header.about,
            "rung": self.rung.name,
            "model_ns": clock.ns if device.type == "cpu" and clock.ns else None,
            "peak_growth_bytes": peak.growth_bytes,
        }
        header = replace(recording.header, strategy=self.rung.name, about=about)
        return replace(recording, header=header)


@dataclass(frozen=True, eq=False)
class LadderOutcome:
    """The measurements of a ladder."""

    ladder: Ladder
    recordings: Mapping[str, Sequence[Recording]]  # by rung, one a round
    verifications: Mapping[str, Verification]
    ceilings: Sequence[Mapping[str, Ceiling]]  # before each round and after the last, by dtype
    stopped: str | None  # the number of rounds, if Ctrl-C ended it early
    failed: UsageError | None = None  # the error that ended it early


class _RungWatch(Watch):
    """Report trials under a rung's name; drop notes and phases, which are the same for all."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self._watch.trial_begins(self._name, trial, trials)

    def progressed(self, progress: Progress) -> None:
        progress.strategy = self._name
        self._watch.progressed(progress)

    def trial_ends(self, strategy: str, trial: int, duration_ns: int) -> None:
        self._watch.trial_ends(self._name, trial, duration_ns)


class Ladder:
    """Rungs that are ready to serve, each a session of the experiment with the rung's change.

    A rung that fails, now or later, is left out with the reason; one that ``--rungs`` names raises
    UsageError.
    """

    def __init__(self, experiment: Experiment, spec: LadderSpec, watch: Watch) -> None:
        self.experiment, self.spec, self._watch = experiment, spec, watch
        self._named = spec.rungs != ALL
        self._models = ModelCache()
        serving = replace(
            experiment.serving, strategy="continuous", engine="slots", prefill="mixed", max_wait=0.0
        )
        self._planned = LocalBench(replace(experiment, serving=serving, simulated=True), watch)
        if not self._planned.workload.closed:
            raise UsageError(
                "a ladder compares how fast a queue is served: all requests must be there at the "
                "start, with known lengths; drop options about arrivals and --stop-at-eos"
            )
        self.source = self._models.find(experiment.model, weights=True)
        watch.note(self.source.note)
        watch.phase("loading")
        from batchbench.batching.engines.torch.architecture import describe
        from batchbench.batching.models.loading import model_config, resolve_device, resolve_dtype

        device = resolve_device(experiment.model.device)
        dtype = resolve_dtype(experiment.model.dtype, device)
        described = describe(model_config(self.source))
        self.left_out: dict[str, str] = {}
        self.rungs: list[OpenRung] = []
        for rung in choose_rungs(spec.rungs):
            if why := _lacking(rung, described, device, dtype, named=self._named):
                self._leave_out(rung, why)
                continue
            watch.phase(f"preparing {rung.name}")
            try:
                self.rungs.append(self._open(rung))
            except Exception as error:  # of a model's own code, a compiler, a driver
                self._leave_out(rung, _reason(error), error)
        if not self.rungs:
            raise self._none_left({})
        self.workload = self.rungs[0].session.workload

    def _leave_out(self, rung: Rung, why: str, error: Exception | None = None) -> None:
        if self._named:
            then = "" if isinstance(error, UsageError) else "; remove it"
            raise UsageError(f"--rungs {rung.name}: {why}{then}") from error
        self.left_out[rung.name] = why

    def _none_left(self, before: Mapping[str, str]) -> UsageError:
        """Return the error if the last rungs failed; ``before`` were left out earlier."""
        name, why = next(item for item in self.left_out.items() if item[0] not in before)
        return UsageError(f"--rungs {self.spec.rungs}: no rung is left; {name}: {why}")

    def _open(self, rung: Rung) -> OpenRung:
        from batchbench.batching.engines.torch.forward import TransformersForward, make_forward
        from batchbench.batching.engines.torch.hardware import ModelClock
        from batchbench.batching.engines.torch.linear import Kernels

        base, clock = self.experiment, ModelClock()

        def make_pass(model: LoadedModel) -> Forward:
            if rung.forward in _KERNELS:
                forward = make_forward(model, Kernels[_KERNELS[rung.forward]])
            else:
                forward = TransformersForward(model)
            # torch.compile traces the whole pass, which must not read a clock.
            return forward if rung.execution == "compile" else clock.timed(forward)

        # A plug-in has a cache of its own, so it gets the engine that allocates none.
        ours = rung.policy in POLICIES
        serving = replace(
            base.serving,
            strategy=rung.policy,
            engine=rung.engine if ours else "notebook",
            prefill=rung.prefill if ours else "separate",
            execution=rung.execution,
            max_wait=0.0,
        )
        spec = replace(base.model, dtype=rung.dtype or base.model.dtype)
        session = LocalBench(
            replace(base, serving=serving, model=spec),
            _RungWatch(self._watch, rung.name),
            self._models,
            forward=make_pass if rung.forward else None,
        )
        model = self._models.load(session.source, spec, session.workload.seed)
        return OpenRung(replace(rung, dtype=model.dtype_name), session, model, clock)

    @property
    def model(self) -> dict[str, Any]:
        """Facts about the model that hold for all rungs; ``dtype`` is that of the first."""
        facts = self.rungs[0].session.model
        names = ("name", "load_format", "note", "quantization", "device", "dtype", "parameters")
        return {name: facts[name] for name in names}

    def measure(self) -> Mapping[str, Ceiling]:
        """Measure what this machine allows now, by number format."""
        from batchbench.batching.engines.torch import hardware

        self._watch.phase("measuring what this machine allows")
        plan = self._planned.batcher("continuous").serve(self.workload, Watch())
        rows, cached = decode_steps(plan).full_rows, full_kv_tokens(plan)
        if cached is None:
            raise UsageError(
                "this workload has no decode step to measure: every request asks for one token; "
                "raise --long-tokens"
            )
        bandwidth = hardware.measure_bandwidth(self.rungs[0].model.device)
        return {
            dtype: Ceiling(
                bandwidth,
                hardware.reading_of(model),
                hardware.measure_products(model, rows),
                rows,
                cached,
                hardware.measure_arithmetic(model, rows),
                hardware.measure_launching(model, rows),
            )
            for dtype, model in self._by_dtype().items()
        }

    def _by_dtype(self) -> dict[str, LoadedModel]:
        return {opened.model.dtype_name: opened.model for opened in self.rungs}

    def run(self, before: Mapping[str, Ceiling]) -> LadderOutcome:
        """Warm up, serve in alternating order, verify.

        Ctrl-C and errors keep the finished rounds; an error in the first round keeps the rungs that
        have served. The machine, measured ``before``, is measured again after each round: its speed
        may drift.
        """
        self._watch.phase("warming up")
        self._for_each(lambda opened: opened.session.warm_up(most=_WARM_UP_ROUNDS))
        recordings: dict[str, list[Recording]] = {opened.rung.name: [] for opened in self.rungs}
        rounds, ceilings, stopped, failed = self.spec.rounds, [before], None, None
        verifications = dict.fromkeys(recordings, NOT_VERIFIED)

        def serve(opened: OpenRung) -> None:
            recordings[opened.rung.name].append(opened.serve(len(ceilings) - 1, rounds))

        try:
            for number in range(rounds):
                self._for_each(serve, reverse=number % 2 == 1)
                ceilings.append(self.measure())
            verifications = self._verify(recordings)
        except KeyboardInterrupt:
            if len(ceilings) == 1:
                raise
            stopped = f"interrupted after {len(ceilings) - 1} of {rounds} rounds"
        except Exception as error:
            if not any(recordings.values()):
                raise
            failed = error if isinstance(error, UsageError) else UsageError(_reason(error))
            if len(ceilings) == 1:
                ceilings.append(before)
        finished = len(ceilings) - 1
        self.rungs = [r for r in self.rungs if len(recordings[r.rung.name]) >= finished]
        served = {r.rung.name: recordings[r.rung.name][:finished] for r in self.rungs}
        return LadderOutcome(self, served, verifications, ceilings, stopped, failed)

    def _for_each(self, action: Callable[[OpenRung], object], *, reverse: bool = False) -> None:
        """Call a function with each rung; leave out rungs for which it fails.

        If it fails for all, none is left out, and UsageError is raised.
        """
        before, left_out = list(self.rungs), dict(self.left_out)
        for opened in before[:: -1 if reverse else 1]:
            try:
                action(opened)
            except Exception as error:  # of a model's own code, a compiler, a driver
                self._leave_out(opened.rung, _reason(error), error)
                self.rungs.remove(opened)
        if not self.rungs:
            none_left = self._none_left(left_out)
            self.rungs, self.left_out = before, left_out
            raise none_left

    def _verify(self, recordings: Mapping[str, Sequence[Recording]]) -> dict[str, Verification]:
        from batchbench.batching.engines.torch.reference import TeacherForced

        limit = self.experiment.trials.verify_limit
        if limit == 0:
            return dict.fromkeys(recordings, NOT_VERIFIED)
        self._watch.phase("verifying")
        # Rungs of one number format mostly give the same tokens, which are checked once.
        references = {
            dtype: Remembered(TeacherForced(model)) for dtype, model in self._by_dtype().items()
        }
        return {
            opened.rung.name: verify(
                self.workload,
                recordings[opened.rung.name],
                references[opened.model.dtype_name],
                self.source.eos_token_ids,
                limit,
            )
            for opened in self.rungs
        }


def _reason(error: Exception) -> str:
    """Return why a rung failed, in one short line."""
    kind = "" if isinstance(error, UsageError | RuntimeError) else f"{type(error).__name__}: "
    return reason_in_short(f"{kind}{error}")


def _lacking(
    rung: Rung,
    described: Architecture | str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    named: bool,
) -> str | None:
    """Return why this model on this device has no such rung; None if it has."""
    from batchbench.batching.engines.torch.kernels import native
    from batchbench.batching.engines.torch.linear import onednn
    from batchbench.batching.engines.torch.triton.choice import supports_triton
    from batchbench.batching.models.loading import resolve_dtype

    dtype_name = str(dtype).removeprefix("torch.")
    if rung.dtype is not None:
        if dtype_name != "float32":
            return f"the model is in {dtype_name} already; give --dtype float32"
        try:
            resolve_dtype(rung.dtype, device)
        except UsageError as error:
            return str(error)
        return None
    if rung.forward in _KERNELS and isinstance(described, str):
        return f"batchbench has no forward pass of its own for this model: {described}"
    if rung.execution == "graph" and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if rung.execution == "compile" and device.type == "cpu" and not named:
        return "compiling takes half a minute per size; name it in --rungs to include it"
    if rung.forward == "own" and device.type == "cuda":
        return None if supports_triton(device) else "batchbench's own kernels need Triton on a GPU"
    if rung.forward in ("packed", "own") and device.type != "cpu":
        return "weights are packed on a CPU only"
    if rung.forward == "packed" and onednn(dtype) is None:
        return f"this build of torch cannot pack {dtype_name} weights"
    if rung.forward == "own" and native() is None:
        return "batchbench's own kernels need AVX-512, Linux and g++"
    return None


_KERNELS = {"lean": "PLAIN", "packed": "PACKED", "own": "OWN"}
"""Kernels of a rung's forward pass, by the names of ``Kernels``."""
