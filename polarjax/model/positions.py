"""Where a token stands: rotary angles (LLaMA) or a learned table (OPT)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from polarjax.config import Rope

# OPT's table starts with two rows that no position uses.
LEARNED_OFFSET = 2


def frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Angle per position of each pair of dimensions.

    Args:
      rope: base and scaling.
      head_dim: d.

    Returns:
      float32[d / 2], radians per token.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freq = 1.0 / rope.theta**exponent
    if rope.divisors:
        freq = freq / jnp.asarray(rope.divisors, jnp.float32)
    if rope.kind == "llama3":
        # Long wavelengths are stretched, short ones stay, between them a ramp.
        turns = rope.original_context * freq / (2 * math.pi)
        ramp = (turns - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        ramp = jnp.clip(ramp, 0.0, 1.0)
        freq = ramp * freq + (1 - ramp) * freq / rope.factor
    return freq


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding; dimension i pairs with i + d / 2.

    Args:
      x: [b, t, heads, d], queries or keys.
      positions: int32[b, t], from 0.
      rope: base and scaling.

    Returns:
      Like x.
    """
    angle = positions[..., None, None] * frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [b, t, 1, d / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
