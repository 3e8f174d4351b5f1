"""The top heads of each sequence."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.select import triton

_MAX_HEADS = 1024


def top_heads(
    scores: Float[Array, "b c"],
    n: int,
    *,
    implementation: Implementation | None = None,
) -> Int32[Array, "b n"]:
    """The n best-scored heads of each sequence, best first.

    The first j of the result are the top j, so that a budget below n takes a prefix.
    Every head is compared with every other: for the 8 to 72 heads of a model that is
    one small kernel, where a sort costs several launches.

    Args:
        scores: router scores of the heads or KV groups, [b, c]; a NaN counts as -inf.
        n: how many heads to keep, 1..c.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        Head indices, int32 [b, n], in descending order of score; of equal scores the
        lower index comes first.

    Raises:
        ValueError: if scores is not a float [b, c], or n is out of range.
        NotImplementedError: if the implementation cannot serve the call.
    """
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"scores is {scores.dtype}{list(scores.shape)}; it must be a float [b, c]"
        )
    c = scores.shape[1]
    if not 1 <= n <= c:
        raise ValueError(f"n is {n}; it must be in 1..{c}, the number of scores")
    implementation = resolve(implementation)
    # A selection has no derivative, and a kernel no rule for it.
    scores = lax.stop_gradient(scores)
    with jax.named_scope("top_heads"):
        if implementation == "xla":
            return _reference(scores, n)
        if c > _MAX_HEADS:
            raise NotImplementedError(
                f"scores has {c} heads; the Triton kernel compares at most "
                f"{_MAX_HEADS} with each other: use 'xla'"
            )
        return triton.top_heads(
            scores, n, interpret=implementation == "triton_interpret"
        )


def _reference(scores, n):
    c = scores.shape[1]
    index = jnp.arange(c, dtype=jnp.int32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)  # [b, c], a permutation of 0..c-1
    placed = rank[:, None, :] == jnp.arange(n, dtype=jnp.int32)[:, None]  # [b, n, c]
    return jnp.sum(jnp.where(placed, index, 0), axis=2, dtype=jnp.int32)
