"""Intervals for differences measured on the same items."""

from __future__ import annotations

import numpy as np


def paired_bootstrap(
    difference: np.ndarray, weight: np.ndarray | None = None, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of a mean difference, by resampling items.

    Args:
      difference: float[n], one value per item (system minus baseline).
      weight: float[n], the items' weights; None for equal ones.
      draws: bootstrap samples; the seed is fixed.

    Returns:
      Lower and upper bound.
    """
    difference = np.asarray(difference, np.float64)
    weight = np.ones(len(difference)) if weight is None else np.asarray(weight)
    rng = np.random.default_rng(0)
    picks = rng.integers(len(difference), size=(draws, len(difference)))
    means = (difference * weight)[picks].sum(axis=1) / weight[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
