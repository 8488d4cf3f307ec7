"""A distribution: what was observed, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchbench.batching.recording import Ints, Recording

Floats = NDArray[np.float64]

_DENSE = 16
"""Largest range, in multiples of the number of values, at which values are counted, not sorted."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Distinct values, ascending: ``weights[i]`` observations of ``values[i]``.

    Exactly what the expanded list would give, without the list: a million requests share their
    gaps between tokens. Sums are rounded once (:func:`math.fsum`), so that statistics do not depend
    on the order in which things were observed.
    """

    values: Floats
    weights: Ints

    @classmethod
    def of(cls, values: NDArray[Any], weights: NDArray[Any] | None = None) -> Distribution:
        """From unsorted values; without weights each counts once."""
        if weights is not None:
            values, weights = values[weights > 0], weights[weights > 0]
        if values.dtype.kind == "i" and len(values):
            low, high = int(values.min()), int(values.max())
            if high - low < _DENSE * len(values):  # counting takes a tenth of the time of sorting
                counts = np.bincount(values - low, weights)  # exact up to 2**53
                found = np.flatnonzero(counts)
                return cls((found + low).astype(np.float64), counts[found].astype(np.int64))
        distinct, first, counts = np.unique(values, return_inverse=True, return_counts=True)
        if weights is not None:
            counts = np.bincount(first, weights, len(distinct))
        return cls(distinct.astype(np.float64), counts.astype(np.int64))

    @classmethod
    def pooled(cls, parts: Sequence[Distribution]) -> Distribution:
        """All observations of several distributions."""
        return cls.of(
            np.concatenate([p.values for p in parts]), np.concatenate([p.weights for p in parts])
        )

    def in_units_of(self, unit: float) -> Distribution:
        """Return the same observations as multiples of a unit."""
        return Distribution(self.values / unit, self.weights)

    @cached_property
    def _cumulated(self) -> Ints:
        return np.cumsum(self.weights)

    @property
    def count(self) -> int:
        """Number of observations."""
        return int(self._cumulated[-1]) if len(self.weights) else 0

    @property
    def max(self) -> float | None:
        """The largest observation; None of nothing."""
        return float(self.values[-1]) if self.count else None

    def mean(self) -> float | None:
        """Arithmetic mean; None of nothing."""
        return math.fsum(self.values * self.weights) / self.count if self.count else None

    def std(self) -> float | None:
        """Standard deviation of these observations (not an estimate for others)."""
        mean = self.mean()
        if mean is None:
            return None
        away = self.values - mean
        return math.sqrt(math.fsum(away * away * self.weights) / self.count)

    def percentile(self, q: float) -> float | None:
        """The q-th percentile, linear between neighbours (NumPy's default)."""
        if not self.count:
            return None
        rank = (self.count - 1) * q / 100
        low = int(rank)
        at = np.searchsorted(self._cumulated, [low, min(low + 1, self.count - 1)], side="right")
        below, above = self.values[at]
        return float(below + (above - below) * (rank - low))


def step_distribution(recording: Recording, spans: Ints | None = None) -> Distribution:
    """Return the distribution of the durations of steps, in ns.

    Args:
        spans: numbers of the spans whose steps are counted, ascending; None for all.
    """
    parts = [Distribution.of(part.ns, part.count) for part in recording.step_times(spans)]
    return Distribution.pooled(parts)
