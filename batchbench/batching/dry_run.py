"""The cost of an experiment that is not run: exact steps, memory within 15 %, rough time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.session import Session

_BESIDE_PRODUCTS = 1.5
"""How much longer a step takes than its matrix products (docs/log.md)."""


@dataclass(frozen=True)
class Estimate:
    """Steps of each strategy; bytes; seconds of all trials, counting matrix products alone.

    Where requests come over time, both follow from how long a step takes here, which is guessed.
    """

    steps: Mapping[str, int]
    trials: int
    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    device: str | None = None
    peak_bytes: int | None = None
    room_bytes: int | None = None  # memory that is available
    fitting: int | None = None  # largest batch size that fits; None if this one fits
    batch_size: int | None = None
    seconds: float | None = None
    exact: bool = True
    timed: bool = False
    uncounted: tuple[str, ...] = ()  # strategies that schedule for themselves

    def lines(self) -> list[str]:
        """For people."""
        about = "about " if self.timed else "" if self.exact else "at most "
        counts = ", ".join(f"{name} {about}{n:,}" for name, n in self.steps.items())
        found = [f"steps   {counts or 'no'} forward passes a trial, {self.trials} trials each"]
        if self.uncounted:
            found[0] += f"; {', '.join(self.uncounted)} schedules for itself and is not counted"
        if self.weight_bytes is not None and self.kv_cache_bytes is not None:
            found.append(
                f"memory  {self.weight_bytes / 2**20:,.0f} MiB of weights + "
                f"{self.kv_cache_bytes / 2**20:,.0f} MiB of KV cache on {self.device}; "
                f"{(self.peak_bytes or 0) / 2**20:,.0f} MiB at the peak, with activations, copies "
                "and libraries"
            )
        if self.fitting is not None and self.peak_bytes and self.room_bytes:
            largest = f"the largest --batch-size that fits is {self.fitting}"
            found.append(
                f"warning {self.device} has {self.room_bytes / 2**20:,.0f} MiB for it, so "
                f"--batch-size {self.batch_size} does not fit; "
                + (largest if self.fitting else "not even one slot fits: take a smaller model")
            )
        if self.seconds is not None and self.timed:
            found.append(
                f"time    {self.seconds:,.3g} s for all trials, waiting for requests included, if "
                "a step takes half as long again as its matrix products, timed just now"
            )
        elif self.seconds is not None:
            found.append(
                f"time    {self.seconds:,.3g} s for the matrix products of all trials, as timed "
                "just now; with attention and all else, half as much again"
            )
        return found


def estimate(experiment: Experiment, watch: Watch) -> Estimate:
    """Serve the workload in simulation and time one matrix product; load no model."""
    session = Session(replace(experiment, simulated=True), watch)
    workload, trials = session.workload, experiment.trials.trials
    exact, timed = not workload.stop_at_eos, not replace(workload, stop_at_eos=False).closed
    if experiment.simulated:
        steps = {r.header.strategy: r.num_steps for r in _served(session, UNIT_NS)}
        return Estimate(steps, trials, exact=exact)
    from batchbench.batching.engines.torch.build import size_up

    sizes = size_up(experiment, session.source, workload)
    step_ns = round(sizes.step_s * (_BESIDE_PRODUCTS if timed else 1.0) * 1e9)
    served = _served(session, step_ns)
    return Estimate(
        {r.header.strategy: r.num_steps for r in served},
        trials,
        weight_bytes=sizes.weight_bytes,
        kv_cache_bytes=sizes.kv_cache_bytes,
        device=sizes.device,
        peak_bytes=sizes.peak_bytes,
        room_bytes=sizes.room_bytes,
        fitting=None if sizes.fits else sizes.fitting,
        batch_size=experiment.serving.batch_size,
        seconds=sum(r.duration_ns for r in served) / 1e9 * trials,
        exact=exact,
        timed=timed,
        uncounted=tuple(
            name
            for name in experiment.serving.strategies
            if name not in experiment.serving.policies
        ),
    )


def _served(session: Session, step_ns: int) -> list[Recording]:
    """Each strategy's simulation, with steps of ``step_ns``."""
    engine = SimulatedEngine(max(step_ns, 1))
    to_the_end = replace(session.workload, stop_at_eos=False)
    names = session.experiment.serving.policies
    batchers = [replace(session.batcher(name), engine=engine) for name in names]
    return [batcher.serve(to_the_end, Watch()) for batcher in batchers]
