"""Attention of packed pieces of prompts over paged keys as a Pallas kernel for Triton.

A program has one item, some rows of one piece, and one KV group: the group's `g` query
heads of each row stand under each other, up to `block_q` in all, so that its keys are
read once for all of them. It walks the tiles of `block_k` positions of its sequence
from position 0, or from the first tile that holds anything in its window, to the item's
last position, with an online softmax (FlashAttention).

A row's bits do not depend on the item that it is in. Tiles have fixed borders; one that
a row does not see leaves its sums as they are, as it multiplies them by exp2(0) and
adds 0. Tiles that all rows see whole need no mask: they have a loop of their own, whose
arithmetic is that of the other.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import once, pltriton
from pallas_kernels._dot import dot
from pallas_kernels._sizes import ceil_power_of_two, floor_power_of_two
from pallas_kernels.attention.items import Items

_MAX_GROUP = 128
_MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    A row's bits depend on it, through the order of sums, so it must not depend on how
    many rows or pieces a call has.

    Attributes:
        block_q: rows of the dots, a power of two, at least 16 and g; the query heads of
            `block_q // g` rows of q are in them.
        block_k: cache positions per tile; a power of two, at least 16.
        num_warps: warps per program.
        num_stages: tiles whose loads are in flight at once.
        split: whether tiles that all rows see whole are computed without a mask.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    split: bool = True


# Numbers in the accumulator: 128 rows of 128.
_ACCUMULATOR = 128 * 128
# Bytes of one tile of keys: 128 positions of 128 bfloat16.
_TILE_BYTES = 32 * 1024


def heuristic(*, g: int, d: int, itemsize: int) -> Config:
    """A config that always works, from the shapes and the bytes per element."""
    padded = _columns(d)
    # float32 is multiplied without matrix units, from registers.
    most = _ACCUMULATOR // padded // (1 if itemsize == 2 else 4)
    block_q = max(min(most, 128), ceil_power_of_two(g), 16)
    tile_bytes = _TILE_BYTES if itemsize == 2 else _TILE_BYTES // 2
    block_k = floor_power_of_two(tile_bytes // (padded * itemsize))
    num_warps = 8 if block_q >= 128 or padded > 128 else 4
    return Config(block_q, min(max(block_k, 16), 128), num_warps, num_stages=2)


@once("scale", "window", "softcap", "interpret", "config")
def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    table: jax.Array,
    slots: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    firsts: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """See `attend_chunk`; a config of None is the heuristic's.

    Raises:
        NotImplementedError: if the kernel cannot serve these shapes.
    """
    n, h, d = q.shape
    k = k_pages.shape[1]
    g = h // k
    if g > _MAX_GROUP or d > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the Triton kernel serves up to {_MAX_GROUP} query heads per KV group and "
            f"a head dim up to {_MAX_HEAD_DIM}, not {g} and {d}; "
            "implementation='xla' serves any"
        )
    config = config or heuristic(g=g, d=d, itemsize=q.dtype.itemsize)
    items = Items(n=n, r=slots.shape[0], rows=config.block_q // g)
    static = _Static(items, config, g, scale, window, softcap)
    inputs = _Inputs(q, k_pages, v_pages, table, slots, starts, counts, firsts)
    return pl.pallas_call(
        functools.partial(_attend_item, static=static),
        grid=(items.most, k),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # The rows of no piece stay as they are here.
        input_output_aliases={len(inputs): 0},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        name="attend_chunk",
    )(inputs, jnp.zeros_like(q))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for."""

    items: Items
    config: Config
    g: int
    scale: float
    window: int | None
    softcap: float | None


class _Inputs(NamedTuple):
    """What a call reads: arrays outside of the kernel, refs inside."""

    q: Any  # [n, h, d]
    k_pages: Any  # [p, k, page, d]
    v_pages: Any  # [p, k, page, d]
    table: Any  # [slots, m]
    slots: Any  # [r]
    starts: Any  # [r]
    counts: Any  # [r]
    firsts: Any  # [r]


class _Item(NamedTuple):
    """A program's rows: where they are, and what they see."""

    group: jax.Array
    slot: jax.Array
    q: jax.Array  # [rows, cols]
    positions: jax.Array  # [rows]; of the last valid one behind that
    first: jax.Array  # position of the first row
    end: jax.Array  # behind the last row's position


def _attend_item(inputs: _Inputs, _, out_ref, *, static: _Static):
    """One item of one KV group. Items go from the last, which sees most, backwards."""
    program, group = pl.program_id(0), pl.program_id(1)
    items, g, d = static.items, static.g, inputs.q.shape[2]
    index = jnp.arange(ceil_power_of_two(items.r), dtype=jnp.int32)
    at = inputs.counts.at[index]
    counts = pltriton.load(at, mask=index < items.r, other=0)
    total = jnp.minimum(jnp.sum(items.counts(counts)), items.most)

    @pl.when(program < total)
    def _():
        piece, skipped = items.find(counts, total - 1 - program)
        left = inputs.counts[piece] - skipped
        first = inputs.firsts[piece] + skipped
        # The query heads of one row of q stand together.
        lines = jnp.arange(static.config.block_q, dtype=jnp.int32)
        cols = jnp.arange(_columns(d), dtype=jnp.int32)
        steps, heads = lax.div(lines, g), group * g + lax.rem(lines, g)
        rows = inputs.starts[piece] + skipped + steps
        valid = (steps < jnp.minimum(left, items.rows)) & (rows >= 0) & (rows < items.n)
        mask = valid[:, None] & (cols < d)[None, :]
        at = rows[:, None], heads[:, None], cols[None, :]
        last = jnp.minimum(left, items.rows) - 1
        out = _attend_tiles(
            inputs,
            _Item(
                group=group,
                slot=jnp.clip(inputs.slots[piece], 0, inputs.table.shape[0] - 1),
                q=pltriton.load(inputs.q.at[at], mask=mask, other=0),
                positions=first + jnp.minimum(steps, last),
                first=first,
                end=first + last + 1,
            ),
            static,
        )
        pltriton.store(out_ref.at[at], out.astype(out_ref.dtype), mask=mask)


def _attend_tiles(inputs: _Inputs, item: _Item, static: _Static) -> jax.Array:
    """The attention of an item's rows, [rows, cols] float32."""
    block_q, block_k = static.config.block_q, static.config.block_k
    d = inputs.q.shape[2]
    cols = jnp.arange(_columns(d), dtype=jnp.int32)
    # To scores in units of log2, as exp2 is in hardware. They are multiplied last, in
    # one fused multiply-add with the difference from the top.
    factor = (static.softcap or static.scale) * _LOG2_E
    oldest = jnp.zeros_like(item.positions)
    if static.window is not None:
        oldest = jnp.maximum(item.positions - (static.window - 1), 0)

    def step(index, carry, *, masked: bool):
        top, total, acc = carry  # [rows], [rows], [rows, cols]
        positions = index * block_k + jnp.arange(block_k, dtype=jnp.int32)
        known = None
        if masked:  # What a masked load leaves out is 0; memory may hold NaN.
            known = (positions < item.end)[:, None]
            if static.window is not None:
                known &= (positions > item.first - static.window)[:, None]
        if d < cols.shape[0]:
            exists = (cols < d)[None, :]
            known = exists if known is None else known & exists
        at = _places(inputs, item, index, positions, block_k, cols)
        other = None if known is None else 0
        keys = pltriton.load(inputs.k_pages.at[at], mask=known, other=other)
        values = pltriton.load(inputs.v_pages.at[at], mask=known, other=other)
        scores = dot(item.q, keys, 1)
        if static.softcap is not None:
            scores = jnp.tanh(scores * (static.scale / static.softcap))
        seen = None
        if masked:
            seen = positions[None, :] <= item.positions[:, None]
            if static.window is not None:
                seen &= positions[None, :] >= oldest[:, None]
        new_top = jnp.max(_hide(scores, seen, -jnp.inf), axis=1) * factor
        new_top = level = jnp.maximum(top, new_top)
        if static.window is not None:
            # Of a row that has seen nothing yet it is -inf; -inf - -inf is NaN.
            level = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        # What is not seen is hidden after the difference, not before, so that both
        # loops have the same product before it, to fuse or not.
        weights = jnp.exp2(scores * factor - level[:, None])
        weights = _hide(weights, seen, 0.0)
        rescale = jnp.exp2(top - level)
        total = total * rescale + jnp.sum(weights, axis=1)
        acc = acc * rescale[:, None] + dot(weights.astype(values.dtype), values, 0)
        return new_top, total, acc

    carry = (
        jnp.full((block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros((block_q, cols.shape[0]), jnp.float32),
    )
    # Wrong numbers must not lead out of the table.
    length = inputs.table.shape[1] * inputs.k_pages.shape[2]
    end = lax.div(jnp.clip(item.end, 0, length) + (block_k - 1), block_k)
    start = jnp.zeros_like(end)
    if static.window is not None:
        start = lax.div(jnp.clip(item.first - (static.window - 1), 0, length), block_k)
    elif static.config.split:
        whole = lax.div(jnp.clip(item.first + 1, 0, length), block_k)
        carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
        start = whole
    _, total, acc = lax.fori_loop(
        start, end, functools.partial(step, masked=True), carry
    )
    return acc / total[:, None]


def _columns(d: int) -> int:
    """The head dim as dots want it."""
    return max(ceil_power_of_two(d), 16)


def _hide(x: jax.Array, seen: jax.Array | None, value: float) -> jax.Array:
    """The value in place of what is not seen; seen of None is all."""
    return x if seen is None else jnp.where(seen, x, value)


def _places(inputs, item, index, positions, block_k, cols):
    """Where the positions of a tile lie in the pool, as an index of its pages."""
    p, _, page, _ = inputs.k_pages.shape
    m = inputs.table.shape[1]
    if page % block_k == 0:  # The tile is in one page.
        column = lax.div(index * block_k, page)
        offsets = positions - column * page
        numbers = jnp.clip(inputs.table[item.slot, column], 0, p - 1)
        return numbers, item.group, offsets[:, None], cols[None, :]
    columns = jnp.minimum(lax.div(positions, page), m - 1)
    numbers = jnp.clip(pltriton.load(inputs.table.at[item.slot, columns]), 0, p - 1)
    offsets = lax.rem(positions, page)
    return numbers[:, None], item.group, offsets[:, None], cols[None, :]
