"""Bytes that one decode step must read: what the budgets of a model are worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.policies.routers import append_rows
from polarjax.policy import Dense, Policy, Reads


def step_weight_bytes(
    weights: Tree, config: ModelConfig, policy: Policy, reads: Reads | None = None
) -> int:
    """Bytes of weights that one decode step must read, the policy's own included.

    The token table counts only where it is the output head too: a lookup reads a row.
    Single numbers, such as a layer's budget, do not count.

    Args:
      weights: bound to the policy.
      config: what the model is.
      policy: bound.
      reads: what the policy plans to read; None for all neurons.
    """
    own = [leaf for leaf in jax.tree.leaves(policy) if leaf.ndim]
    total = tree_bytes(weights) + tree_bytes(own)
    embed = weights["embed"]
    if not config.tied_embeddings:
        total -= tree_bytes(embed["tokens"])
    total -= tree_bytes(embed.get("positions"))
    for layer, density in enumerate(reads.neurons if reads else ()):
        if density < 1:
            total -= round(_neuron_bytes(weights, layer) * (1 - density))
    return total


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, or of what `jax.ShapeDtypeStruct` stand for."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _neuron_bytes(weights: Tree, layer: int) -> int:
    """Of what belongs to the neurons of a layer's MLP."""
    mlp = weights[f"layers_{layer}"]["mlp"]
    return tree_bytes({name: x for name, x in mlp.items() if name != "down_bias"})


def kv_row_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of one KV group's key and value of one token in one layer."""
    return 2 * config.head_dim * jnp.dtype(dtype).itemsize


# What a device says to the others of each request's best token of its own.
SAID_BYTES = 4 * 4


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A byte model of one decode step of a batch, linear in what a layer reads.

    On a device whose memory is the limit, bytes / bandwidth is the step's floor, so
    that the order of budgets by bytes is their order by time on any such device.

    Attributes:
      weights: bytes of the original weights that a step reads.
      routers: per layer, bytes of its head router, most of them rows that ride in its
        QKV matrix, as soon as it reads less than every group.
      group: per layer, bytes of one KV group's cache over the whole batch; of one
        device of several, what it has of a group on average.
      kv_heads: k, groups of a dense layer.
      neurons: per layer, bytes of the MLP that belong to its neurons.
      neuron_routers: per layer, bytes of its neuron router, as soon as it reads less
        than every neuron.
    """

    weights: int
    routers: tuple[int, ...]
    group: tuple[float, ...]
    kv_heads: int
    neurons: tuple[int, ...] = ()
    neuron_routers: tuple[int, ...] = ()

    def bytes_read(self, reads: Reads) -> int:
        """Bytes that one step reads.

        Args:
          reads: what it reads of each layer.

        Raises:
          ValueError: if there is not one number of groups per layer, from 1 to k.
        """
        k, budgets = self.kv_heads, reads.groups
        right = len(budgets) == len(self.group) and all(1 <= n <= k for n in budgets)
        if not right:
            raise ValueError(
                f"budgets {tuple(budgets)}: they must be {len(self.group)} numbers "
                f"from 1 to {k}"
            )
        layers = zip(budgets, self.routers, self.group, strict=True)
        total = self.weights + round(sum(n * g + (n < k) * r for n, r, g in layers))
        if reads.neurons:
            mlps = zip(reads.neurons, self.neuron_routers, self.neurons, strict=True)
            total += round(sum((d < 1) * r - (1 - d) * n for d, r, n in mlps))
        return total


def step_cost(params: Params, *, batch: int, context: int) -> StepCost:
    """The byte model of a model that decodes a batch.

    Weights and cache are of the weights' dtype. A layer without a router (an oracle
    needs none) pays for none.

    Args:
      params: the model, with or without routers; its leaves may be
        `jax.ShapeDtypeStruct`.
      batch: sequences that are decoded together.
      context: tokens in the cache of each.

    Raises:
      ValueError: if a number is not positive.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"batch {batch} and context {context} must be positive")
    config = params.config
    layers = range(config.layers)

    def routers(kind: str) -> tuple[int, ...]:
        """Per layer: rows that ride in the QKV matrix, and the second matrix."""
        parts = [params.routers.get(f"layers_{i}", {}).get(kind, {}) for i in layers]
        routed = [i for i in layers if parts[i]]
        chosen = {"layers": routed} if kind == "heads" else {"neurons": routed}
        # Their shapes alone: nothing is computed.
        bound = jax.eval_shape(lambda p: append_rows(p, **chosen)[0], params)

        def attention(weights: Tree, layer: int) -> int:
            return tree_bytes(weights[f"layers_{layer}"]["attention"])

        rows = [attention(bound, i) - attention(params.weights, i) for i in layers]
        second = [tree_bytes(parts[i].get("up")) for i in layers]
        return tuple(r + s for r, s in zip(rows, second, strict=True))

    token = batch * kv_row_bytes(config, params.dtype)
    seen = [min(context, config.window(i) or context) for i in layers]
    return StepCost(
        weights=step_weight_bytes(params.weights, config, Dense()),
        routers=routers("heads"),
        group=tuple(token * tokens for tokens in seen),
        kv_heads=config.kv_heads,
        neurons=tuple(_neuron_bytes(params.weights, i) for i in layers),
        neuron_routers=routers("neurons"),
    )
