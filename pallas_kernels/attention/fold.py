"""The kernel that adds up what the pieces of `paged` have left (FlashDecoding)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels.attention.sums import Sums

# Pieces whose loads are in flight at once.
_AT_ONCE = 8


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
    b, n, _, g, _ = partials.shape
    return pl.pallas_call(
        _fold,
        grid=(b * n, g),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
    )(partials, scales, counts, out)


def _fold(partials_ref, scales_ref, counts_ref, _, out_ref):
    n, (g, d) = partials_ref.shape[1], partials_ref.shape[3:]
    row = pl.program_id(1)
    sequence, slot = lax.div(pl.program_id(0), n), lax.rem(pl.program_id(0), n)
    pieces, group, first = (counts_ref[sequence, slot, i] for i in range(3))
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    nothing = Sums.nothing(1, cols.shape[0])

    @pl.when(pieces > 0)
    def _():
        def load(piece):
            there = piece < pieces
            at = sequence, slot, jnp.minimum(piece, pieces - 1), row
            top, total = (scales_ref[*at, i] for i in range(2))
            mask = (cols < d) & there
            acc = pltriton.load(partials_ref.at[*at, cols], mask=mask, other=0)
            return Sums(
                jnp.where(there, top, nothing.top),
                jnp.where(there, total, nothing.total),
                acc[None, :],
            )

        def step(i, sums):
            begin = first + i * _AT_ONCE
            for piece in [load(begin + j) for j in range(_AT_ONCE)]:
                sums = sums.plus(piece)
            return sums

        chunks = pl.cdiv(pieces - first, _AT_ONCE)
        sums = lax.fori_loop(0, chunks, step, nothing)
        at = out_ref.at[sequence, group * g + row, cols]
        mean = jnp.sum(sums.mean(), axis=0)
        pltriton.store(at, mean.astype(out_ref.dtype), mask=cols < d)
