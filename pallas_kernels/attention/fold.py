"""The kernel that adds up what the pieces of `triton` have left (FlashDecoding)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels.attention.sums import Sums

# Pieces whose loads are in flight at once.
_AT_ONCE = 16


def fold_pieces(partials, scales, counts, out, *, interpret: bool) -> jax.Array:
    """Add up the groups that were computed in several pieces, in their order.

    Args:
        partials: `Sums.acc` of pieces of groups, float32 [b, n, pieces, g, d].
        scales: their tops and totals, float32 [b, n, pieces, g, 2].
        counts: int32 [b, n, 3]: how many pieces a selected group has, 0 if it is in the
            output already; which group it is; and in which piece the sums of this one
            and all before are.
        out: [b, h, d], with the other groups; written in place.
        interpret: whether to interpret the kernel.
    """
    b, n, most, g, d = partials.shape
    numbers = pl.next_power_of_2(g) * pl.next_power_of_2(d)
    return pl.pallas_call(
        functools.partial(_fold, at_once=min(pl.next_power_of_2(most), _AT_ONCE)),
        grid=(b * n,),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=min(max(numbers // 128, 1), 8), num_stages=1
        ),
        name="fold_pieces",
    )(partials, scales, counts, out)


def _fold(partials_ref, scales_ref, counts_ref, _, out_ref, *, at_once: int):
    n, (g, d) = partials_ref.shape[1], partials_ref.shape[3:]
    sequence, slot = lax.div(pl.program_id(0), n), lax.rem(pl.program_id(0), n)
    pieces, group, first = (counts_ref[sequence, slot, i] for i in range(3))
    rows = jnp.arange(pl.next_power_of_2(g), dtype=jnp.int32)
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    mask = (rows < g)[:, None] & (cols < d)[None, :]
    nothing = Sums.nothing(rows.shape[0], cols.shape[0])

    @pl.when(pieces > 0)
    def _():
        def load(piece) -> Sums:
            there = piece < pieces
            at = sequence, slot, jnp.minimum(piece, pieces - 1), rows
            scales = (scales_ref.at[*at, i] for i in range(2))
            known = (rows < g) & there
            top, total = (pltriton.load(x, mask=known, other=0) for x in scales)
            at = (*at[:3], rows[:, None], cols[None, :])
            acc = pltriton.load(partials_ref.at[at], mask=mask & there, other=0)
            return Sums(jnp.where(known, top, nothing.top), total, acc)

        def step(i, sums):
            begin = first + i * at_once
            for piece in [load(begin + j) for j in range(at_once)]:
                sums = sums.plus(piece)
            return sums

        chunks = pl.cdiv(pieces - first, at_once)
        sums = lax.fori_loop(0, chunks, step, nothing)
        at = out_ref.at[sequence, (group * g + rows)[:, None], cols[None, :]]
        pltriton.store(at, sums.mean().astype(out_ref.dtype), mask=mask)
