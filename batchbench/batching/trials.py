"""Measurements around the trials: warm-up, steps of small batches, memory speed, energy and load.

Static batching computes a full batch in every step, so its trials do not show the cost of fewer
rows. A short workload shows it: half the slots decode, then a quarter of them, and so on.

A GPU may serve a workload in a tenth of a second, too short to be measured well. A trial then
serves it several times. The serving of median duration becomes the trial's recording, so its steps,
tokens and counters are those of the workload that was asked for.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.machine import (
    Counter,
    EnergyMeter,
    LoadMeter,
    gpu_clock_mhz,
    longest_resolution_s,
)
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

SMALL_STEPS, SMALL_PROMPT = 6, 16
"""Decode steps to time for each smaller number of rows, and most tokens of their prompts."""


SETTLED = 0.05
"""Change of the median step, as a share, below which the warm-up ends."""


@dataclass(frozen=True)
class WarmUp:
    """The outcome of the warm-up; durations are None if there was none.

    It watches the median step of our own engine, and the median E2E latency of a server.
    """

    rounds: int
    settled: bool
    last_change: float | None  # of the median between the last two rounds, as a share
    step_ns: int | None
    duration_s: float | None = None


def warm_up(batcher: Batcher, others: Iterable[Strategy], workload: Workload, most: int) -> WarmUp:
    """Serve the beginning of a workload until the median step settles; ``others`` once before."""
    began = time.monotonic()
    piece = beginning(workload, batcher.slots, output_tokens=12)
    for strategy in others:
        strategy.serve(piece, Watch())

    def median_step() -> float:
        recording = batcher.serve(piece, Watch())
        durations = recording.step_ends_ns - recording.step_starts_ns
        return float(np.median(durations[1:] if len(durations) > 1 else durations))

    return settle(median_step, most, began)


def settle(measure: Callable[[], float], most: int, began: float) -> WarmUp:
    """Measure a duration in ns at most ``most`` times, until it changes by less than SETTLED."""
    found: list[float] = []
    change, settled = None, False
    while len(found) < most and not settled:
        found.append(measure())
        if len(found) > 1:
            change = found[-1] / found[-2] - 1
            settled = abs(change) < SETTLED
    return WarmUp(len(found), settled, change, round(found[-1]), time.monotonic() - began)


def beginning(workload: Workload, count: int, output_tokens: int) -> Workload:
    """Return the first ``count`` requests, with outputs cut to ``output_tokens``."""
    count = min(count, len(workload))
    offsets = workload.prompt_offsets[: count + 1]
    return Workload(
        name=f"beginning of {workload.name}",
        seed=workload.seed,
        prompt_ids=workload.prompt_ids[: offsets[-1]],
        prompt_offsets=offsets,
        output_tokens=np.minimum(workload.output_tokens[:count], output_tokens),
        due_ns=np.zeros(count, np.int64),
        sampling=workload.sampling,
    )


def time_small_batches(batcher: Batcher, workload: Workload, max_len: int) -> list[Recording]:
    """Time steps of fewer rows than slots; return nothing if there is one slot.

    The work is served twice, since libraries set up each new number of rows.
    """
    pieces = [small_batches(workload, batcher.slots, max_len, steps) for steps in (1, SMALL_STEPS)]
    served = [batcher.serve(piece, Watch()) for piece in pieces if piece is not None]
    return served[1:]


def small_batches(workload: Workload, slots: int, max_len: int, steps: int) -> Workload | None:
    """Return requests that let half the slots decode for ``steps`` steps, then a quarter, … one.

    Their prompts are the first tokens of the workload's; none is longer than ``max_len``.
    """
    halves, rows = list[int](), slots
    while rows := rows // 2:
        halves.append(rows)
    if not halves or max_len < 3:  # a prompt of one token, its first output, and one more
        return None
    longest = max(1, min(SMALL_PROMPT, max_len - 1 - len(halves)))
    room = max_len - 1 - longest  # output tokens beyond the first
    steps, halves = max(1, min(steps, room // len(halves))), halves[:room]
    prompts = [workload.prompt(i % len(workload))[:longest].tolist() for i in range(halves[0])]
    outputs = [1 + steps * sum(i < rows for rows in halves) for i in range(halves[0])]
    made = Workload.of("smaller batches", prompts, outputs, sampling=workload.sampling)
    return replace(made, seed=workload.seed)


TRIAL_S = 1.0
"""Shortest duration of a trial on a GPU; several servings fill it."""

MOST_SERVINGS = 999

WHOLE_S = 10.0
"""Longest time that the workload should take when it is served whole before the trials."""


def warm_up_whole(
    strategies: Iterable[Strategy],
    workload: Workload,
    warm_up: WarmUp,
    watch: Watch,
    *,
    least_steps_s: float,
    trial_s: float,
) -> tuple[WarmUp, dict[str, int]]:
    """Serve the workload once under each strategy, as a part of the warm-up.

    A GPU loads a kernel when it first meets a shape, so every shape that is timed should have been
    met. Of a workload that would take too long, only the beginning is served: ``least_steps_s`` is
    the time of its steps if every slot were useful in each. Return also how many times each
    strategy must serve the workload to fill ``trial_s``.
    """
    began, servings = time.monotonic(), dict[str, int]()
    share, piece = WHOLE_S / max(least_steps_s, 1e-9), workload
    if share < 1 or int(workload.due_ns.max()) > WHOLE_S * 1e9:
        count = max(1, int(len(workload) * min(share, 1.0)))
        piece = beginning(workload, count, int(workload.output_tokens.max()))
    for strategy in strategies:
        recording = strategy.serve(piece, Watch())
        if piece is workload and recording.duration_ns < 2e9 * trial_s:
            recording = strategy.serve(workload, Watch())  # the first time, it loaded kernels
            servings[strategy.name] = servings_for(recording.duration_ns / 1e9, trial_s)
    if note := servings_note(servings):
        watch.note(note)
    duration_s = (warm_up.duration_s or 0.0) + time.monotonic() - began
    return replace(warm_up, duration_s=duration_s), servings


def servings_note(servings: Mapping[str, int]) -> str | None:
    """Return words for the servings of a trial, by strategy; None if each is served once."""
    counts = ", ".join(f"{n} times ({name})" for name, n in servings.items() if n > 1)
    if not counts:
        return None
    return f"a trial serves the workload {counts}: the serving of median duration counts"


def servings_for(duration_s: float, trial_s: float) -> int:
    """Return the number of servings that fill a trial: odd, so that one has the median duration."""
    return min(math.ceil(trial_s / max(duration_s, 1e-9)), MOST_SERVINGS) | 1


def least_trial_s(energy: Sequence[Counter], pairs_s: float | None, count: int) -> float:
    """Return the shortest duration of a trial on a GPU, which is a second or so.

    Energy counters may need more; ``count`` trials must fit in ``pairs_s``.
    """
    wanted = max(TRIAL_S, 1.1 * longest_resolution_s(energy))
    return wanted if pairs_s is None else min(wanted, pairs_s / count)


def measure_memory(model: LoadedModel, watch: Watch) -> dict[str, Any]:
    """Return the speed of memory now and the bytes that a decode step reads, for a trial's header.

    It is empty if the last-level cache holds all that is read: memory then sets no limit.
    """
    from batchbench.batching.engines.torch import hardware

    reading = hardware.reading_of(model)
    if reading.step_weight_bytes <= (hardware.cache_bytes(model.device) or 0):
        return {}
    watch.phase("measuring memory bandwidth")
    bandwidth = hardware.measure_bandwidth(model.device)
    if bandwidth.beyond_cache is False:  # there was no room for a buffer that large
        return {}
    return {"memory": {"bytes_per_s": bandwidth.bytes_per_s, "reading": asdict(reading)}}


def observe(
    strategy: Strategy,
    workload: Workload,
    watch: Watch,
    trial: int = 0,
    energy: Sequence[Counter] = (),
    *,
    simulated: bool = False,
    about: Mapping[str, Any] | None = None,
    servings: int = 1,
    gpu: str | None = None,
) -> Recording:
    """Serve one trial without garbage collection.

    The header of its recording gets the energy, the load of other processes, and ``about``. Of
    several ``servings``, the one of median duration is returned. ``gpu`` is the id of a GPU whose
    clocks are read at the end.
    """
    if not simulated:  # a collection takes 0.1 s
        gc.collect()
    gc.disable()
    try:
        load = LoadMeter()
        with EnergyMeter(energy) as meter:
            served = [strategy.serve(workload, watch, trial=trial) for _ in range(servings)]
            clocks = None if gpu is None else gpu_clock_mhz(gpu)
        foreign = None if simulated else load.foreign_cores()
    finally:
        gc.enable()
    recording, own = middle_of(served)
    about = {**recording.header.about, **(about or {}), **own}
    if gpu is not None:
        about["gpu_clock_mhz"] = clocks
    about |= {"foreign_cores": foreign, **meter.about(servings)}
    return replace(recording, header=replace(recording.header, about=about))


def middle_of(served: Sequence[Recording]) -> tuple[Recording, dict[str, Any]]:
    """Return the recording of median duration, with those of other tokens, and facts about all."""
    middle = sorted(served, key=lambda r: r.duration_ns)[len(served) // 2]
    if len(served) == 1:
        return middle, {}
    outputs = {_output_of(r): r for r in served}
    del outputs[_output_of(middle)]
    others = tuple(outputs.values())
    differing = {i for other in others for i in requests_that_differ(middle, other)}
    facts = {
        "servings": len(served),
        "differing_requests": sorted(differing),
        "steps_vary": len({r.num_steps for r in served}) > 1,
    }
    return replace(middle, others=others), facts


def _output_of(recording: Recording) -> tuple[bytes, bytes]:
    tokens = recording.tokens  # a plug-in may not report them
    return recording.requests.output_tokens.tobytes(), b"" if tokens is None else tokens.tobytes()


def requests_that_differ(one: Recording, other: Recording) -> list[int]:
    """Return the requests to which two recordings gave different tokens."""
    if one.tokens is None or other.tokens is None:
        return []
    count = len(one.requests.slot)
    return [i for i in range(count) if not np.array_equal(one.tokens_of(i), other.tokens_of(i))]
