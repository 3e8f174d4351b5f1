"""Sum and normalisation in one Pallas kernel for Triton: a program to a row.

XLA makes two kernels of it, of which the first waits for a whole row's sum and the
second reads the row again; at a batch of decode's size both are mostly their start.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._backend import once, pltriton
from pallas_kernels._sizes import ceil_power_of_two


@once("center", "eps", "interpret")
def add_norm(x, parts, scale, shift, *, center, eps, interpret=False):
    """See `pallas_kernels.add_norm`; the arguments are checked there."""
    b, m = x.shape
    out = jax.ShapeDtypeStruct((b, m), x.dtype)
    # About 16 numbers of a row to a thread.
    warps = min(max(ceil_power_of_two(m) // 512, 1), 16)
    return pl.pallas_call(
        functools.partial(_kernel, center=center, eps=eps),
        grid=(b,),
        out_shape=(out, out),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        name="add_norm",
    )(x, parts, scale, shift)


def _kernel(
    x_ref,  # [b, m]
    parts_ref,  # [p, b, m]
    scale_ref,  # [m]
    shift_ref,  # [m] or None
    sum_ref,  # [b, m]
    out_ref,  # [b, m]
    *,
    center: bool,
    eps: float,
):
    m = x_ref.shape[1]
    row = pl.program_id(0)
    cols = jnp.arange(ceil_power_of_two(m), dtype=jnp.int32)
    mask = None if cols.size == m else cols < m

    def load(ref):
        other = None if mask is None else 0.0
        return pltriton.load(ref, mask=mask, other=other).astype(jnp.float32)

    total = load(parts_ref.at[0, row, cols])
    for part in range(1, parts_ref.shape[0]):
        total += load(parts_ref.at[part, row, cols])
    dtype = x_ref.dtype
    # On their way before the row is summed, which waits for it.
    scale = load(scale_ref.at[cols])
    shift = None if shift_ref is None else load(shift_ref.at[cols])
    # Rounded where the model's own arithmetic rounds.
    y = load(x_ref.at[row, cols]) + total.astype(dtype).astype(jnp.float32)
    y = y.astype(dtype)
    pltriton.store(sum_ref.at[row, cols], y, mask=mask)
    y = y.astype(jnp.float32)
    if center:
        y = y - jnp.sum(y) / m
        y = y if mask is None else jnp.where(mask, y, 0.0)
    factor = jax.lax.rsqrt(jnp.sum(y * y) / m + eps)
    y = y * (factor * scale)
    if shift is not None:
        y = y + shift
    pltriton.store(out_ref.at[row, cols], y.astype(dtype), mask=mask)
