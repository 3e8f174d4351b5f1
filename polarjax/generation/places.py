"""Where the arrays of a batch lie on a mesh: cache, rows, a policy's choices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.generation.sampling import Sampling
from polarjax.policy import SelectionPolicy
from polarjax.sharding import DP, TP, local_config

# How a cache on a mesh is cut: batch, and KV groups.
_GROUPS: Any = P(DP, TP)
ROWS: Any = P(DP)
CACHE: Any = KVCache(_GROUPS, _GROUPS, ROWS)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [b, ...] on the devices, cut along "dp" over a mesh."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, ROWS))


def cache_places(cache: KVCache, mesh: Mesh) -> Any:
    """Where the arrays of a cache lie on a mesh."""
    groups: Any = NamedSharding(mesh, CACHE.keys)
    rows: Any = NamedSharding(mesh, ROWS)
    each = (groups,) * len(cache.keys)
    return KVCache(each, each, rows)


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, mesh: Mesh | None
) -> KVCache:
    """`KVCache.empty`, where the model is: over a mesh, or on one device for None."""
    if mesh is None:
        return KVCache.empty(config, batch, capacity, dtype)
    tp = mesh.shape[TP]
    groups = tp * local_config(config, tp).kv_heads
    config = dataclasses.replace(config, heads=groups, kv_heads=groups)
    where = NamedSharding(mesh, CACHE.keys)
    cache = KVCache.empty(config, batch, capacity, dtype, where)
    lengths = jnp.zeros(batch, jnp.int32, device=NamedSharding(mesh, ROWS))
    return dataclasses.replace(cache, lengths=lengths)


def policy_specs(policy: SelectionPolicy) -> Any:
    """How a bound policy on a mesh is cut: by requests, and routers by neurons."""
    cut = {"counts": P(DP), "ranking": P(None, DP), "neuron_routers": P(TP)}

    def spec(path: tuple, _) -> P:
        names = {getattr(key, "name", None) for key in path}
        return next((cut[name] for name in cut if name in names), P())

    return jax.tree_util.tree_map_with_path(spec, policy)


def widen(tree: Any, batch: int) -> Any:
    """A bound policy, or sampling settings, for further rows, which the last one sets.

    Args:
      tree: the policy or settings.
      batch: rows that it is for then.
    """
    if isinstance(tree, Sampling):
        specs = jax.tree.map(lambda _: ROWS, tree)
    else:
        specs = policy_specs(tree)

    def pad(leaf: jax.Array, spec: P) -> jax.Array:
        if DP not in spec:
            return leaf
        axis = spec.index(DP)
        wide = [(0, 0)] * leaf.ndim
        wide[axis] = (0, batch - leaf.shape[axis])
        return jnp.pad(leaf, wide, mode="edge")

    return jax.tree.map(pad, tree, specs)
