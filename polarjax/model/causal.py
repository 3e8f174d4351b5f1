"""Causal attention of whole sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import traced_gpu

# Queries that `spanned_attention` takes at once.
BLOCK = 256


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None
) -> jax.Array:
    """Each position attends to itself and those before it.

    By cuDNN's flash attention on a GPU, in 16 bit and for sizes that it takes: XLA's
    own writes out t x t weights for each head.

    Args:
      q: [b, t, h, d].
      k: [b, t, k, d].
      v: [b, t, k, d].
      window: newest positions attended to, itself included; None for all.

    Returns:
      [b, t, h, d].
    """
    t, dtype = q.shape[1], q.dtype
    if dtype == jnp.float16 and traced_gpu() is None:  # a CPU has no such product
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(window - 1, 0) if window and window < t else None,
        implementation="cudnn" if _flash(q) else "xla",
    )
    return o.astype(dtype)


def _flash(q: jax.Array) -> bool:
    serves = flash_serves(q.dtype.itemsize, q.shape[1], q.shape[-1])
    return traced_gpu() is not None and serves


def flash_serves(itemsize: int, t: int, d: int) -> bool:
    """Whether cuDNN's flash attention takes such numbers, lengths and head dims."""
    return itemsize == 2 and t % 64 == 0 and d % 8 == 0 and d <= 128


def spanned_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    read: jax.Array,
    span: int,
    window: int | None = None,
) -> jax.Array:
    """Causal attention that reads some spans of keys alone, in float32.

    Args:
      q: [b, t, h, d].
      k: [b, t, k, d].
      v: [b, t, k, d].
      read: bool[b, t, k or 1, spans], the spans that each position reads.
      span: positions of each.
      window: newest positions attended to, itself included; None for all.

    Returns:
      [b, t, h, d].
    """
    b, t, h, d = q.shape
    groups = k.shape[2], h // k.shape[2]
    keys, values = (x.astype(jnp.float32) for x in (k, v))
    size, at = min(t, BLOCK), jnp.arange(t)
    whole = -(-t // size) * size

    def cut(x: jax.Array) -> jax.Array:
        rest = ((0, 0), (0, whole - t), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, rest).reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)

    def block(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, read, place = args
        part = q.astype(jnp.float32).reshape(b, size, *groups, d)
        scores = _einsum("bqkgd,bskd->bkgqs", part, keys) / d**0.5
        seen = at <= place[:, None]
        if window is not None:
            seen &= at > place[:, None] - window
        spread = jnp.repeat(read, span, axis=-1)[..., :t]  # [b, q, k, s]
        seen = seen & spread.swapaxes(1, 2)[:, :, None]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        o = _einsum("bkgqs,bskd->bqkgd", weights, values)
        return o.reshape(b, size, h, d).astype(q.dtype)

    places = jnp.arange(whole).reshape(-1, size)
    o = lax.map(block, (cut(q), cut(read), places))
    return o.swapaxes(0, 1).reshape(b, whole, h, d)[:, :t]


def _einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(
        formula,
        x,
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
