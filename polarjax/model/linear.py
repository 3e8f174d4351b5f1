"""The one matrix product of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import product


def linear(
    x: jax.Array, rows: jax.Array, bias: jax.Array | None = None, dtype=jnp.float32
) -> jax.Array:
    """Rows times x, plus bias, accumulated in float32 and rounded once.

    Args:
      x: [..., i].
      rows: [o, i], one row per output; operands stay in their own dtype, which is
        what matrix units want.
      bias: [o] or None.
      dtype: of the result. What writes 16 bit has less to write.

    Returns:
      [..., o].
    """
    y = product(
        x.reshape(-1, x.shape[-1]), rows, dtype if bias is None else jnp.float32
    )
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else (y + bias.astype(jnp.float32)).astype(dtype)
