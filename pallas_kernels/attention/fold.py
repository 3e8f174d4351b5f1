"""The kernel that adds up what the pieces of `paged` have left (FlashDecoding)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton

# Pieces that are read at once. The order of a sum depends on it alone.
_CHUNK = 16


def fold_pieces(
    partials, logs, counts, out, *, num_stages: int, interpret: bool
) -> jax.Array:
    """Add up the groups that were computed in several pieces.

    Args:
        partials: outputs of pieces of groups, each as if it were the whole, float32
            [b, n, pieces, g, d].
        logs: log2 of their sums of weights, float32 [b, n, pieces, g].
        counts: int32 [b, n, 2], how many pieces a selected group has, in order from
            the first, 0 if it is in the output already; and which group it is.
        out: [b, h, d], with the other groups; written in place.
        num_stages: of the compiler.
        interpret: whether to interpret the kernel.
    """
    b, n, most, g, d = partials.shape
    chunk = min(pl.next_power_of_2(most), _CHUNK)
    return pl.pallas_call(
        functools.partial(_combine, chunk=chunk),
        grid=(b * n, g),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=max(chunk * pl.next_power_of_2(d) // 2048, 1),
            num_stages=num_stages,
        ),
    )(partials, logs, counts, out)


def _combine(partials_ref, logs_ref, counts_ref, _, out_ref, *, chunk: int):
    n, (g, d) = partials_ref.shape[1], partials_ref.shape[3:]
    row = pl.program_id(1)
    sequence, slot = lax.div(pl.program_id(0), n), lax.rem(pl.program_id(0), n)
    pieces, group = (counts_ref[sequence, slot, i] for i in range(2))
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)

    @pl.when(pieces > 0)
    def _():
        def step(i, carry):
            top, total, acc = carry
            index = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            mask = index < pieces
            at = logs_ref.at[sequence, slot, index, row]
            logs = pltriton.load(at, mask=mask, other=-jnp.inf)
            at = sequence, slot, index[:, None], row, cols[None, :]
            mask = mask[:, None] & (cols < d)[None, :]
            partials = pltriton.load(partials_ref.at[at], mask=mask, other=0)
            new_top = jnp.maximum(top, jnp.max(logs))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing was seen yet
            rescale, weights = jnp.exp2(top - base), jnp.exp2(logs - base)
            total = total * rescale + jnp.sum(weights)
            acc = acc * rescale + jnp.sum(partials * weights[:, None], axis=0)
            return new_top, total, acc

        carry = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.zeros(cols.shape))
        _, total, acc = lax.fori_loop(0, pl.cdiv(pieces, chunk), step, carry)
        acc = acc / jnp.where(total == 0.0, 1.0, total)
        at = out_ref.at[sequence, group * g + row, cols]
        pltriton.store(at, acc.astype(out_ref.dtype), mask=cols < d)
