"""What a head router is trained to minimise, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from polarjax.training.collect import top_labels

HeadLoss = Literal["bce", "ranking"]

Mean = Callable[..., jax.Array]
"""(array, where=None or booleans) -> its mean, of those elements. `jnp.mean`, or of one
device of several, whose tokens are a part of the batch's, `Share.batch_mean`."""


def weighted_bce(
    scores: jax.Array,
    labels: jax.Array,
    counted: jax.Array | None = None,
    mean: Mean = jnp.mean,
) -> jax.Array:
    """Binary cross-entropy where a negative weighs the share of positives.

    The paper's loss (Polar Sparsity, appendix on router training); a positive weighs 1.

    Args:
      scores: float32[n, k], logits.
      labels: float32[n, k], 0 or 1.
      counted: bool[n], the tokens that count; None for all.
      mean: of an array, of the elements where another is true; `Share.batch_mean` of
        one device of several.

    Returns:
      float32[], the mean over the whole batch.
    """
    tokens = None if counted is None else counted[:, None]
    positives = mean(labels, where=tokens)
    weight = labels * (1 - positives) + positives
    loss = weight * optax.sigmoid_binary_cross_entropy(scores, labels)
    return mean(loss, where=tokens)


def ranking_loss(
    scores: jax.Array,
    norms: jax.Array,
    n: int,
    counted: jax.Array | None = None,
    mean: Mean = jnp.mean,
) -> jax.Array:
    """What it costs that a head within the budget stands behind one beyond it.

    The logistic loss of the difference of their scores, over all such pairs of each
    token, by the norm that would be lost if they changed places (LambdaRank, Burges et
    al. 2006): to take one of two heads for the other costs nothing if they are equal.
    The order within either side, and how far the scores lie from a threshold, do not
    matter to a choice of the top n; scores of two tokens cannot be compared.

    Args:
      scores: float32[tokens, k].
      norms: float32[tokens, k].
      n: heads of the budget.
      counted: bool[tokens], those that count; None for all.
      mean: of an array, of the elements where another is true; `Share.batch_mean` of
        one device of several.

    Returns:
      float32[], the mean over tokens, in shares of a token's norms.
    """
    labels = top_labels(norms, n)
    pairs = labels[:, :, None] * (1 - labels[:, None, :])
    lost = norms[:, :, None] - norms[:, None, :]
    loss = jax.nn.softplus(scores[:, None, :] - scores[:, :, None])
    total = jnp.maximum(norms.sum(axis=-1), 1e-20)
    cost = (pairs * lost * loss).sum(axis=(1, 2)) / total
    return mean(cost, where=counted)


def head_loss(
    kind: HeadLoss,
    scores: jax.Array,
    norms: jax.Array,
    n: int,
    counted: jax.Array | None = None,
    mean: Mean = jnp.mean,
) -> jax.Array:
    """The loss of a head router by its name; see `ranking_loss`."""
    if kind == "ranking":
        return ranking_loss(scores, norms, n, counted, mean)
    return weighted_bce(scores, top_labels(norms, n), counted, mean)


def recall(
    scores: jax.Array, labels: jax.Array, n: int, mean: Mean = jnp.mean
) -> jax.Array:
    """Share of the true top n that the n best scores find, float32[]."""
    found = (top_labels(scores, n) * labels).sum(axis=-1)
    return mean(found) / n


def kept_norm(
    scores: jax.Array, norms: jax.Array, n: int, mean: Mean = jnp.mean
) -> jax.Array:
    """Share of all heads' norm that the n best scores keep, float32[]."""
    total = jnp.maximum(norms.sum(axis=-1), 1e-20)
    kept = (top_labels(scores, n) * norms).sum(axis=-1) / total
    return mean(kept)


def router_scores(router: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """What a head router makes of states, as the decode step does.

    Args:
      router: "weight" [k, m] and "bias" [k]; perhaps "down" [r, m] and "up" [k, r].
      inputs: [n, m].

    Returns:
      float32[n, k].
    """
    scores = jnp.einsum("nm,km->nk", inputs, router["weight"]) + router["bias"]
    if "down" in router:
        hidden = jnp.einsum("nm,rm->nr", inputs, router["down"])
        scores += jnp.einsum("nr,kr->nk", jnp.square(hidden), router["up"])
    return scores
