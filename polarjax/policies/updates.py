"""What recovery adds to a model's weights, for its sparse policy alone.

A matrix W of shape [o, i] gets the low-rank update b a, with a [r, i] and b [o, r]
(LoRA, arXiv 2106.09685); vectors, and matrices of a recovery at full rank, get a delta
of their own shape. They live in `Params.routers`, under "layers_3/updates", in the
order of "layers_3" in `Params.weights`; the weights stay what they were.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from polarjax.mesh.cut import mesh_of
from polarjax.params import Params, Tree, taught

Path = tuple[str, ...]


def init_updates(
    key: jax.Array, weights: Tree, layers: int, rank: int | None
) -> dict[str, Tree]:
    """Updates that change nothing yet.

    Args:
      key: of the draw of each a; b is zero.
      weights: of the model.
      layers: of the model.
      rank: of the matrices' updates; None for full ones.

    Returns:
      By layer name, float32 leaves.

    Raises:
      ValueError: if the rank is not positive.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"the rank of the updates must be at least 1, got {rank}")
    found = {}
    for layer in range(layers):
        name = f"layers_{layer}"
        flat: dict[Path, Any] = {}
        leaves: dict[Path, Any] = dict(traverse_util.flatten_dict(weights[name]))
        for path, leaf in leaves.items():
            if rank is None or leaf.ndim < 2:
                flat[*path, "delta"] = jnp.zeros(leaf.shape, jnp.float32)
                continue
            key, own = jax.random.split(key)
            rows, columns = leaf.shape
            scale = columns**-0.5
            flat[*path, "a"] = scale * jax.random.normal(
                own, (rank, columns), jnp.float32
            )
            flat[*path, "b"] = jnp.zeros((rows, rank), jnp.float32)
        found[name] = traverse_util.unflatten_dict(flat)
    return found


def ranks_of(routers: Tree) -> set[int | None]:
    """Ranks that the matrices' updates have; None for full ones.

    Args:
      routers: nested dict of arrays by layer, such as `layers_3/heads/weight`.
    """
    ranks: set[int | None] = set()
    for parts in routers.values():
        leaves: dict[Path, Any] = dict(
            traverse_util.flatten_dict(parts.get("updates", {}))
        )
        for path, leaf in leaves.items():
            if path[-1] == "a":
                ranks.add(leaf.shape[0])
            elif path[-1] == "delta" and leaf.ndim > 1:
                ranks.add(None)
    return ranks


def merge_updates(params: Params) -> Params:
    """The model with its updates in its weights, and out of its routers.

    Args:
      params: the model. It stays as it is, and shares what does not change.
    """
    weights, routers = dict(params.weights), {}
    on_mesh = mesh_of(weights) is not None
    for name, parts in params.routers.items():
        kept = {kind: part for kind, part in parts.items() if kind != "updates"}
        if "updates" in parts:
            merged = _merge(weights[name], parts["updates"])
            if on_mesh:  # XLA may have put them elsewhere
                where = jax.tree.map(lambda leaf: leaf.sharding, weights[name])
                merged = jax.device_put(merged, where)
            weights[name] = merged
        if kept:
            routers[name] = kept
    return taught(dataclasses.replace(params, weights=weights), routers)


@jax.jit
def _merge(weights: Tree, updates: Tree) -> Tree:
    flat: dict[Path, Any] = dict(traverse_util.flatten_dict(weights))
    parts: dict[Path, Any] = dict(traverse_util.flatten_dict(updates))
    for path, leaf in flat.items():
        change = parts.get((*path, "delta"))
        if (*path, "a") in parts:
            a, b = (parts[*path, x].astype(jnp.float32) for x in "ab")
            change = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        if change is not None:
            flat[path] = (leaf.astype(jnp.float32) + change).astype(leaf.dtype)
    return traverse_util.unflatten_dict(flat)


def check_updates(name: str, updates: Tree, weights: Tree) -> None:
    """Raise unless updates fit the weights of their layer.

    Args:
      name: of the layer.
      updates: its updates.
      weights: its weights.

    Raises:
      ValueError: naming the update and the shape that would be right.
    """
    leaves: dict[Path, Any] = dict(traverse_util.flatten_dict(weights))
    want = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    flat: dict[Path, Any] = dict(traverse_util.flatten_dict(updates))
    for (*path, kind), leaf in flat.items():
        place, shape = tuple(path), tuple(leaf.shape)
        where = "/".join((name, "updates", *path, kind))
        if place not in want:
            raise ValueError(f"{where}: the model has no such weight")
        right = want[place]
        kinds = {x: flat[*place, x].shape for x in ("a", "b") if (*place, x) in flat}
        match kind, kinds:
            case "delta", {}:
                fits = shape == right and not kinds
            case "a" | "b", {"a": (rank, columns), "b": (rows, other)}:
                fits = right == (rows, columns) and 0 < rank == other <= max(right)
            case _:
                fits = False
        if not fits:
            raise ValueError(
                f"{where} has shape {list(shape)}: it must be a delta of shape "
                f"{list(right)}, or a [rank, {right[-1]}] beside b [{right[0]}, rank]"
            )
