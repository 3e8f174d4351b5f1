"""Writing into a cache in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._backend import traced_gpu


def put(whole: jax.Array, at: Any, part: jax.Array, *, unique: bool = False):
    """`whole.at[at].set(part)`, in place; what lies outside is dropped.

    XLA on a CPU has no scatter of 16-bit floats, but makes a float32 copy of the whole:
    there they are written as bits.

    Args:
        whole: the array; donate it.
        at: the index, as in `jnp.ndarray.at`.
        part: what goes there, of the same dtype.
        unique: whether no place is named twice.
    """
    dtype, indices = whole.dtype, {"mode": "drop", "unique_indices": unique}
    if dtype.itemsize != 2 or traced_gpu() is not None:
        return whole.at[at].set(part, **indices)
    whole, part = (lax.bitcast_convert_type(x, jnp.uint16) for x in (whole, part))
    return lax.bitcast_convert_type(whole.at[at].set(part, **indices), dtype)
