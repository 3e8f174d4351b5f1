"""The reference in plain XLA; also what serves on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._put import put


def attend(
    q, k_cache, v_cache, lengths, heads, n_active, new=None, *, scale, window, softcap
):
    """See `select_head_attention` and, for new, `append_and_attend`.

    Returns:
        The output, and the caches: as they came, or with the new keys and values.
    """
    if new is not None:
        k_cache, v_cache = append(k_cache, v_cache, lengths, new)
    args = (q, k_cache, v_cache, lengths, heads, n_active)
    return _attend(*args, scale, window, softcap), k_cache, v_cache


def append(k_cache, v_cache, lengths, new):
    """The caches [b, k, s, d] with new keys and values [b, k, d] at lengths - 1."""
    b, k, s, _ = k_cache.shape
    # Behind the cache, and so dropped, for a sequence of length 0.
    position = jnp.where(lengths > 0, lengths - 1, s)[:, None]
    at = (jnp.arange(b)[:, None], jnp.arange(k)[None], position)
    return tuple(
        put(cache, at, array)
        for cache, array in zip((k_cache, v_cache), new, strict=True)
    )


def _attend(q, k_cache, v_cache, lengths, heads, n_active, scale, window, softcap):
    b, h, d = q.shape
    k, s = k_cache.shape[1:3]
    q = q.reshape(b, k, h // k, d)
    positions = jnp.arange(s, dtype=jnp.int32)
    valid = positions < lengths[:, None]  # [b, s]
    if window is not None:
        valid &= positions >= lengths[:, None] - window
    if heads is None:
        out = _attend_groups(q, k_cache, v_cache, valid, scale, softcap)
        return out.reshape(b, h, d)

    n = heads.shape[1]
    n_active = jnp.full(b, n, jnp.int32) if n_active is None else n_active
    active = jnp.arange(n, dtype=jnp.int32) < n_active[:, None]  # [b, n]
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    # What lies behind n_active may be anything: clipped here, and dropped below.
    out = _attend_groups(
        q.at[rows, heads].get(mode="clip"),
        k_cache.at[rows, heads].get(mode="clip"),
        v_cache.at[rows, heads].get(mode="clip"),
        valid,
        scale,
        softcap,
    )
    target = jnp.where(active, heads, k)  # k lies outside: dropped
    return jnp.zeros_like(q).at[rows, target].set(out, mode="drop").reshape(b, h, d)


def _attend_groups(q, keys, values, valid, scale, softcap):
    """Attention of q [b, n, g, d] over keys and values [b, n, s, d], valid [b, s]."""
    # The values are masked as well as the scores: a weight of 0 does not silence NaN.
    values = jnp.where(valid[:, None, :, None], values, jnp.zeros((), values.dtype))
    scores = _dot("bngd,bnsd->bngs", q, keys) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # Without a valid position top is -inf, and -inf - -inf is NaN.
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    # A product: the order of a sum on a CPU depends on how many zeros follow.
    total = _dot("bngs,bs->bng", weights, valid.astype(jnp.float32))[..., None]
    out = _dot("bngs,bnsd->bngd", weights.astype(values.dtype), values)
    return (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)


def _dot(subscripts, x, y) -> jax.Array:
    # HIGHEST keeps float32 operands out of TF32; it changes nothing for 16-bit ones,
    # which stay as they are: the sums are float32 either way.
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
