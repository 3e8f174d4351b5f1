"""One line of tiles, cut into equal shares (Stream-K, arXiv 2301.03598).

The tiles that a call has to read stand in one line: sequence by sequence, selected
group by selected group, position by position. Every program gets an equal share of the
line, so that ragged lengths and few groups leave none of them idle. What a program
reads of one group is a piece.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Work:
    """What all programs have to do together.

    The methods are for scalars inside of kernels as well as for arrays. Wrong lengths
    and counts are clipped here, so that none leads out of an array.

    Attributes:
        s: positions in the caches.
        n: groups that can be selected per sequence.
        block: positions per tile.
        programs: how many share the work.
        window: newest positions that a sequence attends to; None means all.
    """

    s: int
    n: int
    block: int
    programs: int
    window: int | None = None

    def positions(self, length):
        """The first position that a sequence attends to, and the end of them."""
        end = jnp.clip(length, 0, self.s)
        return jnp.maximum(end - min(self.window or self.s, self.s), 0), end

    def tiles(self, length):
        """The first tile that holds such positions, and how many there are."""
        start, end = self.positions(length)
        first = lax.div(start, self.block)
        return first, lax.div(end + (self.block - 1), self.block) - first

    def groups(self, n_active):
        """How many groups of a sequence are selected."""
        return jnp.clip(n_active, 0, self.n)

    def share(self, total, program):
        """Where a program's share of `total` tiles begins, and how many it has."""
        share, longer = lax.div(total, self.programs), lax.rem(total, self.programs)
        more = (program < longer).astype(jnp.int32)
        return program * share + jnp.minimum(program, longer), share + more

    def owner(self, total, tile):
        """The program whose share a tile is in."""
        share, longer = lax.div(total, self.programs), lax.rem(total, self.programs)
        behind = tile - longer * (share + 1)
        return jnp.where(
            behind < 0,
            lax.div(tile, share + 1),
            longer + lax.div(behind, jnp.maximum(share, 1)),
        )
