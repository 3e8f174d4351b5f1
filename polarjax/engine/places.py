"""Where the arrays of a batch lie on a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from polarjax.cache import PagedCache
from polarjax.mesh.cut import DP, TP
from polarjax.mesh.share import Share
from polarjax.params import Params

# How a cache on a mesh is cut: batch, and KV groups.
GROUPS: Any = P(DP, TP)
ROWS: Any = P(DP)
# What there is of each layer and request, and of each layer and device.
COLUMNS: Any = P(None, DP)
OWN: Any = P(None, DP, TP)
# Pages that were gathered of all layers, [2 layers, n, k, page, d].
PAGE_GROUPS: Any = P(None, DP, TP)
PAGES: Any = PagedCache.cut(ROWS, GROUPS)


def logits_cut(share: Share) -> Any:
    """How logits of rows lie, [rows, v]: by the vocabulary too, where that is cut."""
    return GROUPS if share.cuts_vocabulary else ROWS


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [b, ...] on the devices, cut along "dp" over a mesh."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, ROWS))


def place_own(tree: Any, where: Any) -> Any:
    """Arrays of the host on the devices, where each process has the same ones.

    Over several processes `jax.device_put` would compare them first, and wait for the
    devices to do so.

    Args:
      tree: of arrays; those that are there already are left as they are.
      where: a device, a sharding, or None for the default device.
    """
    if not isinstance(where, NamedSharding) or where.is_fully_addressable:
        return jax.device_put(tree, where)

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == where:
            return array
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, where, lambda at: array[at])

    return jax.tree.map(place, tree)


@functools.partial(jax.jit, static_argnames=("mesh",))
def everywhere(tree: Any, *, mesh: Mesh) -> Any:
    """Arrays of a mesh, whole on each of its devices."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def on_devices(params: Params) -> Params:
    """The model where it is, or where its arrays are the host's, on the default device.

    There it stays, whatever the default device is once programs run.
    """

    def put(leaf: Any) -> jax.Array:
        leaf = leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        return leaf if leaf.committed else jax.device_put(leaf, leaf.sharding)

    return jax.tree.map(put, params)
