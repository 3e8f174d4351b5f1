"""Sums of a softmax that has seen a part of its scores (the online softmax).

They are added up exactly as if no one had cut them: a rescaling is by a power of two,
which rounds nothing, so that it does not matter where the products are fused with the
sums. Kernels that add up the same parts in the same order get the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

# Below all scores.
_LEAST = float(jnp.finfo(jnp.float32).min)


class Sums(NamedTuple):
    """What some scores and values add up to, in float32.

    Attributes:
        top: whole numbers, none of the scores is higher, [rows]. Scores are in units
            of log2.
        total: sum of 2 ** (score - top), [rows].
        acc: sum of the values times that, [rows, cols].
    """

    top: Any
    total: Any
    acc: Any

    @classmethod
    def nothing(cls, rows: int, cols: int) -> Sums:
        """The sums of no scores."""
        zeros = jnp.zeros((rows,), jnp.float32)
        return cls(zeros + _LEAST, zeros, jnp.zeros((rows, cols), jnp.float32))

    def below(self, top) -> Sums:
        """The same sums below another top, whole numbers no less than theirs."""
        scale = power_of_two(self.top - top)
        return Sums(top, self.total * scale, self.acc * scale[:, None])

    def raised(self, score) -> Sums:
        """The same sums, whose top is no less than a score of each row, [rows]."""
        return self.below(jnp.maximum(self.top, jnp.ceil(score)))

    def plus(self, other: Sums) -> Sums:
        """The sums of both."""
        top = jnp.maximum(self.top, other.top)
        mine, theirs = self.below(top), other.below(top)
        return Sums(top, mine.total + theirs.total, mine.acc + theirs.acc)

    def mean(self):
        """The output of the softmax, 0 where nothing was seen, [rows, cols]."""
        return self.acc / jnp.where(self.total == 0.0, 1.0, self.total)[:, None]


def power_of_two(exponent):
    """2 ** exponent to the last bit, of whole numbers from 0 down; 0 below -126."""
    bits = jnp.maximum(exponent, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(jnp.left_shift(bits, 23), jnp.float32)
