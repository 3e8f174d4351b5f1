"""The feed-forward half of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import (
    Implementation,
    activate,
    gathered_mlp,
    masked_mlp,
    partial_mlp,
)
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share
from polarjax.model.linear import linear
from polarjax.model.module import Module
from polarjax.policy import Rows


class MLP(Module):
    """Plain (OPT) or gated (LLaMA), neuron-major: row i of each matrix is neuron i."""

    config: ModelConfig
    dtype: jnp.dtype
    share: Share
    implementation: Implementation | None = None

    def setup(self) -> None:
        c = self.config
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        names = ("up", "down", *(("gate",) if c.gated_mlp else ()))
        for name in names:
            weight = self.param(name, normal, (c.neurons, c.dim), self.dtype)
            setattr(self, name, weight)
        if c.mlp_bias:
            self.up_bias = self.param("up_bias", zeros, (c.neurons,), self.dtype)
            if c.gated_mlp:
                bias = self.param("gate_bias", zeros, (c.neurons,), self.dtype)
                self.gate_bias = bias
            self.down_bias = self.param("down_bias", zeros, (c.dim,), self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the MLP to [..., m], dense."""
        y = gathered_mlp(
            x.reshape(-1, self.config.dim),
            self._weights(),
            activation=self.config.activation,
            implementation=self.implementation,
        )
        return self.share.add_up(y).reshape(x.shape)

    def whole(
        self, x: jax.Array, rows: Rows | None, thin: Callable[[str, jax.Array], Any]
    ) -> jax.Array:
        """Apply the MLP to whole sequences, what is not read masked.

        Args:
          x: [b, t, m].
          rows: neurons that count for the whole batch at each position, each array with
            an axis of positions first; None for all.
          thin: makes 0 of the inputs that a policy leaves out, by matrix; returns what
            it got where none are.
        """
        entered, weights = thin("up", x), self._weights()
        probe = jnp.zeros((1, self.config.neurons))
        thins = thin("down", probe) is not probe
        if rows is None and not thins:
            return self(entered)

        def feed(x: jax.Array, rows: Rows | None) -> jax.Array:
            def keep(hidden: jax.Array) -> jax.Array:
                hidden = hidden if rows is None else _weighed(hidden, rows)
                return thin("down", hidden) if thins else hidden

            plain = rows is None or (rows.count is None and rows.scale is None)
            return masked_mlp(
                x,
                weights,
                None if rows is None else rows.index,
                activation=self.config.activation,
                padded=not self.share.alone,
                keep=None if plain and not thins else keep,
            )

        axes = None if rows is None else 0
        y = jax.vmap(feed, (1, axes), 1)(entered, rows)
        return self.share.add_up(y)

    def open_gate(self, x: jax.Array) -> jax.Array:
        """What the activation makes of the gate, float32[..., f], of [..., m].

        Of a plain MLP, what it makes of the first matrix.
        """
        weights, name = self._weights(), "gate" if self.config.gated_mlp else "up"
        y = linear(x, weights[name], weights.get(f"{name}_bias"), jnp.float32)
        return activate(y, self.config.activation)

    def step(self, x: jax.Array, rows: Rows | None) -> jax.Array:
        """Of one token of each sequence, as parts of a sum.

        Args:
          x: [b, m].
          rows: the neurons to read for the whole batch; None for all.

        Returns:
          float32[p, b, m], for `Norm.add`.

        Raises:
          NotImplementedError: if neurons are counted or scaled on the device, for
            which there is no kernel yet.
        """
        if rows is not None and not (rows.count is None and rows.scale is None):
            raise NotImplementedError(
                "neurons with a count or a scale of their own cannot be selected while "
                "decoding: no kernel takes them yet; measure the policy in mode mask"
            )
        parts = partial_mlp(
            x,
            self._weights(),
            None if rows is None else rows.index,
            activation=self.config.activation,
            padded=not self.share.alone and rows is not None,
            implementation=self.implementation,
        )
        return self.share.add_up_parts(parts)

    def _weights(self) -> dict[str, jax.Array]:
        c = self.config
        weights = {"up": self.up, "down": self.down}
        if c.gated_mlp:
            weights["gate"] = self.gate
        if c.mlp_bias:
            weights |= {
                "up_bias": self.up_bias,
                "down_bias": self.share.on_first(self.down_bias),
            }
            if c.gated_mlp:
                weights["gate_bias"] = self.gate_bias
        return weights


def _weighed(hidden: jax.Array, rows: Rows) -> jax.Array:
    """Hidden values [b, f] of the neurons that are read, scaled; 0 for the others."""
    read = jnp.ones(rows.index.shape, bool)
    if rows.count is not None:
        read = jnp.arange(len(rows.index)) < rows.count
    weight = jnp.broadcast_to(read.astype(hidden.dtype), (len(hidden), len(read)))
    if rows.scale is not None:
        weight = weight * rows.scale
    scale = jnp.zeros_like(hidden).at[:, rows.index].set(weight, mode="drop")
    return hidden * scale
