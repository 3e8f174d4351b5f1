"""What a router is trained to minimise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from polarjax.training.collect import top_labels


def weighted_bce(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy where a negative weighs the share of positives.

    The paper's loss (Polar Sparsity, appendix on router training); a positive weighs 1.

    Args:
      scores: float32[n, k], logits.
      labels: float32[n, k], 0 or 1.

    Returns:
      float32[], the mean.
    """
    share = labels.mean()
    weight = labels * (1 - share) + share
    return (weight * optax.sigmoid_binary_cross_entropy(scores, labels)).mean()


def recall(scores: jax.Array, labels: jax.Array, n: int) -> jax.Array:
    """Share of the true top n that the n best scores find, float32[]."""
    return (top_labels(scores, n) * labels).sum(axis=-1).mean() / n


def router_scores(router: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """One linear layer: inputs [n, m] to float32[n, k]."""
    return jnp.einsum("nm,km->nk", inputs, router["weight"]) + router["bias"]
