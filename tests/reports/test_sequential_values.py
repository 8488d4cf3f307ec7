"""Decisions from samples have the values that scipy's distributions give, written from the text."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.laws import law

from batchbench.reports.statistics import (
    CONFIDENCE,
    FEWEST,
    POWER,
    PRIOR,
    Decision,
    Rule,
    Verdict,
    compare_means,
    confidence_sequence,
    decide,
    log_e,
)

RULE = Rule(floor=0.02, margin=0.06, alpha=0.01)
LOOSE = Rule(floor=0.02, margin=0.06, alpha=0.2)
NARROW = Rule(floor=0.06, margin=0.02, alpha=0.01)
"""A margin within the floor: a mean between them can be neither slower nor the same."""

WIDE = Rule(floor=0.05, margin=0.06, alpha=0.01)
RULES = {"usual": RULE, "loose": LOOSE, "narrow": NARROW, "wide": WIDE}

EVEN = np.array([-1.5, -0.5, 0.5, 1.5])
SAMPLES = {
    "none": [],
    "one": [0.3],
    "two": [0.1, 0.3],
    "three": [0.1, 0.1, 0.4],
    "four far above": (0.5 + EVEN / 100).tolist(),
    "four far below": (-0.5 + EVEN / 100).tolist(),
    "four at nought": (EVEN / 1000).tolist(),
    "eight above": np.linspace(0.03, 0.15, 8).tolist(),
    "eight within the margin": np.linspace(0.025, 0.035, 8).tolist(),
    "eight between": np.linspace(0.03, 0.05, 8).tolist(),
    "nine below the margin": np.linspace(-0.045, -0.035, 9).tolist(),
    "twelve scattered": np.linspace(-1, 1.2, 12).tolist(),
    "six that scatter widely": np.linspace(-30, 30, 6).tolist(),
    "equal": [0.03] * 6,
}


def mean_and_error(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; no scatter is below a clock's 1e-9."""
    scatter = max(float(np.std(samples, ddof=1)), 1e-9)
    return float(np.mean(samples)), scatter / math.sqrt(len(samples))


def evidence(samples: Sequence[float], null: float) -> float:
    """Ratio of the likelihoods of Student's t, mixed over normal effects of variance 4."""
    mean, error = mean_and_error(samples)
    n, square = len(samples), ((mean - null) / error) ** 2
    base = (1 + square / (n - 1)) / (1 + square / ((n - 1) * (1 + 4 * n)))
    return base ** (n / 2) / math.sqrt(1 + 4 * n) if mean > null else 1.0


def verdict_of(samples: Sequence[float], rule: Rule, last: bool) -> Verdict:
    """Half of alpha is spent while samples come in, and half on a t-test when they have ended."""

    def shown(sign: int, bound: float) -> bool:
        signed = [sign * sample for sample in samples]
        mean, error = mean_and_error(signed)
        tail = stats.t.sf((mean - bound) / error, len(signed) - 1)
        limit = rule.alpha / 2
        return bool(evidence(signed, bound) >= 1 / limit or (last and tail < limit))

    if len(samples) < 4:
        return Verdict.UNKNOWN
    if shown(1, rule.floor):
        return Verdict.SLOWER
    if shown(-1, rule.floor):
        return Verdict.FASTER
    may_be_same = last or abs(np.mean(samples)) <= rule.floor
    within = shown(1, -rule.margin) and shown(-1, -rule.margin)
    return Verdict.SAME if may_be_same and within else Verdict.UNKNOWN


def p_value_of(verdict: Verdict, mean: float, error: float, nu: float, rule: Rule) -> float:
    """Probability of such a mean where the verdict does not hold."""
    above = float(stats.t.sf((rule.margin + mean) / error, nu))
    below = float(stats.t.sf((rule.margin - mean) / error, nu))
    of = {
        Verdict.SAME: max(above, below),
        Verdict.FASTER: float(stats.t.sf((-mean - rule.floor) / error, nu)),
    }
    return of.get(verdict, float(stats.t.sf((mean - rule.floor) / error, nu)))


COUNTS = np.arange(4, 100_001)


@functools.cache
def detectable(alpha: float) -> np.ndarray:
    """Standard errors above the floor at which an effect is found, for each of ``COUNTS``."""
    reach = stats.t.ppf(1 - alpha, COUNTS - 1) + stats.t.ppf(0.8, COUNTS - 1)
    return np.asarray(reach)


def needed_of(mean: float, scatter: float, rule: Rule) -> int | None:
    """Samples that would tell, found by trying every number; no more than 100,000."""
    distance = max(abs(mean) - rule.floor, rule.margin - abs(mean))
    if distance <= 0:
        return None
    enough = COUNTS[detectable(rule.alpha / 2) * scatter / COUNTS**0.5 <= distance]
    return int(enough[0]) if len(enough) else 100_000


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("none", "one")])
def test_a_decision_has_the_values_of_scipys_distributions(
    name: str, rule: Rule, last: bool
) -> None:
    samples = SAMPLES[name]
    told = decide(samples, rule, last=last)
    (mean, error), n = mean_and_error(samples), len(samples)
    assert told.verdict is verdict_of(samples, rule, last)
    assert told.samples == n
    assert told.estimate == pytest.approx(mean)
    assert told.p_value == pytest.approx(p_value_of(told.verdict, mean, error, n - 1, rule))
    assert (told.low, told.high) == confidence_sequence(samples)
    assert (told.smallest is None) == (n < 4)
    if n >= 4:
        reach = float(detectable(rule.alpha / 2)[n - 4]) * error
        assert told.smallest == pytest.approx(rule.floor + reach)
    needed = needed_of(mean, error * math.sqrt(n), rule)
    assert told.needed == (needed if told.verdict is Verdict.UNKNOWN else None)


def test_the_cases_have_every_verdict_early_and_at_the_end() -> None:
    for last in (False, True):
        verdicts = {verdict_of(s, r, last) for s in SAMPLES.values() for r in (RULE, LOOSE)}
        assert verdicts == set(Verdict) - {Verdict.CHANGED}


def test_of_fewer_than_two_samples_no_more_than_the_estimate_is_told() -> None:
    nothing = (None,) * 5
    assert decide([], RULE, last=True) == Decision(Verdict.UNKNOWN, 0, None, *nothing)
    assert decide([0.5], RULE, last=True) == Decision(Verdict.UNKNOWN, 1, 0.5, *nothing)
    assert log_e([0.5], 0.0) == log_e([1.0, 3.0], 2.0) == log_e([1.0, 3.0], 4.0) == 0.0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["four far above", "eight above", "eight between"])
def test_a_verdict_turns_where_evidence_or_probability_passes_half_of_alpha(
    name: str, sign: int
) -> None:
    samples = [sign * sample for sample in SAMPLES[name]]
    verdict = Verdict.SLOWER if sign > 0 else Verdict.FASTER
    mean, error = mean_and_error(SAMPLES[name])
    tail = float(stats.t.sf((mean - 0.02) / error, len(samples) - 1))
    for limit, last in ((1 / evidence(SAMPLES[name], 0.02), False), (tail, True)):
        for factor, told in ((1 + 1e-6, verdict), (1 - 1e-6, Verdict.UNKNOWN)):
            rule = Rule(floor=0.02, margin=0.02, alpha=2 * limit * factor)
            assert decide(samples, rule, last=last).verdict is told


@pytest.mark.parametrize(
    "verdict", [Verdict.SLOWER, Verdict.FASTER, Verdict.SAME], ids=lambda verdict: verdict.value
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_verdict_on_two_sets_turns_where_its_probability_passes_alpha(
    verdict: Verdict, sign: int
) -> None:
    base, new = [0.0, 0.001, 0.003, 0.002], [sign * 0.009 + x for x in (0.0, 0.001, 0.004)]
    for alpha in np.geomspace(1e-6, 0.3, 25):
        told = compare_means(base, new, Rule(0.005, 0.012, float(alpha)))
        if told.verdict is not verdict:
            continue
        p_value = told.p_value
        assert p_value is not None
        just = [Rule(0.005, 0.012, p_value * factor) for factor in (1 + 1e-6, 1 - 1e-6)]
        verdicts = [compare_means(base, new, rule).verdict for rule in just]
        assert verdicts == [verdict, Verdict.UNKNOWN]
        return


def test_at_the_floor_early_samples_may_be_the_same() -> None:
    samples = [0.03125 + step / 1024 for step in (-1, 1) * 8]
    rule = Rule(floor=0.03125, margin=0.0625, alpha=0.1)
    assert np.mean(samples) == rule.floor
    assert decide(samples, rule, last=False).verdict is Verdict.SAME


def test_no_number_of_samples_would_tell_a_mean_on_floor_and_margin() -> None:
    rule = Rule(floor=0.5, margin=0.5, alpha=0.01)
    told = decide([0.25, 0.75, 0.25, 0.75], rule, last=True)
    assert (told.verdict, told.estimate, told.needed) == (Verdict.UNKNOWN, 0.5, None)
    told = compare_means([-0.25, 0.25], [0.25, 0.75], rule)
    assert (told.verdict, told.estimate, told.needed) == (Verdict.UNKNOWN, 0.5, None)


@settings(law, max_examples=40)
@given(st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=9), st.floats(-0.3, 0.3))
def test_evidence_is_that_of_the_formula(samples: list[float], null: float) -> None:
    assert log_e(samples, null) == pytest.approx(math.log(evidence(samples, null)), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("none", "one")])
def test_a_bound_is_where_the_evidence_against_it_is_enough(name: str) -> None:
    samples = SAMPLES[name]
    low, high = confidence_sequence(samples)
    most = (1 + 4 * len(samples)) ** ((len(samples) - 1) / 2)  # that so few can ever show
    if most <= 2 / (1 - CONFIDENCE):
        assert (low, high) == (None, None)
        return
    assert low is not None
    assert high is not None
    mean, error = mean_and_error(samples)
    assert low + high == pytest.approx(2 * mean, abs=error / 1e6)
    if name != "equal":  # whose error the clock's 1e-9 is, which a bound's digits lose
        assert evidence(samples, low) == pytest.approx(2 / (1 - CONFIDENCE), rel=1e-6)


def test_a_bound_needs_four_samples() -> None:
    samples = SAMPLES["eight above"]
    assert confidence_sequence(samples[:3]) == (None, None)
    assert None not in confidence_sequence(samples[:4])
    assert confidence_sequence([]) == confidence_sequence([0.5]) == (None, None)


@pytest.mark.parametrize("between", [0.0, 0.004, 0.05])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("base", "new"),
    [
        ([0.0, 0.01, 0.03, 0.02, 0.01], [0.3, 0.32, 0.31]),
        ([0.3, 0.32, 0.31], [0.0, 0.01, 0.03, 0.02, 0.01]),
        ([0.0, 0.001, 0.002, 0.001], [0.001, 0.002, 0.001]),
        ([0.0, 0.1, 0.2, 0.1], [0.15, 0.2, 0.12]),
        ([0.2, 0.1], [0.15, 0.19]),
        ([0.0, 0.001, 0.002, 0.001], [0.041, 0.042, 0.041]),
        ([0.041, 0.042, 0.041], [0.0, 0.001, 0.002, 0.001]),
        ([0.25, 0.25, 0.25], [0.25, 0.25, 0.25]),
    ],
    ids=["slower", "faster", "same", "scattered", "two", "above", "below", "equal"],
)
def test_two_sets_are_compared_as_welch_does(
    base: list[float], new: list[float], rule: Rule, between: float
) -> None:
    n, m = len(base), len(new)
    told = compare_means(base, new, rule, between=between)
    mean = float(np.mean(new) - np.mean(base))
    parts = [np.var(base, ddof=1) / n, np.var(new, ddof=1) / m]
    error = max(math.sqrt(sum(parts) + between**2 + between**2), 1e-9)
    lost = parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)
    nu = min(float(error**4 / lost), 1e6) if lost else 1e6
    p_values = {
        v: p_value_of(v, mean, error, nu, rule)
        for v in (Verdict.SLOWER, Verdict.FASTER, Verdict.SAME)
    }
    verdict = next((v for v, p in p_values.items() if p < rule.alpha), Verdict.UNKNOWN)
    assert told.verdict is verdict
    assert told.samples == min(n, m)
    assert told.estimate == pytest.approx(mean)
    assert told.p_value == pytest.approx(p_value_of(verdict, mean, error, nu, rule))
    half = float(stats.t.ppf(0.975, nu)) * error
    assert (told.low, told.high) == pytest.approx((mean - half, mean + half))
    reach = float(stats.t.ppf(1 - rule.alpha, nu) + stats.t.ppf(0.8, nu)) * error
    assert told.smallest == pytest.approx(rule.floor + reach)
    if verdict is not Verdict.UNKNOWN:
        assert told.needed is None
        return
    distance = max(abs(mean) - rule.floor, rule.margin - abs(mean))
    z = float(stats.norm.ppf(1 - rule.alpha) + stats.norm.ppf(0.8))
    room = (distance / z) ** 2 - 2 * between**2
    needed = max(4, math.ceil(sum(parts) * min(n, m) / room)) if room > 0 else None
    assert told.needed == needed


def test_sets_of_many_processes_have_no_error_beyond_their_values() -> None:
    base, new = [0.0, 0.1, 0.2, 0.1], [0.15, 0.2, 0.12]
    assert compare_means(base, new, RULE) == compare_means(base, new, RULE, between=0.0)


def test_two_sets_of_which_one_has_fewer_than_two_samples_are_not_compared() -> None:
    assert compare_means([], [1.0, 2.0], RULE) == Decision(Verdict.UNKNOWN, 0, None)
    assert compare_means([1.0, 2.0], [], RULE) == Decision(Verdict.UNKNOWN, 0)
    assert compare_means([1.0], [2.5], RULE) == Decision(Verdict.UNKNOWN, 1, 1.5)
    assert compare_means([1.0, 2.0], [2.5], RULE) == Decision(Verdict.UNKNOWN, 1, 1.0)


def test_the_numbers_that_the_documentation_gives() -> None:
    assert (PRIOR, FEWEST, POWER) == (4.0, 4, 0.8)
    assert Rule() == Rule(floor=0.01, margin=0.05, alpha=0.001)
    assert [verdict.value for verdict in Verdict] == [
        "slower",
        "faster",
        "same",
        "changed",
        "cannot tell",
    ]


def test_several_metrics_share_alpha_and_nothing_else() -> None:
    assert RULE.shared(5) == replace(RULE, alpha=RULE.alpha / 5)
    assert RULE.shared(1) == RULE.shared(0) == RULE


def test_whatever_is_told_is_sure() -> None:
    sure = {verdict for verdict in Verdict if Decision(verdict, 9).is_sure}
    assert sure == set(Verdict) - {Verdict.UNKNOWN}


def test_a_rule_is_written_with_its_bounds_in_percent() -> None:
    rule = Rule(floor=math.log(1.02), margin=math.log(1.1), alpha=0.005)
    data = rule.as_data()
    assert data.keys() == {"floor_percent", "margin_percent", "alpha"}
    assert data["floor_percent"] == pytest.approx(2.0)
    assert data["margin_percent"] == pytest.approx(10.0)
    assert data["alpha"] == 0.005
