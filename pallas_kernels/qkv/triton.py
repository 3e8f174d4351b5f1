"""One Pallas kernel for Triton, where XLA makes one for each of q, k, v and scores."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._backend import once, pltriton
from pallas_kernels._sizes import ceil_power_of_two

# Heads, or as many numbers of the rest, in a program.
_HEADS = 8


@once("heads", "kv_heads", "head_dim", "dtype", "interpret")
def split_heads(
    parts, cos, sin, *, heads, kv_heads, head_dim, dtype, interpret=False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """See `pallas_kernels.split_heads`; the arguments are checked there."""
    b, width = parts.shape[1:]
    rest = width - (heads + 2 * kv_heads) * head_dim
    programs = pl.cdiv(heads + 2 * kv_heads, _HEADS)
    shapes = [(b, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    if rest:
        outs.append(jax.ShapeDtypeStruct((b, rest), jnp.float32))
    found = pl.pallas_call(
        functools.partial(_kernel, programs=programs, rotates=cos is not None),
        grid=(b, programs + pl.cdiv(rest, _HEADS * head_dim)),
        out_shape=outs,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=2, num_stages=1),
        name="split_heads",
    )(parts, *(() if cos is None else (cos, sin)))
    q, k, v, *others = found
    return q, k, v, others[0] if others else None


def _kernel(parts_ref, *refs, programs: int, rotates: bool):
    """Parts [p, b, w]; cos and sin [b, d / 2]; q, k and v [b, n, d]; rest [b, r]."""
    angles, outs = refs[: 2 * rotates], refs[2 * rotates :]
    row, program = pl.program_id(0), pl.program_id(1)
    heads, kv_heads, d = outs[0].shape[1], outs[1].shape[1], outs[0].shape[2]
    total, half = heads + 2 * kv_heads, d // 2

    def load(index, mask):
        parts = (
            pltriton.load(parts_ref.at[p, row, index], mask=mask, other=0.0)
            for p in range(parts_ref.shape[0])
        )
        return functools.reduce(jnp.add, parts)

    @pl.when(program < programs)
    def _split():
        head = program * _HEADS + jnp.arange(_HEADS, dtype=jnp.int32)
        col = jnp.arange(ceil_power_of_two(half), dtype=jnp.int32)
        mask = (head < total)[:, None] & (col < half)[None, :]
        index = jnp.minimum(head, total - 1)[:, None] * d + col[None, :]
        cols = jnp.where(col < half, col, d)[None, :]
        dtype = outs[0].dtype
        # Rounded before they are rotated, as the model's own arithmetic has it.
        first, second = (load(index + start, mask).astype(dtype) for start in (0, half))
        if rotates:
            cos, sin = (
                pltriton.load(ref.at[row, col], mask=col < half, other=0.0)[None, :]
                for ref in angles
            )
            x, y = first.astype(jnp.float32), second.astype(jnp.float32)
            turned = (head < heads + kv_heads)[:, None]
            first = jnp.where(turned, (x * cos - y * sin).astype(dtype), first)
            second = jnp.where(turned, (y * cos + x * sin).astype(dtype), second)
        start = 0
        for ref in outs[:3]:
            inside = (head >= start) & (head < start + ref.shape[1])
            # Elsewhere out of bounds: the interpreter writes what is masked back.
            place = jnp.where(inside, head - start, ref.shape[1])[:, None]
            for offset, value in ((0, first), (half, second)):
                where = ref.at[row, place, cols + offset]
                pltriton.store(where, value, mask=mask & inside[:, None])
            start += ref.shape[1]

    if len(outs) == 4:

        @pl.when(program >= programs)
        def _rest():
            size = ceil_power_of_two(_HEADS * d)
            own = jnp.arange(size, dtype=jnp.int32)
            place = (program - programs) * _HEADS * d + own
            mask = (own < _HEADS * d) & (place < outs[3].shape[1])
            value = load(total * d + place, mask)
            pltriton.store(outs[3].at[row, place], value, mask=mask)
