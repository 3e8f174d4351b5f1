"""The feed-forward half of a layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Implementation, gathered_mlp, gathering, masked_mlp
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
          x: [..., m]; with `neurons`, [b, m] or [b, t, m].
          neurons: int32[n], the neurons to compute for the whole batch; int32[t, n] if
            each position has its own, and then the others are computed and masked;
            None for all.

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
        if neurons is not None and neurons.ndim == 2:

            def feed(x: jax.Array, neurons: jax.Array) -> jax.Array:
                return masked_mlp(x, weights, neurons, activation=c.activation)

            return jax.vmap(feed, (1, 0), 1)(x, neurons)
        y = gathered_mlp(
            *(x.reshape(-1, c.dim), weights, neurons),
            activation=c.activation,
            implementation=gathering(self.implementation),
        )
        return y.reshape(x.shape)
