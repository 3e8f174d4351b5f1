"""Thresholds of router scores, for budgets that adapt to each token."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from polarjax.model import Decoder, make_decoder
from polarjax.params import Params, Tree
from polarjax.policies.updates import merge_updates
from polarjax.training.collect import observe_heads
from polarjax.training.losses import router_scores


def sorted_scores(params: Params, blocks: np.ndarray) -> np.ndarray:
    """The scores that a text's tokens get: what thresholds are read from.

    Args:
      params: the model with routers.
      blocks: int32[n, t] token ids of calibration text. In memory are one block's
        activations, and 8 bytes for each score.

    Returns:
      float32[layers - 1, n * t * k], of layer 1 and up, ascending.

    Raises:
      ValueError: if there is no text or no router.
    """
    if not len(blocks):
        raise ValueError("there is no text to find thresholds on")
    if not params.routers:
        raise ValueError("thresholds are of routers: the model has none")
    merged = merge_updates(params)
    model = make_decoder(params.config.architecture, params.weights)
    found = [
        np.asarray(
            _scores(
                merged.routers,
                merged.weights,
                jnp.asarray(block[None]),
                model=model,
            )
        )
        for block in blocks
    ]
    scores = np.concatenate(found, axis=1).reshape(len(found[0]), -1)
    scores.sort(axis=1)
    return scores


def score_thresholds(
    scores: np.ndarray, budgets: Sequence[float], kv_heads: int
) -> tuple[float, ...]:
    """Per layer, the score that as many groups pass as the budgets keep, on average.

    A token whose scores are high reads more groups than its layer's budget, another
    fewer; over the text, the density is that of the budgets (or a little more, as no
    token reads less than one group).

    Args:
      scores: from `sorted_scores`.
      budgets: KV groups by layer, whole numbers or not.
      kv_heads: k of the model.

    Returns:
      For `polarjax.policy.Learned.thresholds`; 0 for layers that read every group.

    Raises:
      ValueError: if there is not one budget per layer.
    """
    if len(budgets) != len(scores) + 1:
        raise ValueError(f"{len(budgets)} budgets for {len(scores) + 1} layers")
    found = [0.0]
    for part, n in zip(scores, budgets[1:], strict=True):
        # The least score that is read, of those in order.
        first = min(round((1 - n / kv_heads) * len(part)), len(part) - 1)
        found.append(float(part[first]) if n < kv_heads else 0.0)
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("model",))
def _scores(
    routers: Tree, weights: Tree, tokens: jax.Array, *, model: Decoder
) -> jax.Array:
    """float32[layers - 1, tokens, k]."""

    def measure(heads: list[Tree], weights: Tree, tokens: jax.Array) -> jax.Array:
        def learn(layer: int, inputs: jax.Array, _: jax.Array) -> jax.Array:
            return router_scores(heads[layer - 1], inputs)

        return jnp.stack(observe_heads(model, weights, tokens, learn))

    heads = [routers[f"layers_{i}"]["heads"] for i in range(1, model.config.layers)]
    specs = P(), model.share.weight_specs(weights), P()
    return model.share.over(measure, specs, P())(heads, weights, tokens)
