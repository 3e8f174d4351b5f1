"""How many of the truly largest heads a router finds, and how much of their norm."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from polarjax.model import Decoder, make_decoder
from polarjax.params import Params, Tree
from polarjax.policies.updates import merge_updates
from polarjax.settings import draw_key
from polarjax.training.collect import observe_heads, top_labels
from polarjax.training.losses import kept_norm, recall, router_scores


@dataclasses.dataclass(frozen=True)
class Recall:
    """What routers find on a text, by layer from 1.

    Attributes:
      routers: float64[layers - 1], share of the n KV groups with the largest output
        norms that are among the n chosen, mean over tokens.
      chance: the same of random scores.
      kept: float64[layers - 1], share of all groups' norm that the chosen ones have.
      sparse: bool[layers - 1], where the budget is less than all groups.
    """

    routers: np.ndarray
    chance: np.ndarray
    kept: np.ndarray
    sparse: np.ndarray

    @property
    def mean(self) -> float:
        """Of the routers over sparse layers; 1 if there is none."""
        return float(self.routers[self.sparse].mean()) if self.sparse.any() else 1.0

    def card(self) -> dict[str, Any]:
        """As JSON values; means are over sparse layers."""
        parts = {"routers": self.routers, "chance": self.chance, "kept": self.kept}
        means = {
            name: round(float(x[self.sparse].mean()), 4) if self.sparse.any() else 1.0
            for name, x in parts.items()
        }
        layers = [round(float(x), 4) for x in self.routers]
        return {"mean": means, "by_layer": layers}


def router_recall(
    params: Params, batches: Iterable[np.ndarray], seed: int = 0
) -> Recall:
    """Recall of the adapter's budgets on text, beside that of random scores.

    On dense states, of the weights that the sparse policy uses. A budget that is a mean
    over tokens counts as the whole number below it.

    Args:
      params: the model with routers and budgets.
      batches: int32[b, t] token ids.
      seed: of the random scores.

    Raises:
      ValueError: if there are no routers.
    """
    config = params.config
    if not params.routers:
        raise ValueError("the model has no routers: load it with adapter=")
    budgets, params = params.policy.learned.budgets, merge_updates(params)
    model, total = make_decoder(config.architecture, params.weights), []
    for i, tokens in enumerate(batches):
        key = jax.random.fold_in(draw_key(seed), i)
        total.append(
            _recall(
                params.routers,
                params.weights,
                jnp.asarray(tokens, jnp.int32),
                key,
                model=model,
                budgets=tuple(map(int, budgets)),
            )
        )
    found = np.asarray(total, np.float64).mean(axis=0)
    routers, chance, kept = found
    sparse = np.array(budgets[1:]) < config.kv_heads
    return Recall(routers, chance, kept, sparse)


@functools.partial(jax.jit, static_argnames=("model", "budgets"))
def _recall(
    routers: Tree,
    weights: Tree,
    tokens: jax.Array,
    key: jax.Array,
    *,
    model: Decoder,
    budgets: tuple[int, ...],
) -> jax.Array:
    def measure(heads: list[Tree], weights: Tree, tokens: jax.Array, key: jax.Array):
        def learn(layer: int, inputs: jax.Array, norms: jax.Array) -> jax.Array:
            n = budgets[layer]
            labels = top_labels(norms, n)
            scores = router_scores(heads[layer - 1], inputs)
            chance = jax.random.uniform(
                jax.random.fold_in(key, layer), scores.shape, jnp.float32
            )
            found = [recall(s, labels, n) for s in (scores, chance)]
            return jnp.stack([*found, kept_norm(scores, norms, n)])

        found = observe_heads(model, weights, tokens, learn)
        return jnp.stack(found, axis=1)

    heads = [routers[f"layers_{i}"]["heads"] for i in range(1, model.config.layers)]
    # Each copy of the model reads the whole batch, which may be of one row.
    specs = P(), model.share.weight_specs(weights), P(), P()
    return model.share.over(measure, specs, P())(heads, weights, tokens, key)
