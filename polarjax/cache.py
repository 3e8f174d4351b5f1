"""The KV cache of a batch: who writes it, who reads it, and how it lies in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels import (
    Implementation,
    append_and_attend,
    attend_chunk,
    put,
    select_head_attention,
)
from polarjax.config import ModelConfig
from polarjax.policy import Groups, Pages

# Queries of a chunk that are attended from at once.
_QUERIES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts of prompts, whose tokens stand behind one another in one array of n.

    Attributes:
      slots: int32[r], whose prompt each is of.
      starts: int32[r], the place of its first token in the array.
      counts: int32[r], its tokens; 0 where there is no piece.
      firsts: int32[r], the position of its first token in the sequence.
    """

    slots: jax.Array
    starts: jax.Array
    counts: jax.Array
    firsts: jax.Array

    @classmethod
    def among(cls, lengths: jax.Array, first: jax.Array | int, n: int) -> Pieces:
        """Those of n tokens of sequences whose tokens all stand behind one another.

        Args:
          lengths: int32[r], tokens of each sequence, that of slot 0 first.
          first: which of all these tokens is the first of the n.
          n: tokens of the array.
        """
        begins = jnp.cumsum(lengths) - lengths - first
        starts, ends = (jnp.clip(x, 0, n) for x in (begins, begins + lengths))
        slots = jnp.arange(len(lengths), dtype=jnp.int32)
        return cls(slots, starts, ends - starts, starts - begins)

    @property
    def ends(self) -> jax.Array:
        """int32[r], the place of each piece's last token; 0 where there is none."""
        return jnp.maximum(self.starts + self.counts - 1, 0)

    def places(self, n: int) -> tuple[jax.Array, jax.Array]:
        """The slot and the position of each token of an array.

        Args:
          n: tokens of the array.

        Returns:
          int32[n], -1 for those of no piece; int32[n], 0 for those.
        """
        place = jnp.arange(n, dtype=jnp.int32)[:, None]
        inside = (place >= self.starts) & (place < self.starts + self.counts)
        there, piece = inside.any(axis=1), jnp.argmax(inside, axis=1)
        position = place[:, 0] - self.starts[piece] + self.firsts[piece]
        return (
            jnp.where(there, self.slots[piece], -1),
            jnp.where(there, position, 0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer, and how far each sequence has come.

    Position x of a sequence lies in the page that its row of the table has for
    x // page, in row x % page there; a page belongs to as many sequences as name it.
    Without a table each sequence has one page, all its own. A selected group of a page
    is one contiguous stream. Positions at and beyond a sequence's length hold garbage
    that nothing reads. Nobody else knows this layout but the attention kernels.

    Attributes:
      keys: per layer, [pages, k, page, d], each a buffer of its own.
      values: per layer, [pages, k, page, d].
      lengths: int32[b], positions that each sequence has.
      rows: int32[b], of a cache without a table, the page of each sequence, distinct;
        numbers beyond the pages that there are stand for none: what is written for
        them is dropped. None for page i of sequence i.
      table: int32[b, m], pages of each sequence in order, 0 for none: page 0 is trash.
        None for one page a sequence.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    rows: jax.Array | None = None
    table: jax.Array | None = None

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.keys[-1].shape[2]

    @property
    def capacity(self) -> int:
        """Positions that a sequence has room for, s."""
        return self.page if self.table is None else self.page * self.table.shape[1]

    @property
    def layers(self) -> int:
        """Layers that are kept."""
        return len(self.keys)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        slots: int,
        context: int,
        dtype: Any,
        sharding: jax.sharding.Sharding | None = None,
    ) -> PagedCache:
        """A cache of no positions.

        Args:
          config: what the model is.
          slots: sequences, b.
          context: positions that each has room for, s.
          dtype: of keys and values.
          sharding: of each layer's arrays; None for the default device.
        """
        shape = (slots, config.kv_heads, context, config.head_dim)
        return cls(
            keys=tuple(zeros(shape, dtype, sharding) for _ in range(config.layers)),
            values=tuple(zeros(shape, dtype, sharding) for _ in range(config.layers)),
            lengths=zeros((slots,), jnp.int32),
        )

    @classmethod
    def pool(
        cls,
        config: ModelConfig,
        slots: int,
        context: int,
        pages: int,
        page: int,
        dtype: Any,
        sharding: jax.sharding.Sharding | None = None,
    ) -> PagedCache:
        """A cache of pages that nobody has yet.

        Args:
          config: what the model is.
          slots: sequences, b.
          context: positions that each may have.
          pages: that there are, the trash page among them.
          page: positions of each.
          dtype: of keys and values.
          sharding: of each layer's arrays; None for the default device.
        """
        # Each page as a sequence of its own has one.
        cache = cls.empty(config, pages, page, dtype, sharding)
        table = zeros((slots, -(-context // page)), jnp.int32)
        lengths = zeros((slots,), jnp.int32)
        return dataclasses.replace(cache, lengths=lengths, table=table)

    @classmethod
    def cut(
        cls, rows: PartitionSpec, groups: PartitionSpec, paged: bool = False
    ) -> Any:
        """How a cache lies on a mesh, a prefix of its tree.

        Args:
          rows: of arrays by sequence.
          groups: of keys and values.
          paged: whether it has a table.
        """
        each: Any = groups
        lengths: Any = rows
        return cls(each, each, lengths, table=lengths if paged else None)

    def of_rows(self, rows: jax.Array, lengths: jax.Array | None = None) -> PagedCache:
        """The same memory, seen by the sequences of some rows.

        Args:
          rows: int32[r], as in the class.
          lengths: int32[r], positions that they have; None for none.
        """
        if lengths is None:
            lengths = jnp.zeros(len(rows), jnp.int32)
        return dataclasses.replace(self, lengths=lengths, rows=rows)

    def back_in(self, whole: PagedCache) -> PagedCache:
        """The cache that this one is a view of, with what was written through it.

        Args:
          whole: that `of_rows` was called on.
        """
        assert self.rows is not None
        lengths = put(whole.lengths, self.rows, self.lengths, unique=True)
        return dataclasses.replace(self, lengths=lengths, rows=None)

    def copies(self, rows: jax.Array, context: int) -> PagedCache:
        """A cache whose sequences begin as copies of this one's.

        Args:
          rows: int32[b], the sequence that each is a copy of.
          context: positions that there is room for in it, at least as many as here.
        """
        room = ((0, 0), (0, 0), (0, context - self.capacity), (0, 0))

        def take(part: jax.Array) -> jax.Array:
            return jnp.pad(part[rows], room)

        keys, values = (tuple(map(take, parts)) for parts in (self.keys, self.values))
        return PagedCache(keys, values, self.lengths[rows])

    def apart(self) -> list[Any]:
        """The arrays of each layer, for `of_layers`."""
        return list(zip(self.keys, self.values, strict=True))

    @classmethod
    def of_layers(cls, layers: Sequence[Any], lengths: Any) -> PagedCache:
        """The cache that has these arrays of each layer.

        Args:
          layers: as `apart` returns them.
          lengths: int32[b].
        """
        keys, values = zip(*layers, strict=True)
        return cls(keys, values, lengths)

    def grown(self, counts: jax.Array) -> PagedCache:
        """The cache once so many new positions of each are in every layer.

        Args:
          counts: int32[b].
        """
        return dataclasses.replace(self, lengths=self.lengths + counts)

    def attend(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        live: jax.Array,
        groups: Groups | None = None,
        pages: Pages | None = None,
        window: int | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of the newest position of each sequence.

        Keys and values of all groups are written, whatever is read.

        Args:
          layer: from 0.
          q: [b, h, d].
          k: [b, k, d], the newest position's; None if it is there already.
          v: [b, k, d].
          live: bool[b]; the others read and write nothing: they may be full.
          groups: the KV groups to read; None for all.
          pages: the spans to read; None for all.
          window: newest positions attended to, itself included; None for all.
          implementation: of the kernel; None chooses by device.

        Returns:
          [b, h, d], and the cache with the position written. Its lengths are those of
          before: `grown` counts the position, once all layers have written theirs.

        Raises:
          NotImplementedError: if pages are selected, for which there is no kernel yet.
        """
        if pages is not None:
            raise NotImplementedError(
                "pages cannot be selected while decoding: no kernel reads lists of "
                "them yet; measure the policy in mode mask"
            )
        assert self.rows is None, "views are written by chunks"
        index, count = (None, None) if groups is None else groups
        keys, values = self.keys[layer], self.values[layer]
        visible = jnp.where(live, self.lengths + 1, 0)
        options: Any = {"window": window, "implementation": implementation}
        options["table"] = self.table
        if k is None or v is None:
            o = select_head_attention(q, keys, values, visible, index, count, **options)
            return o, self
        k, v = k.astype(keys.dtype), v.astype(values.dtype)
        o, keys, values = append_and_attend(
            q, k, v, keys, values, visible, index, count, **options
        )
        return o, self._with_layer(layer, keys, values)

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> PagedCache:
        """The first positions of sequences that have none yet.

        Args:
          layer: from 0.
          k: [b, t, k, d]; what there is no room for is dropped.
          v: [b, t, k, d].
        """
        rows = jnp.arange(len(k)) if self.rows is None else self.rows

        def store(whole: jax.Array, part: jax.Array) -> jax.Array:
            part = part[:, : self.capacity].swapaxes(1, 2).astype(whole.dtype)
            at = rows, slice(None), slice(part.shape[2])
            return put(whole, at, part, unique=True)

        keys, values = store(self.keys[layer], k), store(self.values[layer], v)
        return self._with_layer(layer, keys, values)

    def attend_chunk(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        counts: jax.Array,
        window: int | None = None,
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of several new positions of each sequence, behind what it has.

        Args:
          layer: from 0.
          q: [b, t, h, d].
          k: [b, t, k, d].
          v: [b, t, k, d].
          counts: int32[b], new positions of each, at most t; the others mean nothing.
          window: newest positions attended to, itself included; None for all.

        Returns:
          [b, t, h, d], and the cache with the positions written, as in `attend`.
        """
        b, t, h, d = q.shape
        rows = jnp.arange(b) if self.rows is None else self.rows
        place = self.lengths[:, None] + jnp.arange(t)
        new = jnp.arange(t) < counts[:, None]
        to = jnp.where(new, place, self.capacity)  # nowhere

        def store(whole: jax.Array, part: jax.Array) -> jax.Array:
            at = rows[:, None], slice(None), to
            return put(whole, at, part.astype(whole.dtype))

        keys, values = store(self.keys[layer], k), store(self.values[layer], v)
        cache = self._with_layer(layer, keys, values)
        if self.rows is not None:
            keys, values = (jnp.take(x, rows, axis=0) for x in (keys, values))
        size = min(t, _QUERIES)
        pad = ((0, 0), (0, -t % size))
        # Padding sees no more than the last new position does: beyond is garbage.
        place = jnp.minimum(place, (self.lengths + counts - 1)[:, None])
        places = jnp.pad(place, pad).reshape(b, -1, size).swapaxes(0, 1)
        queries = jnp.pad(q, (*pad, (0, 0), (0, 0)))
        queries = queries.reshape(b, -1, size, h, d).swapaxes(0, 1)

        def read(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            return _attend_from(*block, keys, values, window)

        o = lax.map(read, (queries, places))
        return o.swapaxes(0, 1).reshape(b, -1, h, d)[:, :t], cache

    def attend_pieces(
        self,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pieces: Pieces,
        window: int | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of parts of prompts, each behind what is there of its sequence.

        Args:
          layer: from 0.
          q: [n, h, d].
          k: [n, k, d].
          v: [n, k, d].
          pieces: whose they are; the sequences must have pages for them.
          window: newest positions attended to, itself included; None for all.
          implementation: of the kernel; None chooses by device.

        Returns:
          [n, h, d], and the cache with the positions written. Its lengths are those of
          before.
        """
        assert self.table is not None, "pieces are read into pages"
        slot, position = pieces.places(len(q))
        page = self.table[slot, position // self.page]
        page = jnp.where(slot < 0, len(self.keys[layer]), page)  # nowhere
        at = page, slice(None), position % self.page

        def store(whole: jax.Array, part: jax.Array) -> jax.Array:
            return put(whole, at, part.astype(whole.dtype))

        keys, values = store(self.keys[layer], k), store(self.values[layer], v)
        o = attend_chunk(
            q,
            keys,
            values,
            self.table,
            pieces.slots,
            pieces.starts,
            pieces.counts,
            pieces.firsts,
            window=window,
            implementation=implementation,
        )
        return o, self._with_layer(layer, keys, values)

    def _with_layer(self, i: int, keys: jax.Array, values: jax.Array) -> PagedCache:
        return dataclasses.replace(
            self,
            keys=(*self.keys[:i], keys, *self.keys[i + 1 :]),
            values=(*self.values[:i], values, *self.values[i + 1 :]),
        )


def zeros(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """`jnp.zeros`, ten times as fast: a cache has two arrays a layer, one by one.

    Args:
      shape: of the array.
      dtype: of the array.
      sharding: of the array; None for the default device.
    """
    return _fill(shape, jnp.dtype(dtype), sharding)()


@functools.lru_cache(maxsize=256)
def _fill(
    shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None
) -> Callable[[], jax.Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def _attend_from(
    q: jax.Array,
    places: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attention of queries [b, n, h, d] at places int32[b, n] to all before them."""
    b, n, h, d = q.shape
    k, s = keys.shape[1:3]
    einsum = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    grouped = q.reshape(b, n, k, h // k, d)
    scores = einsum("bnkgd,bksd->bkngs", grouped, keys)
    at = jnp.arange(s)
    seen = at <= places[..., None]
    if window is not None:
        seen &= at > places[..., None] - window
    scores = jnp.where(seen[:, None, :, None], scores / d**0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    # What lies beyond is garbage, and no number times it need be 0.
    there = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0)
    o = einsum("bkngs,bksd->bnkgd", weights, there.astype(jnp.float32))
    return o.reshape(b, n, h, d).astype(q.dtype)
