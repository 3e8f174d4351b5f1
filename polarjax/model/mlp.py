"""The feed-forward half of a layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Implementation, gathered_mlp, gathering
from polarjax.config import ModelConfig


class MLP(nn.Module):
    """Plain (OPT) or gated (LLaMA), neuron-major: row i of each matrix is neuron i."""

    config: ModelConfig
    dtype: jnp.dtype
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, neurons: jax.Array | None = None) -> jax.Array:
        """Apply the MLP.

        Args:
          x: [..., m]; with `neurons`, [b, m].
          neurons: int32[n], the neurons to compute for the whole batch; None for all.

        Returns:
          Like x.
        """
        c = self.config
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        names = ("up", "down", *(("gate",) if c.gated_mlp else ()))
        weights = {
            name: self.param(name, normal, (c.neurons, c.dim), self.dtype)
            for name in names
        }
        if c.mlp_bias:
            # LLaMA's gate may have a bias too; no known checkpoint has one.
            for name, size in (("up_bias", c.neurons), ("down_bias", c.dim)):
                weights[name] = self.param(name, zeros, (size,), self.dtype)
        y = gathered_mlp(
            *(x.reshape(-1, c.dim), weights, neurons),
            activation=c.activation,
            implementation=gathering(self.implementation),
        )
        return y.reshape(x.shape)
