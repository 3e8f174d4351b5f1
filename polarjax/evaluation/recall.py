"""How many of the truly largest heads a router finds."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.training.collect import observe_heads, top_labels
from polarjax.training.losses import recall, router_scores


def router_recall(
    params: Params, batches: Iterable[np.ndarray], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Recall of the adapter's budgets on text, beside that of random scores.

    Recall is the share of the n KV groups with the largest output norms that are
    among the n chosen, averaged over tokens, on dense states.

    Args:
      params: the model with routers and budgets.
      batches: int32[b, t] token ids.
      seed: of the random scores.

    Returns:
      float64[layers - 1] for the routers and for chance, from layer 1 on.
    """
    config = params.config
    if not params.routers:
        raise ValueError("the model has no routers: load it with adapter=")
    total = []
    for i, tokens in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        total.append(
            _recall(
                *(params.routers, params.weights, jnp.asarray(tokens, jnp.int32), key),
                config=config.architecture,
                budgets=config.budgets,
            )
        )
    found, chance = np.asarray(total, np.float64).mean(axis=0)
    return found, chance


@functools.partial(jax.jit, static_argnames=("config", "budgets"))
def _recall(
    routers: Tree,
    weights: Tree,
    tokens: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    budgets: tuple[int, ...],
) -> jax.Array:
    def learn(layer: int, inputs: jax.Array, norms: jax.Array) -> jax.Array:
        n = budgets[layer]
        labels = top_labels(norms, n)
        scores = router_scores(routers[f"layers_{layer}"]["heads"], inputs)
        chance = jax.random.uniform(jax.random.fold_in(key, layer), scores.shape)
        return jnp.stack([recall(s, labels, n) for s in (scores, chance)])

    return jnp.stack(observe_heads(weights, tokens, learn, config=config), axis=1)
