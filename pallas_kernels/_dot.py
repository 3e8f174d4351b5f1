"""The product that references and Triton kernels are made of."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(x: jax.Array, y: jax.Array, axis: int, dtype=jnp.float32) -> jax.Array:
    """Contract the last axis of x with the given axis of y, summed in float32."""
    return lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # float32 operands would become TF32
        preferred_element_type=dtype,
    )


def product(x: jax.Array, rows: jax.Array, dtype=jnp.float32) -> jax.Array:
    """[n, i] times the rows of [o, i], [n, o]; gradients in the operands' dtype.

    Autodiff would multiply float32 gradients at the precision above: many times slower
    than a GPU's matrix units are in 16 bit.

    Args:
        x: [n, i].
        rows: [o, i].
        dtype: of the result. Sums are float32.
    """
    return _product(x, rows, dtype)


def _product_forward(x: jax.Array, rows: jax.Array, dtype):
    return dot(x, rows, 1, dtype), (x, rows)


def _product_backward(_, kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, rows = kept
    gradient = gradient.astype(x.dtype)
    to_rows = dot(gradient.T, x, 0)
    return dot(gradient, rows, 0).astype(x.dtype), to_rows.astype(rows.dtype)


_product = jax.custom_vjp(
    lambda x, rows, dtype: dot(x, rows, 1, dtype), nondiff_argnums=(2,)
)
_product.defvjp(_product_forward, _product_backward)
