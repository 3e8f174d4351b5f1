"""Intervals that cover the truth as often as they say."""

import numpy as np
import pytest
from scipy import stats

from polarjax.evaluation import (
    difference_interval,
    fraction_interval,
    mcnemar,
    mean_interval,
    share_interval,
)
from polarjax.evaluation.statistics import Interval, within

REPEATS = 2000


def accuracies(rng):
    """Two systems on the same 400 items; the second is worse by 0.04."""
    change = rng.choice([-1, 0, 1], p=[0.07, 0.9, 0.03], size=400)
    baseline = np.where(change == 0, rng.random(400) < 0.6, change < 0)
    return difference_interval(baseline + change, baseline), -0.04


def windows(rng):
    """Log-likelihoods of 60 windows of unequal length; a token costs 0.1 more."""
    scored = rng.integers(100, 2000, size=60)
    base = rng.normal(3, 0.5, size=60)
    worse = base + 0.1 + rng.normal(0, 0.05, size=60)
    return mean_interval(worse - base, scored), 0.1


def skewed(rng):
    """Tokens until the first divergence: a few prompts go on for long."""
    return mean_interval(rng.exponential(20, size=150)), 20


def few_pairs(rng):
    """Of 200 items 3 % differ."""
    change = rng.choice([-1, 0, 1], p=[0.02, 0.97, 0.01], size=200)
    baseline = np.where(change == 0, rng.random(200) < 0.6, change < 0)
    return difference_interval(baseline + change, baseline), -0.01


def few_windows(rng):
    """Seven windows."""
    return mean_interval(rng.normal(0.1, 0.05, size=7), rng.integers(90, 110, 7)), 0.1


@pytest.mark.parametrize("make", [accuracies, windows, skewed, few_pairs, few_windows])
def test_intervals_cover_the_truth(make):
    rng = np.random.default_rng(0)
    found = [make(rng) for _ in range(REPEATS)]
    covered = sum(low <= truth <= high for (_, low, high), truth in found)
    # Where few pairs differ, counts are coarse: the interval may cover too much.
    assert 0.93 <= covered / REPEATS <= (0.99 if make is few_pairs else 0.97)
    values = [value for (value, _, _), _ in found]
    error = np.std(values) / np.sqrt(REPEATS)
    assert abs(np.mean(values) - found[0][1]) < 4 * error


def test_pairs_make_it_narrow():
    rng = np.random.default_rng(1)
    base = rng.normal(300, 20, size=40)
    worse = base + rng.normal(10, 3, size=40)
    value, low, high = mean_interval(worse - base)
    assert value == pytest.approx((worse - base).mean())
    t = stats.ttest_rel(worse, base).confidence_interval()
    np.testing.assert_allclose([low, high], [t.low, t.high], rtol=0.05)


def test_weights_are_as_many_items():
    values, weights = np.array([1.0, 4.0, 2.0]), np.array([3, 1, 2])
    repeated = np.repeat(values, weights)
    assert mean_interval(values, weights).value == pytest.approx(repeated.mean())
    assert mean_interval(values, weights) == mean_interval(values, 7 * weights)
    assert mean_interval(values) == mean_interval(values)  # the seed is fixed


def test_few_items_know_little():
    assert mean_interval(np.array([2.0])) == (2.0, -np.inf, np.inf)
    with pytest.raises(ValueError, match="no items"):
        mean_interval(np.array([]))
    right = np.array([True, False] * 10)
    value, low, high = difference_interval(right, right)
    # Of 20 items none differs; some might (Bonett and Price: one more of each kind).
    assert value == 0 and high == -low == pytest.approx(
        1.96 * np.sqrt(2) / 22, rel=1e-3
    )
    worse = np.where(np.arange(100) < 4, False, True)
    value, low, high = difference_interval(worse, np.ones(100, bool))
    # McNemar's p is 0.125 there: the interval must not exclude 0.
    assert value == -0.04 and low < -0.08 and 0 < high < 0.01
    value, low, high = share_interval(np.ones(20, bool))
    assert value == 1 and high == 1 and 0.8 < low < 0.9


def test_large_counts_need_little_memory():
    values = np.random.default_rng(2).normal(size=300_000)
    value, low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(300_000), rel=0.1)
    assert low < value < high


def test_mcnemar_counts_discordant_pairs():
    right = np.array([1] * 10 + [0] * 2 + [1] * 50 + [0] * 30, bool)
    baseline = np.array([0] * 10 + [1] * 2 + [1] * 50 + [0] * 30, bool)
    # Twice the chance of at most 2 heads in 12 tosses.
    assert mcnemar(right, baseline) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(baseline, right) == mcnemar(right, baseline)
    assert mcnemar(right, right) == 1


@pytest.mark.parametrize("items", [2, 3, 5, 7, 8, 64])
@pytest.mark.parametrize("shape", [(9, 1), (30, 0.5), (0.3, 0.1), (2, 2)])
def test_fractions_stay_in_bounds_and_cover_the_truth(items, shape):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        fractions = rng.beta(*shape, size=items)
        value, low, high = fraction_interval(fractions)
        assert 0 <= low <= value <= high <= 1
        assert value == pytest.approx(fractions.mean())
        covered += low <= shape[0] / sum(shape) <= high
    # Resampling has its limits where there are few, and a few say it all.
    assert covered / 400 >= (0.93 if items < 8 else 0.85)


def test_fractions_that_are_all_alike():
    for n, least in ((1, 0.15), (3, 0.4), (64, 0.94)):
        value, low, high = fraction_interval(np.ones(n))
        assert value == high == 1 and least < low < 1
        value, low, high = fraction_interval(np.zeros(n))
        assert value == low == 0 and 0 < high < 1 - least
    assert fraction_interval(np.ones(20)) == pytest.approx(share_interval(np.ones(20)))
    varied = np.linspace(0.5, 1, 9)
    assert fraction_interval(varied) == mean_interval(varied)
    with pytest.raises(ValueError, match="no items"):
        fraction_interval(np.array([]))


def test_bounds_are_cut_to_where_the_value_can_be():
    assert within(Interval(0.1, -0.3, 0.5), 0) == (0.1, 0, 0.5)
    assert within(Interval(0.9, 0.7, 1.1), 0, 1) == (0.9, 0.7, 1)
    # Nothing is known of them.
    assert within(Interval(0.1, -np.inf, np.inf), 0) == (0.1, -np.inf, np.inf)
