"""Deciding from few noisy samples: errors hold under peeking, and verdicts mirror each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchbench.reports.statistics import (
    FEWEST,
    Rule,
    Verdict,
    compare_means,
    confidence_sequence,
    decide,
    log_e,
)

RULE = Rule()
SAMPLES = st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=30)


def paths(count: int, length: int, mean: float, scatter: float, seed: int = 0) -> np.ndarray:
    """Sequences of samples with heavy tails (Student's t with 3 degrees of freedom)."""
    noise = np.random.default_rng(seed).standard_t(3, (count, length)) / math.sqrt(3)
    return mean + scatter * noise


def first_verdict(samples: np.ndarray, rule: Rule = RULE) -> Verdict:
    """Return the decision after a look at each sample, as in a duet."""
    for n in range(1, len(samples) + 1):
        told = decide(samples[:n].tolist(), rule, last=n == len(samples))
        if told.is_sure:
            break
    return told.verdict


def test_evidence_is_the_ratio_of_the_two_likelihoods_of_t() -> None:
    # Of t under effects δ ~ N(0, 4) in standard deviations, and under none: scipy's noncentral t,
    # integrated over δ.
    from scipy import integrate, stats

    samples = [0.01, 0.03, 0.02, 0.05, 0.015]
    n = len(samples)
    t = np.mean(samples) / (np.std(samples, ddof=1) / math.sqrt(n))
    mixed, _ = integrate.quad(
        lambda d: stats.norm.pdf(d, scale=2) * stats.nct.pdf(t, n - 1, d * math.sqrt(n)), -12, 12
    )
    assert log_e(samples, 0.0) == pytest.approx(math.log(mixed / stats.t.pdf(t, n - 1)), rel=1e-4)


def test_probabilities_are_those_of_scipys_t_tests() -> None:
    from scipy import stats

    base, new = paths(2, 9, 0.0, 0.02)[0], paths(2, 7, 0.06, 0.03, seed=5)[1]
    told = decide(new.tolist(), RULE, last=True)
    assert told.verdict in (Verdict.SLOWER, Verdict.UNKNOWN)
    asked = stats.ttest_1samp(new, RULE.floor, alternative="greater")
    assert told.p_value == pytest.approx(asked.pvalue)
    both = compare_means(base.tolist(), new.tolist(), RULE)
    welch = stats.ttest_ind(new - RULE.floor, base, equal_var=False, alternative="greater")
    assert both.p_value == pytest.approx(welch.pvalue)
    usual = stats.ttest_ind(new, base, equal_var=False).confidence_interval(0.95)
    assert (both.low, both.high) == pytest.approx((usual.low, usual.high))


def test_who_looks_after_every_sample_raises_no_more_false_alarms_than_alpha() -> None:
    rule = Rule(floor=0.01, margin=0.5, alpha=0.05)  # nothing is ever the same: all may alarm
    at_the_border = paths(400, 30, 0.01, 0.02)
    alarms = sum(first_verdict(path, rule) is Verdict.SLOWER for path in at_the_border)
    assert alarms <= 400 * 0.05
    # The test can fail: without the correction for looking, a t-test alarms far more often.
    from scipy import stats

    naive = sum(
        any(
            stats.ttest_1samp(path[:n], 0.01, alternative="greater").pvalue < 0.05
            for n in range(FEWEST, 31)
        )
        for path in at_the_border
    )
    assert naive > 400 * 0.08


def test_equal_versions_pass_and_losses_are_found() -> None:
    assert {first_verdict(p) for p in paths(100, 26, 0.0, 0.01)} == {Verdict.SAME}
    assert {first_verdict(p) for p in paths(100, 26, 0.05, 0.01)} == {Verdict.SLOWER}
    assert {first_verdict(p) for p in paths(100, 26, -0.05, 0.01)} == {Verdict.FASTER}


def test_a_loss_within_the_margin_is_looked_for_until_the_end() -> None:
    found = [first_verdict(p) for p in paths(100, 26, 0.03, 0.01)]
    assert found.count(Verdict.SLOWER) > 80


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans())
def test_to_exchange_the_sides_mirrors_the_verdict(samples: list[float], last: bool) -> None:
    one, other = (decide([s * v for v in samples], RULE, last=last) for s in (1, -1))
    mirror = {Verdict.SLOWER: Verdict.FASTER, Verdict.FASTER: Verdict.SLOWER}
    assert other.verdict is mirror.get(one.verdict, one.verdict)
    assert one.estimate == pytest.approx(-other.estimate)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.floats(-0.2, 0.2), st.floats(0, 0.1), st.integers(0, FEWEST - 1))
def test_nothing_is_told_of_few_samples(mean: float, scatter: float, count: int) -> None:
    samples = [mean + scatter * i for i in range(count)]
    told = decide(samples, RULE, last=True)
    assert told.verdict is Verdict.UNKNOWN
    assert told.smallest is None


def test_equal_samples_are_no_proof_beyond_the_clock() -> None:
    assert decide([0.0] * 8, RULE, last=False).verdict is Verdict.SAME
    assert decide([0.02] * 8, RULE, last=False).verdict is Verdict.SLOWER


def test_bounds_hold_the_mean_however_often_one_looks() -> None:
    missed = 0
    for path in paths(300, 25, 0.02, 0.02):
        bounds = [confidence_sequence(path[:n].tolist()) for n in range(4, 26)]
        missed += any(
            not low <= 0.02 <= high for low, high in bounds if low is not None and high is not None
        )
    assert missed <= 300 * 0.05


def test_needed_is_enough() -> None:
    for path in paths(20, 6, 0.02, 0.03):
        told = decide(path.tolist(), RULE, last=False)
        if told.needed is None or told.needed > 400:
            continue
        scatter, mean = float(np.std(path, ddof=1)), float(np.mean(path))
        ideal = np.linspace(-1, 1, told.needed)
        ideal = mean + scatter * ideal / ideal.std(ddof=1)
        assert decide(ideal.tolist(), RULE, last=True).is_sure


def test_one_process_cannot_tell_what_several_can() -> None:
    base, new = [0.0, 0.001, -0.001, 0.0], [0.10, 0.101, 0.099, 0.1]
    assert compare_means(base, new, RULE).verdict is Verdict.SLOWER
    assert compare_means(base, new, RULE, between=0.05).verdict is Verdict.UNKNOWN
    assert compare_means(base[:1], new[:1], RULE).verdict is Verdict.UNKNOWN


def test_alpha_is_shared_by_the_metrics() -> None:
    assert RULE.shared(4).alpha == RULE.alpha / 4
