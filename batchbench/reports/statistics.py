"""Statistics: distributions, ratios with intervals, and rules that decide on a difference."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from batchbench.batching.recording import Ints, Recording
from batchbench.reports.result_data import Speedup

Floats = NDArray[np.float64]

_DENSE = 16
"""Largest range, in multiples of the number of values, whose values are counted, not sorted."""


# Distributions


@dataclass(frozen=True, eq=False)
class Distribution:
    """Distinct values, ascending: ``weights[i]`` observations of ``values[i]``.

    Statistics are those of the expanded list, which may be long: a million requests share their
    gaps between tokens. Sums are rounded once (:func:`math.fsum`), so that they do not depend on
    the order of the observations.
    """

    values: Floats
    weights: Ints

    @classmethod
    def of(cls, values: NDArray[Any], weights: NDArray[Any] | None = None) -> Distribution:
        """Count unsorted values; without weights each counts once."""
        if weights is not None:
            values, weights = values[weights > 0], weights[weights > 0]
        if values.dtype.kind == "i" and len(values):
            low, high = int(values.min()), int(values.max())
            if high - low < _DENSE * len(values):  # counting takes a tenth of the time of sorting
                counts = np.bincount(values - low, weights)  # exact up to 2**53
                there = np.flatnonzero(counts)
                return cls((there + low).astype(np.float64), counts[there].astype(np.int64))
        distinct, first, counts = np.unique(values, return_inverse=True, return_counts=True)
        if weights is not None:
            counts = np.bincount(first, weights, len(distinct))
        return cls(distinct.astype(np.float64), counts.astype(np.int64))

    @classmethod
    def pooled(cls, parts: Sequence[Distribution]) -> Distribution:
        """Return all observations of several distributions."""
        return cls.of(
            np.concatenate([p.values for p in parts]), np.concatenate([p.weights for p in parts])
        )

    def in_units_of(self, unit: float) -> Distribution:
        return Distribution(self.values / unit, self.weights)

    @cached_property
    def _cumulated(self) -> Ints:
        return np.cumsum(self.weights)

    @property
    def count(self) -> int:
        return int(self._cumulated[-1]) if len(self.weights) else 0

    @property
    def max(self) -> float | None:
        """Largest observation; None if there is none."""
        return float(self.values[-1]) if self.count else None

    def mean(self) -> float | None:
        """Return the mean; None if there are no observations."""
        return math.fsum(self.values * self.weights) / self.count if self.count else None

    def std(self) -> float | None:
        """Return the standard deviation of these observations (no estimate for others)."""
        mean = self.mean()
        if mean is None:
            return None
        away = self.values - mean
        return math.sqrt(math.fsum(away * away * self.weights) / self.count)

    def percentile(self, q: float) -> float | None:
        """Return the q-th percentile, linear between neighbours (NumPy's default)."""
        if not self.count:
            return None
        rank = (self.count - 1) * q / 100
        low = int(rank)
        at = np.searchsorted(self._cumulated, [low, min(low + 1, self.count - 1)], side="right")
        below, above = self.values[at]
        return float(below + (above - below) * (rank - low))


def step_distribution(recording: Recording, spans: Ints | None = None) -> Distribution:
    """Return the durations of steps in ns, of all spans or of the ``spans`` of these numbers."""
    parts = [Distribution.of(part.ns, part.count) for part in recording.step_times(spans)]
    return Distribution.pooled(parts)


# Ratios and intervals

CONFIDENCE = 0.95

FEWEST_PAIRS = 3
"""Minimum number of values for an interval: a bootstrap of three covers 75 %, not 95 %."""


@dataclass(frozen=True)
class Ratio:
    """A paired ratio: its median over the pairs, and an interval of its mean logarithm."""

    median: float
    low: float | None
    high: float | None

    def as_dict(self) -> Speedup:
        """Return JSON values; ``ci95`` is null if there are too few pairs."""
        ends = [end for end in (self.low, self.high) if end is not None]
        return {"median": self.median, "ci95": ends or None}


def paired_ratio(
    numerators: Sequence[float | None], denominators: Sequence[float | None]
) -> Ratio | None:
    """Return numerator / denominator, pair by pair; None if a value is missing or not above 0.

    The interval is Student's t interval of the mean log ratio (ratios multiply, so their logs
    scatter evenly).
    """
    pairs = list(zip(numerators, denominators, strict=True))
    values = np.array(pairs, np.float64)  # a missing value is NaN
    if not pairs or not (values > 0).all():
        return None
    logs = np.log(values[:, 0] / values[:, 1])
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


def interval_of_ratio(then: ArrayLike, now: ArrayLike) -> tuple[float, float]:
    """Return Welch's 95 % interval of now / then, the ratio of their geometric means."""
    new, old = np.log(np.asarray(now)), np.log(np.asarray(then))
    first = new[0] - old[0]
    new, old = new - new[0], old - old[0]  # scipy warns of values that hardly differ, unless near 0
    if not (new.any() or old.any()):
        return (math.exp(first),) * 2
    low, high = stats.ttest_ind(new, old, equal_var=False).confidence_interval(CONFIDENCE)
    return math.exp(first + low), math.exp(first + high)


# Verdicts

PRIOR = 4.0

FEWEST = 4
"""Number of samples below which the verdict is always unknown."""

POWER = 0.8
"""Probability with which an effect must be found to count as detectable."""

_LEAST_SCATTER = 1e-9
"""Minimum standard deviation: equal samples only show that the clock is coarse."""


class Verdict(StrEnum):
    """A verdict on a quantity, new against base."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    CHANGED = "changed"  # of counts and outputs, which have no noise
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Rule:
    """Thresholds of a difference.

    Attributes:
        floor: log ratio that must be exceeded for *slower*; below its negative it is *faster*.
        margin: log ratio within which, on both sides, it must lie for *same*.
        alpha: probability of a false *slower* (and of a false *faster*), all looks together.
    """

    floor: float = 0.01
    margin: float = 0.05
    alpha: float = 0.001

    def shared(self, metrics: int) -> Rule:
        return Rule(self.floor, self.margin, self.alpha / max(metrics, 1))

    def as_data(self) -> dict[str, float]:
        """Return JSON values, the bounds in percent as options give them."""
        return {
            "floor_percent": 100 * math.expm1(self.floor),
            "margin_percent": 100 * math.expm1(self.margin),
            "alpha": self.alpha,
        }


@dataclass(frozen=True)
class Decision:
    """A verdict with its evidence, in log ratios, which are above 0 if new is slower.

    Attributes:
        low, high: 95 % interval of the mean; None if there are too few samples.
        p_value: of the null hypothesis that the verdict rejects, the larger of the two for *same*.
        smallest: smallest detectable slowdown with these samples; None if there are too few.
        needed: samples that would probably be enough, if the verdict is unknown.
    """

    verdict: Verdict
    samples: int
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    smallest: float | None = None
    needed: int | None = None

    @property
    def is_sure(self) -> bool:
        return self.verdict is not Verdict.UNKNOWN


# One sample of pairs: an e-process, which may be looked at after every pair


def log_e(samples: Sequence[float], null: float) -> float:
    """Return the logarithm of the evidence that the mean is above ``null``; at most 0 if not."""
    mean, error = _mean_and_error(samples)
    if len(samples) < 2 or mean <= null:
        return 0.0
    t = (mean - null) / error
    return _evidence(t * t, len(samples))


def _evidence(square: float, n: int) -> float:
    """Return the logarithm of the evidence of n samples with this square of Student's t."""
    nu, spread = n - 1, 1 + PRIOR * n
    gain = math.log1p(square / nu) - math.log1p(square / (nu * spread))
    return n / 2 * gain - 0.5 * math.log(spread)


def decide(samples: Sequence[float], rule: Rule, *, last: bool) -> Decision:
    """Return the verdict on paired samples so far.

    An early *same* needs an estimate within the floor: with a floor of 3 %, a loss of 4 % is a
    regression to report although it is within the margin.

    Args:
        last: there will be no more samples, so the half of α that was reserved for this is spent.
    """
    n = len(samples)
    if n < 2:
        return Decision(Verdict.UNKNOWN, n, float(samples[0]) if n else None)
    mean, error = _mean_and_error(samples)
    alpha = rule.alpha / 2

    def shows(sign: int, bound: float) -> bool:
        if log_e([sign * value for value in samples], bound) >= math.log(1 / alpha):
            return True
        return last and _tail((sign * mean - bound) / error, n - 1) < alpha

    verdict = Verdict.UNKNOWN
    if n >= FEWEST:
        if shows(1, rule.floor):
            verdict = Verdict.SLOWER
        elif shows(-1, rule.floor):
            verdict = Verdict.FASTER
        elif last or abs(mean) <= rule.floor:
            within = shows(1, -rule.margin) and shows(-1, -rule.margin)
            verdict = Verdict.SAME if within else verdict
    return Decision(
        verdict,
        n,
        mean,
        *confidence_sequence(samples),
        p_value=_p_value(verdict, mean, error, n - 1, rule),
        smallest=rule.floor + _detectable(n - 1, alpha) * error if n >= FEWEST else None,
        needed=_needed(mean, error * n**0.5, rule) if verdict is Verdict.UNKNOWN else None,
    )


def confidence_sequence(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """Return bounds of the mean that hold after any number of looks; None for too few samples."""
    n = len(samples)
    need = math.log(2 / (1 - CONFIDENCE))
    if n < 2 or (n - 1) / 2 * math.log1p(PRIOR * n) <= need:  # the limit of the evidence
        return None, None
    mean, error = _mean_and_error(samples)

    def missing(log_t: float) -> float:
        return _evidence(math.exp(2 * log_t), n) - need

    t = math.exp(float(optimize.brentq(missing, -20, 50)))
    return mean - t * error, mean + t * error


# Two samples of independent sessions


def compare_means(
    base: Sequence[float], new: Sequence[float], rule: Rule, *, between: float = 0.0
) -> Decision:
    """Return the verdict on two independent sets of logarithms, by Welch's t-test.

    ``between`` is the standard deviation of a set's mean beyond what its values show, as when all
    of them come from one process.
    """
    n, m = len(base), len(new)
    mean = float(np.mean(new) - np.mean(base)) if n and m else None
    if mean is None or min(n, m) < 2:
        return Decision(Verdict.UNKNOWN, min(n, m), mean)
    parts = [float(np.var(base, ddof=1)) / n, float(np.var(new, ddof=1)) / m]
    known = 2 * between**2
    error = max(math.sqrt(sum(parts) + known), _LEAST_SCATTER)
    # The known part of the variance is not estimated, so it costs no degrees of freedom.
    lost = parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)
    nu = min(error**4 / lost, 1e6) if lost else 1e6
    verdict = Verdict.UNKNOWN
    for rejected in (Verdict.SAME, Verdict.SLOWER, Verdict.FASTER):  # the last has precedence
        if _p_value(rejected, mean, error, nu, rule) < rule.alpha:
            verdict = rejected
    half = _quantile((1 + CONFIDENCE) / 2, nu) * error
    unknown = verdict is Verdict.UNKNOWN
    return Decision(
        verdict,
        min(n, m),
        mean,
        mean - half,
        mean + half,
        p_value=_p_value(verdict, mean, error, nu, rule),
        smallest=rule.floor + _detectable(nu, rule.alpha) * error,
        needed=_needed_of_two(mean, sum(parts) * min(n, m), known, rule) if unknown else None,
    )


def _mean_and_error(samples: Sequence[float]) -> tuple[float, float]:
    mean = float(np.mean(samples))
    if len(samples) < 2:
        return mean, math.inf
    return mean, max(float(np.std(samples, ddof=1)), _LEAST_SCATTER) / len(samples) ** 0.5


def _tail(t: float, nu: float) -> float:
    """Return the probability that Student's t with ``nu`` degrees of freedom exceeds ``t``.

    As ``scipy.stats.t.sf``, without the checks that take fifty times as long: a table has thousands
    of verdicts.
    """
    return float(special.stdtr(nu, -t))


def _quantile(p: float, nu: float) -> float:
    return float(special.stdtrit(nu, p))


def _p_value(verdict: Verdict, mean: float, error: float, nu: float, rule: Rule) -> float:
    """Return the p-value of the hypothesis that the verdict rejects; of "not slower" if none."""
    if verdict is Verdict.FASTER:
        return _tail((-mean - rule.floor) / error, nu)
    if verdict is Verdict.SAME:
        return _tail((rule.margin - abs(mean)) / error, nu)
    return _tail((mean - rule.floor) / error, nu)


def _detectable(nu: float, alpha: float) -> float:
    """Return the standard errors above the floor at which an effect is found."""
    return _quantile(1 - alpha, nu) + _quantile(POWER, nu)


def _distance(mean: float, rule: Rule) -> float:
    """Return the distance to the nearest bound that would give a verdict."""
    return max(abs(mean) - rule.floor, rule.margin - abs(mean))


def _needed(mean: float, scatter: float, rule: Rule) -> int | None:
    """Return the samples for a verdict if the mean and the scatter stay as they are."""
    distance = _distance(mean, rule)

    def enough(n: int) -> bool:
        return bool(_detectable(n - 1, rule.alpha / 2) * scatter / n**0.5 <= distance)

    return FEWEST + bisect_left(range(FEWEST, 100_000), True, key=enough) if distance > 0 else None


def _needed_of_two(mean: float, scatter: float, known: float, rule: Rule) -> int | None:
    """Return the samples per side for a verdict; None if no number is enough."""
    z = float(special.ndtri(1 - rule.alpha) + special.ndtri(POWER))
    room = (_distance(mean, rule) / z) ** 2 - known
    return None if room <= 0 else max(FEWEST, math.ceil(scatter / room))
