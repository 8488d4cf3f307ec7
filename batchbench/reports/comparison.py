"""Comparison of two strategies over paired trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
FEWEST_PAIRS = 3
"""Below this no interval is given: a bootstrap of three values covers 75 %, not 95 %."""


@dataclass(frozen=True)
class Ratio:
    """A paired ratio: its median over the pairs, and an interval of its mean logarithm."""

    median: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        """For the result: ``ci95`` is null where there are too few pairs."""
        interval = None if self.low is None else [self.low, self.high]
        return {"median": self.median, "ci95": interval}


def paired_ratio(
    numerators: Sequence[float | None], denominators: Sequence[float | None]
) -> Ratio | None:
    """Return numerator / denominator, pair by pair; None if a value is missing or not above 0.

    The interval is Student's t interval of the mean log ratio (ratios multiply, so their logs
    are what scatters evenly).
    """
    both = zip(numerators, denominators, strict=True)
    pairs = [(a, b) for a, b in both if a is not None and b is not None and a > 0 and b > 0]
    if not pairs or len(pairs) < len(numerators):
        return None
    logs = np.log([a / b for a, b in pairs])
    median = float(np.exp(np.median(logs)))
    if len(logs) < FEWEST_PAIRS:
        return Ratio(median, None, None)
    low, high = mean_interval(logs)
    return Ratio(median, math.exp(low), math.exp(high))


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean; it is unbounded for fewer than two values."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)
