"""Where a series changed its level: E-divisive means, with a permutation test.

Matteson and James 2014 (A nonparametric approach for multiple change point analysis of
multivariate data, JASA 109): the split of a segment whose two sides differ most in the energy
statistic is a change point if permuting the values *within* the segments found so far hardly ever
gives as large a one; then the parts are looked at in the same way. Daly et al. 2020 (Change point
detection in software performance testing) brought it to histories of benchmarks. Both sides of a
split end where their segment ends: the paper's search for an end before that is left out. Hunter
(Fleming et al. 2023, arXiv:2301.03034) takes a t-test in place of the permutations, as theirs were
not deterministic; but the split was chosen, which a t-test does not know of. Here they are seeded
and as many as the level needs, and a test counts that false alarms are as rare as was asked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchbench.reports.statistics import Floats

SHORTEST = 3
"""Values of a segment, at least: a single outlier is no change of level."""

_PERMUTATIONS = 5
"""Permutations for each 1/α: four of five may exceed and it is still significant."""

_BATCH = 256
_SLACK = 1e-9  # an equal arrangement adds up to an equal statistic but for its rounding


@dataclass(frozen=True)
class ChangePoint:
    """A change of level before the value ``index``, and its p-value by permutation."""

    index: int
    p_value: float


def fewest_values(alpha: float) -> int:
    """Values from which on the clearest change is found at ``alpha``.

    In the most extreme order all small values come before all large ones, or after them. Its
    p-value must be a quarter of α, as so few permutations tell it only roughly.
    """
    n = 2 * SHORTEST
    while 2 / math.comb(n, n // 2) > alpha / 4:
        n += 1
    return n


def find_changes(values: Sequence[float], alpha: float, seed: int = 0) -> list[ChangePoint]:
    """The change points of a series, in its order.

    Args:
        alpha: probability that any is found where the values come in no order.
        seed: of the permutations, so that the same series gives the same answer.
    """
    series = np.asarray(values, np.float64)
    edges, found = [0, len(series)], dict[int, float]()
    random = np.random.default_rng(seed)
    while True:
        segments = [series[a:b] for a, b in itertools.pairwise(edges)]
        scored = [_best_split(segment[None, :]) for segment in segments]
        scores = [float(score[0]) for score, _ in scored]
        chosen = int(np.argmax(scores))
        if scores[chosen] <= 0:  # all values are equal, or the segments too short to be split
            break
        p_value = _p_value(segments, scores[chosen], alpha, random)
        if p_value > alpha:
            break
        place = edges[chosen] + int(scored[chosen][1][0])
        found[place] = p_value
        edges = sorted([*edges, place])
    return [ChangePoint(place, found[place]) for place in sorted(found)]


def _p_value(
    segments: Sequence[Floats], score: float, alpha: float, random: np.random.Generator
) -> float:
    """Share of the permutations with as large a best split; cut short once it is above α."""
    asked = math.ceil(_PERMUTATIONS / alpha) - 1
    allowed = alpha * (asked + 1) - 1
    long = [segment for segment in segments if len(segment) >= 2 * SHORTEST]
    made = exceeding = 0
    while made < asked and exceeding <= allowed:
        count = min(_BATCH, asked - made)
        best = np.full(count, -np.inf)
        for segment in long:
            mixed = random.permuted(np.broadcast_to(segment, (count, len(segment))), axis=1)
            best = np.maximum(best, _best_split(mixed)[0])
        exceeding += int((best >= score * (1 - _SLACK)).sum())
        made += count
    return (exceeding + 1) / (made + 1)


def _best_split(rows: Floats) -> tuple[Floats, Floats]:
    """The largest energy statistic of each row of ``[rows, n]``, and the split it belongs to.

    With m and k values on the two sides it is mk / (m + k) × (2 × mean distance between them −
    mean distance within the one − within the other).
    """
    count, n = rows.shape
    if n < 2 * SHORTEST:
        return np.full(count, -np.inf), np.zeros(count)
    before = np.zeros_like(rows)  # of each value, the sum of its distances to those before it
    after = np.zeros_like(rows)
    for i in range(1, n):
        distances = np.abs(rows[:, :i] - rows[:, i : i + 1])
        before[:, i] = distances.sum(axis=1)
        after[:, :i] += distances
    splits = np.arange(SHORTEST, n - SHORTEST + 1)  # values on the left
    left = before.cumsum(axis=1)[:, splits - 1]
    right = after[:, ::-1].cumsum(axis=1)[:, n - splits - 1]
    between = before.sum(axis=1)[:, None] - left - right
    m, k = splits, n - splits
    energy = 2 * between / (m * k) - left / (m * (m - 1) / 2) - right / (k * (k - 1) / 2)
    scores = m * k / n * energy
    best = scores.argmax(axis=1)
    return scores[np.arange(count), best], splits[best].astype(np.float64)
