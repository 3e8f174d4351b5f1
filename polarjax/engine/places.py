"""Where the arrays of a batch lie on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from polarjax.cache import PagedCache, zeros
from polarjax.mesh.cut import DP, TP
from polarjax.model import Decoder
from polarjax.params import Params

# How a cache on a mesh is cut: batch, and KV groups.
GROUPS: Any = P(DP, TP)
ROWS: Any = P(DP)
PAGES: Any = PagedCache.cut(ROWS, GROUPS, paged=True)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [b, ...] on the devices, cut along "dp" over a mesh."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, ROWS))


def empty_cache(model: Decoder, batch: int, capacity: int) -> PagedCache:
    """`PagedCache.empty`, where the model is: over a mesh, or on one device."""
    config, mesh, share = model.config, model.mesh, model.share
    if mesh is None:
        return PagedCache.empty(config, batch, capacity, model.dtype)
    groups = share.tp * share.own.kv_heads
    config = dataclasses.replace(config, heads=groups, kv_heads=groups)
    where = NamedSharding(mesh, GROUPS)
    cache = PagedCache.empty(config, batch, capacity, model.dtype, where)
    lengths = zeros((batch,), jnp.int32, NamedSharding(mesh, ROWS))
    return dataclasses.replace(cache, lengths=lengths)


def on_devices(params: Params) -> Params:
    """The model where it is, or where its arrays are the host's, on the default device.

    There it stays, whatever the default device is once programs run.
    """

    def put(leaf: Any) -> jax.Array:
        leaf = leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        return leaf if leaf.committed else jax.device_put(leaf, leaf.sharding)

    return jax.tree.map(put, params)
