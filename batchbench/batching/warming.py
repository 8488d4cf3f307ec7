"""The warm-up before all trials, and steps of smaller batches, timed there for predictions.

Static batching computes a full batch in every step, so its trials do not show the cost of fewer
rows. A short workload shows it: half the slots decode, then a quarter of them, and so on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from batchbench.batching.batcher import Batcher
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.workloads import Workload

SMALL_STEPS, SMALL_PROMPT = 6, 16
"""Decode steps to time for each smaller number of rows, and most tokens of their prompts."""


@dataclass(frozen=True)
class WarmUp:
    """The outcome of the warm-up."""

    rounds: int
    settled: bool
    last_change: float | None  # of the median step, between the last two rounds, as a share
    step_ns: int | None
    duration_s: float | None = None  # of all rounds; None if there were none


def warm_up(batcher: Batcher, piece: Workload, *, most: int, within: float) -> WarmUp:
    """Serve a short workload until the median step changes by less than ``within``."""
    began = time.monotonic()
    medians: list[float] = []
    change = None
    while len(medians) < most:
        recording = batcher.serve(piece, Watch())
        spent = recording.step_ends_ns - recording.step_starts_ns
        medians.append(float(np.median(spent[1:] if len(spent) > 1 else spent)))
        if len(medians) > 1:
            change = medians[-1] / medians[-2] - 1
            if abs(change) < within:
                break
    settled = change is not None and abs(change) < within
    return WarmUp(len(medians), settled, change, round(medians[-1]), time.monotonic() - began)


def time_small_batches(batcher: Batcher, workload: Workload, max_len: int) -> list[Recording]:
    """Time steps of fewer rows than slots; none if there is one slot.

    The work is served twice, since libraries set up each new number of rows.
    """
    pieces = [small_batches(workload, batcher.slots, max_len, steps) for steps in (1, SMALL_STEPS)]
    served = [batcher.serve(piece, Watch()) for piece in pieces if piece is not None]
    return served[1:]


def small_batches(workload: Workload, slots: int, max_len: int, steps: int) -> Workload | None:
    """Return requests that let half the slots decode for ``steps`` steps, then a quarter, … one.

    Args:
        workload: source of the prompts, of which only the first tokens are taken.
        max_len: most tokens of a request.
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
    made = Workload.of("smaller batches", prompts, outputs)
    return replace(made, seed=workload.seed)
