"""What routers learn from: each layer's input, and the norms of its head outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import top_heads
from polarjax.config import ModelConfig
from polarjax.model import Decoder, run
from polarjax.model.attention import head_norms
from polarjax.params import Tree

Learn = Callable[[int, jax.Array, jax.Array], Any]
"""(layer, inputs float32[n, m], norms float32[n, k]) -> anything small."""


def observe_heads(
    weights: Tree, tokens: jax.Array, learn: Learn, *, config: ModelConfig
) -> list[Any]:
    """Run the dense model over text and hand each sparse layer's tokens to `learn`.

    A layer's activations are gone when the next layer's come: what is kept is what
    `learn` returns. Call it inside jit.

    Args:
      weights: the original ones.
      tokens: int32[b, t].
      learn: called for layers 1 and up with all n = b * t tokens.
      config: of the model.

    Returns:
      What `learn` returned, by layer from 1.
    """

    def observe(layer: int, u: jax.Array, o: jax.Array) -> Any:
        if layer == 0:
            return None
        inputs = u.astype(jnp.float32).reshape(-1, config.dim)
        norms = head_norms(o, config.kv_heads).reshape(-1, config.kv_heads)
        return learn(layer, inputs, norms)

    model = Decoder(config, weights["embed"]["tokens"].dtype)
    return run(model, weights, "observe", tokens, observe)[1:]


def top_labels(ranking: jax.Array, n: int) -> jax.Array:
    """float32[..., k]: 1 for the n largest of each row, else 0."""
    chosen = top_heads(ranking, n)
    return jax.nn.one_hot(chosen, ranking.shape[-1]).sum(axis=-2)
