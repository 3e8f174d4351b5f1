"""Intervals for what was measured on the same items, and McNemar's test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

SEED = 0
"""Of every bootstrap."""
_DRAWS = 2000
_OUTSIDE = 0.05
# With fewer items, or pairs that differ, resampling covers the truth too rarely.
_FEW_ITEMS, _FEW_PAIRS = 8, 10
_AT_ONCE = 1 << 22  # resampled items in memory


class Interval(NamedTuple):
    """A value with the bounds of its interval, of 95 % if nothing else is said."""

    value: float
    low: float
    high: float


def mean_interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    confidence: float = 1 - _OUTSIDE,
) -> Interval:
    """Mean with a bootstrap interval, by resampling items.

    Give it paired differences for a paired interval. The quantiles are those of the
    expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 5.3): the
    plain ones are too narrow for few items. Below eight items it is Student's t.

    Args:
      values: float[n], one per item; with weights, the item's mean.
      weights: float[n], how much each item weighs; None for all the same.
      confidence: that the interval covers the truth, both ends together.

    Raises:
      ValueError: if there is no item, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    outside = 1 - confidence
    values = np.asarray(values, np.float64)
    n = len(values)
    if not n:
        raise ValueError("no items: there is nothing to take the mean of")
    even = weights is None
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    products = values * weights
    mean = float(products.sum() / weights.sum())
    if n == 1:  # nothing is known of how items differ
        return Interval(mean, -np.inf, np.inf)
    if n < _FEW_ITEMS:
        errors = weights * (values - mean) / weights.mean()
        half = stats.t.ppf(1 - outside / 2, n - 1)
        half *= np.sqrt((errors**2).sum() / (n * (n - 1)))
        return Interval(mean, mean - float(half), mean + float(half))
    rng = np.random.default_rng(SEED)
    means = []
    for start in range(0, _DRAWS, draws := max(1, _AT_ONCE // n)):
        picks = rng.integers(n, size=(min(draws, _DRAWS - start), n))
        totals = n if even else weights[picks].sum(axis=1)
        means.append(products[picks].sum(axis=1) / totals)
    quantile = stats.t.ppf(outside / 2, n - 1) * np.sqrt(n / (n - 1))
    tail = stats.norm.cdf(quantile)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def further_bound(values: np.ndarray, confidence: float = 1 - _OUTSIDE) -> float:
    """What one more value of the same kind will hardly exceed.

    The upper end of the two-sided prediction interval for values that are normally
    distributed: Student's t, with the spread of the new one and of the mean.

    Args:
      values: float[n].
      confidence: that the interval covers the further value, both ends together.

    Raises:
      ValueError: if there are less than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} value(s): how much they differ takes two")
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(1 + 1 / n)
    return float(np.mean(values) + half * np.std(values, ddof=1))


def share_interval(right: np.ndarray) -> Interval:
    """Share of items that are right, with the Wilson interval.

    Args:
      right: bool[n].
    """
    right = np.asarray(right, bool)
    result = stats.binomtest(int(right.sum()), len(right))
    bounds = result.proportion_ci(1 - _OUTSIDE, method="wilson")
    return Interval(float(right.mean()), float(bounds.low), float(bounds.high))


def fraction_interval(fractions: np.ndarray) -> Interval:
    """Mean of fractions, one per item, with an interval that lies in [0, 1].

    Where resampling knows too little, as below eight items or where none differs from
    the others, it is Wilson's for as many items that are right or wrong: nothing in
    [0, 1] of the same mean varies more than that.

    Args:
      fractions: float[n], from 0 to 1.

    Raises:
      ValueError: if there is no item.
    """
    fractions = np.asarray(fractions, np.float64)
    n = len(fractions)
    if n >= _FEW_ITEMS and np.ptp(fractions):
        return mean_interval(fractions)
    if not n:
        raise ValueError("no items: there is nothing to take the mean of")
    mean, z = float(fractions.mean()), -stats.norm.ppf(_OUTSIDE / 2)
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = np.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) * z / (1 + z**2 / n)
    # Rounding alone leads out.
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
    return Interval(mean, min(mean, low), max(mean, high))


def within(interval: Interval, low: float, high: float = np.inf) -> Interval:
    """An interval's bounds cut to where the value can be; infinite ones are not known.

    Args:
      interval: with its value inside.
      low: least that the value can be.
      high: most that it can be.
    """
    bounds = (
        float(np.clip(x, low, high)) if np.isfinite(x) else x for x in interval[1:]
    )
    return Interval(interval.value, *bounds)


def difference_interval(right: np.ndarray, baseline: np.ndarray) -> Interval:
    """Difference of two shares on the same items, paired.

    Where few items differ, resampling knows too little of those that might: then the
    bounds are Bonett and Price's (2012, doi 10.3102/1076998611411915), which add one
    pair to each kind.

    Args:
      right: bool[n].
      baseline: bool[n].
    """
    change = np.asarray(right, np.float64) - np.asarray(baseline, bool)
    if np.count_nonzero(change) >= _FEW_PAIRS:
        return mean_interval(change)
    n = len(change) + 2
    gained, lost = ((change > 0).sum() + 1) / n, ((change < 0).sum() + 1) / n
    middle = gained - lost
    half = -stats.norm.ppf(_OUTSIDE / 2) * np.sqrt((gained + lost - middle**2) / n)
    low, high = max(-1.0, float(middle - half)), min(1.0, float(middle + half))
    return Interval(float(change.mean()), low, high)


def mcnemar(right: np.ndarray, baseline: np.ndarray) -> float:
    """P-value of McNemar's exact test that two systems are right equally often.

    Args:
      right: bool[n].
      baseline: bool[n], on the same items.
    """
    right, baseline = np.asarray(right, bool), np.asarray(baseline, bool)
    gained, lost = int((right & ~baseline).sum()), int((baseline & ~right).sum())
    if not gained + lost:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)
