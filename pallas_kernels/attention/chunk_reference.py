"""The reference of `attend_chunk` in plain XLA; also what serves on a CPU.

A loop over items of up to 64 rows of a piece, and in it one over pages, up to that of
the item's last position: time and memory do not depend on how long the table is. All
shapes within are fixed, so that a row's bits do not depend on the packing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._backend import once, traced_gpu
from pallas_kernels._put import put
from pallas_kernels.attention.items import Items

_ROWS = 64


@once("scale", "window", "softcap")
def attend(
    q: jax.Array,  # [n, h, d]
    k_pages: jax.Array,  # [p, k, page, d]
    v_pages: jax.Array,  # [p, k, page, d]
    table: jax.Array,  # [slots, m]
    slots: jax.Array,  # [r]
    starts: jax.Array,  # [r]
    counts: jax.Array,  # [r]
    firsts: jax.Array,  # [r]
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """See `attend_chunk`."""
    n, h, d = q.shape
    p, k, page, _ = k_pages.shape
    m = table.shape[1]
    g = h // k
    items = Items(n=n, r=slots.shape[0], rows=_ROWS)
    steps = jnp.arange(_ROWS, dtype=jnp.int32)

    def attend_item(item, out):
        piece, skipped = items.find(counts, item)
        rows = starts[piece] + skipped + steps
        valid = (steps < counts[piece] - skipped) & (rows >= 0) & (rows < n)
        first = jnp.clip(firsts[piece], 0, m * page) + skipped
        end = jnp.minimum(first + jnp.minimum(counts[piece] - skipped, _ROWS), m * page)
        positions = first + steps
        oldest = jnp.zeros_like(positions)
        if window is not None:
            oldest = jnp.maximum(positions - (window - 1), 0)
        slot = jnp.clip(slots[piece], 0, table.shape[0] - 1)
        queries = q.at[rows].get(mode="clip").reshape(_ROWS, k, g, d)

        def step(index, carry):
            top, total, acc = carry  # [k, g, rows], [k, g, rows], [k, g, rows, d]
            number = jnp.clip(table[slot, index], 0, p - 1)
            keys, values = (_page(pages, number) for pages in (k_pages, v_pages))
            places = index * page + jnp.arange(page, dtype=jnp.int32)
            seen = (places <= positions[:, None]) & (places >= oldest[:, None])
            # The values are masked as well: a weight of 0 does not silence NaN.
            known = (places >= oldest[0]) & (places < end)
            values = jnp.where(known[:, None], values, jnp.zeros((), values.dtype))
            scores = _dot("tkgd,ksd->kgts", queries, keys) * scale
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(seen & known, scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            # Of a row that has seen nothing yet top is -inf; -inf - -inf is NaN.
            level = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights = jnp.exp(scores - level[..., None])
            rescale = jnp.exp(top - level)
            total = total * rescale + jnp.sum(weights, axis=-1)
            part = _dot("kgts,ksd->kgtd", weights.astype(values.dtype), values)
            return new_top, total, acc * rescale[..., None] + part

        carry: Any = (
            jnp.full((k, g, _ROWS), -jnp.inf, jnp.float32),
            jnp.zeros((k, g, _ROWS), jnp.float32),
            jnp.zeros((k, g, _ROWS, d), jnp.float32),
        )
        bounds = lax.div(oldest[0], page), lax.div(end + (page - 1), page)
        _, total, acc = lax.fori_loop(*bounds, step, carry)
        # Rows of no piece may have seen nothing.
        part = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
        part = part.transpose(2, 0, 1, 3).reshape(_ROWS, h, d).astype(q.dtype)
        return put(out, jnp.where(valid, rows, n), part)

    total = jnp.sum(items.counts(counts))
    return lax.fori_loop(0, total, attend_item, jnp.zeros_like(q))


def _page(pages: jax.Array, number: jax.Array) -> jax.Array:
    """One page of a pool, copying no other."""
    if pages.dtype.itemsize != 2 or traced_gpu() is not None:
        return pages[number]
    # XLA on a CPU slices no 16-bit floats, but makes a float32 copy of the whole: they
    # are read as bits. Without the barrier it copies those, in front of the loop.
    bits, number = lax.optimization_barrier((pages, number))
    bits = lax.bitcast_convert_type(bits, jnp.uint16)[number]
    return lax.bitcast_convert_type(bits, pages.dtype)


def _dot(subscripts, x, y) -> jax.Array:
    # HIGHEST keeps float32 operands out of TF32.
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
