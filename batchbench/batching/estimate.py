"""What an experiment would take: steps exactly, memory exactly, time roughly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from batchbench.batching.conduct import Session
from batchbench.batching.experiment import Experiment
from batchbench.batching.watch import Watch


@dataclass(frozen=True)
class Estimate:
    """Steps of each strategy; bytes; seconds of all trials, counting matrix products alone."""

    steps: Mapping[str, int]
    trials: int
    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    device: str | None = None
    seconds: float | None = None
    exact: bool = True
    uncounted: tuple[str, ...] = ()  # strategies that schedule for themselves

    def lines(self) -> list[str]:
        """For people."""
        about = "" if self.exact else "at most "
        counts = ", ".join(f"{name} {about}{n:,}" for name, n in self.steps.items())
        found = [f"steps   {counts or 'no'} forward passes a trial, {self.trials} trials each"]
        if self.uncounted:
            found[0] += f"; {', '.join(self.uncounted)} schedules for itself and is not counted"
        if self.weight_bytes is not None and self.kv_cache_bytes is not None:
            found.append(
                f"memory  {self.weight_bytes / 2**20:,.0f} MiB of weights + "
                f"{self.kv_cache_bytes / 2**20:,.0f} MiB of KV cache on {self.device}"
            )
        if self.seconds is not None:
            found.append(
                f"time    {self.seconds:,.3g} s for the matrix products of all trials, as timed "
                "just now; with attention and all else, half as much again"
            )
        return found


def estimate(experiment: Experiment, watch: Watch) -> Estimate:
    """Serve the workload in simulation and time one matrix product; load no model."""
    session = Session(replace(experiment, simulated=True), watch)
    to_the_end = replace(session.workload, stop_at_eos=False)
    steps = {
        name: session.batcher(name).serve(to_the_end, Watch()).num_steps
        for name in experiment.serving.policies
    }
    found = Estimate(
        steps,
        experiment.trials.trials,
        exact=not session.workload.stop_at_eos,
        uncounted=tuple(name for name in experiment.serving.strategies if name not in steps),
    )
    if experiment.simulated:
        return found
    from batchbench.batching.engines.torch.sizing import size_up

    sizes = size_up(experiment, session.source, session.workload.max_total_tokens)
    passes = sum(steps.values()) * experiment.trials.trials
    return replace(
        found,
        weight_bytes=sizes.weight_bytes,
        kv_cache_bytes=sizes.kv_cache_bytes,
        device=sizes.device,
        seconds=passes * sizes.step_s,
    )
