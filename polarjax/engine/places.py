"""Where the arrays of a batch lie on a mesh: cache, rows, a policy's choices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import put
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.engine.sampling import Sampling
from polarjax.mesh.cut import DP, TP, local_config, over_mesh
from polarjax.policy import SelectionPolicy

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


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("whole",))
def insert(whole: Any, part: Any, rows: jax.Array, *, mesh: Mesh | None = None) -> Any:
    """Put the rows of some arrays into larger ones, in place.

    Args:
      whole: arrays [b, ...]; donated.
      part: as many, [r, ...]; where they have four axes, the third may be of another
        size: what both have is written.
      rows: int32[r], where each goes, as in `prefill`.
      mesh: that rows lie on; None for one device.
    """

    def write(whole: Any, part: Any, rows: jax.Array) -> Any:
        def one(whole: jax.Array, part: jax.Array) -> jax.Array:
            if whole.ndim < 4:
                return put(whole, rows, part, unique=True)
            both = min(whole.shape[2], part.shape[2])
            at = rows, slice(None), slice(both)
            return put(whole, at, part[:, :, :both], unique=True)

        return jax.tree.map(one, whole, part)

    cut = jax.tree.map(lambda x: CACHE.keys if x.ndim == 4 else ROWS, whole)
    return over_mesh(write, mesh, (cut, cut, ROWS), cut)(whole, part, rows)


def insert_all(
    cache: KVCache,
    logits: jax.Array,
    part: KVCache,
    last: jax.Array,
    rows: np.ndarray,
    mesh: Mesh | None,
    call: Callable[..., Any],
) -> tuple[KVCache, jax.Array]:
    """Put what a call of prefill read into the cache and the logits of the batch.

    Args:
      cache: of the batch; donated.
      logits: float32[b, v]; donated.
      part: the call's cache, of r rows.
      last: float32[r, v].
      rows: int32[r], where each goes, as in `prefill`.
      mesh: that all of them lie on; None for one device.
      call: runs each compiled program, as call(function, *args, **kwargs).
    """
    layers = zip(cache.keys, cache.values, part.keys, part.values, strict=True)
    # A layer at a time: the program, one for each size of both, is small so.
    found = [call(insert, (k, v), (a, b), rows, mesh=mesh) for k, v, a, b in layers]
    keys, values = zip(*found, strict=True)
    lengths, logits = call(
        insert, (cache.lengths, logits), (part.lengths, last), rows, mesh=mesh
    )
    return KVCache(keys, values, lengths), logits


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
