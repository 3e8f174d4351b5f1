"""Which tokens a request may draw: min-p, top-k and top-p, without sorting.

A sum of floating-point numbers depends on their order, which a program may choose; and
at the border of a filter one bit more or less takes a token in or leaves it out. So all
that is summed here are integers: a row keeps the same tokens in whatever program, and
whether they are found by sorting or by halving.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Bits of a mass behind the unit: of 2**20 tokens each may lose one of the lowest.
_FINE = 12

Measure = Callable[[jax.Array], jax.Array]


def filtered(
    scores: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Scores of the tokens that three filters let pass, in this order.

    Min-p keeps tokens that are at least so many times as probable as the best; top-k
    the best of them, of equal scores the first ids; top-p the best of these until their
    part of the probability that is left reaches the mass: the token that crosses it is
    kept. The best token always passes.

    Args:
      scores: float32[b, v], after the temperature; v at most 2**20.
      top_k: int32[b], v or more for all.
      top_p: float32[b], 1 for all.
      min_p: float32[b], 0 for all.

    Returns:
      float32[b, v], bit for bit the scores of what is kept, and -inf.
    """
    if scores.shape[-1] > 2**20:
        raise ValueError(f"filters know 2**20 tokens at most, not {scores.shape[-1]}")
    order = ordered(scores)
    likely = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    kept = likely >= min_p[:, None]

    def count(rows: jax.Array) -> jax.Array:
        return rows.sum(axis=-1, dtype=jnp.uint32)

    kept &= _leading(order, count, jnp.maximum(top_k, 1).astype(jnp.uint32))
    units, parts = _masses(jnp.where(kept, likely, 0.0))

    def mass(rows: jax.Array) -> jax.Array:
        whole = jnp.where(rows, units, 0).sum(axis=-1, dtype=jnp.uint32)
        rest = jnp.where(rows, parts, 0).sum(axis=-1, dtype=jnp.uint32)
        return whole + (rest >> _FINE)

    # The best has nothing before it, which is less than 1.
    limit = jnp.ceil(top_p * mass(kept).astype(jnp.float32))
    limit = jnp.maximum(limit, 1.0).astype(jnp.uint32)
    # A sum may not show the rarest, which a mass of 1 keeps all the same.
    kept &= _leading(order, mass, limit) | (top_p >= 1)[:, None]
    return jnp.where(kept, scores, -jnp.inf)


def ordered(scores: jax.Array) -> jax.Array:
    """Integers in the order of some float32, uint32; both zeros are equal."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _masses(likely: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers in [0, 1] as integers that can be summed, in units and parts of one.

    Args:
      likely: float32[b, v]; the largest of a row is 1.

    Returns:
      Of each the units, of which a row has fewer than 2**31, uint32[b, v]; and the
      parts, of which `2**_FINE` are one unit, uint32[b, v]. What is lost is less than
      a part of each: a millionth of the mass of 2**17 tokens.
    """
    v, parts = likely.shape[-1], 2.0**_FINE
    # At most v parts more than that are the whole.
    floor = jnp.floor(likely * parts).astype(jnp.uint32).sum(-1, dtype=jnp.uint32)
    bits = 32 - lax.clz(floor + v).astype(jnp.int32)  # the sum is below 2**(bits - 12)
    # A power of two, so that nothing is rounded; exp2 may round it itself.
    exponent = (127 + 31 + _FINE - bits) << 23
    scaled = likely * lax.bitcast_convert_type(exponent, jnp.float32)[:, None]
    whole = jnp.floor(scaled)
    rest = jnp.floor((scaled - whole) * parts)
    return whole.astype(jnp.uint32), rest.astype(jnp.uint32)


def _leading(order: jax.Array, measure: Measure, limit: jax.Array) -> jax.Array:
    """The tokens before which there is less than a limit, bool[b, v].

    Args:
      order: uint32[b, v], larger for better tokens; of equal ones the first comes
        first.
      measure: of the tokens that bool[b, v] tells, uint32[b]; never less of more.
      limit: uint32[b], at least 1.
    """
    b, v = order.shape
    index = jnp.arange(v, dtype=jnp.uint32)
    none = jnp.zeros(b, jnp.uint32)

    # The lowest score above which there is less than the limit, from its highest bit.
    def lower(i: jax.Array, low: jax.Array) -> jax.Array:
        bit = jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        less = measure(order > (low | (bit - 1))[:, None]) < limit
        return jnp.where(less, low, low | bit)

    low = lax.fori_loop(0, 32, lower, none)[:, None]
    above, equal = order > low, order == low

    # Of those with that score, the last id before which there is less.
    def further(i: jax.Array, last: jax.Array) -> jax.Array:
        more = last | (jnp.uint32(1 << (v.bit_length() - 1)) >> i.astype(jnp.uint32))
        less = measure(above | (equal & (index < more[:, None]))) < limit
        return jnp.where(less, more, last)

    last = lax.fori_loop(0, v.bit_length(), further, none)[:, None]
    return above | (equal & (index <= last))
