"""Timing a piece of work on any device, to its end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]

_SETTLING = 2
"""Turns that do not count: the first touches memory and makes kernels ready."""


def median_s(work: Work, device: torch.device, turns: int) -> float:
    """Seconds that ``work`` takes: the median of several turns."""
    once = _by_events if device.type == "cuda" else _by_the_host
    return statistics.median([once(work, device) for _ in range(_SETTLING + turns)][_SETTLING:])


def _by_the_host(work: Work, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


def _by_events(work: Work, device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in "be")  # type: ignore[no-untyped-call]
    begins.record(stream)
    work()
    ends.record(stream)
    ends.synchronize()
    return float(begins.elapsed_time(ends)) / 1e3
