"""The top heads of each sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def top_heads(scores: Float[Array, "b c"], n: int) -> Int32[Array, "b n"]:
    """The n best-scored heads of each sequence, best first.

    The first j of the result are the top j, so that a budget below n takes a prefix.
    Every head is compared with every other: for the 8 to 72 heads of a model that
    fuses into one small kernel, where a sort costs several launches.

    Args:
        scores: router scores of the heads or KV groups, [b, c], free of NaN.
        n: how many heads to keep, 1..c.

    Returns:
        Head indices, int32 [b, n], in descending order of score; of equal scores the
        lower index comes first.

    Raises:
        ValueError: if scores is not a float [b, c], or n is out of range.
    """
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"scores is {scores.dtype}{list(scores.shape)}; it must be a float [b, c]"
        )
    c = scores.shape[1]
    if not 1 <= n <= c:
        raise ValueError(f"n is {n}; it must be in 1..{c}, the number of scores")
    index = jnp.arange(c, dtype=jnp.int32)
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)  # [b, c], a permutation of 0..c-1
    placed = rank[:, None, :] == jnp.arange(n, dtype=jnp.int32)[:, None]  # [b, n, c]
    return jnp.sum(jnp.where(placed, index, 0), axis=2, dtype=jnp.int32)
