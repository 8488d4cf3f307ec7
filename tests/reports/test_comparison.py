"""Comparison: paired ratios and their intervals."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.laws import law

from batchbench.reports.statistics import paired_ratio

values = st.floats(0.01, 100.0)
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=12)
enough = st.lists(st.tuples(values, values), min_size=3, max_size=12)
some = settings(law, max_examples=100)


def columns(rows: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Numerators and denominators."""
    return [a for a, _ in rows], [b for _, b in rows]


@some
@given(pairs)
def test_the_median_is_the_median_of_the_paired_ratios(rows: list[tuple[float, float]]) -> None:
    found = paired_ratio(*columns(rows))
    assert found is not None
    ratios = sorted(a / b for a, b in rows)
    middle = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    # Between the two in the middle their geometric mean: swapping the sides then inverts it.
    assert found.median == pytest.approx((middle[0] * middle[1]) ** 0.5)


@some
@given(enough)
def test_the_interval_is_students_of_the_mean_log_ratio(rows: list[tuple[float, float]]) -> None:
    found = paired_ratio(*columns(rows))
    assert found is not None
    logs = [np.log(a / b) for a, b in rows]
    if np.std(logs) < 1e-9:
        assert (found.low, found.high) == pytest.approx((found.median, found.median))
        return
    test = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((np.exp(test.low), np.exp(test.high)))


@pytest.mark.parametrize(("count", "given"), [(1, False), (2, False), (3, True), (4, True)])
def test_there_is_no_interval_below_three_pairs(count: int, given: bool) -> None:
    found = paired_ratio([3.0, 3.1, 3.3, 3.2][:count], [1.0] * count)
    assert found is not None
    assert (found.low is not None, found.high is not None) == (given, given)
    assert (found.as_dict()["ci95"] is not None) is given


@some
@given(enough)
def test_swapping_the_sides_inverts_ratio_and_interval(rows: list[tuple[float, float]]) -> None:
    above, below = columns(rows)
    one, other = paired_ratio(above, below), paired_ratio(below, above)
    assert one is not None
    assert other is not None
    assert one.low is not None
    assert one.high is not None
    assert (other.median, other.low, other.high) == pytest.approx(
        (1 / one.median, 1 / one.high, 1 / one.low)
    )


@some
@given(enough, values, values)
def test_units_scale_the_ratio_and_leave_the_intervals_width(
    rows: list[tuple[float, float]], up: float, down: float
) -> None:
    above, below = columns(rows)
    one = paired_ratio(above, below)
    other = paired_ratio([a * up for a in above], [b * down for b in below])
    assert one is not None
    assert other is not None
    assert one.low is not None
    assert one.high is not None
    scale = up / down
    expected = one.median * scale, one.low * scale, one.high * scale
    assert (other.median, other.low, other.high) == pytest.approx(expected)


@some
@given(enough, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(
    rows: list[tuple[float, float]], random: random.Random
) -> None:
    turned = list(rows)
    random.shuffle(turned)
    one, other = paired_ratio(*columns(rows)), paired_ratio(*columns(turned))
    assert one is not None
    assert other is not None
    assert (one.median, one.low, one.high) == pytest.approx((other.median, other.low, other.high))


def test_what_both_sides_share_cancels() -> None:
    """A slow minute slows both trials of a pair; the ratio does not see it."""
    calm = paired_ratio([3.0, 3.1, 2.9, 3.0], [1.0, 1.0, 1.0, 1.0])
    stormy = paired_ratio([3.0, 6.2, 2.9, 9.0], [1.0, 2.0, 1.0, 3.0])
    assert calm == stormy


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_no_ratio_where_one_value_has_no_meaning(nothing: float | None, side: int) -> None:
    sides: list[list[float | None]] = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    sides[side][1] = nothing
    assert paired_ratio(*sides) is None


def test_no_ratio_of_nothing() -> None:
    assert paired_ratio([], []) is None


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired_ratio([1.0, 2.0], [1.0])


def test_equal_pairs_give_an_interval_without_width() -> None:
    found = paired_ratio([2.0] * 4, [1.0] * 4)
    assert found is not None
    assert json.dumps(found.as_dict(), allow_nan=False) == json.dumps(
        {"median": 2.0, "ci95": [2.0, 2.0]}
    )


@pytest.mark.parametrize("count", [3, 4, 8])
def test_about_95_percent_of_intervals_cover_the_truth(count: int) -> None:
    rng = np.random.default_rng(count)
    covered = 0
    for _ in range(400):
        shared = rng.lognormal(0, 0.3, count)  # the machine's mood, the same for both of a pair
        above = 2.5 * shared * rng.lognormal(0, 0.05, count)
        found = paired_ratio(above.tolist(), (shared * rng.lognormal(0, 0.05, count)).tolist())
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
