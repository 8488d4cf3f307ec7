"""Fairness: who pays for whom, by the length of the output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.gaps import gaps_ms
from batchbench.reports.latency import e2el_ms, queue_ms, ttft_ms
from batchbench.reports.statistics import Distribution, Floats, step_distribution

MOST_CLASSES = 4

Class = tuple[int, int]
"""Smallest and largest output of a class, in tokens, both included."""


def length_classes(output_tokens: Ints) -> list[Class]:
    """Classes of output lengths: each length its own if there are few, else quarters."""
    lengths = np.unique(output_tokens)
    if len(lengths) <= MOST_CLASSES:
        return [(int(length), int(length)) for length in lengths]
    shares = np.arange(1, MOST_CLASSES) / MOST_CLASSES
    inner = np.quantile(output_tokens, shares, method="inverted_cdf")
    tops = np.unique([*inner, lengths[-1]])
    bottoms = [lengths[0], *(lengths[np.searchsorted(lengths, top) + 1] for top in tops[:-1])]
    return [(int(low), int(high)) for low, high in zip(bottoms, tops, strict=True)]


def slowdown(recording: Recording) -> Floats:
    """E2E latency over what the request would take alone, ``[requests]``.

    Alone it would take a step a token, of the trial's median step.
    """
    step_ms = max(median_step_ms(recording), 1e-6)  # a clock may show 0 for a step
    alone = recording.requests.output_tokens * step_ms
    found: Floats = e2el_ms(recording) / alone
    return found


def median_step_ms(recording: Recording) -> float:
    """Median duration of a step, or of the gaps between tokens where no steps are shown."""
    if not recording.has_steps:
        gaps = gaps_ms(recording).percentile(50)
        return float(np.median(ttft_ms(recording))) if gaps is None else gaps
    median = step_distribution(recording).in_units_of(1e6).percentile(50)
    assert median is not None
    return median


def by_length(
    recordings: Sequence[Recording], classes: Sequence[Class]
) -> list[dict[str, float | int | None]]:
    """What the requests of each class met with, over all trials."""
    lengths = np.concatenate([r.requests.output_tokens for r in recordings])
    figures = {
        "queue_ms": np.concatenate([queue_ms(r) for r in recordings]),
        "ttft_ms": np.concatenate([ttft_ms(r) for r in recordings]),
        "e2el_ms": np.concatenate([e2el_ms(r) for r in recordings]),
        "slowdown": np.concatenate([slowdown(r) for r in recordings]),
    }
    rows: list[dict[str, float | int | None]] = []
    for low, high in classes:
        members = (low <= lengths) & (lengths <= high)
        row: dict[str, float | int | None] = {
            "min_output_tokens": low,
            "max_output_tokens": high,
            "requests": int(members.sum()),
        }
        for name, values in figures.items():
            found = Distribution.of(values[members])
            row |= {f"mean_{name}": found.mean(), f"p99_{name}": found.percentile(99)}
        rows.append(row)
    return rows
