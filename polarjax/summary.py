"""A model in a few lines, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from polarjax.config import ModelConfig
from polarjax.policy import Learned


def summary(weights: Any, learned: Learned, config: ModelConfig) -> str:
    """Family, sizes, dtype, bytes, devices and adapter of a model.

    Args:
      weights: of the model. JAX also puts shapes, tracers and other things in their
        place: those without a shape and dtype are left out.
      learned: what its policy learned, likewise.
      config: of the model.
    """
    c, leaves, added = config, _arrays(weights), _arrays(learned.routers)
    number, dtypes = sum(leaf.size for leaf in leaves), {str(x.dtype) for x in leaves}
    adapter = "no adapter"
    if learned.routers:
        adapter = f"adapter for {len(learned.routers)} layers, {_megabytes(added)}"
    if learned.routers and learned.budgets:
        mean = sum(learned.budgets) / len(learned.budgets)
        adapter += f", reads {mean:.2f} of {c.kv_heads} KV groups on average"
    return (
        f"Params({c.family}, {number / 1e6:,.1f}M weights, "
        f"{', '.join(sorted(dtypes)) or 'no arrays'}, {_megabytes(leaves)}, "
        f"{_devices(leaves)},\n"
        f"  {c.layers} layers of {c.dim}, {c.heads} heads in {c.kv_heads} KV groups, "
        f"{c.neurons} neurons, {c.vocab_size} tokens, context {c.context},\n"
        f"  {adapter})"
    )


def _arrays(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if hasattr(x, "size") and hasattr(x, "dtype")]


def _megabytes(leaves: Sequence[Any]) -> str:
    return f"{sum(x.size * x.dtype.itemsize for x in leaves) / 1e6:,.1f} MB"


def _devices(leaves: Sequence[Any]) -> str:
    """The devices of arrays that are there, or what stands for them."""
    devices = set()
    for leaf in leaves:
        there = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if there and not leaf.is_deleted():
            devices |= leaf.devices()
    if len(devices) > 1:
        return f"on {len(devices)} devices"
    kinds = {type(leaf).__name__ for leaf in leaves}
    return f"on {devices.pop()}" if devices else f"as {', '.join(sorted(kinds))}"
