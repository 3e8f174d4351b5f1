"""What a neuron router of a ReLU model learns, and how its choice is judged.

The router (Polar Sparsity, arXiv 2505.14884, section 4.1) is two matrices without bias
or nonlinearity. It reads the attention's input, one norm earlier than the MLP does, so
that it need not wait for the attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from polarjax.model.linear import linear
from polarjax.params import Tree
from polarjax.training.losses import Mean

# Added to the share of active neurons, so that a negative weighs something even where
# next to none is active (the paper's router training).
_SHARE_OFFSET = 0.005


def active_neurons(mlp_weights: Tree, v: jax.Array) -> jax.Array:
    """Which neurons of a ReLU MLP are not zero.

    Args:
      mlp_weights: "up" [f, m] and "up_bias" [f] where there is one; of a gated MLP
        also "gate" [f, m] and perhaps "gate_bias" [f], which decide alone.
      v: [n, m], the MLP's input.

    Returns:
      bool[n, f].
    """
    if "gate" in mlp_weights:
        rows, bias = mlp_weights["gate"], mlp_weights.get("gate_bias")
    else:
        rows, bias = mlp_weights["up"], mlp_weights.get("up_bias")
    # The model's own dtype, as the MLP itself computes it.
    return linear(v.astype(rows.dtype), rows, bias) > 0


def init_low_rank(
    key: jax.Array, rank: int, dim: int, outputs: int
) -> dict[str, jax.Array]:
    """A router before training: random directions in, every score 0 out.

    Args:
      key: of `jax.random`.
      rank: r, inner width; the paper's is 1024.
      dim: m.
      outputs: f neurons, or k groups.

    Returns:
      float32 "down" [r, m], of unit variance over normalised inputs, and "up" [f, r],
      zeros: all outputs start equal and the first gradients go to `up`.
    """
    down = jax.random.normal(key, (rank, dim), jnp.float32) / jnp.sqrt(dim)
    return {"down": down, "up": jnp.zeros((outputs, rank), jnp.float32)}


def neuron_scores(router: Tree, inputs: jax.Array) -> jax.Array:
    """Two products, as the decode step computes them.

    Args:
      router: "down" [r, m] and "up" [f, r].
      inputs: [n, m], the attention's input.

    Returns:
      float32[n, f]; what lies between the products has the dtype of `up`.
    """
    hidden = linear(inputs, router["down"]).astype(router["up"].dtype)
    return linear(hidden, router["up"])


def neuron_loss(
    router: Tree, inputs: jax.Array, active: jax.Array, mean: Mean = jnp.mean
) -> jax.Array:
    """The paper's loss: a positive weighs 1, a negative about the share of positives.

    Weighted binary cross-entropy with weight y (1 - w) + w, where w is the mean of the
    labels y of this batch plus 0.005 (Polar Sparsity, router training).

    Args:
      router: its matrices, "down" [r, m] and "up" [f, r].
      inputs: [n, m], the attention's input.
      active: bool[n, f], the labels.
      mean: of an array, of the elements where another is true: `jnp.mean`, or of one
        device of several `Share.batch_mean`.

    Returns:
      float32[], the mean over the whole batch's tokens and neurons.
    """
    labels = active.astype(jnp.float32)
    positives = mean(labels) + _SHARE_OFFSET
    weight = labels * (1 - positives) + positives
    scores = neuron_scores(router, inputs)
    loss = weight * optax.sigmoid_binary_cross_entropy(scores, labels)
    return mean(loss)


def union_curve(ranking: jax.Array, union: jax.Array) -> jax.Array:
    """Recall of a union by the best 1, 2, ... f neurons of a ranking.

    Args:
      ranking: float32[groups, f], larger is better; of equal ones the first is.
      union: bool[groups, f].

    Returns:
      float32[groups, f]; 1 where the union is empty.
    """
    _, found = jax.lax.sort((-ranking, union.astype(jnp.int32)), num_keys=1)
    found = jnp.cumsum(found, axis=1)
    size = found[:, -1:]
    return jnp.where(size == 0, 1.0, found / jnp.maximum(size, 1))
