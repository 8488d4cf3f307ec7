"""Estimate of an experiment that is not run: exact steps, memory within 15 %, rough time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from batchbench.batching.benches.local import LocalBench
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.trials import TRIAL_S, servings_for

_BESIDE_PRODUCTS = 1.5
"""Ratio of the time of a step to that of its matrix products (docs/log.md)."""


@dataclass(frozen=True)
class Estimate:
    """Steps, memory and time of an experiment.

    With timed arrivals, steps and time depend on the duration of a step, which is a guess.
    """

    steps: Mapping[str, int]  # by strategy
    trials: int
    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    device: str | None = None
    peak_bytes: int | None = None
    room_bytes: int | None = None  # free memory
    fitting: int | None = None  # largest batch size that fits; None if this one fits
    batch_size: int | None = None
    seconds: float | None = None  # all trials; matrix products alone unless ``timed``
    launches: int = 0  # kernels of a decode step on a GPU, whose time is in ``seconds``
    exact: bool = True
    timed: bool = False
    uncounted: tuple[str, ...] = ()  # strategies that schedule by themselves

    def lines(self) -> list[str]:
        """Return the estimate in words."""
        about = "about " if self.timed else "" if self.exact else "at most "
        counts = ", ".join(f"{name} {about}{n:,}" for name, n in self.steps.items())
        lines = [f"steps   {counts or 'no'} forward passes per trial; {self.trials} trials each"]
        if self.uncounted:
            lines[0] += (
                f"; {', '.join(self.uncounted)} schedules by itself, so its steps are not counted"
            )
        if self.weight_bytes is not None and self.kv_cache_bytes is not None:
            lines.append(
                f"memory  {_mib(self.weight_bytes)} of weights and {_mib(self.kv_cache_bytes)} of "
                f"KV cache on {self.device}; at its peak {_mib(self.peak_bytes or 0)} with "
                "activations, copies and libraries"
            )
        if self.fitting is not None and self.peak_bytes and self.room_bytes:
            largest = f"the largest --batch-size that fits is {self.fitting}"
            lines.append(
                f"warning {self.device} has {_mib(self.room_bytes)} free, so --batch-size "
                f"{self.batch_size} does not fit; "
                + (largest if self.fitting else "not even one slot fits: choose a smaller model")
            )
        if self.seconds is not None and self.launches:
            lines.append(self._time_on_gpu())
        elif self.seconds is not None and self.timed:
            lines.append(
                f"time    about {self.seconds:,.3g} s for all trials, with waits for requests; "
                "this assumes that a step takes 1.5 times as long as its matrix products, which "
                "were timed just now"
            )
        elif self.seconds is not None:
            lines.append(
                f"time    {self.seconds:,.3g} s for the matrix products of all trials, timed just "
                "now; with attention and overhead about 1.5 times as long"
            )
        return lines

    def _time_on_gpu(self) -> str:
        waits = ", with waits for requests" if self.timed else ""
        return (
            f"time    about {self.seconds:,.3g} s for all trials{waits}; a step takes the time of "
            f"its matrix products and of launching {self.launches:,} kernels, both timed just now, "
            "and a trial at least a second"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


_LARGE = 20_000
"""Number of requests whose simulation takes longer than about two seconds."""


def estimate(experiment: Experiment, watch: Watch) -> Estimate:
    """Simulate the strategies and time one matrix product; load no model."""
    session = LocalBench(replace(experiment, simulated=True), watch)
    workload, trials = session.workload, experiment.trials.trials
    exact, timed = not workload.stop_at_eos, not replace(workload, stop_at_eos=False).closed
    if len(workload) > _LARGE:
        watch.phase(f"simulating {len(workload):,} requests under each strategy")
    if experiment.simulated:
        steps = {r.header.strategy: r.num_steps for r in _served(session, UNIT_NS)}
        return Estimate(steps, trials, exact=exact)
    watch.phase("loading torch and timing a matrix product")
    from batchbench.batching.engines.torch.build import size_up

    sizes = size_up(experiment, session.source, workload)
    beside = _BESIDE_PRODUCTS if timed and not sizes.launches else 1.0
    step_ns = round((sizes.step_s * beside + sizes.launching_s) * 1e9)
    served = _served(session, step_ns)
    return Estimate(
        {r.header.strategy: r.num_steps for r in served},
        trials,
        weight_bytes=sizes.weight_bytes,
        kv_cache_bytes=sizes.kv_cache_bytes,
        device=sizes.device,
        peak_bytes=sizes.peak_bytes,
        room_bytes=sizes.room_bytes,
        fitting=sizes.fitting,
        batch_size=experiment.serving.batch_size,
        seconds=sum(_trial_s(r, on_gpu=sizes.launches > 0) for r in served) * trials,
        launches=sizes.launches,
        exact=exact,
        timed=timed,
        uncounted=tuple(
            name
            for name in experiment.serving.strategies
            if name not in experiment.serving.policies
        ),
    )


def _trial_s(recording: Recording, *, on_gpu: bool) -> float:
    """Return the duration of a trial, which serves the workload several times if it is short."""
    once_s = recording.duration_ns / 1e9
    return once_s * servings_for(once_s, TRIAL_S) if on_gpu else once_s


def _served(session: LocalBench, step_ns: int) -> list[Recording]:
    """Simulate each strategy with steps of ``step_ns``."""
    engine = SimulatedEngine(max(step_ns, 1))
    to_the_end = replace(session.workload, stop_at_eos=False)
    names = session.experiment.serving.policies
    batchers = [replace(session.batcher(name), engine=engine) for name in names]
    return [batcher.serve(to_the_end, Watch()) for batcher in batchers]
