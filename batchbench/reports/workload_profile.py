"""What a workload looks like before anything serves it: lengths and arrivals in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchbench.workloads.outline import Outline
from batchbench.workloads.ragged import Ints


@dataclass(frozen=True)
class Spread:
    """Lengths of all requests, in tokens; percentiles are linear between neighbours."""

    total: int
    mean: float
    least: int
    p50: float
    p90: float
    p99: float
    most: int


@dataclass(frozen=True)
class Pace:
    """Arrivals: the time from the first to the last, gaps in it a second, and how they vary.

    ``variation`` is the coefficient of variation of the gaps, 1 for a Poisson process and
    burstiness ** -0.5 for a gamma one; None below two gaps or where all come at once.
    """

    span_s: float
    per_second: float | None
    variation: float | None


@dataclass(frozen=True)
class Bar:
    """Lengths from ``low`` to ``high``, both included, and how many there are."""

    low: int
    high: int
    count: int


def spread(lengths: Ints) -> Spread:
    """How lengths, ``[requests]``, are spread."""
    p50, p90, p99 = np.percentile(lengths, (50, 90, 99)).tolist()
    return Spread(
        int(lengths.sum()),
        float(lengths.mean()),
        int(lengths.min()),
        p50,
        p90,
        p99,
        int(lengths.max()),
    )


def pace(due_ns: Ints) -> Pace:
    """How requests due at these times, ``[requests]``, come in."""
    gaps = np.diff(due_ns)
    span = float(due_ns[-1] - due_ns[0]) / 1e9
    if not span:
        return Pace(span, None, None)
    variation = float(gaps.std() / gaps.mean()) if len(gaps) > 1 else None
    return Pace(span, len(gaps) / span, variation)


def bars(lengths: Ints, most: int = 10) -> list[Bar]:
    """A histogram of at most ``most`` bars of equal width, a whole number of tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // most)
    counts = np.bincount((lengths - low) // width)
    return [
        Bar(low + i * width, min(low + (i + 1) * width - 1, high), count)
        for i, count in enumerate(counts.tolist())
    ]


def title(outline: Outline) -> str:
    """Requests and tokens in a line."""
    prompt, output = int(outline.prompt_tokens.sum()), int(outline.output_tokens.sum())
    requests = f"{len(outline):,} request{'s' * (len(outline) != 1)}"
    return f"{requests} · {prompt:,} prompt tokens · {output:,} output tokens"
