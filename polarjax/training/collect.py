"""What routers learn from: each layer's inputs, and the norms of its head outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import top_heads
from polarjax.model import Decoder, Prefix, whole
from polarjax.model.attention import head_norms
from polarjax.params import Params, Tree
from polarjax.policy import Dense, Policy

Learn = Callable[[int, jax.Array, jax.Array, jax.Array], Any]
"""(layer, attention's inputs float32[n, m], norms float32[n, k], MLP's inputs [n, m])
-> anything small."""


def observe_layers(
    model: Decoder,
    params: Params,
    tokens: jax.Array,
    learn: Learn,
    policy: Policy,
    prefix: Prefix | None,
) -> list[Any]:
    """Run the model over text and hand each sparse layer's tokens to `learn`.

    A layer's activations are gone when the next layer's come: what is kept is what
    `learn` returns. Call it inside jit, and on a mesh inside `Share.over`. Inputs and
    norms are then the whole model's on every device that shares it.

    Args:
      model: without score rows.
      params: the model's, its weights as one device has them, all else whole.
      tokens: int32[b, t].
      learn: called for layers 1 and up with all n = b * t tokens.
      policy: reads the positions after the prefix; not yet bound.
      prefix: positions that are read dense; None for all of them, with the original
        weights and no policy.

    Returns:
      What `learn` returned, by layer from 1.
    """
    config, share = model.config, model.share

    def observe(layer: int, u: jax.Array, o: jax.Array, z: jax.Array) -> Any:
        if layer == 0:
            return None
        inputs = u.astype(jnp.float32).reshape(-1, config.dim)
        norms = share.add_up_groups(head_norms(o, share.own.kv_heads))
        norms = norms.reshape(-1, config.kv_heads)
        return learn(layer, inputs, norms, z.reshape(-1, config.dim))

    if prefix is None:
        return whole(model, params.weights, tokens, observe=observe).observed[1:]
    weights, bound = policy.bind(params)
    sparse = model.learning(bound.wants.scores)
    made = whole(sparse, weights, tokens, policy=bound, prefix=prefix, observe=observe)
    return made.observed[1:]


def observe_heads(
    model: Decoder,
    weights: Tree,
    tokens: jax.Array,
    learn: Callable[[int, jax.Array, jax.Array], Any],
) -> list[Any]:
    """As `observe_layers` of the dense model, for what concerns heads.

    Args:
      model: without score rows.
      weights: the original ones, as one device has them.
      tokens: int32[b, t].
      learn: without the MLP's inputs.
    """
    params = Params(weights, Dense(), model.config)

    def heads(layer: int, inputs: jax.Array, norms: jax.Array, _: jax.Array) -> Any:
        return learn(layer, inputs, norms)

    return observe_layers(model, params, tokens, heads, Dense(), None)


def top_labels(ranking: jax.Array, n: int) -> jax.Array:
    """float32[..., k]: 1 for the n largest of each row, else 0."""
    chosen = top_heads(ranking, n)
    return jax.nn.one_hot(chosen, ranking.shape[-1]).sum(axis=-2)
