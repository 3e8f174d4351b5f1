"""Where weights go on a mesh of devices: rules from paths to partitions.

XLA inserts the communication. The Pallas kernels are not partitioned yet, so that on
more than one device `implementation="xla"` has to be named.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree

# First match wins. Heads, neurons and the vocabulary are rows in every matrix.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/(tokens|head)$", PartitionSpec("tp", None)),
    (r"attention/(qkv|out)$", PartitionSpec("tp", None)),
    (r"attention/qkv_bias$", PartitionSpec("tp")),
    (r"mlp/(gate|up|down)$", PartitionSpec("tp", None)),
    (r"mlp/up_bias$", PartitionSpec("tp")),
    (r".*", PartitionSpec()),
)


def make_mesh(tp: int | None = None) -> Mesh:
    """A mesh with the axis "tp" for tensor parallelism.

    Args:
      tp: number of devices; None for all that are visible.

    Raises:
      ValueError: if there are fewer devices.
    """
    return _make_mesh("tp", tp)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one weight is cut.

    Args:
      path: as in `Params.weights`, joined by "/".
      shape: of the weight. An axis that the mesh does not divide is not cut: each
        device then has all of it.
      mesh: with an axis "tp".

    Raises:
      ValueError: if it has none.
    """
    if "tp" not in mesh.shape:
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}, but weights are cut "
            'along "tp": make one with polarjax.sharding.make_mesh()'
        )
    spec = next(spec for rule, spec in RULES if re.search(rule, path))
    parts = (
        name if name is None or size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, shape, strict=False)
    )
    return PartitionSpec(*parts)


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`partition` on its mesh; arguments as there."""
    return NamedSharding(mesh, partition(path, shape, mesh))


def cache_sharding(weights: Tree, config: ModelConfig) -> NamedSharding | None:
    """Where a layer's keys and values [b, k, s, d] go: groups where they are made.

    Args:
      weights: of a model, on any devices.
      config: of the model.

    Returns:
      None if the weights are on no mesh with an axis "tp".
    """
    where = getattr(weights["layers_0"]["attention"]["qkv"], "sharding", None)
    if not isinstance(where, NamedSharding) or "tp" not in where.mesh.shape:
        return None
    divides = config.kv_heads % where.mesh.shape["tp"] == 0
    return NamedSharding(where.mesh, PartitionSpec(None, "tp" if divides else None))


def shard(params: Params, mesh: Mesh) -> Params:
    """Place a model on a mesh.

    Args:
      params: the model, on any devices.
      mesh: with an axis "tp", Auto or Explicit.

    Returns:
      The same model, its weights cut by `RULES`, its routers on every device.
    """

    def place(path, leaf: jax.Array) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        return jax.device_put(leaf, sharding(name, leaf.shape, mesh))

    weights = jax.tree_util.tree_map_with_path(place, params.weights)
    routers = replicate(params.routers, mesh)
    return dataclasses.replace(params, weights=weights, routers=routers)


def make_data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the axis "dp" for data parallelism.

    Args:
      devices: how many; None for all that are visible.

    Raises:
      ValueError: if there are fewer devices.
    """
    return _make_mesh("dp", devices)


def _make_mesh(axis: str, count: int | None) -> Mesh:
    devices = jax.devices()
    count = len(devices) if count is None else count
    if not 1 <= count <= len(devices):
        raise ValueError(f"{axis} is {count}, but there are {len(devices)} devices")
    return jax.make_mesh((count,), (axis,), (AxisType.Auto,), devices=devices[:count])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays on every device of a mesh, whole."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def first_copy(tree: Any) -> Any:
    """What `replicate` placed, on the first device alone; nothing is copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
