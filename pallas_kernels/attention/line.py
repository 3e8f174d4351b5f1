"""What a call of the attention kernel reads, and the line of its tiles."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels.attention.pieces import Work


@dataclasses.dataclass(frozen=True)
class Static:
    """What a kernel is compiled for: the work, the glossary's dimensions, options."""

    work: Work
    b: int
    k: int
    g: int
    d: int
    scale: float
    softcap: float | None


class Inputs(NamedTuple):
    """What a call reads: arrays outside of the kernels, refs inside."""

    lengths: jax.Array  # [b]
    heads: jax.Array | None  # [b, n]; None is every group
    n_active: jax.Array | None  # [b]; None is n
    table: jax.Array | None  # [b, m]; None where each sequence has one page, its own
    lists: jax.Array | None  # [b, k or 1, p]; None is every page
    counts: jax.Array | None  # [b, k or 1]
    q: jax.Array  # [b, h, d]
    new: tuple[jax.Array, jax.Array] | None  # keys and values to append, [b, k, d]
    k_cache: jax.Array  # [pages, k, page, d]
    v_cache: jax.Array  # [pages, k, page, d]

    def active(self, sequence, static):
        """How many groups are selected for a sequence, or for each of an array."""
        if self.n_active is None:
            return jnp.full_like(sequence, static.work.n)
        return static.work.groups(self.n_active[sequence])

    def group(self, sequence, slot, static, mask=None):
        """The group in a slot of a sequence's selection, or in each of an array."""
        if self.heads is None:
            return slot
        if mask is None:
            group = self.heads[sequence, slot]
        else:
            at: Any = self.heads.at[sequence, slot]
            group = pltriton.load(at, mask=mask, other=0)
        # The clip keeps a wrong index from reading outside of the cache.
        return jnp.clip(group, 0, static.k - 1)

    def row(self, group):
        """Which list a group reads."""
        assert self.counts is not None
        return group if self.counts.shape[1] > 1 else jnp.zeros_like(group)


class Line:
    """The line of all tiles, which every program works out from the lengths.

    It consists of runs of equal lists: the groups of a sequence, or where each group
    has a list of its own, one group.
    """

    def __init__(self, inputs, static):
        self.static, work = static, static.work
        own = inputs.counts is not None and inputs.counts.shape[1] > 1
        self.each = work.n if own else 1  # runs of a sequence
        runs = static.b * self.each
        self.index = jnp.arange(pl.next_power_of_2(runs), dtype=jnp.int32)
        there = self.index < runs
        sequence = lax.div(self.index, self.each)

        def load(ref, *at):
            return pltriton.load(ref.at[at], mask=there, other=0)

        lengths = load(inputs.lengths, sequence)
        groups = jnp.where(there, work.n, 0)
        if inputs.n_active is not None:
            groups = work.groups(load(inputs.n_active, sequence))
        if inputs.counts is None:
            _, self.tiles = work.tiles(lengths)
        else:
            slot = lax.rem(self.index, self.each)
            group = inputs.group(sequence, slot, static, there) if own else slot
            self.tiles = work.listed(lengths, load(inputs.counts, sequence, group))
        if own:
            groups = (slot < groups).astype(jnp.int32)
        self.ends = jnp.cumsum(self.tiles * groups)
        self.total = jnp.sum(self.tiles * groups)

    def find(self, tile):
        """The selected group that a tile is of; any that exists, beyond the last tile.

        Returns:
            Its sequence, its slot in the sequence's selection, and where in the line
            its tiles start and stop.
        """
        work = self.static.work
        before = self.ends <= tile
        run = jnp.sum(before.astype(jnp.int32))
        start = jnp.max(jnp.where(before, self.ends, 0))
        tiles = jnp.sum(jnp.where(self.index == run, self.tiles, 0))
        slot = lax.div(tile - start, jnp.maximum(tiles, 1))
        start += slot * tiles
        run = jnp.minimum(run, self.static.b * self.each - 1)
        slot = jnp.minimum(slot, work.n - 1)
        if self.each > 1:
            slot = lax.rem(run, self.each)
        return lax.div(run, self.each), slot, start, start + tiles

    def piece_at(self, start, stop, tile):
        """Where the first piece of a list begins that does so at a tile or behind.

        Args:
            start: of the list in the line.
            stop: behind its last tile.
            tile: within them.
        """
        size = self.static.work.piece_tiles(stop - start)
        ahead = lax.div(tile - start + (size - 1), size) * size
        return jnp.minimum(start + ahead, stop)
