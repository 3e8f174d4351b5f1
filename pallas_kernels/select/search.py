"""The n-th largest of many non-negative numbers, by counting.

A threshold at or below which exactly n numbers lie is all that a selection needs, and
to count the numbers above a guess is cheap where a sort is not. Non-negative floats
are ordered as their bit patterns are, so the guesses are int32 keys: neighbouring
floats are neighbouring keys, and a bracket of two keys settles the last digit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Guesses by false position before the search halves what is left of the bracket,
# which takes 31 at most. On sums of router scores it takes about 7 in all.
_FALSE_POSITIONS = 8
MAX_STEPS = 1 + _FALSE_POSITIONS + 31


class Threshold(NamedTuple):
    """Which keys are the n largest; int32 scalars.

    Attributes:
        sure: keys at or above this are among the n.
        tied: keys at or above this and below `sure` are equal to each other.
        ties: how many of those are among the n; any of them will do.
        steps: guesses that were counted, at most MAX_STEPS.
    """

    sure: jax.Array
    tied: jax.Array
    ties: jax.Array
    steps: jax.Array


class _Bracket(NamedTuple):
    """`lo` has at least n keys at or above it, `hi` fewer; `c` counts, `g` is a gap.

    A gap is how far the log odds of a count are from those of n. Odds, because counts
    of bell-shaped data make an S and their log odds nearly a line.
    """

    lo: jax.Array
    hi: jax.Array
    c_lo: jax.Array
    c_hi: jax.Array
    g_lo: jax.Array
    g_hi: jax.Array
    raised: jax.Array  # whether the last step moved lo
    steps: jax.Array


def find_threshold(
    count: Callable[[jax.Array], jax.Array], largest: jax.Array, *, f: int, n: int
) -> Threshold:
    """Find the n largest of f keys.

    Args:
        count: how many keys are at or above an int32 key.
        largest: the largest key, int32: the bits of a non-negative float, not a NaN.
        f: number of keys.
        n: how many to find, 1..f.
    """
    goal = _log_odds(jnp.int32(n), f)

    def unfinished(bracket: _Bracket) -> jax.Array:
        return (bracket.hi - bracket.lo > 1) & (bracket.c_lo != n)

    def step(bracket: _Bracket) -> _Bracket:
        lo, hi, c_lo, c_hi, g_lo, g_hi, raised, steps = bracket
        guess = jnp.where(
            steps <= _FALSE_POSITIONS,
            _false_position(bracket),
            lo + (hi - lo) // 2,
        )
        # Many sums are exactly zero, where the counts jump: look there first.
        guess = jnp.where(steps == 0, 1, guess)
        guess = jnp.clip(guess, lo + 1, hi - 1)  # also where infinities made a NaN
        c = count(guess)
        g = _log_odds(c, f) - goal
        raises = c >= n
        # An end that stays put while the other moves twice gets its gap shrunk, or it
        # would stay for good (Anderson and Bjorck 1973).
        shrunk = 1.0 - g / jnp.where(raises, g_lo, g_hi)
        again = (steps > 0) & (raises == (raised == 1))
        shrink = jnp.where(again, jnp.where(shrunk > 0.0, shrunk, 0.5), 1.0)
        return _Bracket(
            lo=jnp.where(raises, guess, lo),
            hi=jnp.where(raises, hi, guess),
            c_lo=jnp.where(raises, c, c_lo),
            c_hi=jnp.where(raises, c_hi, c),
            g_lo=jnp.where(raises, g, g_lo * shrink),
            g_hi=jnp.where(raises, g_hi * shrink, g),
            raised=raises.astype(jnp.int32),
            steps=steps + 1,
        )

    zero = jnp.int32(0)
    first = _Bracket(
        lo=zero,
        hi=largest + 1,
        c_lo=jnp.int32(f),
        c_hi=zero,
        g_lo=_log_odds(jnp.int32(f), f) - goal,
        g_hi=_log_odds(zero, f) - goal,
        raised=zero,
        steps=zero,
    )
    last = lax.while_loop(unfinished, step, first)
    exact = last.c_lo == n
    return Threshold(
        sure=jnp.where(exact, last.lo, last.hi),
        tied=last.lo,
        ties=jnp.where(exact, 0, n - last.c_hi),
        steps=last.steps,
    )


def _log_odds(count: jax.Array, f: int) -> jax.Array:
    count = count.astype(jnp.float32)
    return jnp.log((count + 0.5) / (f - count + 0.5))


def _false_position(bracket: _Bracket) -> jax.Array:
    """The key where a line through both ends, in value and gap, is at n."""
    lo = lax.bitcast_convert_type(bracket.lo, jnp.float32)
    hi = lax.bitcast_convert_type(bracket.hi, jnp.float32)
    weight = bracket.g_lo / (bracket.g_lo - bracket.g_hi)
    return lax.bitcast_convert_type(lo + (hi - lo) * weight, jnp.int32)
