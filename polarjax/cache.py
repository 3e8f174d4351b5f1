"""The KV cache of a batch: who writes it, who reads it, and how it lies in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    A selected group of a page is one contiguous stream. Positions at and beyond a
    sequence's length hold garbage that nothing reads. Nobody else knows this layout but
    the attention kernels.

    Attributes:
      keys: per layer, [pages, k, page, d], each a buffer of its own.
      values: per layer, [pages, k, page, d].
      lengths: int32[b], positions that each sequence has.
      table: int32[b, m], pages of each sequence in order, 0 for none: page 0 is trash.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    table: jax.Array

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.keys[-1].shape[2]

    @property
    def capacity(self) -> int:
        """Positions that a sequence has room for, s."""
        return self.page * self.table.shape[1]

    @property
    def layers(self) -> int:
        """Layers that are kept."""
        return len(self.keys)

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
        shape = (pages, config.kv_heads, page, config.head_dim)
        return cls(
            keys=tuple(zeros(shape, dtype, sharding) for _ in range(config.layers)),
            values=tuple(zeros(shape, dtype, sharding) for _ in range(config.layers)),
            lengths=zeros((slots,), jnp.int32),
            table=zeros((slots, -(-context // page)), jnp.int32),
        )

    @classmethod
    def cut(cls, rows: PartitionSpec, groups: PartitionSpec) -> Any:
        """How a cache lies on a mesh, a prefix of its tree.

        Args:
          rows: of arrays by sequence.
          groups: of keys and values.
        """
        each: Any = groups
        lengths: Any = rows
        return cls(each, each, lengths, lengths)

    def apart(self) -> list[Any]:
        """The arrays of each layer, for `of_layers`."""
        return list(zip(self.keys, self.values, strict=True))

    @classmethod
    def of_layers(cls, layers: Sequence[Any], lengths: Any, table: Any) -> PagedCache:
        """The cache that has these arrays of each layer.

        Args:
          layers: as `apart` returns them.
          lengths: int32[b].
          table: int32[b, m].
        """
        keys, values = zip(*layers, strict=True)
        return cls(keys, values, lengths, table)

    @property
    def bare(self) -> PagedCache:
        """The same without keys and values: who has what, and how much."""
        return dataclasses.replace(self, keys=(), values=())

    def over(self, cache: PagedCache) -> PagedCache:
        """A bare one with keys and values again.

        Args:
          cache: that has them.
        """
        return dataclasses.replace(self, keys=cache.keys, values=cache.values)

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
        index, count = (None, None) if groups is None else groups
        keys, values = self.keys[layer], self.values[layer]
        visible = jnp.where(live, self.lengths + 1, 0)
        options: Any = {
            "table": self.table,
            "window": window,
            "implementation": implementation,
        }
        if k is None or v is None:
            o = select_head_attention(q, keys, values, visible, index, count, **options)
            return o, self
        k, v = k.astype(keys.dtype), v.astype(values.dtype)
        o, keys, values = append_and_attend(
            q, k, v, keys, values, visible, index, count, **options
        )
        return o, self._with_layer(layer, keys, values)

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
