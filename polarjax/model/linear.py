"""The one matrix product of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import product


def linear(x: jax.Array, rows: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Rows times x, plus bias, accumulated and returned in float32.

    Args:
      x: [..., i].
      rows: [o, i], one row per output; operands stay in their own dtype, which is
        what matrix units want.
      bias: [o] or None.

    Returns:
      float32[..., o].
    """
    y = product(x.reshape(-1, x.shape[-1]), rows)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.astype(jnp.float32)
