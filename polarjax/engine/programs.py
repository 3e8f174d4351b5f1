"""What all who run a model's programs share: what steps bring, and plain logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polarjax.model import Decoder, Read, whole
from polarjax.model import logits as logits_of
from polarjax.policy import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a decode step brought.

    Attributes:
      token: int32[b].
      logprob: float32[b].
      valid: bool[b], whether the token belongs to the output.
      reads: int32[layers, b], KV groups read.
      visible: int32[b], tokens in the cache of each live request, its newest included.
      own: int32[layers, dp, tp], KV groups that each device of a mesh read of all its
        live requests; None on one device.
    """

    token: jax.Array
    logprob: jax.Array
    valid: jax.Array
    reads: jax.Array
    visible: jax.Array
    own: jax.Array | None = None


def device_of(weights: Tree) -> Any:
    """The first device that the model is on."""
    return next(iter(weights["embed"]["tokens"].devices()))


def own_reads(read: tuple[Read, ...]) -> jax.Array:
    """What each layer's attention read on this device, int32[layers, 1, 1]."""
    return jnp.stack([one.here for one in read])[:, None, None]


@functools.partial(jax.jit, static_argnames=("model",))
def all_logits(weights: Tree, tokens: jax.Array, *, model: Decoder) -> jax.Array:
    """Logits of every position, dense, float32[b, t, v]."""

    def read(weights: Tree, tokens: jax.Array) -> jax.Array:
        return logits_of(model, weights, whole(model, weights, tokens).x)

    specs = model.share.weight_specs(weights), P()
    return model.share.over(read, specs, P())(weights, tokens)
