"""The reference in plain XLA; also what serves on a CPU."""

import jax
import jax.numpy as jnp


def normalize(x, scale, shift, *, center, eps, dtype=None):
    """See `pallas_kernels.normalize`."""
    y = x.astype(jnp.float32)
    if center:
        y = y - y.mean(axis=-1, keepdims=True)
    # Of what is centred: E[x^2] - E[x]^2 loses digits.
    factor = jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)
    y = y * (factor * scale.astype(jnp.float32))
    if shift is not None:
        y = y + shift.astype(jnp.float32)
    return y.astype(dtype or x.dtype)


def add_norm(x, parts, scale, shift, *, center, eps):
    """See `pallas_kernels.add_norm`; the arguments are checked there."""
    y = x + parts.sum(axis=0).astype(x.dtype)
    return y, normalize(y, scale, shift, center=center, eps=eps)
