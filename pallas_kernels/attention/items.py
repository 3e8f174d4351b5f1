"""How the packed pieces of prompts are cut into items of work.

An item is up to `rows` rows of one piece. The items stand in one line, piece by piece;
how many there are is known on the device only, so that whoever takes one finds its
piece from the counts.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of one call.

    The methods serve inside of kernels as well; wrong counts are clipped here.

    Attributes:
        n: rows in all.
        r: pieces in all, empty ones among them.
        rows: most rows of an item.
    """

    n: int
    r: int
    rows: int

    @property
    def most(self) -> int:
        """How many items there can be at most, as no row is in two pieces."""
        pieces = min(self.n, self.r)
        return (self.n + pieces * (self.rows - 1)) // self.rows

    def counts(self, counts):
        """How many items each piece has, from its count of rows."""
        # Not above n, for a count of 2**31 - 1 rows would overflow.
        return lax.div(jnp.clip(counts, 0, self.n) + (self.rows - 1), self.rows)

    def find(self, counts, item):
        """The piece that an item is of, and how many rows of the piece precede it.

        Args:
            counts: rows of each piece, [r] or longer; 0 behind r.
            item: below the sum of the pieces' items.
        """
        items = self.counts(counts)
        ends = jnp.cumsum(items)
        before = ends <= item
        piece = jnp.minimum(jnp.sum(before.astype(jnp.int32)), self.r - 1)
        return piece, (item - jnp.max(jnp.where(before, ends, 0))) * self.rows
