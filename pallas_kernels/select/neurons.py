"""The neurons that a batch needs together."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


def union_neurons(
    scores: Float[Array, "b f"], live: Bool[Array, " b"], n: int
) -> Int32[Array, " n"]:
    """The n neurons with the largest positive scores summed over the live sequences.

    Source: the union selection of Polar Sparsity section 4 (arXiv 2505.14884).

    Args:
        scores: neuron router outputs before any nonlinearity, [b, f], free of NaN
            in the live rows.
        live: which sequences count, bool [b]; finished ones and padding do not.
        n: how many neurons to keep, 1..f.

    Returns:
        Neuron indices, int32 [n], ascending; of equal sums any may be kept.

    Raises:
        ValueError: if a shape or dtype is wrong, or n is out of range.
    """
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"scores is {scores.dtype}{list(scores.shape)}; it must be a float [b, f]"
        )
    b, f = scores.shape
    if live.shape != (b,) or live.dtype != jnp.bool_:
        raise ValueError(
            f"live is {live.dtype}{list(live.shape)}; it must be bool[{b}]"
        )
    if not 1 <= n <= f:
        raise ValueError(f"n is {n}; it must be in 1..{f}, the number of neurons")
    counted = jnp.where(live[:, None], scores.astype(jnp.float32), 0.0)
    total = jnp.sum(jnp.maximum(counted, 0.0), axis=0)
    return jnp.sort(lax.top_k(total, n)[1])
