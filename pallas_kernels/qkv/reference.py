"""The reference in plain XLA; also what serves on a CPU."""

import jax.numpy as jnp


def rotate(x, cos, sin):
    """Rotary position embedding; dimension i pairs with i + d / 2.

    Args:
        x: [..., d].
        cos: float32 [..., d / 2], broadcast to x.
        sin: likewise.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def split_heads(parts, cos, sin, *, heads, kv_heads, head_dim, dtype):
    """See `pallas_kernels.split_heads`; the arguments are checked there."""
    y = parts.sum(axis=0)
    ends = [heads * head_dim, (heads + kv_heads) * head_dim]
    ends.append(ends[-1] + kv_heads * head_dim)
    *qkv, rest = jnp.split(y, ends, axis=1)
    q, k, v = (x.astype(dtype).reshape(len(y), -1, head_dim) for x in qkv)
    if cos is not None:
        q, k = (rotate(x, cos[:, None], sin[:, None]) for x in (q, k))
    return q, k, v, rest if rest.shape[1] else None
