"""The kernel that combines what the shares of `triton` have cut (FlashDecoding)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton

# Pieces that are read at once.
_MAX_CHUNK = 128


def combine_pieces(
    partials, logs, cuts, out, *, groups: int, num_stages: int, interpret: bool
) -> jax.Array:
    """Add the groups that lie in several shares to the output.

    Args:
        partials: outputs of pieces of groups, each as if it were the whole, float32
            [programs, 2, g, d]. A share can cut two groups: place 0 is for that which
            it starts in, place 1 for that which it ends in.
        logs: log2 of their sums of weights, float32 [programs, 2, g].
        cuts: of the group that a share starts and its end cuts, int32 [programs, 4]:
            how many pieces it has (0: there is none), the place of the first, which
            this share holds, as the next shares hold the others at place 0, the
            sequence and the KV group.
        out: [b, h, d], with the other groups; written in place.
        groups: how many are selected in all.
        num_stages: of the compiler.
        interpret: whether to interpret the kernel.
    """
    programs, _, g, d = partials.shape
    # As many pieces at once as a group has when all are equally long.
    chunk = min(pl.next_power_of_2(-(-programs // groups) + 1), _MAX_CHUNK)
    return pl.pallas_call(
        functools.partial(_combine, chunk=chunk),
        grid=(programs, g),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=max(chunk * pl.next_power_of_2(d) // 2048, 1),
            num_stages=num_stages,
        ),
    )(partials, logs, cuts, out)


def _combine(partials_ref, logs_ref, cuts_ref, _, out_ref, *, chunk: int):
    program, row = pl.program_id(0), pl.program_id(1)
    g, d = partials_ref.shape[2:]
    pieces, place, sequence, group = (cuts_ref[program, i] for i in range(4))
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)

    @pl.when(pieces > 0)
    def _():
        def step(i, carry):
            top, total, acc = carry
            index = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            places = jnp.where(index == 0, place, 0)
            mask = index < pieces
            at = logs_ref.at[program + index, places, row]
            logs = pltriton.load(at, mask=mask, other=-jnp.inf)
            at = (program + index)[:, None], places[:, None], row, cols[None, :]
            mask = mask[:, None] & (cols < d)[None, :]
            partials = pltriton.load(partials_ref.at[at], mask=mask, other=0)
            new_top = jnp.maximum(top, jnp.max(logs))
            rescale, weights = jnp.exp2(top - new_top), jnp.exp2(logs - new_top)
            total = total * rescale + jnp.sum(weights)
            acc = acc * rescale + jnp.sum(partials * weights[:, None], axis=0)
            return new_top, total, acc

        carry = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.zeros(cols.shape))
        _, total, acc = lax.fori_loop(0, pl.cdiv(pieces, chunk), step, carry)
        at = out_ref.at[sequence, group * g + row, cols]
        pltriton.store(at, (acc / total).astype(out_ref.dtype), mask=cols < d)
