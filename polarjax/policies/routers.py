"""Router weights: their shapes, and how they ride in the QKV matmul.

The head router is a linear layer from the layer's normalised input u to one score per
KV group (paper section 4.2), and, where an adapter has it, a quadratic form of low rank
beside it: weight u + bias + up (down u)^2. What it predicts, the norm of an output, is
no linear function of u: values, and the logits of queries with keys, enter by their
products. The neuron router (ReLU models) is two matrices of low rank without
nonlinearity. All read what the QKV projection reads, so their first matrices are
appended to it as further rows and cost no launch of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polarjax.config import ModelConfig
from polarjax.mesh.cut import TP, mesh_of
from polarjax.params import Params, Tree
from polarjax.policies.updates import check_updates

# Of a head router's quadratic form: more than the model's width tell nothing more, but
# tiny models have a few.
_LARGEST_RANK = 1024


def router_shapes(
    config: ModelConfig, head_rank: Any = None, neuron_rank: Any = None
) -> Tree:
    """Shapes of one layer's routers, as a tree of tuples.

    Args:
      config: of the model.
      head_rank: of the head router's quadratic form; None for a linear one.
      neuron_rank: of the neuron router; None for none.
    """
    k, m, f = config.kv_heads, config.dim, config.neurons

    def low_rank(rank: Any, outputs: int) -> Tree:
        return {} if rank is None else {"down": (rank, m), "up": (outputs, rank)}

    shapes: Tree = {"heads": {"weight": (k, m), "bias": (k,), **low_rank(head_rank, k)}}
    if neuron_rank is not None:
        shapes["neurons"] = low_rank(neuron_rank, f)
    return shapes


def check_routers(routers: Tree, weights: Tree, config: ModelConfig) -> None:
    """Raise unless the routers fit the model.

    Args:
      routers: nested dict of arrays by layer, such as `layers_3/heads/weight`.
      weights: of the model.
      config: of the model.

    Raises:
      ValueError: naming the router, and the shape or dtype that would be right.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(routers):
        if leaf.dtype not in (jnp.float32, jnp.bfloat16):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"router {name} is {leaf.dtype}, but must be float32 or bfloat16"
            )
    for layer, parts in routers.items():
        if layer not in {f"layers_{i}" for i in range(config.layers)}:
            raise ValueError(
                f"router {layer}: the model has layers_0 to layers_{config.layers - 1}"
            )
        if not isinstance(parts, dict) or not isinstance(
            parts.get("updates", {}), dict
        ):
            raise ValueError(
                f"router {layer} or its updates are one array, not several"
            )
        parts = dict(parts)
        if "updates" in parts:
            check_updates(layer, parts.pop("updates"), weights[layer])
        have = jax.tree.map(lambda leaf: tuple(leaf.shape), parts)
        ranks: dict[str, Any] = {"heads": None, "neurons": None}
        match have:
            case {"heads": {"down": (rank, _)}}:
                ranks["heads"] = rank
            case {"heads": {"down": _} | {"up": _}}:
                ranks["heads"] = "rank"
        match have:
            case {"neurons": {"down": (rank, _)}}:
                ranks["neurons"] = rank
            case {"neurons": _}:
                ranks["neurons"] = "rank"
        want = router_shapes(config, ranks["heads"], ranks["neurons"])
        if layer == "layers_0":  # it is dense
            want = {}
        if have != want:
            raise ValueError(
                f"router {layer} has shapes {have}, the model needs {want}"
            )
        for kind, other in (("heads", _LARGEST_RANK), ("neurons", config.neurons)):
            rank, most = ranks[kind], max(config.dim, other)
            if rank is not None and not 1 <= rank <= most:
                raise ValueError(
                    f"router {layer}/{kind} has rank {rank}: it must be between 1 and "
                    f"{most}"
                )


def append_rows(
    params: Params, layers: Collection[int] = (), neurons: Collection[int] = ()
) -> tuple[Tree, tuple[int, ...]]:
    """Append router rows to the QKV matrices of some layers.

    Args:
      params: the model with its routers; left as it is.
      layers: whose head router's first matrices are appended.
      neurons: whose neuron router's first matrix is appended, behind them.

    Returns:
      The new weights, and the number of rows appended in each layer.

    Raises:
      ValueError: if a layer has no router.
    """
    weights = dict(params.weights)
    rows = [0] * params.config.layers
    mesh = mesh_of(weights)
    for layer in sorted({*layers, *neurons}):
        name = f"layers_{layer}"
        if "heads" not in params.routers.get(name, {}):
            raise ValueError(
                f"no router for layer {layer}: load the model with adapter= "
                "(--adapter), or make one with `polarjax calibrate`"
            )
        router = params.routers[name]
        heads = router["heads"] if layer in layers else {}
        added = [heads[part] for part in ("weight", "down") if part in heads]
        if layer in neurons:
            if "neurons" not in router:
                raise ValueError(f"the adapter has no neuron router for layer {layer}")
            added.append(router["neurons"]["down"])
        attention = dict(weights[name]["attention"])
        qkv = attention["qkv"]
        bias = attention.get("qkv_bias", jnp.zeros(qkv.shape[0], qkv.dtype))
        rows[layer] = sum(map(len, added))
        own = [heads["bias"]] if heads else []
        without = jnp.zeros(rows[layer] - sum(map(len, own)))
        attention["qkv"] = _append(qkv, added, mesh)
        attention["qkv_bias"] = _append(bias, [*own, without], mesh)
        weights[name] = {**weights[name], "attention": attention}
    return weights, tuple(rows)


def head_scores(rows: jax.Array, up: jax.Array | None, kv_heads: int) -> jax.Array:
    """Scores of the KV groups, from what a router's rows yield.

    Args:
      rows: float32[n, r], weight u + bias, down u, and perhaps more.
      up: [k, rank], if the router has a quadratic form.
      kv_heads: k.

    Returns:
      float32[n, k].
    """
    scores = rows[:, :kv_heads]
    if up is None:
        return scores
    hidden = rows[:, kv_heads : kv_heads + up.shape[1]]
    # So few products that they are one fusion with the rest, in exact float32, whose
    # sums do not depend on n as those of a matrix product may.
    square = jnp.square(hidden)[:, None, :] * up.astype(jnp.float32)
    return scores + square.sum(axis=-1)


def _append(
    first: jax.Array, others: Sequence[jax.Array], mesh: Mesh | None
) -> jax.Array:
    """Rows behind the others; on a mesh a part of them behind each device's own.

    Args:
      first: on a mesh cut along "tp" by rows.
      others: whole on every device. Rows of zeros make their number a multiple of tp.
      mesh: of all of them.
    """
    if mesh is None:
        return _concatenate(first, *others)
    tp = mesh.shape[TP]

    def append(first: jax.Array, *others: jax.Array) -> jax.Array:
        rows = jnp.concatenate([o.astype(first.dtype) for o in others])
        rows = jnp.pad(rows, [(0, -len(rows) % tp), *[(0, 0)] * (rows.ndim - 1)])
        parts = [x.reshape(tp, -1, *x.shape[1:]) for x in (first, rows)]
        return jnp.concatenate(parts, axis=1).reshape(-1, *first.shape[1:])

    where = NamedSharding(mesh, PartitionSpec(TP))
    return jax.jit(append, out_shardings=where)(first, *others)


@jax.jit
def _concatenate(first: jax.Array, *others: jax.Array) -> jax.Array:
    return jnp.concatenate([first, *(o.astype(first.dtype) for o in others)])
