"""The feed-forward half of a layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import (
    Implementation,
    gathered_mlp,
    gathering,
    masked_mlp,
    partial_mlp,
)
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share, add_up, add_up_parts, once


class MLP(nn.Module):
    """Plain (OPT) or gated (LLaMA), neuron-major: row i of each matrix is neuron i."""

    config: ModelConfig
    dtype: jnp.dtype
    implementation: Implementation | None = None
    share: Share | None = None

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

    def __call__(self, x: jax.Array, neurons: jax.Array | None = None) -> jax.Array:
        """Apply the MLP.

        Args:
          x: [..., m]; with `neurons`, [b, t, m].
          neurons: int32[t, n], the neurons that count for the whole batch at each
            position: the others are computed and masked; None for all.

        Returns:
          Like x.
        """
        c, weights = self.config, self._weights()
        if neurons is not None:

            def feed(x: jax.Array, neurons: jax.Array) -> jax.Array:
                return masked_mlp(
                    *(x, weights, neurons),
                    activation=c.activation,
                    padded=self.share is not None,
                )

            return add_up(jax.vmap(feed, (1, 0), 1)(x, neurons), self.share)
        y = gathered_mlp(
            x.reshape(-1, c.dim),
            weights,
            activation=c.activation,
            implementation=gathering(self.implementation),
        )
        return add_up(y, self.share).reshape(x.shape)

    def decode(self, x: jax.Array, neurons: jax.Array | None) -> jax.Array:
        """Of one token of each sequence, as parts of a sum.

        Args:
          x: [b, m].
          neurons: int32[n], the neurons to read for the whole batch; None for all.

        Returns:
          float32[p, b, m], for `Norm.add`.
        """
        parts = partial_mlp(
            *(x, self._weights(), neurons),
            activation=self.config.activation,
            padded=self.share is not None and neurons is not None,
            implementation=gathering(self.implementation),
        )
        return add_up_parts(parts, self.share)

    def _weights(self) -> dict[str, jax.Array]:
        c = self.config
        weights = {"up": self.up, "down": self.down}
        if c.gated_mlp:
            weights["gate"] = self.gate
        if c.mlp_bias:
            weights |= {
                "up_bias": self.up_bias,
                "down_bias": once(self.down_bias, self.share),
            }
            if c.gated_mlp:
                weights["gate_bias"] = self.gate_bias
        return weights
