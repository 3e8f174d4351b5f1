"""A model over a mesh of devices: what each of them has, and where it goes.

Tensor parallelism (axis "tp", arXiv 1909.08053) cuts attention by heads, the MLP by
neurons, the vocabulary by rows: a device runs the same model with fewer of each, and
sums what the layers' halves put out. Data parallelism (axis "dp") cuts the batch. Both
are `jax.shard_map` over one step; XLA does the communication.

A device's query heads lie behind one another, as in the model, and it holds the KV
groups that they read: where there are fewer groups than devices, several hold the same
one. Its rows of the QKV matrix are its queries', keys' and values', in this order, so
that cutting the matrix by rows gives each device its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from polarjax.config import ModelConfig
from polarjax.mesh.processes import from_main, is_main, to_host
from polarjax.params import Params, Placement, Tree, taught
from polarjax.storage.quoted import quoted

DP, TP = "dp", "tp"
# First match wins. Heads, neurons and the vocabulary are rows in every matrix.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/(tokens|head)$", PartitionSpec(TP)),
    (r"attention/(qkv|out|qkv_bias)$", PartitionSpec(TP)),
    (r"mlp/(gate|up|down|gate_bias|up_bias)$", PartitionSpec(TP)),
    (r".*", PartitionSpec()),
)
_QKV_UPDATE = r"updates/attention/qkv(_bias)?/(b|delta)$"


def make_mesh(tp: int | None = None, dp: int | None = None) -> Mesh:
    """A mesh with the axes "dp" and "tp".

    Args:
      tp: devices that share a model; None for all that `dp` leaves, or all.
      dp: copies of the model, which share a batch; None for 1.

    Raises:
      ValueError: if there are fewer devices, or not so many that they divide.
    """
    devices = jax.devices()
    for name, count in ((TP, tp), (DP, dp)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
        if count is not None and count > len(devices):
            raise ValueError(f"{name} is {count}, but there {_counted(len(devices))}")
    dp = dp or 1
    if tp is None and len(devices) % dp:
        raise ValueError(f"dp {dp} does not divide the {len(devices)} devices")
    tp = tp or len(devices) // dp
    if dp * tp > len(devices):
        raise ValueError(
            f"dp {dp} x tp {tp} needs {dp * tp} devices, but there "
            + _counted(len(devices))
        )
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((dp, tp), (DP, TP), types, devices=devices[: dp * tp])


def _counted(devices: int) -> str:
    return "is 1 device" if devices == 1 else f"are {devices} devices"


def default_mesh(config: ModelConfig, batch: int | None = None) -> Mesh:
    """All devices: as many as can share the model, the rest for copies of it.

    Args:
      config: of the model.
      batch: of a training, whose copies must have equal parts of it: as many devices
        as that leaves, and of these as many copies. None for requests, which are filled
        up.
    """
    count, both = jax.device_count(), math.gcd(config.heads, config.neurons)
    if batch is None:
        tp = math.gcd(count, both)
        return make_mesh(tp, count // tp)
    fitting = [
        (dp * tp, dp, tp)
        for dp in range(1, count + 1)
        for tp in range(1, count // dp + 1)
        if batch % dp == 0 and both % tp == 0
    ]
    _, dp, tp = max(fitting)
    return make_mesh(tp, dp)


def check_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The mesh with both axes, Auto, if a model can be cut over it.

    Raises:
      TypeError: if it is no mesh.
      ValueError: naming the axis or the size that does not divide.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh, such as polarjax.mesh.cut.make_mesh() "
            f"makes, got {quoted(mesh)}"
        )
    if TP not in mesh.shape or not {DP, TP} >= set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}, but weights are cut "
            'along "tp" and batches along "dp": make one with '
            "polarjax.mesh.cut.make_mesh()"
        )
    tp = mesh.shape[TP]
    check_tp(tp, config)
    devices = mesh.devices if mesh.axis_names[-1] == TP else mesh.devices.T
    types = (AxisType.Auto, AxisType.Auto)
    return Mesh(devices.reshape(-1, tp), (DP, TP), axis_types=types)


def check_tp(tp: int, config: ModelConfig) -> None:
    """Raise unless a model can be cut over so many devices.

    Raises:
      ValueError: naming the size that does not divide.
    """
    for name, size in (("query heads", config.heads), ("neurons", config.neurons)):
        if size % tp:
            raise ValueError(
                f"tp {tp} does not divide the model's {size} {name}: it may be "
                f"{_all_divisors(config)}"
            )


def _all_divisors(config: ModelConfig) -> str:
    both = math.gcd(config.heads, config.neurons)
    found = [str(n) for n in range(1, both + 1) if both % n == 0]
    return " or ".join([", ".join(found[:-1])] * (len(found) > 1) + found[-1:])


@functools.cache
def shard_groups(config: ModelConfig, tp: int) -> tuple[tuple[int, ...], ...]:
    """The KV group of the model that each group of each device is, tp x k of a device.

    Where a device's heads begin or end within a group, its groups are parts of the
    model's, all equally many heads.
    """
    own, g = config.heads // tp, config.heads // config.kv_heads
    part = math.gcd(own, g)
    firsts = range(0, config.heads, part)
    groups = [first // g for first in firsts]
    each = own // part
    return tuple(tuple(groups[i : i + each]) for i in range(0, len(groups), each))


@functools.cache
def local_config(config: ModelConfig, tp: int) -> ModelConfig:
    """The model that one of tp devices runs."""
    return dataclasses.replace(
        config,
        heads=config.heads // tp,
        kv_heads=len(shard_groups(config, tp)[0]),
        neurons=config.neurons // tp,
        vocab_size=config.vocab_size // (tp if _cuts_vocabulary(config, tp) else 1),
        bos_ids=(),  # ids may be beyond its part of the vocabulary
        eos_ids=(),
    )


def _cuts_vocabulary(config: ModelConfig, tp: int) -> bool:
    return config.vocab_size % tp == 0


@functools.cache
def _qkv_rows(config: ModelConfig, tp: int) -> np.ndarray:
    """Where each row of the QKV matrix on a mesh lies in the model's."""
    d, heads, k = config.head_dim, config.heads, config.kv_heads
    own = heads // tp
    rows = []
    for shard, groups in enumerate(shard_groups(config, tp)):
        parts = [np.arange(shard * own, (shard + 1) * own)]
        parts += [heads + np.array(groups), heads + k + np.array(groups)]
        rows.append(np.concatenate(parts))
    heads_rows = np.concatenate(rows)
    return (heads_rows[:, None] * d + np.arange(d)).reshape(-1)


def placement(
    path: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh
) -> Placement:
    """How one weight is cut.

    Args:
      path: of the weight, such as "layers_3/attention/qkv".
      shape: of the weight in the model.
      config: of the model.
      mesh: with an axis "tp", Auto or Explicit.

    Raises:
      ValueError: if the model cannot be cut over the mesh.
    """
    mesh = check_mesh(mesh, config)
    tp, rows = mesh.shape[TP], None
    if re.search(r"attention/qkv(_bias)?$", path):
        rows = _qkv_rows(config, tp)
        if len(_qkv_rows(config, 1)) != shape[0]:
            raise ValueError("its weights are not those of its config.json")
        shape = (len(rows), *shape[1:])
    return Placement(NamedSharding(mesh, _spec(path, shape, tp)), rows)


def mesh_of(weights: Tree) -> Mesh | None:
    """The mesh that a model is cut over; None if it is on none with an axis "tp"."""
    qkv = next(x for name, x in weights.items() if name.startswith("layers_"))
    qkv = qkv["attention"]["qkv"]
    # A tracer inside `over_mesh` is of what one device has.
    known = isinstance(qkv, jax.Array) and not isinstance(qkv, Tracer)
    where = qkv.sharding if known else None
    if not isinstance(where, NamedSharding) or not isinstance(where.mesh, Mesh):
        return None
    return where.mesh if TP in where.mesh.shape else None


def axis_size(mesh: Mesh | None, name: str) -> int:
    """Devices along an axis; 1 without a mesh, or without the axis."""
    return 1 if mesh is None else mesh.shape.get(name, 1)


def of_processes(mesh: Mesh | None) -> bool:
    """Whether several processes run what is on a mesh, and have to do so alike."""
    return mesh is not None and mesh.is_multi_process


def writes(mesh: Mesh | None) -> bool:
    """Whether this process is the one that writes files of what is on a mesh."""
    return not of_processes(mesh) or is_main()


def by_writer(mesh: Mesh | None, do: Callable[[], None]) -> None:
    """Let the process that writes do something; where it fails, all of them do.

    Args:
      mesh: of what is written.
      do: raises OSError or ValueError if it fails.
    """
    failed, told = None, None
    if writes(mesh):
        try:
            do()
        except (OSError, ValueError) as error:
            failed = error
    if of_processes(mesh):
        told = from_main(failed and [isinstance(failed, OSError), str(failed)])
    if failed:
        raise failed
    if told:
        raise (OSError if told[0] else ValueError)(told[1])


def weight_specs(weights: Tree, tp: int) -> Any:
    """How weights are cut over so many devices."""

    def spec(path: tuple, leaf: jax.Array) -> PartitionSpec:
        return _spec(_name(path), leaf.shape, tp)

    return jax.tree_util.tree_map_with_path(spec, weights)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(path: str, shape: tuple[int, ...], tp: int) -> PartitionSpec:
    spec = next(spec for rule, spec in RULES if re.search(rule, path))
    # Of a vocabulary that does not divide each device has all.
    return PartitionSpec() if len(spec) and shape[0] % tp else spec


def router_specs(routers: Tree, tp: int) -> Any:
    """How routers are cut over so many devices: with the neurons and weights.

    Those of heads are whole on every device.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: router_spec(_name(path), leaf.shape, tp), routers
    )


def router_spec(path: str, shape: tuple[int, ...], tp: int) -> PartitionSpec:
    """As `router_specs`, of one array, its path joined by "/"."""
    if path.endswith("neurons/up"):
        return PartitionSpec(TP)
    if path.endswith(("/b", "/delta")):
        weight = path.replace("/updates/", "/").rpartition("/")[0]
        return _spec(weight, shape, tp)
    return PartitionSpec()


def field_specs(record: Any) -> Any:
    """How the arrays of a dataclass are cut over a mesh, as its fields say.

    Args:
      record: a registered dataclass whose fields' metadata may have "cut", the axes of
        a `PartitionSpec` for all arrays of the field; without it they are whole on
        every device. Fields that are such dataclasses speak for themselves.

    Returns:
      A tree like the record's.
    """
    if not dataclasses.is_dataclass(record):
        return jax.tree.map(lambda _: PartitionSpec(), record)
    found = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.metadata.get("static"):
            continue
        if cut := field.metadata.get("cut"):
            found[field.name] = jax.tree.map(lambda _, c=cut: PartitionSpec(*c), value)
        else:
            found[field.name] = field_specs(value)
    made: Any = record
    return dataclasses.replace(made, **found)


def over_mesh(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function of one device's share, over the shares of all.

    Args:
      function: of arrays as one device has them.
      mesh: of the arrays; None for one device, which has all.
      in_specs: how arguments are cut, a pytree as they are, or a prefix of one.
      out_specs: how what it returns is cut.
    """
    if mesh is None:
        return function
    # Explicit axes would ask each array of the step for its sharding.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def shard(params: Params, mesh: Mesh) -> Params:
    """Place a model on a mesh.

    Args:
      params: the model, on any devices, but not yet cut.
      mesh: with an axis "tp", Auto or Explicit, and optionally "dp".

    Returns:
      The same model, its weights cut by `RULES`, its routers as
      `place_routers` places them.

    Raises:
      ValueError: if the mesh has no axis "tp", its size does not divide heads or
        neurons, or the model is on another mesh.
    """
    if (there := mesh_of(params.weights)) is not None:
        if there != check_mesh(mesh, params.config):
            raise ValueError(
                f"the model is cut over {dict(there.shape)}, not {dict(mesh.shape)}: "
                "load it with the mesh that it shall be on"
            )
        return params

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        where = placement(name, leaf.shape, params.config, mesh)
        leaf = leaf if where.rows is None else leaf[where.rows]
        return put(leaf, where.sharding)

    weights = jax.tree_util.tree_map_with_path(place, params.weights)
    routers = place_routers(params.routers, params.config, mesh)
    return taught(dataclasses.replace(params, weights=weights), routers)


def put(leaf: Any, where: Sharding) -> jax.Array:
    """`jax.device_put`, also of what one process has to where several have parts."""
    # On a device of its own it could not go to another's from there.
    here = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    leaves = here and not where.is_fully_addressable
    return jax.device_put(np.asarray(leaf) if leaves else leaf, where)


def place_routers(routers: Tree, config: ModelConfig, mesh: Mesh | None) -> Tree:
    """Routers where the heads, neurons and weights that they are for lie on a mesh.

    Args:
      routers: as they are without one, on any devices.
      config: of the model.
      mesh: that the model is cut over; None for none, and the routers as they are.
    """
    if mesh is None:
        return routers
    mesh = check_mesh(mesh, config)
    ordered = order_updates(routers, config, mesh)

    def place(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, ordered, router_specs(ordered, mesh.shape[TP]))


def order_updates(routers: Tree, config: ModelConfig, mesh: Mesh | None) -> Tree:
    """Routers whose updates of the QKV matrix have its rows' order on a mesh."""
    if mesh is None:
        return routers
    rows = _qkv_rows(config, mesh.shape[TP])

    def order(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf[rows] if re.search(_QKV_UPDATE, _name(path)) else leaf

    return jax.tree_util.tree_map_with_path(order, routers)


def whole(params: Params) -> Params:
    """A model that is cut over a mesh, as it is without one, in the host's memory.

    Args:
      params: the model; one on no mesh is returned as it is.
    """
    mesh = mesh_of(params.weights)
    if mesh is None:
        return params
    first = first_rows(params.config, mesh)

    def take(path: tuple, leaf: jax.Array) -> np.ndarray:
        cut = re.search(r"attention/qkv(_bias)?$", _name(path))
        return to_host(leaf)[first] if cut else to_host(leaf)

    weights = jax.tree_util.tree_map_with_path(take, params.weights)
    routers = whole_routers(params)
    return taught(dataclasses.replace(params, weights=weights), routers)


def whole_routers(params: Params) -> Tree:
    """A model's routers as they are without a mesh; of one on a mesh, as numpy.

    Every process must call it alike.

    Args:
      params: the model.
    """
    mesh = mesh_of(params.weights)
    if mesh is None:
        return params.routers
    first = first_rows(params.config, mesh)

    def take(path: tuple, leaf: jax.Array) -> np.ndarray:
        cut = re.search(_QKV_UPDATE, _name(path))
        return to_host(leaf)[first] if cut else to_host(leaf)

    return jax.tree_util.tree_map_with_path(take, params.routers)


def first_rows(config: ModelConfig, mesh: Mesh) -> np.ndarray:
    """Of each row of the model's QKV matrix, the first place on a mesh.

    Args:
      config: of the model.
      mesh: with an axis "tp".

    Returns:
      int64[rows of the model].
    """
    return np.unique(_qkv_rows(config, mesh.shape[TP]), return_index=True)[1]


def model_shapes(weights: Tree, config: ModelConfig) -> Tree:
    """Weights as `jax.ShapeDtypeStruct`, of their shapes without a mesh."""
    mesh = mesh_of(weights)
    tp = 1 if mesh is None else mesh.shape[TP]
    wide, narrow = len(_qkv_rows(config, tp)), len(_qkv_rows(config, 1))

    def shape(path: tuple, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        found = leaf.shape
        if str(path[-1].key) in ("qkv", "qkv_bias") and found[0] == wide:
            found = (narrow, *found[1:])
        return jax.ShapeDtypeStruct(found, leaf.dtype)

    return jax.tree_util.tree_map_with_path(shape, weights)
