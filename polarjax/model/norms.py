"""The normalisation before attention, MLP and head, and of queries and keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Implementation, add_norm, normalize
from polarjax.config import ModelConfig
from polarjax.model.module import Module


class Norm(Module):
    """RMSNorm (LLaMA) or LayerNorm (OPT), computed in float32, returned in `dtype`.

    Attributes:
      config: of the model.
      size: of the axis that is normalised.
      dtype: of the weights, and of what the next product reads.
      implementation: of the kernel that decoding uses; None chooses by device.
    """

    config: ModelConfig
    size: int
    dtype: jnp.dtype
    implementation: Implementation | None = None

    def setup(self) -> None:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.center = self.config.norm == "layer"
        self.scale = self.param("scale", ones, (self.size,), self.dtype)
        if self.center:
            self.bias = self.param("bias", zeros, (self.size,), self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] to the same."""
        return normalize(x, *self._weights(), **self._kind(), dtype=self.dtype)

    def add(self, x: jax.Array, parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The residual stream [b, m] plus the sum of parts [p, b, m]; its norm."""
        kind = {**self._kind(), "implementation": self.implementation}
        return add_norm(x, parts, *self._weights(), **kind)

    def _weights(self) -> tuple[jax.Array, jax.Array | None]:
        return self.scale, self.bias if self.center else None

    def _kind(self) -> dict:
        return {"center": self.center, "eps": self.config.norm_eps}
