"""Estimate of an experiment that is not run: exact steps, memory within 15 %, rough time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchbench.batching.bench import LocalBench
from batchbench.batching.engines.simulated import UNIT_NS, SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.trials import TRIAL_S, servings_for

if TYPE_CHECKING:
    from batchbench.batching.engines.torch.build import Sizes

_BESIDE_PRODUCTS = 1.5
"""Ratio of the time of a step to that of its matrix products (docs/log.md)."""


@dataclass(frozen=True)
class Estimate:
    """Steps, memory and time of an experiment.

    With timed arrivals, steps and time depend on the duration of a step, which is a guess.
    """

    steps: Mapping[str, int]  # by strategy
    trials: int
    batch_size: int
    exact: bool
    timed: bool = False
    uncounted: tuple[str, ...] = ()  # strategies that schedule by themselves
    sizes: Sizes | None = None  # None for a simulation, as are the seconds
    seconds: float | None = None  # all trials; matrix products alone on a CPU unless ``timed``

    def lines(self) -> list[str]:
        """Return the estimate in words."""
        about = "about " if self.timed else "" if self.exact else "at most "
        counts = ", ".join(f"{name} {about}{n:,}" for name, n in self.steps.items()) or "no"
        lines = [f"steps   {counts} forward passes per trial; {self.trials} trials each"]
        if self.uncounted:
            names = ", ".join(self.uncounted)
            lines[0] += f"; {names} schedules by itself, so its steps are not counted"
        if self.sizes is not None:
            lines += [*_memory(self.sizes, self.batch_size), self._time(self.sizes.launches)]
        return lines

    def _time(self, launches: int) -> str:
        if not launches and not self.timed:
            return (
                f"time    {self.seconds:,.3g} s for the matrix products of all trials, timed just "
                "now; with attention and overhead about 1.5 times as long"
            )
        waits = ", with waits for requests" if self.timed else ""
        how = "1.5 times as long as its matrix products, which were timed just now"
        if launches:
            how = (
                f"as long as its matrix products and launching {launches:,} kernels, both timed "
                "just now, and that a trial takes at least a second"
            )
        return (
            f"time    about {self.seconds:,.3g} s for all trials{waits}; this assumes that a step "
            f"takes {how}"
        )


def _memory(sizes: Sizes, batch_size: int) -> Iterator[str]:
    weights, cache, peak, room = (
        f"{size / 2**20:,.0f} MiB"
        for size in (sizes.weight_bytes, sizes.kv_cache_bytes, sizes.peak_bytes, sizes.room_bytes)
    )
    yield (
        f"memory  {weights} of weights and {cache} of KV cache on {sizes.device}; at its peak "
        f"{peak} with activations, copies and libraries"
    )
    if sizes.fitting is not None:
        hint = "not even one slot fits: choose a smaller model"
        if sizes.fitting:
            hint = f"the largest --batch-size that fits is {sizes.fitting}"
        place = f"{sizes.device} has {room} free"
        yield f"warning {place}, so --batch-size {batch_size} does not fit; {hint}"


_LARGE = 20_000
"""Number of requests whose simulation takes longer than about two seconds."""


def estimate(experiment: Experiment, watch: Watch) -> Estimate:
    """Simulate the strategies and time one matrix product; load no model."""
    session = LocalBench(replace(experiment, simulated=True), watch)
    workload, trials, serving = session.workload, experiment.trials.trials, experiment.serving
    exact, timed = not workload.stop_at_eos, not replace(workload, stop_at_eos=False).closed
    if len(workload) > _LARGE:
        watch.phase(f"simulating {len(workload):,} requests under each strategy")
    if experiment.simulated:
        steps = {r.header.strategy: r.num_steps for r in _served(session, UNIT_NS)}
        return Estimate(steps, trials, serving.batch_size, exact)
    watch.phase("loading torch and timing a matrix product")
    from batchbench.batching.engines.torch.build import size_up

    sizes = size_up(experiment, session.source, workload)
    beside = _BESIDE_PRODUCTS if timed and not sizes.launches else 1.0
    served = _served(session, round((sizes.step_s * beside + sizes.launching_s) * 1e9))
    seconds = 0.0
    for recording in served:
        once_s = recording.duration_ns / 1e9  # on a GPU a short workload is served several times
        seconds += once_s * (servings_for(once_s, TRIAL_S) if sizes.launches else 1)
    return Estimate(
        {r.header.strategy: r.num_steps for r in served},
        trials,
        serving.batch_size,
        exact,
        timed,
        serving.plug_ins,
        sizes,
        seconds * trials,
    )


def _served(session: LocalBench, step_ns: int) -> list[Recording]:
    """Simulate each strategy with steps of ``step_ns``."""
    engine = SimulatedEngine(max(step_ns, 1))
    to_the_end = replace(session.workload, stop_at_eos=False)
    names = session.experiment.serving.policies
    batchers = [replace(session.batcher(name), engine=engine) for name in names]
    return [batcher.serve(to_the_end, Watch()) for batcher in batchers]
