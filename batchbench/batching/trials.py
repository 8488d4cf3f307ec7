"""Measurements around the trials: warm-up, steps of small batches, memory speed, energy and load.

Static batching computes a full batch in every step, so its trials do not show the cost of fewer
rows. A short workload shows it: half the slots decode, then a quarter of them, and so on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.machine import Counter, EnergyMeter, LoadMeter
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.workloads import Workload

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

SMALL_STEPS, SMALL_PROMPT = 6, 16
"""Decode steps to time for each smaller number of rows, and most tokens of their prompts."""


@dataclass(frozen=True)
class WarmUp:
    """The outcome of the warm-up; durations are None if there was none."""

    rounds: int
    settled: bool
    last_change: float | None  # of the median step, between the last two rounds, as a share
    step_ns: int | None
    duration_s: float | None = None


def warm_up(
    batcher: Batcher, others: Iterable[Strategy], workload: Workload, *, most: int, within: float
) -> WarmUp:
    """Serve the beginning of a workload until the median step changes by less than ``within``.

    ``others`` serve it once before.
    """
    began = time.monotonic()
    piece = beginning(workload, batcher.slots, output_tokens=12)
    for strategy in others:
        strategy.serve(piece, Watch())
    medians: list[float] = []
    change, settled = None, False
    while len(medians) < most and not settled:
        recording = batcher.serve(piece, Watch())
        durations = recording.step_ends_ns - recording.step_starts_ns
        medians.append(float(np.median(durations[1:] if len(durations) > 1 else durations)))
        if len(medians) > 1:
            change = medians[-1] / medians[-2] - 1
            settled = abs(change) < within
    return WarmUp(len(medians), settled, change, round(medians[-1]), time.monotonic() - began)


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
    return replace(Workload.of("smaller batches", prompts, outputs), seed=workload.seed)


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
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Recording:
    """Serve one trial without garbage collection.

    The header of its recording gets the energy, the load of other processes, and ``about``.
    """
    if not simulated:  # a collection takes 0.1 s
        gc.collect()
    gc.disable()
    try:
        load = LoadMeter()
        with EnergyMeter(energy) as meter:
            recording = strategy.serve(workload, watch, trial=trial)
        foreign = None if simulated else load.foreign_cores()
    finally:
        gc.enable()
    about = {**recording.header.about, **about, "foreign_cores": foreign, **meter.about()}
    return replace(recording, header=replace(recording.header, about=about))
