"""Where a token stands: rotary angles (LLaMA) or a learned table (OPT)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from polarjax.config import Rope

# OPT's table starts with two rows that no position uses.
LEARNED_OFFSET = 2


def frequencies(rope: Rope, head_dim: int, context: int) -> jax.Array:
    """Angle per position of each pair of dimensions.

    Args:
      rope: base and scaling.
      head_dim: d.
      context: of the model, in tokens. Where a scaling is for long texts alone
        ("dynamic", "longrope"), it says whether these are: by a sequence's own length
        its keys would turn otherwise as it grows, or as its batch-mates do.

    Returns:
      float32[d / 2], radians per token.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freq = 1.0 / base(rope, head_dim, context) ** exponent
    divisors = rope.divisors
    if rope.kind == "longrope" and context > rope.original_context:
        divisors = rope.long_divisors
    if divisors:
        freq = freq / jnp.asarray(divisors, jnp.float32)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        # Long wavelengths are stretched, short ones stay, between them a ramp.
        turns = rope.original_context * freq / (2 * math.pi)
        ramp = (turns - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return _mix(freq, freq / rope.factor, ramp)
    if rope.kind == "yarn":
        first = _dimension(rope, head_dim, rope.beta_fast)
        last = _dimension(rope, head_dim, rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        ramp = 1 - (jnp.arange(head_dim // 2) - first) / width
        return _mix(freq, freq / rope.factor, ramp)
    return freq


def base(rope: Rope, head_dim: int, context: int) -> float:
    """Of the wavelengths; "dynamic" raises it in a context beyond the original one."""
    if rope.kind != "dynamic" or context <= rope.original_context:
        return rope.theta
    stretch = rope.factor * context / rope.original_context - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _mix(stay: jax.Array, stretched: jax.Array, ramp: jax.Array) -> jax.Array:
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return ramp * stay + (1 - ramp) * stretched


def _dimension(rope: Rope, head_dim: int, turns: float) -> float:
    """The pair of dimensions that turns so often over the original context."""
    wavelength = rope.original_context / (2 * math.pi * turns)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def angles(
    positions: jax.Array, rope: Rope, head_dim: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """What queries and keys are rotated by; see `pallas_kernels.rotate`.

    Args:
      positions: int32[...], from 0.
      rope: base and scaling.
      head_dim: d.
      context: of the model, in tokens.

    Returns:
      Cosine and sine, times the rope's scale, float32[..., d / 2].
    """
    angle = positions[..., None] * frequencies(rope, head_dim, context)
    return rope.scale * jnp.cos(angle), rope.scale * jnp.sin(angle)
