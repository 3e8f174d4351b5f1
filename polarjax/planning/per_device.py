"""What one device of a mesh has of a model, and sends in a decode step, in bytes.

As `polarjax.mesh.cut` cuts the model and `polarjax.mesh.share` has devices speak to
one another; shapes alone, nothing is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig
from polarjax.mesh.cut import local_config
from polarjax.model import weight_shapes
from polarjax.params import Params, Tree, taught
from polarjax.planning.cost import SAID_BYTES, StepCost, step_cost, tree_bytes
from polarjax.policies.routers import append_rows

_FLOAT32 = 4


def of_device(params: Params, tp: int) -> Params:
    """What one of tp devices reads of a model with routers, in their shapes.

    The rows that ride in its QKV matrix are a part of those of all, the neuron router's
    second matrix is cut by neurons, and the head router's is whole.
    """

    def rows(leaf: jax.ShapeDtypeStruct, number: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *leaf.shape[1:]), leaf.dtype)

    def cut(router: Tree) -> Tree:
        heads = dict(router["heads"])
        whole = len_of(heads["weight"]) + len_of(heads.pop("down", None))
        first = -(-whole // tp)
        heads |= {name: rows(heads[name], first) for name in ("weight", "bias")}
        if "neurons" not in router:
            return {"heads": heads}
        down, up = router["neurons"]["down"], router["neurons"]["up"]
        both = -(-(whole + len_of(down)) // tp)
        neurons = {"down": rows(down, both - first), "up": rows(up, len_of(up) // tp)}
        return {"heads": heads, "neurons": neurons}

    def len_of(leaf: jax.ShapeDtypeStruct | None) -> int:
        return leaf.shape[0] if leaf else 0

    config = local_config(params.config, tp)
    routers = {name: cut(router) for name, router in params.routers.items()}
    shapes = Params(weight_shapes(config, params.dtype), params.policy, config)
    return taught(shapes, routers)


def device_cost(own: Params, kv_heads: int, batch: int, context: int) -> StepCost:
    """Of a step on one device, by the groups that the whole model reads.

    Those that a sequence reads may all be one device's. On average over devices it is
    the part that each has of a group, and no step is done before the slowest. Where
    selection is balanced it is each one's.
    """
    cost = step_cost(own, batch=batch, context=context)
    part = own.config.kv_heads / kv_heads
    group = tuple(part * size for size in cost.group)
    return dataclasses.replace(cost, kv_heads=kv_heads, group=group)


def bound_bytes(params: Params, heads: bool, neurons: bool) -> int:
    """Of the QKV matrices that binding makes, beside the original ones.

    Args:
      params: of the device.
      heads: whether layers from the second on choose heads.
      neurons: whether they choose neurons.
    """
    routed = range(1, params.config.layers) if heads or neurons else ()
    by_heads, by_neurons = (routed if on else () for on in (heads, neurons))
    bound = jax.eval_shape(lambda p: append_rows(p, by_heads, by_neurons)[0], params)
    names = ("qkv", "qkv_bias")
    layers = (bound[f"layers_{i}"]["attention"] for i in routed)
    return sum(tree_bytes([layer[name] for name in names]) for layer in layers)


def step_sent_bytes(
    config: ModelConfig,
    tp: int,
    dp: int,
    batch: int,
    dtype: Any,
    *,
    score_rows: Sequence[int],
    picks_neurons: Sequence[bool],
    balanced: bool = False,
) -> int:
    """Bytes that each device sends in one decode step, in rings.

    Of n devices each sends 2 (n - 1) / n of what is summed over them, and (n - 1) / n
    of what is gathered. Only switches that add up themselves (NVLink SHARP) let it send
    less: what is summed once. With a top_k or top_p the logits come on top.

    Args:
      config: of the model.
      tp: devices that share a model.
      dp: parts of the batch.
      batch: sequences of one part, b.
      dtype: of the weights.
      score_rows: per layer, rows that the policy appended to the QKV matrix.
      picks_neurons: per layer, whether the policy chooses neurons.
      balanced: whether each device chooses among its own.
    """
    b, vocab = batch, config.vocab_size
    total = 2 * config.layers * _summed(_FLOAT32 * b * config.dim, tp)
    if local_config(config, tp).vocab_size != vocab:
        total += _summed(jnp.dtype(dtype).itemsize * b * config.embed_dim, tp)
        # The log-sum-exp of the logits, then the best token.
        total += _gathered(_FLOAT32 * b * tp, tp)
        total += _gathered(SAID_BYTES * b * tp, tp)
    for rows, picks in zip(score_rows, picks_neurons, strict=True):
        total += _gathered(_FLOAT32 * b * tp * -(-rows // tp), tp)
        if picks:  # what the whole batch has of each device's neurons, then of all
            total += _summed(Fraction(_FLOAT32 * config.neurons, tp), dp)
            if not balanced:
                total += _gathered(_FLOAT32 * config.neurons, tp)
    return round(total)


def _summed(size: int | Fraction, devices: int) -> Fraction:
    return 2 * _gathered(size, devices)


def _gathered(size: int | Fraction, devices: int) -> Fraction:
    return Fraction(devices - 1, devices) * size
