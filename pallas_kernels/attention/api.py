"""The public attention function: checks its arguments, then dispatches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.attention import reference, triton

_DTYPES = ("bfloat16", "float16", "float32")


def select_head_attention(
    q: Float[Array, "b h d"],
    k_cache: Float[Array, "pages k page d"],
    v_cache: Float[Array, "pages k page d"],
    lengths: Int32[Array, " b"],
    heads: Int32[Array, "b n"] | None = None,
    n_active: Int32[Array, " b"] | None = None,
    *,
    table: Int32[Array, "b m"] | None = None,
    pages: Int32[Array, "b lists p"] | None = None,
    n_pages: Int32[Array, "b lists"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b h d"]:
    """Attend with one query token per sequence, for the selected KV groups only.

    Query head `i` belongs to KV group `i // g` with `g = h // k`; a selected group
    computes all its `g` query heads. The softmax is in float32. What the caches
    hold at and beyond a sequence's length never reaches the output.

    Nor do its batch-mates: with arrays of the same shapes a sequence's output is the
    same bits whatever the others are, and whichever pages it has.

    Source: Select Head/Group Attention, Polar Sparsity section 4 (arXiv 2505.14884);
    pages as in PagedAttention (arXiv 2309.06180).

    Args:
        q: queries of the newest token, [b, h, d], bfloat16, float16 or float32.
        k_cache: cached keys, the dtype of q: [b, k, s, d], or with a table, as pages
            of any sequences, [pages, k, page, d]; h is a multiple of k.
        v_cache: cached values, like k_cache.
        lengths: valid cache positions of each sequence in tokens, the newest
            included, int32 [b], 0..s. A sequence of length 0 yields zeros.
        heads: KV groups to compute for each sequence, int32 [b, n] with
            1 <= n <= k, in any order, distinct and in 0..k-1 within the first
            n_active[b]. None computes every group (dense).
        n_active: how many leading entries of heads[b] count, int32 [b], 0..n; the
            entries behind them may hold anything. None means all n.
        table: where the positions of each sequence lie, int32 [b, m]: position x in
            page table[b, x // page], in row x % page; s is m * page. None where page b
            is all of sequence b.
        pages: which of a sequence's pages each KV group reads, numbers of entries of
            its table, int32 [b, k, p], or [b, 1, p] for all groups alike, in any order,
            distinct within the first n_pages. None reads all.
        n_pages: how many leading entries of pages count, int32 [b, k] or [b, 1];
            given with pages. A group of no pages yields zeros.
        scale: factor on the scores before the softmax; None means d ** -0.5.
        window: newest positions attended to, in tokens (sliding window attention,
            arXiv 2310.06825 section 2); None means all.
        softcap: bound c on the scaled scores, `c * tanh(score / c)` (arXiv 2408.00118
            section 2); None means none.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        The attention output [b, h, d] in the dtype of q; exactly zero for the heads
        of groups that are not selected.

    Raises:
        ValueError: if a shape or dtype is wrong, n_active comes without heads, pages
            without a table or n_pages, or window or softcap is not positive.
        NotImplementedError: if the implementation cannot serve these shapes.
    """
    _check(q, k_cache, v_cache, lengths, heads, n_active, paged=table is not None)
    where = _check_pages(q, k_cache, table, pages, n_pages)
    args = (q, k_cache, v_cache, lengths, heads, n_active, None)
    return _attend(args, where, scale, window, softcap, implementation)[0]


def append_and_attend(
    q: Float[Array, "b h d"],
    k_new: Float[Array, "b k d"],
    v_new: Float[Array, "b k d"],
    k_cache: Float[Array, "pages k page d"],
    v_cache: Float[Array, "pages k page d"],
    lengths: Int32[Array, " b"],
    heads: Int32[Array, "b n"] | None = None,
    n_active: Int32[Array, " b"] | None = None,
    *,
    table: Int32[Array, "b m"] | None = None,
    pages: Int32[Array, "b lists p"] | None = None,
    n_pages: Int32[Array, "b lists"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "b h d"],
    Float[Array, "pages k page d"],
    Float[Array, "pages k page d"],
]:
    """Write the newest token's keys and values to the caches, then attend.

    What `select_head_attention` does on the caches so written, in one pass over them.
    All groups are written, whichever are read.

    Args:
        q: queries of the newest token, [b, h, d], bfloat16, float16 or float32.
        k_new: keys of the newest token, [b, k, d], the dtype of q.
        v_new: its values, like k_new.
        k_cache: cached keys, the dtype of q: [b, k, s, d], or with a table, as pages
            of any sequences, [pages, k, page, d]; h is a multiple of k. It is written
            in place where it is donated or not used again.
        v_cache: cached values, like k_cache.
        lengths: valid cache positions of each sequence in tokens, int32 [b], 0..s,
            the newest included, which goes to position lengths - 1. For a sequence of
            length 0 nothing is written.
        heads: KV groups to compute for each sequence, int32 [b, n], distinct and in
            0..k-1 within the first n_active[b]. None computes every group (dense).
        n_active: how many leading entries of heads[b] count, int32 [b], 0..n. None
            means all n.
        table: where the positions of each sequence lie, int32 [b, m], see
            `select_head_attention`; the page of the newest must be no other's. None
            where page b is all of sequence b.
        pages: which of a sequence's pages each KV group reads, int32 [b, k or 1, p].
            The newest position is read in any case. None reads all.
        n_pages: how many leading entries of pages count, int32 [b, k or 1]. A group of
            no pages yields zeros.
        scale: factor on the scores before the softmax; None means d ** -0.5.
        window: newest positions attended to, in tokens; None means all.
        softcap: bound c on the scaled scores, `c * tanh(score / c)`; None means none.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        The attention output [b, h, d], and both caches as written.

    Raises:
        ValueError: if a shape or dtype is wrong, n_active comes without heads, pages
            without a table or n_pages, or window or softcap is not positive.
        NotImplementedError: if the implementation cannot serve these shapes.
    """
    _check(q, k_cache, v_cache, lengths, heads, n_active, paged=table is not None)
    where = _check_pages(q, k_cache, table, pages, n_pages)
    shape = (q.shape[0], k_cache.shape[1], q.shape[2])
    for name, array in (("k_new", k_new), ("v_new", v_new)):
        if array.shape != shape or array.dtype != q.dtype:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; it must be "
                f"{q.dtype}{list(shape)}"
            )
    args = (q, k_cache, v_cache, lengths, heads, n_active, (k_new, v_new))
    return _attend(args, where, scale, window, softcap, implementation)


def _attend(args, where, scale, window, softcap, implementation):
    for name, option in (("window", window), ("softcap", softcap)):
        if option is not None and not option > 0:
            raise ValueError(f"{name} is {option}; it must be positive, or None")
    implementation = resolve(implementation)
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "window": window, "softcap": softcap}
    with jax.named_scope("select_head_attention"):
        if implementation == "xla":
            return reference.attend(*args, *where, **options)
        interpret = implementation == "triton_interpret"
        return triton.attend(*args, *where, **options, interpret=interpret)


def _check(q, k_cache, v_cache, lengths, heads, n_active, paged: bool) -> None:
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; it must be [b, h, d]")
    b, h, d = q.shape
    rows = "pages" if paged else b
    wrong = k_cache.ndim != 4 or k_cache.shape[3] != d
    if wrong or (not paged and k_cache.shape[0] != b):
        raise ValueError(
            f"k_cache has shape {k_cache.shape}; with q {q.shape} it must be "
            f"[{rows}, k, {'page' if paged else 's'}, {d}]"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache has shape {v_cache.shape}; it must be that of k_cache, "
            f"{k_cache.shape}"
        )
    k = k_cache.shape[1]
    if min(q.shape) == 0 or min(k_cache.shape) == 0:
        raise ValueError(
            f"q has shape {q.shape} and k_cache {k_cache.shape}; no axis may be empty"
        )
    if h % k:
        raise ValueError(f"q has {h} heads; it must be a multiple of k_cache's {k}")
    if jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; it must be one of {_DTYPES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {cache.dtype}; it must be that of q, {q.dtype}"
            )
    _check_indices("lengths", lengths, (b,))
    if heads is not None:
        if heads.ndim != 2 or heads.shape[0] != b or not 1 <= heads.shape[1] <= k:
            raise ValueError(
                f"heads has shape {heads.shape}; it must be [{b}, n] with n in 1..{k}"
            )
        _check_indices("heads", heads, heads.shape)
    if n_active is not None:
        if heads is None:
            raise ValueError("n_active is given without heads; pass both or neither")
        _check_indices("n_active", n_active, (b,))


def _check_pages(q, k_cache, table, pages, n_pages):
    """Table and lists, as the implementations take them."""
    b, k = q.shape[0], k_cache.shape[1]
    if table is not None:
        if table.ndim != 2 or table.shape[0] != b or table.shape[1] == 0:
            raise ValueError(
                f"table has shape {table.shape}; it must be [{b}, m] with m from 1 on"
            )
        _check_indices("table", table, table.shape)
    if pages is None and n_pages is None:
        return table, None
    if pages is None or n_pages is None:
        given, other = ("pages", "n_pages") if n_pages is None else ("n_pages", "pages")
        raise ValueError(f"{given} is given without {other}; pass both or neither")
    if table is None:
        raise ValueError("pages is given without a table, whose entries it names")
    shape = pages.shape
    if len(shape) != 3 or shape[:2] not in ((b, k), (b, 1)) or shape[2] == 0:
        raise ValueError(
            f"pages has shape {shape}; it must be [{b}, {k}, p], or [{b}, 1, p] for "
            "all groups alike"
        )
    _check_indices("pages", pages, shape)
    _check_indices("n_pages", n_pages, shape[:2])
    return table, (pages, n_pages)


def _check_indices(name: str, array, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != jnp.int32:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}; it must be int32{list(shape)}"
        )
