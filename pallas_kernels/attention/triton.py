"""Attention over selected KV groups as a Pallas kernel for Triton.

A selected group of one sequence is computed for all its `g` query heads at once, so
that its keys and values are read once: decoding is bound by those bytes. Its cache is
read in tiles of `block` positions, each of which lies in one page. A fixed number of
programs shares all tiles of all selected groups evenly (see `pieces`), in pieces that
depend on the group's own list of tiles alone, so that the whole GPU is busy until the
end and a result is the same bits whatever else is in the batch. A group of several
pieces has partial results, which a second, small kernel adds up (FlashDecoding).

Triton wants arrays of power-of-two size and dots of at least 16 rows: head dims and
groups are padded with masked loads, never in memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import once, pltriton
from pallas_kernels._dot import dot
from pallas_kernels.attention.configs import Config, heuristic
from pallas_kernels.attention.fold import fold_pieces
from pallas_kernels.attention.line import Inputs, Line, Static
from pallas_kernels.attention.pieces import Work
from pallas_kernels.attention.sums import Sums

_MAX_GROUP = 128
_MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)


@once("scale", "window", "softcap", "interpret", "config")
def attend(
    q,
    k_cache,
    v_cache,
    lengths,
    heads,
    n_active,
    new=None,
    table=None,
    pages=None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `select_head_attention` and, for new, `append_and_attend`.

    Args:
        q: as there.
        k_cache: likewise.
        v_cache: likewise.
        lengths: likewise.
        heads: likewise.
        n_active: likewise.
        new: keys and values to append, [b, k, d] each; None for none.
        table: as there.
        pages: lists of pages and their lengths, both or None.
        scale: as there.
        window: likewise.
        softcap: likewise.
        interpret: whether to interpret the kernels.
        config: None for the heuristic's.

    Returns:
        The output, and the caches: as they came, or with the new keys and values.
    """
    b, h, d = q.shape
    k, page = k_cache.shape[1:3]
    g = h // k
    if g > _MAX_GROUP or d > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the Triton attention kernel serves up to {_MAX_GROUP} query heads per "
            f"KV group and a head dim up to {_MAX_HEAD_DIM}, not {g} and {d}; "
            "implementation='xla' serves any"
        )
    if table is not None and page % 16:
        raise NotImplementedError(
            f"the Triton attention kernel serves pages of a multiple of 16 positions, "
            f"not {page}; implementation='xla' serves any"
        )
    n = k if heads is None else heads.shape[1]
    s = page if table is None else page * table.shape[1]
    if config is None:
        facts = {"b": b, "n": n, "g": g, "s": s, "d": d, "itemsize": q.dtype.itemsize}
        config = heuristic(**facts, page=None if table is None else page)
    lists, counts = (None, None) if pages is None else pages
    work = Work(
        s=s,
        n=n,
        block=config.block,
        piece=config.piece,
        programs=config.programs,
        entries=None if lists is None else lists.shape[2],
        parts=1 if table is None else page // config.block,
        window=window,
    )
    static = Static(work, b, k, g, d, scale, softcap)
    inputs = Inputs(
        lengths, heads, n_active, table, lists, counts, q, new, k_cache, v_cache
    )
    several = None
    if work.most_pieces > 1:
        shape = (b, n, work.most_pieces, g)
        several = (
            jax.ShapeDtypeStruct((*shape, d), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 2), jnp.float32),
            jax.ShapeDtypeStruct((b, n, 3), jnp.int32),
        )
    caches, aliases = None, {}
    if new is not None:  # written in place
        caches = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in inputs[-2:])
        place = len(jax.tree.leaves(inputs)) - 2
        aliases = {place: 0, place + 1: 1}
    written, pieces, out = pl.pallas_call(
        functools.partial(_attend_share, static=static),
        grid=(config.programs,),
        out_shape=(caches, several, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
    )(inputs)
    if pieces is not None:
        partials, scales, counts = pieces
        out = fold_pieces(partials, scales, counts, out, interpret=interpret)
    return out, *(written or (k_cache, v_cache))


def _attend_share(
    inputs: Inputs,
    cache_refs,  # None, or the caches, to append to
    piece_refs,  # None, or what fold_pieces takes
    out_ref,  # [b, h, d]
    *,
    static: Static,
):
    """Attend over the pieces that begin in one program's share of all tiles."""
    program, work = pl.program_id(0), static.work
    line = Line(inputs, static)
    begin, count = work.share(line.total, program)
    end = begin + count

    def look_up(tile):
        sequence, slot, *tiles = line.find(tile)
        return *tiles, _load_group(inputs, sequence, slot, static)

    def attend_group(carry):
        tile, first, behind, loaded = carry
        # What begins in this share is computed to its end.
        stop = line.piece_at(first, behind, jnp.minimum(end, behind))
        # The next one's indices and queries are on their way meanwhile.
        following = look_up(stop)
        span = tile - first, stop - first, behind - first
        found = _attend_tiles(inputs, piece_refs, loaded, *span, static)
        whole = (tile == first) & (stop == behind)

        @pl.when(whole)
        def _():
            _store_group(out_ref, loaded, found, static)

        if piece_refs is not None:

            @pl.when(jnp.logical_not(whole))
            def _():
                _store_sums(piece_refs, loaded, span[1] - 1, span[2], found, static)

            # Who begins a list says what is left to add up of it.
            @pl.when(tile == first)
            def _():
                _store_count(piece_refs[2], loaded, span[1], span[2], work)

        return stop, *following

    _, _, first, behind = line.find(begin)
    tile = line.piece_at(first, jnp.maximum(behind, begin), begin)
    lax.while_loop(lambda carry: carry[0] < end, attend_group, (tile, *look_up(tile)))

    def finish(i, _):
        sequence = program + i * work.programs
        tiles = _finish_groups(inputs, out_ref, sequence, static)
        if piece_refs is not None:
            slots = jnp.arange(tiles.shape[0], dtype=jnp.int32)
            nothing = (slots < work.n) & (tiles == 0)
            at = piece_refs[2].at[sequence, slots, 0]
            pltriton.store(at, jnp.zeros_like(slots), mask=nothing)
        _append(inputs, cache_refs, sequence, static)

    lax.fori_loop(0, pl.cdiv(static.b - program, work.programs), finish, None)


class _Group(NamedTuple):
    """What a program needs to know of a group before it can read its cache."""

    sequence: jax.Array
    slot: jax.Array
    group: jax.Array
    length: jax.Array
    q: jax.Array  # [rows, cols]; rows are the group's query heads
    new: tuple[jax.Array, ...] | None  # key and value to append, [cols]


def _load_group(inputs, sequence, slot, static) -> _Group:
    group = inputs.group(sequence, slot, static)
    rows, cols, mask = _head_tile(static.g, static.d)
    at = inputs.q.at[sequence, (group * static.g + rows)[:, None], cols[None, :]]
    q = pltriton.load(at, mask=mask, other=0)
    new = None
    if inputs.new is not None:
        new = tuple(
            pltriton.load(ref.at[sequence, group, cols], mask=cols < static.d, other=0)
            for ref in inputs.new
        )
    return _Group(sequence, slot, group, inputs.lengths[sequence], q, new)


def _attend_tiles(inputs, piece_refs, loaded, start, stop, tiles, static):
    """Attention of one group over some pieces of its list.

    Pieces from the beginning of the list on are added up. Others are stored, all but
    the last, where `fold_pieces` finds them, which adds them up in the same way.

    Args:
        inputs: of the kernel.
        piece_refs: likewise.
        loaded: of the group.
        start: number of the first tile in the list, where a piece begins.
        stop: behind the last one.
        tiles: of the whole list.
        static: of the kernel.

    Returns:
        The `Sums` of all pieces, where they begin the list, or else of the last.
    """
    work = static.work
    _, _, group, length, q, new = loaded
    oldest, cached = work.positions(length)
    if new is not None:  # It is not read from the cache: nobody knows if it is there.
        cached -= 1
    rows, cols, _ = _head_tile(static.g, static.d)
    steps = jnp.arange(work.block, dtype=jnp.int32)
    size = work.piece_tiles(tiles)
    nothing = Sums.nothing(rows.shape[0], cols.shape[0])

    def step(index, carry):
        sums, before, (tile, page) = carry
        # Where the next one lies is on its way before it is needed.
        following = _find_tile(inputs, loaded, index + 1, static)
        positions = tile * work.block + steps
        seen = positions < cached
        if inputs.lists is not None:
            seen &= positions >= 0
        if work.window is not None:
            seen &= positions >= oldest
        # Masked loads yield 0 for what is not seen, where the cache may hold NaN.
        mask = seen[:, None]
        if static.d < cols.shape[0]:
            mask &= (cols < static.d)[None, :]
        begin = tile if inputs.table is None else lax.rem(tile, work.parts)
        at = (page, group, (begin * work.block + steps)[:, None], cols[None, :])
        keys = pltriton.load(inputs.k_cache.at[at], mask=mask, other=0)
        values = pltriton.load(inputs.v_cache.at[at], mask=mask, other=0)
        scores = _scale_scores(dot(q, keys, 1), static)
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
        top, total, acc = sums.raised(jnp.max(scores, axis=1))
        # The total is of the rounded weights, so that the output is a mean.
        weights = jnp.exp2(scores - top[:, None]).astype(values.dtype)
        total = total + jnp.sum(weights.astype(jnp.float32), axis=1)
        acc = acc + dot(weights, values, 0)
        sums = Sums(top, total, acc)
        if piece_refs is not None:

            def close():
                found = before.plus(sums)

                @pl.when(start > 0)
                def _():
                    _store_sums(piece_refs, loaded, index, tiles, found, static)

                found = jax.tree.map(
                    lambda x, y: jnp.where(start > 0, x, y), nothing, found
                )
                return nothing, found

            ends = (lax.rem(index + 1, size) == 0) & (index + 1 < stop)
            sums, before = lax.cond(ends, close, lambda: (sums, before))
        return sums, before, following

    first = _find_tile(inputs, loaded, start, static)
    before = nothing if piece_refs is not None else None
    carry = lax.fori_loop(start, stop, step, (nothing, before, first))
    sums, before, _ = carry
    if new is not None:
        key, value = (array.astype(jnp.float32)[None, :] for array in new)
        scores = _scale_scores(jnp.sum(q.astype(jnp.float32) * key, axis=1), static)
        scores = jnp.where(stop == tiles, scores, -jnp.inf)
        top, total, acc = sums.raised(scores)
        weights = jnp.exp2(scores - top)
        sums = Sums(top, total + weights, acc + weights[:, None] * value)
    return sums if before is None else before.plus(sums)


def _find_tile(inputs, loaded, index, static):
    """A tile of a group's list: its number in the sequence, and the page it is in."""
    work = static.work
    if inputs.lists is None:
        tile = work.tiles(loaded.length)[0] + index
    else:
        row = inputs.row(loaded.group)
        last = inputs.lists.shape[2] - 1
        entry = jnp.minimum(lax.div(index, work.parts), last)
        entry = inputs.lists[loaded.sequence, row, entry]
        tile = entry * work.parts + lax.rem(index, work.parts)
    if inputs.table is None:
        return tile, loaded.sequence
    # Behind the list there is nothing, and a list may say anything.
    entry = jnp.clip(lax.div(tile, work.parts), 0, inputs.table.shape[1] - 1)
    page = inputs.table[loaded.sequence, entry]
    return tile, jnp.clip(page, 0, inputs.k_cache.shape[0] - 1)


def _scale_scores(scores, static):
    """Products of queries and keys to scores in units of log2: exp2 is in hardware."""
    if static.softcap is None:
        return scores * (static.scale * _LOG2_E)
    capped = jnp.tanh(scores * (static.scale / static.softcap))
    return capped * (static.softcap * _LOG2_E)


def _finish_groups(inputs, out_ref, sequence, static):
    """Zero the outputs of the groups of a sequence that nothing else writes.

    Returns:
        Tiles of each of its selected groups, [slots], 0 beyond those that count.
    """
    work = static.work
    rows, cols, mask = _head_tile(static.k * static.g, static.d)
    slots = jnp.arange(pl.next_power_of_2(work.n), dtype=jnp.int32)
    counts = slots < inputs.active(sequence, static)
    groups = inputs.group(sequence, slots, static, counts)
    length = inputs.lengths[sequence]
    if inputs.counts is None:
        tiles = jnp.broadcast_to(work.tiles(length)[1], slots.shape)
    else:
        row = inputs.row(groups)
        at = inputs.counts.at[sequence, row]
        tiles = work.listed(length, pltriton.load(at, mask=counts, other=0))
    tiles = jnp.where(counts, tiles, 0)
    same = (rows // static.g)[:, None] == groups[None, :]
    same &= (tiles > 0)[None, :]
    written = jnp.max(same.astype(jnp.int32), axis=1) > 0
    at = out_ref.at[sequence, rows[:, None], cols[None, :]]
    zeros = jnp.zeros(mask.shape, out_ref.dtype)
    pltriton.store(at, zeros, mask=mask & jnp.logical_not(written)[:, None])
    return tiles


def _append(inputs, cache_refs, sequence, static):
    """Write a sequence's new keys and values, of all groups, into the caches."""
    if inputs.new is None:
        return
    work = static.work
    _, end = work.positions(inputs.lengths[sequence])
    position = end - 1
    groups, cols, mask = _head_tile(static.k, static.d)
    mask &= position >= 0
    page, row = sequence, position
    if inputs.table is not None:
        size = work.block * work.parts
        entry = jnp.maximum(lax.div(position, size), 0)
        page = jnp.clip(inputs.table[sequence, entry], 0, inputs.k_cache.shape[0] - 1)
        row = lax.rem(position, size)
    for new_ref, cache_ref in zip(inputs.new, cache_refs, strict=True):
        at = new_ref.at[sequence, groups[:, None], cols[None, :]]
        new = pltriton.load(at, mask=mask, other=0)
        at = cache_ref.at[page, groups[:, None], row, cols[None, :]]
        pltriton.store(at, new, mask=mask)


def _store_sums(piece_refs, loaded, index, tiles, sums, static):
    """Store the sums that end in a piece, which has a tile of the list."""
    partials_ref, scales_ref, _ = piece_refs
    piece = lax.div(index, static.work.piece_tiles(tiles))
    rows, cols, mask = _head_tile(static.g, static.d)
    at = loaded.sequence, loaded.slot, piece, rows
    pltriton.store(scales_ref.at[*at, 0], sums.top, mask=rows < static.g)
    pltriton.store(scales_ref.at[*at, 1], sums.total, mask=rows < static.g)
    at = (*at[:3], rows[:, None], cols[None, :])
    pltriton.store(partials_ref.at[at], sums.acc, mask=mask)


def _store_count(counts_ref, loaded, stop, tiles, work):
    """Say which pieces `fold_pieces` finds of a list whose beginning is added up."""
    pieces = work.pieces(tiles)
    at = loaded.sequence, loaded.slot
    counts_ref[*at, 0] = jnp.where(stop < tiles, pieces, 0)
    counts_ref[*at, 1] = loaded.group
    counts_ref[*at, 2] = lax.div(stop - 1, work.piece_tiles(tiles))


def _store_group(out_ref, loaded, sums, static):
    """Store the outputs of a group's query heads."""
    rows, cols, mask = _head_tile(static.g, static.d)
    heads = (loaded.group * static.g + rows)[:, None]
    at = out_ref.at[loaded.sequence, heads, cols[None, :]]
    pltriton.store(at, sums.mean().astype(out_ref.dtype), mask=mask)


def _head_tile(count, d):
    """The indices of a tile of heads, [rows] and [cols], and which of it exist."""
    rows = jnp.arange(max(pl.next_power_of_2(count), 16), dtype=jnp.int32)
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    return rows, cols, (rows < count)[:, None] & (cols < d)[None, :]
