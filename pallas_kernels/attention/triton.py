"""Attention over selected KV groups as a Pallas kernel for Triton.

A selected group of one sequence is computed for all its `g` query heads at once, so
that its keys and values are read once: decoding is bound by those bytes. Its cache is
read in tiles of `block` positions. A fixed number of programs shares all tiles of all
selected groups evenly (see `shares`), so that the whole GPU is busy until the end.
Where a share ends within a group, its pieces are partial results, which a second, small
kernel combines (FlashDecoding).

Triton wants arrays of power-of-two size and dots of at least 16 rows: head dims and
groups are padded with masked loads, never in memory.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tables
from pallas_kernels._backend import once, pltriton
from pallas_kernels._dot import dot
from pallas_kernels.attention.combine import combine_pieces
from pallas_kernels.attention.configs import Config, heuristic
from pallas_kernels.attention.shares import Work

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
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `select_head_attention` and, for new, `append_and_attend`.

    Returns:
        The output, and the caches: as they came, or with the new keys and values.
    """
    b, h, d = q.shape
    k, s = k_cache.shape[1:3]
    g = h // k
    if g > _MAX_GROUP or d > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the Triton attention kernel serves up to {_MAX_GROUP} query heads per "
            f"KV group and a head dim up to {_MAX_HEAD_DIM}, not {g} and {d}; "
            "implementation='xla' serves any"
        )
    n = k if heads is None else heads.shape[1]
    if config is None:
        facts = {"b": b, "n": n, "g": g, "s": s, "d": d, "itemsize": q.dtype.itemsize}
        config = tables.attention_config(heuristic(**facts), **facts)
    programs = config.programs
    work = Work(s=s, n=n, block=config.block, programs=programs, window=window)
    static = _Static(work, b, k, g, d, scale, softcap)
    inputs = _Inputs(lengths, heads, n_active, q, new, k_cache, v_cache)

    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    kernel, grid, outs = _attend_group, (b, n), (out,)
    if programs:
        partials = jax.ShapeDtypeStruct((programs, 2, g, d), jnp.float32)
        logs = jax.ShapeDtypeStruct((programs, 2, g), jnp.float32)
        cuts = jax.ShapeDtypeStruct((programs, 4), jnp.int32)
        kernel, grid, outs = _attend_share, (programs,), (partials, logs, cuts, out)
    caches, aliases = None, {}
    if new is not None:  # written in place
        caches = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in inputs[-2:])
        place = len(jax.tree.leaves(inputs)) - 2
        aliases = {place: 0, place + 1: 1}
    written, *results = pl.pallas_call(
        functools.partial(kernel, static=static),
        grid=grid,
        out_shape=(caches, *outs),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
    )(inputs)
    if programs:
        options = {"num_stages": config.num_stages, "interpret": interpret}
        results = [combine_pieces(*results, groups=b * n, **options)]
    return results[0], *(written or (k_cache, v_cache))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for: the work, the glossary's dimensions, options."""

    work: Work
    b: int
    k: int
    g: int
    d: int
    scale: float
    softcap: float | None


class _Inputs(NamedTuple):
    """What a call reads: arrays outside of the kernels, refs inside."""

    lengths: jax.Array  # [b]
    heads: jax.Array | None  # [b, n]; None is every group
    n_active: jax.Array | None  # [b]; None is n
    q: jax.Array  # [b, h, d]
    new: tuple[jax.Array, jax.Array] | None  # keys and values to append, [b, k, d]
    k_cache: jax.Array  # [b, k, s, d]
    v_cache: jax.Array  # [b, k, s, d]

    def active(self, sequence, static):
        """How many groups are selected for a sequence."""
        if self.n_active is None:
            return static.work.n
        return static.work.groups(self.n_active[sequence])


class _Line:
    """The line of all tiles, which every program works out from the lengths."""

    def __init__(self, inputs, static):
        self.static = static
        self.index = jnp.arange(pl.next_power_of_2(static.b), dtype=jnp.int32)

        def load(ref):
            mask = self.index < static.b
            return pltriton.load(ref.at[self.index], mask=mask, other=0)

        _, self.tiles = static.work.tiles(load(inputs.lengths))
        groups = static.work.n
        if inputs.n_active is not None:
            groups = static.work.groups(load(inputs.n_active))
        self.ends = jnp.cumsum(self.tiles * groups)
        self.total = jnp.sum(self.tiles * groups)

    def find(self, tile):
        """The selected group that a tile is of; any that exists, beyond the last tile.

        Returns:
            Its sequence, its slot in the sequence's selection, and where in the line
            its tiles start and stop.
        """
        before = self.ends <= tile
        sequence = jnp.sum(before.astype(jnp.int32))
        start = jnp.max(jnp.where(before, self.ends, 0))
        tiles = jnp.sum(jnp.where(self.index == sequence, self.tiles, 0))
        slot = lax.div(tile - start, jnp.maximum(tiles, 1))
        start += slot * tiles
        sequence = jnp.minimum(sequence, self.static.b - 1)
        slot = jnp.minimum(slot, self.static.work.n - 1)
        return sequence, slot, start, start + tiles


def _attend_share(
    inputs: _Inputs,
    cache_refs,  # None, or the caches, to append to
    partials_ref,  # [programs, 2, g, d] float32
    logs_ref,  # [programs, 2, g] float32
    cuts_ref,  # [programs, 4]: see combine_pieces
    out_ref,  # [b, h, d]
    *,
    static: _Static,
):
    """Attend over one program's share of all tiles."""
    program, work = pl.program_id(0), static.work
    line = _Line(inputs, static)
    begin, count = work.share(line.total, program)
    end = begin + count

    def look_up(tile):
        sequence, slot, *tiles = line.find(tile)
        return *tiles, _load_group(inputs, sequence, slot, static)

    def attend_piece(carry):
        tile, first, behind, loaded, _ = carry
        stop = jnp.minimum(end, behind)
        # The next one's indices and queries are on their way meanwhile.
        following = look_up(stop)
        start = tile - first
        acc, log = _attend_tiles(inputs, loaded, start, start + stop - tile, static)
        starts, stops = tile == first, stop == behind

        @pl.when(starts & stops)
        def _():
            _store_group(out_ref, loaded, acc, static)

        # Of the two groups that a share can cut, it starts in one, place 0, and ends
        # in the other, place 1.
        place = (first > begin).astype(jnp.int32)

        @pl.when(jnp.logical_not(starts & stops))
        def _():
            rows, cols, mask = _head_tile(static.g, static.d)
            at = partials_ref.at[program, place, rows[:, None], cols[None, :]]
            pltriton.store(at, acc, mask=mask)
            at = logs_ref.at[program, place, rows]
            pltriton.store(at, log, mask=rows < static.g)

        last = work.owner(line.total, behind - 1)
        pieces = jnp.where(starts & jnp.logical_not(stops), last + 1 - program, 0)
        return stop, *following, (pieces, place, loaded.sequence, loaded.group)

    zero = jnp.zeros((), jnp.int32)
    carry = (begin, *look_up(begin), (zero,) * 4)
    cut = lax.while_loop(lambda carry: carry[0] < end, attend_piece, carry)[-1]
    for i, value in enumerate(cut):
        cuts_ref[program, i] = value

    def finish(i, _):
        sequence = program + i * work.programs
        _zero_unselected(inputs, out_ref, sequence, static)
        _append(inputs, cache_refs, sequence, static)

    lax.fori_loop(0, pl.cdiv(static.b - program, work.programs), finish, None)


def _attend_group(inputs: _Inputs, cache_refs, out_ref, *, static: _Static):
    """Attend for one selected group of one sequence; the refs are _attend_share's."""
    sequence, slot = pl.program_id(0), pl.program_id(1)
    tiles = static.work.tiles(inputs.lengths[sequence])[1]

    @pl.when((slot < inputs.active(sequence, static)) & (tiles > 0))
    def _():
        loaded = _load_group(inputs, sequence, slot, static)
        acc, _ = _attend_tiles(inputs, loaded, 0, tiles, static)
        _store_group(out_ref, loaded, acc, static)

    @pl.when(slot == 0)
    def _():
        _zero_unselected(inputs, out_ref, sequence, static)
        _append(inputs, cache_refs, sequence, static)


class _Group(NamedTuple):
    """What a program needs to know of a group before it can read its cache."""

    sequence: jax.Array
    group: jax.Array
    length: jax.Array
    q: jax.Array  # [rows, cols]; rows are the group's query heads
    new: tuple[jax.Array, ...] | None  # key and value to append, [cols]


def _load_group(inputs, sequence, slot, static) -> _Group:
    group = slot
    if inputs.heads is not None:
        # The clip keeps a wrong index from reading outside of the cache.
        group = jnp.clip(inputs.heads[sequence, slot], 0, static.k - 1)
    rows, cols, mask = _head_tile(static.g, static.d)
    at = inputs.q.at[sequence, (group * static.g + rows)[:, None], cols[None, :]]
    q = pltriton.load(at, mask=mask, other=0)
    new = None
    if inputs.new is not None:
        new = tuple(
            pltriton.load(ref.at[sequence, group, cols], mask=cols < static.d, other=0)
            for ref in inputs.new
        )
    return _Group(sequence, group, inputs.lengths[sequence], q, new)


def _attend_tiles(inputs, loaded, start, stop, static):
    """Attention of one group over the tiles start..stop of those that it sees.

    Returns:
        The output of these tiles alone, [rows, cols] float32, and the log2 of their
        sum of weights, [rows].
    """
    work = static.work
    sequence, group, length, q, new = loaded
    oldest, cached = work.positions(length)
    if new is not None:  # It is not read from the cache: nobody knows if it is there.
        cached -= 1
    rows, cols, _ = _head_tile(static.g, static.d)
    steps = jnp.arange(work.block, dtype=jnp.int32)

    def step(index, carry):
        top, total, acc = carry  # [rows], [rows], [rows, cols]
        positions = index * work.block + steps
        seen = positions < cached
        if work.window is not None:
            seen &= positions >= oldest
        # Masked loads yield 0 for what is not seen, where the cache may hold NaN.
        mask = seen[:, None]
        if static.d < cols.shape[0]:
            mask &= (cols < static.d)[None, :]
        at = (sequence, group, positions[:, None], cols[None, :])
        keys = pltriton.load(inputs.k_cache.at[at], mask=mask, other=0)
        values = pltriton.load(inputs.v_cache.at[at], mask=mask, other=0)
        scores = _scale_scores(dot(q, keys, 1), static)
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        rescale = jnp.exp2(top - new_top)
        total = total * rescale + jnp.sum(weights, axis=1)
        acc = acc * rescale[:, None] + dot(weights.astype(values.dtype), values, 0)
        return new_top, total, acc

    top = jnp.full(rows.shape, -jnp.inf, jnp.float32)
    total = jnp.zeros(rows.shape, jnp.float32)
    acc = jnp.zeros((rows.shape[0], cols.shape[0]), jnp.float32)
    first_tile, tiles = work.tiles(length)
    if new is not None:
        # The last piece starts from the new position, the others from nothing.
        key, value = (array.astype(jnp.float32)[None, :] for array in new)
        scores = _scale_scores(jnp.sum(q.astype(jnp.float32) * key, axis=1), static)
        is_last = stop == tiles
        top = jnp.where(is_last, scores, top)
        total = jnp.where(is_last, 1.0, total)
        acc = jnp.where(is_last, jnp.broadcast_to(value, acc.shape), acc)
    top, total, acc = lax.fori_loop(
        first_tile + start, first_tile + stop, step, (top, total, acc)
    )
    return acc / total[:, None], top + jnp.log2(total)


def _scale_scores(scores, static):
    """Products of queries and keys to scores in units of log2: exp2 is in hardware."""
    if static.softcap is None:
        return scores * (static.scale * _LOG2_E)
    capped = jnp.tanh(scores * (static.scale / static.softcap))
    return capped * (static.softcap * _LOG2_E)


def _zero_unselected(inputs, out_ref, sequence, static):
    """Zero the outputs of the groups of a sequence that nothing else writes."""
    rows, cols, mask = _head_tile(static.k * static.g, static.d)
    _, tiles = static.work.tiles(inputs.lengths[sequence])
    written = jnp.broadcast_to(tiles > 0, rows.shape)
    if inputs.heads is not None:
        slots = jnp.arange(pl.next_power_of_2(static.work.n), dtype=jnp.int32)
        counts = slots < inputs.active(sequence, static)
        at = inputs.heads.at[sequence, slots]
        groups = pltriton.load(at, mask=counts, other=0)
        groups = jnp.where(counts, jnp.clip(groups, 0, static.k - 1), -1)
        same = (rows // static.g)[:, None] == groups[None, :]
        written &= jnp.max(same.astype(jnp.int32), axis=1) > 0
    at = out_ref.at[sequence, rows[:, None], cols[None, :]]
    zeros = jnp.zeros(mask.shape, out_ref.dtype)
    pltriton.store(at, zeros, mask=mask & jnp.logical_not(written)[:, None])


def _append(inputs, cache_refs, sequence, static):
    """Write a sequence's new keys and values, of all groups, into the caches."""
    if inputs.new is None:
        return
    _, end = static.work.positions(inputs.lengths[sequence])
    position = end - 1
    groups, cols, mask = _head_tile(static.k, static.d)
    mask &= position >= 0
    for new_ref, cache_ref in zip(inputs.new, cache_refs, strict=True):
        at = new_ref.at[sequence, groups[:, None], cols[None, :]]
        new = pltriton.load(at, mask=mask, other=0)
        at = cache_ref.at[sequence, groups[:, None], position, cols[None, :]]
        pltriton.store(at, new, mask=mask)


def _store_group(out_ref, loaded, acc, static):
    """Store the outputs of a group's query heads."""
    rows, cols, mask = _head_tile(static.g, static.d)
    heads = (loaded.group * static.g + rows)[:, None]
    at = out_ref.at[loaded.sequence, heads, cols[None, :]]
    pltriton.store(at, acc.astype(out_ref.dtype), mask=mask)


def _head_tile(count, d):
    """The indices of a tile of heads, [rows] and [cols], and which of it exist."""
    rows = jnp.arange(max(pl.next_power_of_2(count), 16), dtype=jnp.int32)
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    return rows, cols, (rows < count)[:, None] & (cols < d)[None, :]
