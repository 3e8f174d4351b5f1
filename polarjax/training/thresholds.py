"""Thresholds of router scores, for budgets that adapt to each token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.sparsity.updates import merge_updates
from polarjax.training.collect import observe_heads
from polarjax.training.losses import router_scores


def score_thresholds(params: Params, blocks: np.ndarray) -> tuple[float, ...]:
    """Per layer, the score that as many groups pass as the budgets keep, on average.

    A token whose scores are high reads more groups than its layer's budget, another
    fewer; over the text, the density is that of the budgets (or a little more, as no
    token reads less than one group).

    Args:
      params: the model with routers and budgets.
      blocks: int32[n, t] token ids of calibration text. In memory are one block's
        activations, and 4 bytes for each score: n * t * k * layers of them.

    Returns:
      For `ModelConfig.thresholds`; 0 for layers that read every group.

    Raises:
      ValueError: if there is no text or no router.
    """
    config = params.config
    if not len(blocks):
        raise ValueError("there is no text to find thresholds on")
    if not params.routers or not config.budgets:
        raise ValueError("thresholds are of routers: the model has none")
    merged = merge_updates(params)
    scores = np.concatenate(
        [
            _scores(
                *(merged.routers, merged.weights, jnp.asarray(block[None])),
                config=config.architecture,
            )
            for block in blocks
        ],
        axis=1,
    )
    found = [0.0]
    for layer, part in enumerate(scores, 1):
        kept = config.budgets[layer] / config.kv_heads
        found.append(float(np.quantile(part, 1 - kept)) if kept < 1 else 0.0)
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("config",))
def _scores(
    routers: Tree, weights: Tree, tokens: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """float32[layers - 1, tokens, k]."""

    def learn(layer: int, inputs: jax.Array, _: jax.Array) -> jax.Array:
        return router_scores(routers[f"layers_{layer}"]["heads"], inputs)

    return jnp.stack(observe_heads(weights, tokens, learn, config=config))
