"""Products that are rounded before they are added to, in whatever program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rounded(product: jax.Array, position: jax.Array) -> jax.Array:
    """A product, which no compiler merges with a sum that it is part of.

    A machine multiplies and adds in one go, and rounds once, where a compiler finds
    both side by side; whether it does depends on the rest of the program. So two
    programs would give a row scores that differ in the last bit, and a near tie another
    winner.

    Args:
      product: float32[b, v].
      position: int32[b], at least 0; which is what no compiler knows.

    Returns:
      The same numbers, float32[b, v].
    """
    nothing = (position < 0).astype(jnp.uint32)[:, None]
    bits = lax.bitcast_convert_type(product, jnp.uint32) ^ nothing
    return lax.bitcast_convert_type(bits, jnp.float32)
