"""Attention over selected KV groups as a Pallas kernel for Triton.

A selected group of one sequence is computed for all its `g` query heads at once, so
that its keys and values are read once: decoding is bound by those bytes. Its cache is
read in tiles of `block` positions. A fixed number of programs shares all tiles of all
selected groups evenly (Stream-K, arXiv 2301.03598), whatever the sequences' lengths
and `n_active` are, so that the whole GPU is busy until the end. Where a share ends
within a group, its parts are partial results, which a second, small kernel combines
(FlashDecoding).

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

from pallas_kernels._backend import pltriton
from pallas_kernels.attention.configs import Config, heuristic
from pallas_kernels.tuning import table

_MAX_GROUP = 128
_MAX_HEAD_DIM = 256
# Partial results that the combining kernel reads at once.
_MAX_CHUNK = 128
_LOG2_E = math.log2(math.e)


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
        config = table.attention_config(heuristic(**facts), **facts)
    static = _Static(b, k, g, s, d, n, config.block, window, scale, softcap)
    selection = _Selection(lengths, heads, n_active)

    def call(kernel, grid, out_shape, num_warps=config.num_warps, **kwargs):
        return pl.pallas_call(
            functools.partial(kernel, static=static),
            grid=grid,
            out_shape=out_shape,
            interpret=interpret,
            compiler_params=pltriton.CompilerParams(
                num_warps=num_warps, num_stages=config.num_stages
            ),
            **kwargs,
        )

    inputs = (selection, q, new, k_cache, v_cache)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    caches, aliases = None, {}
    if new is not None:  # written in place
        caches = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in inputs[-2:])
        place = len(jax.tree.leaves(inputs)) - 2
        aliases = {place: 0, place + 1: 1}

    def attend_with(kernel, grid, *outs):
        results = call(kernel, grid, (caches, *outs), input_output_aliases=aliases)
        written, *results = results(*inputs)
        return results, (written or (k_cache, v_cache))

    if not config.programs:
        (out,), caches = attend_with(_attend_group, (b, n), out)
        return out, *caches
    # A share cuts at most two groups: the one it starts in and the one it ends in.
    programs, parts = config.programs, (config.programs, 2, g)
    results, caches = attend_with(
        _attend_share,
        (programs,),
        jax.ShapeDtypeStruct((*parts, d), jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
        jax.ShapeDtypeStruct((programs, 4), jnp.int32),
        out,
    )
    # As many parts at once as a group has when all are equally long.
    chunk = min(pl.next_power_of_2(-(-programs // (b * n)) + 1), _MAX_CHUNK)
    out = call(
        functools.partial(_combine, chunk=chunk),
        (programs, g),
        out,
        num_warps=max(chunk * pl.next_power_of_2(d) // 2048, 1),
        input_output_aliases={3: 0},
    )(*results)
    return out, *caches


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for: the glossary's dimensions and the options."""

    b: int
    k: int
    g: int
    s: int
    d: int
    n: int
    block: int
    window: int | None
    scale: float
    softcap: float | None


class _Selection(NamedTuple):
    """What to read: arrays outside of the kernels, refs inside."""

    lengths: jax.Array  # [b]
    heads: jax.Array | None  # [b, n]; None is every group
    n_active: jax.Array | None  # [b]; None is n

    def length(self, sequence, static):
        """The positions of a sequence in its cache."""
        # The clip keeps a wrong length from reading outside of the cache.
        return jnp.clip(self.lengths[sequence], 0, static.s)

    def active(self, sequence, static):
        """How many groups are selected for a sequence."""
        if self.n_active is None:
            return static.n
        return jnp.clip(self.n_active[sequence], 0, static.n)

    def group(self, sequence, slot, static):
        """The KV group in a slot of a sequence's selection."""
        if self.heads is None:
            return slot
        # The clip keeps a wrong index from reading outside of the cache.
        return jnp.clip(self.heads[sequence, slot], 0, static.k - 1)


class _Segment(NamedTuple):
    """One selected group's run of tiles, in the row of all tiles of the call."""

    sequence: jax.Array
    slot: jax.Array  # in the sequence's selection
    start: jax.Array  # the run's first tile
    stop: jax.Array  # that behind its last


class _Schedule:
    """The row of all tiles of a call: sequence by sequence, slot by slot.

    Every program works it out for itself from the lengths.
    """

    def __init__(self, selection, static, programs):
        self.index = jnp.arange(pl.next_power_of_2(static.b), dtype=jnp.int32)
        exists = self.index < static.b
        at = selection.lengths.at[self.index]
        length = pltriton.load(at, mask=exists, other=0)
        first_tile, stop = _tiles(jnp.clip(length, 0, static.s), static)
        self.tiles = stop - first_tile
        work = self.tiles * static.n
        if selection.n_active is not None:
            at = selection.n_active.at[self.index]
            active = pltriton.load(at, mask=exists, other=0)
            work = self.tiles * jnp.clip(active, 0, static.n)
        self.ends = jnp.cumsum(work)
        self.total = jnp.sum(work)
        self.programs = programs
        self.static = static

    def share(self, program):
        """The first tile of a program's share; it ends where the next one starts."""
        each, rest = self.total // self.programs, self.total % self.programs
        return program * each + jnp.minimum(program, rest)

    def program(self, tile):
        """The program whose share a tile belongs to."""
        each, rest = self.total // self.programs, self.total % self.programs
        longer = tile // (each + 1)  # the first `rest` shares have one tile more
        return jnp.where(longer < rest, longer, (tile - rest) // jnp.maximum(each, 1))

    def segment(self, tile) -> _Segment:
        """The segment that a tile belongs to; any that exists, beyond the last tile."""
        before = self.ends <= tile
        sequence = jnp.sum(before.astype(jnp.int32))
        start = jnp.max(jnp.where(before, self.ends, 0))
        tiles = jnp.sum(jnp.where(self.index == sequence, self.tiles, 0))
        slot = (tile - start) // jnp.maximum(tiles, 1)
        start += slot * tiles
        return _Segment(
            jnp.minimum(sequence, self.static.b - 1),
            jnp.minimum(slot, self.static.n - 1),
            start,
            start + tiles,
        )


def _attend_share(
    selection,
    q_ref,  # [b, h, d]
    new_refs,  # None, or what to append: keys and values [b, k, d]
    k_ref,  # [b, k, s, d]
    v_ref,  # [b, k, s, d]
    cache_refs,  # None, or the caches, to append to
    part_ref,  # [programs, 2, g, d] float32
    log_ref,  # [programs, 2, g] float32: log2 of the part's sum of weights
    cut_ref,  # [programs, 4], of the group that a share starts and cuts: see _combine
    out_ref,  # [b, h, d]
    *,
    static: _Static,
):
    """Attend over one program's share of all tiles."""
    program, programs = pl.program_id(0), part_ref.shape[0]
    schedule = _Schedule(selection, static, programs)
    begin, end = schedule.share(program), schedule.share(program + 1)

    def look_up(tile):
        segment = schedule.segment(tile)
        group = selection.group(segment.sequence, segment.slot, static)
        which = segment.sequence, group
        return segment, _load_group(selection, q_ref, new_refs, which, static)

    def attend_segment(carry):
        tile, segment, loaded, _ = carry
        stop = jnp.minimum(end, segment.stop)
        # The next one's indices and queries are on their way meanwhile.
        following = look_up(stop)
        start = tile - segment.start
        acc, log = _attend_tiles(
            k_ref, v_ref, loaded, start, start + stop - tile, static
        )
        starts, stops = tile == segment.start, stop == segment.stop

        @pl.when(starts & stops)
        def _():
            _store_group(out_ref, loaded, acc, static)

        # Of the two groups that a share can cut, it starts in one, place 0, and ends
        # in the other, place 1.
        place = (segment.start > begin).astype(jnp.int32)

        @pl.when(jnp.logical_not(starts & stops))
        def _():
            rows, cols, mask = _head_tile(static.g, static.d)
            at = part_ref.at[program, place, rows[:, None], cols[None, :]]
            pltriton.store(at, acc, mask=mask)
            at = log_ref.at[program, place, rows]
            pltriton.store(at, log, mask=rows < static.g)

        last = schedule.program(segment.stop - 1)
        parts = jnp.where(starts & jnp.logical_not(stops), last + 1 - program, 0)
        return stop, *following, (parts, place, loaded.sequence, loaded.group)

    zero = jnp.zeros((), jnp.int32)
    carry = (begin, *look_up(begin), (zero,) * 4)
    cut = lax.while_loop(lambda carry: carry[0] < end, attend_segment, carry)[-1]
    for i, value in enumerate(cut):
        cut_ref[program, i] = value

    def finish(i, _):
        sequence = program + i * programs
        _zero_unselected(selection, out_ref, sequence, static)
        _append(selection, new_refs, cache_refs, sequence, static)

    lax.fori_loop(0, pl.cdiv(static.b - program, programs), finish, None)


def _attend_group(
    selection,
    q_ref,  # [b, h, d]
    new_refs,  # None, or what to append: keys and values [b, k, d]
    k_ref,  # [b, k, s, d]
    v_ref,  # [b, k, s, d]
    cache_refs,  # None, or the caches, to append to
    out_ref,  # [b, h, d]
    *,
    static: _Static,
):
    """Attend for one selected group of one sequence."""
    sequence, slot = pl.program_id(0), pl.program_id(1)
    length = selection.length(sequence, static)

    @pl.when((slot < selection.active(sequence, static)) & (length > 0))
    def _():
        group = selection.group(sequence, slot, static)
        which = sequence, group
        loaded = _load_group(selection, q_ref, new_refs, which, static)
        first_tile, stop = _tiles(length, static)
        acc, _ = _attend_tiles(k_ref, v_ref, loaded, 0, stop - first_tile, static)
        _store_group(out_ref, loaded, acc, static)

    @pl.when(slot == 0)
    def _():
        _zero_unselected(selection, out_ref, sequence, static)
        _append(selection, new_refs, cache_refs, sequence, static)


class _Group(NamedTuple):
    """What a program needs to know of a group before it can read its cache."""

    sequence: jax.Array
    group: jax.Array
    length: jax.Array
    q: jax.Array  # [rows, cols]; rows are the group's query heads
    new: tuple[jax.Array, ...] | None  # key and value to append, [cols]


def _load_group(selection, q_ref, new_refs, which, static) -> _Group:
    sequence, group = which
    rows, cols, mask = _head_tile(static.g, static.d)
    at = q_ref.at[sequence, (group * static.g + rows)[:, None], cols[None, :]]
    q = pltriton.load(at, mask=mask, other=0)
    new = None
    if new_refs is not None:
        new = tuple(
            pltriton.load(ref.at[sequence, group, cols], mask=cols < static.d, other=0)
            for ref in new_refs
        )
    return _Group(sequence, group, selection.length(sequence, static), q, new)


def _attend_tiles(k_ref, v_ref, loaded, start, stop, static):
    """Attention of one group over the tiles start..stop of those that it sees.

    Returns:
        The output of these tiles alone, [rows, cols] float32, and the log2 of their
        sum of weights, [rows].
    """
    sequence, group, length, q, new = loaded
    # What is to be appended is not read from the cache: nobody knows if it is there.
    cached = length if new is None else length - 1
    rows, cols, _ = _head_tile(static.g, static.d)
    steps = jnp.arange(static.block, dtype=jnp.int32)

    def step(index, carry):
        top, total, acc = carry  # [rows], [rows], [rows, cols]
        positions = index * static.block + steps
        seen = positions < cached
        if static.window is not None:
            seen &= positions >= length - static.window
        # Masked loads yield 0 for what is not seen, where the cache may hold NaN.
        mask = seen[:, None]
        if static.d < cols.shape[0]:
            mask &= (cols < static.d)[None, :]
        at = (sequence, group, positions[:, None], cols[None, :])
        keys = pltriton.load(k_ref.at[at], mask=mask, other=0)
        values = pltriton.load(v_ref.at[at], mask=mask, other=0)
        scores = _scale_scores(_dot(q, keys, 1), static)
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        rescale = jnp.exp2(top - new_top)
        total = total * rescale + jnp.sum(weights, axis=1)
        acc = acc * rescale[:, None] + _dot(weights.astype(values.dtype), values, 0)
        return new_top, total, acc

    top = jnp.full(rows.shape, -jnp.inf, jnp.float32)
    total = jnp.zeros(rows.shape, jnp.float32)
    acc = jnp.zeros((rows.shape[0], cols.shape[0]), jnp.float32)
    first_tile, last_tile = _tiles(length, static)
    if new is not None:
        # The last part starts from the new position, the others from nothing.
        key, value = (array.astype(jnp.float32)[None, :] for array in new)
        scores = _scale_scores(jnp.sum(q.astype(jnp.float32) * key, axis=1), static)
        is_last = first_tile + stop == last_tile
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


def _combine(
    part_ref,  # [programs, 2, g, d] float32
    log_ref,  # [programs, 2, g] float32
    cut_ref,  # [programs, 4]: parts of a group (0: none is cut), the place of the
    # first, which this share holds, as the next shares hold the others; whose it is
    _,  # what out_ref aliases
    out_ref,  # [b, h, d]
    *,
    static: _Static,
    chunk: int,
):
    """Combine the parts of the group that one share starts and its end cuts."""
    program, row = pl.program_id(0), pl.program_id(1)
    parts, place, sequence, group = (cut_ref[program, i] for i in range(4))
    cols = jnp.arange(pl.next_power_of_2(static.d), dtype=jnp.int32)

    @pl.when(parts > 0)
    def _():
        def step(i, carry):
            top, total, acc = carry
            index = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            places = jnp.where(index == 0, place, 0)
            mask = index < parts
            at = log_ref.at[program + index, places, row]
            logs = pltriton.load(at, mask=mask, other=-jnp.inf)
            at = (program + index)[:, None], places[:, None], row, cols[None, :]
            mask = mask[:, None] & (cols < static.d)[None, :]
            part = pltriton.load(part_ref.at[at], mask=mask, other=0)
            new_top = jnp.maximum(top, jnp.max(logs))
            rescale, weights = jnp.exp2(top - new_top), jnp.exp2(logs - new_top)
            total = total * rescale + jnp.sum(weights)
            acc = acc * rescale + jnp.sum(part * weights[:, None], axis=0)
            return new_top, total, acc

        carry = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.zeros(cols.shape))
        _, total, acc = lax.fori_loop(0, pl.cdiv(parts, chunk), step, carry)
        at = out_ref.at[sequence, group * static.g + row, cols]
        pltriton.store(at, (acc / total).astype(out_ref.dtype), mask=cols < static.d)


def _zero_unselected(selection, out_ref, sequence, static):
    """Zero the outputs of the groups of a sequence that nothing else writes."""
    h = static.k * static.g
    rows, cols, mask = _head_tile(h, static.d)
    length = selection.length(sequence, static)
    written = jnp.broadcast_to(length > 0, rows.shape)
    if selection.heads is not None:
        slots = jnp.arange(pl.next_power_of_2(static.n), dtype=jnp.int32)
        counts = slots < selection.active(sequence, static)
        at = selection.heads.at[sequence, slots]
        groups = pltriton.load(at, mask=counts, other=0)
        groups = jnp.where(counts, jnp.clip(groups, 0, static.k - 1), -1)
        same = (rows // static.g)[:, None] == groups[None, :]
        written &= jnp.max(same.astype(jnp.int32), axis=1) > 0
    at = out_ref.at[sequence, rows[:, None], cols[None, :]]
    zeros = jnp.zeros(mask.shape, out_ref.dtype)
    pltriton.store(at, zeros, mask=mask & jnp.logical_not(written)[:, None])


def _append(selection, new_refs, cache_refs, sequence, static):
    """Write a sequence's new keys and values, of all groups, into the caches."""
    if new_refs is None:
        return
    position = selection.length(sequence, static) - 1
    groups, cols, mask = _head_tile(static.k, static.d)
    mask &= position >= 0
    for new_ref, cache_ref in zip(new_refs, cache_refs, strict=True):
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


def _tiles(length, static):
    """The first tile that a sequence of a length attends to, and that behind the last.

    All its groups attend to the same.
    """
    stop = pl.cdiv(length, static.block)
    if static.window is None:
        return jnp.zeros_like(stop), stop
    return jnp.maximum(length - static.window, 0) // static.block, stop


def _dot(x, y, axis):
    """Contract the last axis of x with the given axis of y, summed in float32."""
    return lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # float32 operands would become TF32
        preferred_element_type=jnp.float32,
    )
