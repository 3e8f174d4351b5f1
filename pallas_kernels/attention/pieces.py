"""One line of tiles, cut into shares at the borders of pieces.

The tiles that a call has to read stand in one line: sequence by sequence, selected
group by selected group, and within each the entries of its list in order. A list is
cut into pieces, from its own beginning, whose number of tiles depends on its own length
alone, whatever its batch-mates have: what a piece adds up to is then the same bits in
any batch. Every program computes the pieces that begin in its equal share of the line,
so that ragged lengths and few groups leave none of them idle (as Stream-K does, arXiv
2301.03598, which cuts anywhere).
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

# Pieces of a list, at most: longer lists have longer pieces.
_MOST_PIECES = 64
# Pieces of a list, at least: the shares of programs differ by a piece, which would be
# much where lists are short. A list of so many tiles or less has pieces of one.
_LEAST_PIECES = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """What all programs have to do together.

    The methods are for scalars inside of kernels as well as for arrays. Wrong lengths
    and counts are clipped here, so that none leads out of an array.

    Attributes:
        s: positions that a sequence may have.
        n: groups that can be selected per sequence.
        block: positions per tile.
        piece: most tiles of a piece of a list that has no more than 64 pieces.
        programs: how many share the work.
        entries: of the longest list of pages, each of `parts` tiles; None where every
            sequence reads all its positions.
        parts: tiles of a page.
        window: newest positions that a sequence attends to; None means all.
    """

    s: int
    n: int
    block: int
    piece: int
    programs: int
    entries: int | None = None
    parts: int = 1
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

    def listed(self, length, count):
        """How many tiles a list of so many pages has; none without positions."""
        assert self.entries is not None
        tiles = jnp.clip(count, 0, self.entries) * self.parts
        return jnp.where(length > 0, tiles, 0)

    def groups(self, n_active):
        """How many groups of a sequence are selected."""
        return jnp.clip(n_active, 0, self.n)

    @property
    def most_tiles(self) -> int:
        """Tiles of the longest list."""
        if self.entries is not None:
            return self.entries * self.parts
        within = min(self.window or self.s, self.s)
        # A window may begin within a tile, and end within another.
        return min(-(-self.s // self.block), -(-within // self.block) + 1)

    @property
    def most_pieces(self) -> int:
        """Pieces that a list can have."""
        short = min(self.most_tiles, 2 * _LEAST_PIECES)
        return max(min(-(-self.most_tiles // self.piece), _MOST_PIECES), short)

    def piece_tiles(self, tiles):
        """Tiles of each piece of a list of so many, the last perhaps apart."""
        size, longer = jnp.ones_like(tiles), 1
        while longer < self.piece:
            longer *= 2
            size = jnp.where(tiles >= longer * _LEAST_PIECES, longer, size)
        while longer * _MOST_PIECES < self.most_tiles:
            size = jnp.where(tiles > longer * _MOST_PIECES, 2 * longer, size)
            longer *= 2
        return size

    def pieces(self, tiles):
        """How many pieces a list of so many tiles has."""
        size = self.piece_tiles(tiles)
        return lax.div(tiles + (size - 1), size)

    def share(self, total, program):
        """Where a program's share of `total` tiles begins, and how many it has."""
        share, longer = lax.div(total, self.programs), lax.rem(total, self.programs)
        more = (program < longer).astype(jnp.int32)
        return program * share + jnp.minimum(program, longer), share + more
