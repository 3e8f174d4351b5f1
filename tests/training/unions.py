"""How good a choice of neurons for a batch is."""

import jax.numpy as jnp

from polarjax.training.neurons import union_curve


def union_recall(scores, active, n):
    """Share of a batch's true union that its n chosen neurons hold, a mean.

    The choice is the paper's: the largest sums of positive scores. `scores` and
    `active` are [batches, b, f].
    """
    totals = jnp.maximum(scores, 0).sum(axis=1)
    return union_curve(totals, active.any(axis=1))[:, n - 1].mean()
