"""The reference in plain XLA; also what serves on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._put import put


def attend(
    q,
    k_cache,
    v_cache,
    lengths,
    heads,
    n_active,
    new=None,
    table=None,
    pages=None,
    *,
    scale,
    window,
    softcap,
):
    """See `select_head_attention` and, for new, `append_and_attend`.

    Returns:
        The output, and the caches: as they came, or with the new keys and values.
    """
    if new is not None:
        k_cache, v_cache = append(k_cache, v_cache, lengths, new, table)
    keys, values = (gather_pages(cache, table) for cache in (k_cache, v_cache))
    positions = jnp.arange(keys.shape[2], dtype=jnp.int32)
    valid = positions < lengths[:, None]  # [b, s]
    if window is not None:
        valid &= positions >= lengths[:, None] - window
    valid = valid[:, None]
    if pages is not None and table is not None:
        lists, counts = pages
        listed = _listed(lists, counts, table.shape[1])  # [b, k or 1, m]
        listed = jnp.repeat(listed, k_cache.shape[2], axis=2)
        if new is not None:
            some = (counts > 0)[:, :, None]
            listed |= some & (positions == lengths[:, None] - 1)[:, None]
        valid = valid & listed
    valid = jnp.broadcast_to(valid, keys.shape[:3])  # [b, k, s]
    out = _attend(q, keys, values, valid, heads, n_active, scale, softcap)
    return out, k_cache, v_cache


def append(k_cache, v_cache, lengths, new, table=None):
    """The caches with new keys and values [b, k, d] at lengths - 1."""
    pages, k, page, _ = k_cache.shape
    b = len(lengths)
    last = jnp.maximum(lengths - 1, 0)
    rows = jnp.arange(b)
    if table is not None:
        rows = jnp.take_along_axis(table, (last // page)[:, None], axis=1)[:, 0]
        last = last % page
    # Behind the cache, and so dropped, for a sequence of length 0.
    rows = jnp.where(lengths > 0, rows, pages)
    at = (rows[:, None], jnp.arange(k)[None], last[:, None])
    return tuple(
        put(cache, at, array)
        for cache, array in zip((k_cache, v_cache), new, strict=True)
    )


def gather_pages(cache, table):
    """What a table names, [b, k, s, d]; without one the cache itself."""
    if table is None:
        return cache
    parts = cache.at[table].get(mode="clip")  # [b, m, k, page, d]
    b, m, k, page, d = parts.shape
    return parts.swapaxes(1, 2).reshape(b, k, m * page, d)


def _listed(pages, n_pages, m):
    """Which of m entries of a table lists [b, k or 1, p] name, bool[b, k or 1, m]."""
    counts = jnp.arange(pages.shape[2]) < n_pages[..., None]
    named = pages[..., None] == jnp.arange(m)  # [b, k or 1, p, m]
    return (named & counts[..., None]).any(axis=2)


def _attend(q, keys, values, valid, heads, n_active, scale, softcap):
    b, h, d = q.shape
    k = keys.shape[1]
    q = q.reshape(b, k, h // k, d)
    if heads is None:
        return _attend_groups(q, keys, values, valid, scale, softcap).reshape(b, h, d)

    n = heads.shape[1]
    n_active = jnp.full(b, n, jnp.int32) if n_active is None else n_active
    active = jnp.arange(n, dtype=jnp.int32) < n_active[:, None]  # [b, n]
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]

    # What lies behind n_active may be anything: clipped here, and dropped below.
    def select(array):
        return array.at[rows, heads].get(mode="clip")

    chosen, keys, values, valid = (select(array) for array in (q, keys, values, valid))
    out = _attend_groups(chosen, keys, values, valid, scale, softcap)
    target = jnp.where(active, heads, k)  # k lies outside: dropped
    return jnp.zeros_like(q).at[rows, target].set(out, mode="drop").reshape(b, h, d)


def _attend_groups(q, keys, values, valid, scale, softcap):
    """Attention of q [b, n, g, d] over keys and values [b, n, s, d], where valid."""
    # The values are masked as well as the scores: a weight of 0 does not silence NaN.
    values = jnp.where(valid[..., None], values, jnp.zeros((), values.dtype))
    scores = _dot("bngd,bnsd->bngs", q, keys) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(valid[:, :, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # Without a valid position top is -inf, and -inf - -inf is NaN.
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    # A product: the order of a sum on a CPU depends on how many zeros follow.
    total = _dot("bngs,bns->bng", weights, valid.astype(jnp.float32))[..., None]
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
