"""The neurons that a batch needs together."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels._backend import Implementation, resolve_without_mosaic
from pallas_kernels.select import triton

_MAX_NEURONS = 65_536


def union_neurons(
    scores: Float[Array, "b f"],
    live: Bool[Array, " b"],
    n: int,
    *,
    implementation: Implementation | None = None,
) -> Int32[Array, " n"]:
    """The n neurons with the largest positive scores summed over the live sequences.

    Source: the union selection of Polar Sparsity section 4 (arXiv 2505.14884).

    Args:
        scores: neuron router outputs before any nonlinearity, [b, f]; a NaN counts
            as 0.
        live: which sequences count, bool [b]; finished ones and padding do not.
        n: how many neurons to keep, 1..f.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        Neuron indices, int32 [n], ascending; of equal sums any may be kept.

    Raises:
        ValueError: if a shape or dtype is wrong, or n is out of range.
        NotImplementedError: if the implementation cannot serve the call.
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
    implementation = resolve_without_mosaic(implementation, "union_neurons")
    # A selection has no derivative, and a kernel no rule for it.
    scores = lax.stop_gradient(scores)
    with jax.named_scope("union_neurons"):
        if implementation == "xla":
            return _reference(scores, live, n)
        if f > _MAX_NEURONS:
            raise NotImplementedError(
                f"scores has {f} neurons; the Triton kernel holds the sums of all in "
                f"one program's registers, at most {_MAX_NEURONS}: use 'xla'"
            )
        return triton.union_neurons(
            scores, live, n, interpret=implementation == "triton_interpret"
        )


def _reference(scores, live, n):
    counts = live[:, None] & (scores > 0)
    total = jnp.sum(jnp.where(counts, scores.astype(jnp.float32), 0.0), axis=0)
    return jnp.sort(lax.top_k(total, n)[1])
