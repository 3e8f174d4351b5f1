"""The public attention function of prefill: checks its arguments, then dispatches."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.attention import chunk_reference, chunk_triton

_DTYPES = ("bfloat16", "float16", "float32")


def attend_chunk(
    q: Float[Array, "n h d"],
    k_pages: Float[Array, "p k page d"],
    v_pages: Float[Array, "p k page d"],
    table: Int32[Array, "slots m"],
    slots: Int32[Array, " r"],
    starts: Int32[Array, " r"],
    counts: Int32[Array, " r"],
    firsts: Int32[Array, " r"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "n h d"]:
    """Causal attention of pieces of several prompts over their paged keys and values.

    The rows of q are packed: piece i is the rows `starts[i]` to
    `starts[i] + counts[i] - 1`, which are the positions `firsts[i]` and on of the
    sequence in slot `slots[i]`. Position x of a slot lies in the page
    `table[slot, x // page]` at the offset `x % page`; the keys and values of the piece
    itself must be there too. The row of position x attends to the positions 0 to x, or
    to the newest `window` of them. The softmax is in float32.

    What a row yields depends on its query, its position and what the pages hold of its
    sequence alone, to the last bit: not on where a prompt is cut into pieces, how they
    are packed, nor on what else is in the call.

    Args:
        q: queries, [n, h, d], bfloat16, float16 or float32.
        k_pages: the pool of pages of keys, [p, k, page, d], the dtype of q; h is a
            multiple of k, and query head i belongs to KV group `i // (h // k)`. What
            its other pages hold, and what lies behind the end of a piece or before
            its window, never reaches the output.
        v_pages: the pool of pages of values, like k_pages.
        table: numbers of the pages that each slot's sequence lies in, in order, int32
            [slots, m]. Beyond those that the pieces need it may hold anything.
        slots: the slot of each piece, int32 [r].
        starts: the first row of each piece, int32 [r]. No row is in two pieces.
        counts: how many rows each piece has, int32 [r]; for 0 or less there is no
            piece, whatever the other arrays say of it.
        firsts: the position of each piece's first row, int32 [r].
        scale: factor on the scores before the softmax, positive; None means
            d ** -0.5.
        window: newest positions attended to, in tokens (sliding window attention,
            arXiv 2310.06825 section 2); None means all.
        softcap: bound c on the scaled scores, `c * tanh(score / c)` (arXiv 2408.00118
            section 2); None means none.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        The attention output [n, h, d] in the dtype of q; zero for the rows of no piece.

    Raises:
        ValueError: if a shape or dtype is wrong, or scale, window or softcap is not
            positive.
        NotImplementedError: if the implementation cannot serve these shapes.
    """
    _check(q, k_pages, v_pages, table)
    r = slots.shape[:1]
    if not all(r):
        raise ValueError("slots is empty; a call has room for at least one piece")
    pieces = {"slots": slots, "starts": starts, "counts": counts, "firsts": firsts}
    for name, array in pieces.items():
        if len(r) != 1 or array.shape != r or array.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; slots, starts, counts "
                "and firsts must be int32[r], one number for each piece"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "window": window, "softcap": softcap}
    for name, option in options.items():
        if option is not None and not 0 < option < math.inf:
            raise ValueError(f"{name} is {option}; it must be positive, or None")
    implementation = resolve(implementation)
    args = (q, k_pages, v_pages, table, slots, starts, counts, firsts)
    with jax.named_scope("attend_chunk"):
        if implementation == "xla":
            return chunk_reference.attend(*args, **options)
        interpret = implementation == "triton_interpret"
        return chunk_triton.attend(*args, **options, interpret=interpret)


def _check(q, k_pages, v_pages, table) -> None:
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; it must be [n, h, d]")
    _, h, d = q.shape
    if k_pages.ndim != 4 or k_pages.shape[3] != d:
        raise ValueError(
            f"k_pages has shape {k_pages.shape}; with q {q.shape} it must be "
            f"[p, k, page, {d}]"
        )
    if v_pages.shape != k_pages.shape:
        raise ValueError(
            f"v_pages has shape {v_pages.shape}; it must be that of k_pages, "
            f"{k_pages.shape}"
        )
    if min(q.shape) == 0 or min(k_pages.shape) == 0:
        raise ValueError(
            f"q has shape {q.shape} and k_pages {k_pages.shape}; no axis may be empty"
        )
    if h % k_pages.shape[1]:
        raise ValueError(
            f"q has {h} heads; it must be a multiple of k_pages' {k_pages.shape[1]}"
        )
    if jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; it must be one of {_DTYPES}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {pages.dtype}; it must be that of q, {q.dtype}"
            )
    if table.ndim != 2 or min(table.shape) == 0 or table.dtype != jnp.int32:
        raise ValueError(
            f"table is {table.dtype}{list(table.shape)}; it must be int32[slots, m], "
            "neither of them 0"
        )
