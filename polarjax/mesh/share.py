"""What one device does for a model that several run together.

Inside `polarjax.mesh.cut.over_mesh`: each function is of one device's arrays, and
speaks to the others along the axis "tp". Without a share they change nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from polarjax.config import ModelConfig
from polarjax.mesh.cut import DP, TP, local_config, shard_groups


@dataclasses.dataclass(frozen=True)
class Share:
    """How a model is cut over devices.

    Attributes:
      groups: the KV group of the model that each group of each device is, [tp, k of
        one device].
      kv_heads: KV groups of the model.
      cuts_vocabulary: whether embedding and head are cut too.
      dp: parts of the batch.
      cuts_scores: whether the rows that a policy appends to the QKV matrix are cut
        too, as where it is bound to a model on a mesh. A training binds anew in each
        step what one device has.
    """

    groups: tuple[tuple[int, ...], ...]
    kv_heads: int
    cuts_vocabulary: bool
    dp: int = 1
    cuts_scores: bool = True

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh | None) -> Share | None:
        """Of a model on a mesh; None for one device, which has all."""
        if mesh is None:
            return None
        tp = mesh.shape[TP]
        cut = local_config(config, tp).vocab_size != config.vocab_size
        return cls(shard_groups(config, tp), config.kv_heads, cut, mesh.shape[DP])

    @property
    def tp(self) -> int:
        """Devices that share the model."""
        return len(self.groups)


def place(share: Share | None) -> jax.Array | int:
    """Number of this device along "tp"."""
    return 0 if share is None else lax.axis_index(TP)


def slots(batch: int, share: Share | None) -> jax.Array:
    """Number of each of this device's rows among those of all, int32[b].

    Args:
      batch: rows that this device has, b.
      share: of the device; None for all of the model.
    """
    first = 0 if share is None or share.dp == 1 else lax.axis_index(DP) * batch
    return first + jnp.arange(batch, dtype=jnp.int32)


def add_up(x: jax.Array, share: Share | None) -> jax.Array:
    """The sum of what the devices have."""
    return x if share is None or share.tp == 1 else lax.psum(x, TP)


def add_up_parts(parts: jax.Array, share: Share | None) -> jax.Array:
    """[p, b, m] to as many, or to one, with the same sum over all devices."""
    return parts if share is None else add_up(parts.sum(axis=0, keepdims=True), share)


def add_up_batch(x: jax.Array, share: Share | None) -> jax.Array:
    """The sum over the parts of the batch."""
    return x if share is None or share.dp == 1 else lax.psum(x, DP)


def batch_mean(
    x: jax.Array, share: Share | None, where: jax.Array | None = None
) -> jax.Array:
    """The mean over all parts of the batch, of those elements `where` it is true.

    Its gradient, taken inside, is as many times too large as there are parts, each for
    its own: their mean is that of the whole.
    """
    if share is None or share.dp == 1:
        return x.mean(where=where)
    counted = jnp.broadcast_to(True if where is None else where, x.shape)
    total = jnp.sum(x, where=counted), counted.sum(dtype=jnp.float32)
    total, count = lax.psum(total, DP)
    return total / count


def mean_of_parts(tree: Any, share: Share | None) -> Any:
    """The mean over the parts of the batch of what each has."""
    return tree if share is None or share.dp == 1 else lax.pmean(tree, DP)


def largest(x: jax.Array, share: Share | None) -> jax.Array:
    """The largest of what the parts of the batch have."""
    return x if share is None or share.dp == 1 else lax.pmax(x, DP)


def gather(x: jax.Array, share: Share | None) -> jax.Array:
    """What the devices have, behind one another along the last axis."""
    if share is None or share.tp == 1:  # copies of the model: nobody to ask
        return x
    return lax.all_gather(x, TP, axis=x.ndim - 1, tiled=True)


def gather_logits(own: jax.Array, share: Share | None) -> jax.Array:
    """[..., v] from the part of the vocabulary that each device has."""
    return gather(own, share) if share and share.cuts_vocabulary else own


def once(bias: jax.Array | None, share: Share | None) -> jax.Array | None:
    """A bias of what is summed over devices, on one of them alone."""
    if share is None or bias is None:
        return bias
    return jnp.where(place(share) == 0, bias, jnp.zeros_like(bias))


def own_groups(chosen: jax.Array, share: Share | None) -> jax.Array:
    """What is said of this device's KV groups, such as whether they are chosen.

    Args:
      chosen: [..., k], of the model's.
      share: of the device.
    """
    if share is None:
        return chosen
    table = jnp.asarray(np.array(share.groups, np.int32))
    return jnp.take(chosen, table[place(share)], axis=-1)


def add_up_groups(norms: jax.Array, share: Share | None) -> jax.Array:
    """L2 norms of the model's KV groups, from those of every device's.

    Args:
      norms: float32[..., k of the device].
      share: of the device.
    """
    if share is None:
        return norms
    table = jnp.asarray(np.array(share.groups, np.int32))
    squares = jnp.zeros((*norms.shape[:-1], share.kv_heads), norms.dtype)
    squares = squares.at[..., table[place(share)]].add(jnp.square(norms))
    return jnp.sqrt(add_up(squares, share))
