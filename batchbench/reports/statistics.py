"""A distribution: what was observed, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

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


PRIOR = 4.0

FEWEST = 4
"""Samples below which nothing is ever told."""

POWER = 0.8
"""What an effect must be found with, to be called one that could have been found."""

_LEAST_SCATTER = 1e-9
"""Samples that are all equal prove no more than that the clock is coarse."""


class Verdict(StrEnum):
    """What can be told of a quantity, new against base."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    CHANGED = "changed"  # of counts and outputs, which no noise touches
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Rule:
    """When a difference is one.

    Attributes:
        floor: log ratio that must be exceeded for *slower*; below its negative it is *faster*.
        margin: log ratio within which, on both sides, it must lie for *same*.
        alpha: probability of a false *slower* (and of a false *faster*), all looks together.
    """

    floor: float = 0.01
    margin: float = 0.05
    alpha: float = 0.001

    def shared(self, metrics: int) -> Rule:
        """The rule for one of several metrics that are looked at together (Bonferroni)."""
        return Rule(self.floor, self.margin, self.alpha / max(metrics, 1))

    def as_data(self) -> dict[str, float]:
        """Return the rule as JSON values, its bounds in percent as options give them."""
        return {
            "floor_percent": 100 * math.expm1(self.floor),
            "margin_percent": 100 * math.expm1(self.margin),
            "alpha": self.alpha,
        }


@dataclass(frozen=True)
class Decision:
    """A verdict and what it rests on; log ratios, above 0 where new is slower.

    ``low`` and ``high`` bound the mean with 95 % confidence; None where there are too few samples.
    ``p_value`` is of the verdict's own null hypothesis, the larger of the two for *same*.
    ``smallest`` is the least slowdown that so many samples of this scatter would have found; None
    where nothing is told of so few.
    ``needed`` is how many samples would probably do, where it cannot be told.
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
        """Whether anything was shown."""
        return self.verdict is not Verdict.UNKNOWN


# One sample: pairs


def log_e(samples: Sequence[float], null: float) -> float:
    """Logarithm of the evidence that the mean is above ``null``; 0 at most where it seems not."""
    n = len(samples)
    mean, error = _mean_and_error(samples)
    if n < 2 or mean <= null:
        return 0.0
    t, nu = (mean - null) / error, n - 1
    spread = 1 + PRIOR * n
    return -0.5 * math.log(spread) + n / 2 * (
        math.log1p(t * t / nu) - math.log1p(t * t / (nu * spread))
    )


def decide(samples: Sequence[float], rule: Rule, *, last: bool) -> Decision:
    """The verdict on paired samples so far.

    *Same* is not told early of an estimate beyond the floor: whoever asks for a regression of 3 %
    wants to know of it although it is within the margin.

    Args:
        last: there will be no more samples, so that the half of α that was kept for it is spent.
    """
    n = len(samples)
    if n < 2:
        return Decision(Verdict.UNKNOWN, n, float(samples[0]) if n else None)
    mean, error = _mean_and_error(samples)
    told = Verdict.UNKNOWN
    if n >= FEWEST:
        shown = _shows(samples, rule.alpha / 2, last=last)
        if shown(1, rule.floor):
            told = Verdict.SLOWER
        elif shown(-1, rule.floor):
            told = Verdict.FASTER
        elif (
            (abs(mean) <= rule.floor or last) and shown(1, -rule.margin) and shown(-1, -rule.margin)
        ):
            told = Verdict.SAME
    return Decision(
        told,
        n,
        mean,
        *confidence_sequence(samples),
        p_value=_p_value(told, mean, error, n - 1, rule),
        smallest=rule.floor + _detectable(n, rule.alpha / 2) * error if n >= FEWEST else None,
        needed=_needed(mean, error * n**0.5, rule) if told is Verdict.UNKNOWN else None,
    )


def _shows(samples: Sequence[float], alpha: float, *, last: bool) -> Callable[[int, float], bool]:
    """Whether sign × mean is shown to be above a bound."""

    def shown(sign: int, bound: float) -> bool:
        signed = [sign * value for value in samples]
        if log_e(signed, bound) >= math.log(1 / alpha):
            return True
        mean, error = _mean_and_error(signed)
        return last and _tail((mean - bound) / error, len(signed) - 1) < alpha

    return shown


def confidence_sequence(
    samples: Sequence[float], confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """Bounds of the mean that hold however often one looks; None where there are too few."""
    n = len(samples)
    need = math.log(2 / (1 - confidence))
    if n < 2 or (n - 1) / 2 * math.log1p(PRIOR * n) <= need:  # what the evidence tends to
        return None, None
    mean, error = _mean_and_error(samples)
    nu, spread = n - 1, 1 + PRIOR * n

    def missing(log_t: float) -> float:
        square = math.exp(2 * log_t)
        gain = math.log1p(square / nu) - math.log1p(square / (nu * spread))
        return n / 2 * gain - 0.5 * math.log(spread) - need

    t = math.exp(float(optimize.brentq(missing, -20, 50)))
    return mean - t * error, mean + t * error


# Two samples: two sessions


def compare_means(
    base: Sequence[float],
    new: Sequence[float],
    rule: Rule,
    *,
    between: float = 0.0,
) -> Decision:
    """The verdict on two independent sets of logarithms, by Welch's t-test.

    Args:
        between: standard deviation that each set's mean has beyond what its values show, as when
            all of a set come from one process.
    """
    n, m = len(base), len(new)
    if min(n, m) < 2:
        both = n and m
        return Decision(
            Verdict.UNKNOWN,
            min(n, m),
            float(np.mean(new) - np.mean(base)) if both else None,
        )
    mean = float(np.mean(new) - np.mean(base))
    parts = [float(np.var(base, ddof=1)) / n, float(np.var(new, ddof=1)) / m]
    error = max(math.sqrt(sum(parts) + 2 * between**2), _LEAST_SCATTER)
    # The known part of the variance has no degrees of freedom to lose.
    lost = parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)
    nu = min(error**4 / lost, 1e6) if lost else 1e6
    told = Verdict.UNKNOWN
    for sign, verdict in ((1, Verdict.SLOWER), (-1, Verdict.FASTER)):
        if _tail((sign * mean - rule.floor) / error, nu) < rule.alpha:
            told = verdict
    within = max(_tail((rule.margin - sign * mean) / error, nu) for sign in (1, -1))
    if told is Verdict.UNKNOWN and within < rule.alpha:
        told = Verdict.SAME
    half = _quantile(0.975, nu) * error
    detectable = (_quantile(1 - rule.alpha, nu) + _quantile(POWER, nu)) * error
    known = 2 * between**2
    distance = max(abs(mean) - rule.floor, rule.margin - abs(mean))
    return Decision(
        told,
        min(n, m),
        mean,
        mean - half,
        mean + half,
        p_value=_p_value(told, mean, error, nu, rule),
        smallest=rule.floor + detectable,
        needed=_more(sum(parts) * min(n, m), known, distance, rule.alpha)
        if told is Verdict.UNKNOWN
        else None,
    )


def _more(scatter: float, known: float, distance: float, alpha: float) -> int | None:
    """Samples a side with which a difference ``distance`` off would be told; None if no number."""
    z = float(special.ndtri(1 - alpha) + special.ndtri(POWER))
    room = (distance / z) ** 2 - known
    return None if room <= 0 else max(FEWEST, math.ceil(scatter / room))


def _mean_and_error(samples: Sequence[float]) -> tuple[float, float]:
    mean = float(np.mean(samples))
    if len(samples) < 2:
        return mean, math.inf
    return mean, max(float(np.std(samples, ddof=1)), _LEAST_SCATTER) / len(samples) ** 0.5


def _tail(t: float, nu: float) -> float:
    """Probability that Student's t with ``nu`` degrees of freedom exceeds ``t``.

    As ``scipy.stats.t.sf``, without the checks that take fifty times as long: a table of thousands
    of verdicts is decided here.
    """
    return float(special.stdtr(nu, -t))


def _quantile(p: float, nu: float) -> float:
    """What Student's t stays below with probability ``p``."""
    return float(special.stdtrit(nu, p))


def _p_value(told: Verdict, mean: float, error: float, nu: float, rule: Rule) -> float:
    """Of the null hypothesis that the verdict refutes; of «not slower» where none was."""
    if told is Verdict.FASTER:
        return _tail((-mean - rule.floor) / error, nu)
    if told is Verdict.SAME:
        return max(_tail((rule.margin - s * mean) / error, nu) for s in (1, -1))
    return _tail((mean - rule.floor) / error, nu)


def _detectable(n: int, alpha: float) -> float:
    """How many standard errors above the floor an effect must lie to be found."""
    return _quantile(1 - alpha, n - 1) + _quantile(POWER, n - 1)


def _needed(mean: float, scatter: float, rule: Rule, most: int = 100_000) -> int | None:
    """Samples that would tell, if the mean and the scatter stayed as they are."""
    distance = max(abs(mean) - rule.floor, rule.margin - abs(mean))
    if distance <= 0:
        return None
    low, high = FEWEST, most
    while low < high:
        middle = (low + high) // 2
        if _detectable(middle, rule.alpha / 2) * scatter / middle**0.5 <= distance:
            high = middle
        else:
            low = middle + 1
    return low
