"""Selections as Pallas kernels for Triton: no sort, and no launch per step of one."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import once, pltriton, shared_bytes
from pallas_kernels._dot import dot
from pallas_kernels.select.search import find_threshold

# One program of the totals: rows of the batch per loop step and per warp, columns.
_ROWS = 64
_WARP_ROWS = 8
_COLUMNS = 128
# Of a router's hidden state, numbers per loop step.
_STEP = 64
# Keys that one thread loads at a time, 16 bytes.
_THREAD_KEYS = 4
# Heads of a sequence that one program ranks.
_HEADS = 16
# Above any key: nothing reaches it.
_NEVER = 2**31 - 1


@once("n", "interpret", "num_warps")
def union_neurons(
    scores, live, n: int, *, interpret=False, num_warps: int | None = None
) -> jax.Array:
    """See `pallas_kernels.union_neurons`; the arguments are checked there.

    One kernel sums the batch, one selects. num_warps is that of the second.
    """
    b, f = scores.shape
    num_warps = num_warps or _warps(f)
    places = _places(f, num_warps)
    rows = min(pl.next_power_of_2(b), _ROWS)
    keys = _call(
        functools.partial(_total, rows=rows),
        grid=(places // _COLUMNS,),
        shape=(places,),
        num_warps=max(rows // _WARP_ROWS, 1),
        interpret=interpret,
    )(scores, live)
    return _select(keys, f, n, num_warps, interpret)


@once("n", "interpret")
def needed_neurons(hidden, up, live, n: int, *, interpret=False) -> jax.Array:
    """See `pallas_kernels.needed_neurons`; the arguments are checked there.

    One kernel multiplies and sums the batch, so that no score is ever written.
    """
    f, num_warps = up.shape[0], _warps(up.shape[0])
    places = _places(f, num_warps)
    rows = min(max(pl.next_power_of_2(hidden.shape[0]), 16), _ROWS)
    columns = min(max(pl.next_power_of_2(up.shape[1]), 16), _STEP)
    # Half of the memory is for another program: there may be more than one for each
    # multiprocessor.
    tile = columns * (_COLUMNS * up.dtype.itemsize + rows * hidden.dtype.itemsize)
    stages = min(max(shared_bytes() // 2 // tile, 2), 4)
    keys = _call(
        functools.partial(_needs, rows=rows, columns=columns),
        grid=(places // _COLUMNS,),
        shape=(places,),
        num_warps=8,
        num_stages=stages,
        interpret=interpret,
    )(hidden, up, live)
    return _select(keys, f, n, num_warps, interpret)


def _warps(f: int) -> int:
    # Few, as each repeats the arithmetic between two counts; but more keys than 192 to
    # a thread do not fit its registers.
    return 8 if f <= 49_152 else 16


def _places(f: int, num_warps: int) -> int:
    """Keys with padding: whole chunks of one program."""
    chunk = num_warps * 32 * _THREAD_KEYS
    return pl.cdiv(f, chunk) * chunk


def _select(keys, f: int, n: int, num_warps: int, interpret) -> jax.Array:
    chunk = num_warps * 32 * _THREAD_KEYS
    return _call(
        functools.partial(_compact, f=f, chunk=chunk),
        grid=(keys.shape[0] // chunk,),
        shape=(n,),
        num_warps=num_warps,
        interpret=interpret,
    )(keys)


@once("n", "interpret")
def top_heads(scores, n: int, *, interpret=False) -> jax.Array:
    """See `pallas_kernels.top_heads`; the arguments are checked there."""
    b, c = scores.shape
    return _call(
        _rank,
        grid=(b, pl.cdiv(c, _HEADS)),
        shape=(b, n),
        # More would make the compiler load each score once per comparison.
        num_warps=1 if c <= 32 else 4,
        interpret=interpret,
    )(scores)


def _call(
    kernel,
    *,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    num_warps: int,
    num_stages: int = 1,
    interpret,
):
    """A call of a kernel that writes int32s."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
    )


def _total(
    scores_ref,  # [b, f]
    live_ref,  # [b]
    keys_ref,  # [chunks * chunk]
    *,
    rows: int,
):
    """Write the bits of some neurons' totals, or -1 beyond the f neurons."""
    b, f = scores_ref.shape
    cols = pl.program_id(0) * _COLUMNS + jnp.arange(_COLUMNS, dtype=jnp.int32)

    def step(index, total):
        row = index * rows + jnp.arange(rows, dtype=jnp.int32)
        scores = pltriton.load(
            scores_ref.at[row[:, None], cols[None, :]],
            mask=(row < b)[:, None] & (cols < f)[None, :],
            other=0,
        ).astype(jnp.float32)
        alive = pltriton.load(live_ref.at[row], mask=row < b, other=False)
        # Not a maximum: a NaN must count as 0 here.
        counts = alive[:, None] & (scores > 0.0)
        return total + jnp.sum(jnp.where(counts, scores, 0.0), axis=0)

    zeros = jnp.zeros(_COLUMNS, jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(b, rows), step, zeros)
    keys = lax.bitcast_convert_type(total, jnp.int32)
    pltriton.store(keys_ref.at[cols], jnp.where(cols < f, keys, -1))


def _needs(
    hidden_ref,  # [b, w], of which the last r count
    up_ref,  # [f, r]
    live_ref,  # [b]
    keys_ref,  # [places]
    *,
    rows: int,
    columns: int,
):
    """As `_total`, of the softplus of scores that it computes."""
    (b, w), (f, r) = hidden_ref.shape, up_ref.shape
    own = pl.program_id(0) * _COLUMNS + jnp.arange(_COLUMNS, dtype=jnp.int32)
    neuron = jnp.minimum(own, f - 1)

    def add(block, total):
        row = block * rows + jnp.arange(rows, dtype=jnp.int32)

        def step(index, scores):
            col = index * columns + jnp.arange(columns, dtype=jnp.int32)
            inside = (col < r)[None, :]
            up = pltriton.load(
                up_ref.at[neuron[:, None], col[None, :]],
                mask=None if r % columns == 0 else inside & (own < f)[:, None],
                other=None if r % columns == 0 else 0,
            )
            hidden = pltriton.load(
                hidden_ref.at[row[:, None], w - r + col[None, :]],
                mask=(row < b)[:, None] & inside,
                other=0,
            )
            return scores + dot(up, hidden.astype(up.dtype), 1)

        scores = jnp.zeros((_COLUMNS, rows), jnp.float32)
        scores = lax.fori_loop(0, pl.cdiv(r, columns), step, scores)
        needed = jnp.maximum(scores, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(scores)))
        alive = pltriton.load(live_ref.at[row], mask=row < b, other=False)
        # A NaN counts as 0.
        counts = alive[None, :] & (needed > 0.0)
        return total + jnp.sum(jnp.where(counts, needed, 0.0), axis=1)

    zeros = jnp.zeros(_COLUMNS, jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(b, rows), add, zeros)
    keys = lax.bitcast_convert_type(total, jnp.int32)
    pltriton.store(keys_ref.at[own], jnp.where(own < f, keys, -1))


def _compact(
    keys_ref,  # [chunks * chunk], -1 beyond the f neurons
    neurons_ref,  # [n]
    *,
    f: int,
    chunk: int,
):
    """Write the selected neurons of this program's chunk.

    Every program searches all keys for the threshold, which is the same work at the
    same time: cheaper than one program that does it and a launch for the others.
    """
    lane = jnp.arange(chunk, dtype=jnp.int32)
    keys = [
        pltriton.load(keys_ref.at[first + lane])
        for first in range(0, keys_ref.shape[0], chunk)
    ]

    def count(thresholds):
        """How many keys of each chunk reach its threshold, together."""
        # The sign of a difference, as the compiler makes more of a comparison.
        missed = (
            lax.shift_right_arithmetic(threshold - 1 - chunk_keys, jnp.int32(31))
            for chunk_keys, threshold in zip(keys, thresholds, strict=True)
        )
        return -jnp.sum(functools.reduce(jnp.add, missed))

    found = find_threshold(
        lambda threshold: count([threshold] * len(keys)),
        jnp.max(functools.reduce(jnp.maximum, keys)),
        f=f,
        n=neurons_ref.shape[0],
    )
    mine = pl.program_id(0)

    def count_before(threshold):
        """How many keys of the chunks before this one reach the threshold."""
        return count([jnp.where(i < mine, threshold, _NEVER) for i in range(len(keys))])

    sure_before = count_before(found.sure)
    ties_before = (
        lax.cond(found.ties > 0, lambda: count_before(found.tied), lambda: sure_before)
        - sure_before
    )
    neurons = mine * chunk + lane
    key = pltriton.load(keys_ref.at[neurons])
    sure = key >= found.sure
    tied = (key >= found.tied) & ~sure
    # One prefix sum for both: a chunk holds fewer than 2 ** 16 of either.
    flags = jnp.where(sure, 1 << 16, tied.astype(jnp.int32))
    earlier = jnp.cumsum(flags) - flags
    tie = ties_before + (earlier & 0xFFFF)
    place = sure_before + (earlier >> 16) + jnp.minimum(tie, found.ties)
    keep = sure | (tied & (tie < found.ties))
    pltriton.store(neurons_ref.at[place], neurons, mask=keep)


def _rank(
    scores_ref,  # [b, c]
    heads_ref,  # [b, n]
):
    """Store some heads of one sequence, each at its rank among all."""
    row, c, n = pl.program_id(0), scores_ref.shape[1], heads_ref.shape[1]

    def load(head):
        at = scores_ref.at[jnp.full_like(head, row), head]
        scores = pltriton.load(at, mask=head < c, other=-jnp.inf).astype(jnp.float32)
        return jnp.where(jnp.isnan(scores), -jnp.inf, scores)

    mine = pl.program_id(1) * _HEADS + jnp.arange(_HEADS, dtype=jnp.int32)
    every = jnp.arange(pl.next_power_of_2(c), dtype=jnp.int32)
    score, scores = load(mine)[:, None], load(every)[None, :]
    ahead = (scores > score) | ((scores == score) & (every[None, :] < mine[:, None]))
    rank = jnp.sum(ahead.astype(jnp.int32), axis=1)
    # Padding is behind every head, having a higher index.
    at = heads_ref.at[jnp.full_like(mine, row), rank]
    pltriton.store(at, mine, mask=(rank < n) & (mine < c))
