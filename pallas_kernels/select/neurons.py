"""The neurons that a batch needs together."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels._dot import product
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
    f = scores.shape[1]
    _check(live, scores.shape[0], n, f)
    implementation = resolve(implementation)
    # A selection has no derivative, and a kernel no rule for it.
    scores = lax.stop_gradient(scores)
    with jax.named_scope("union_neurons"):
        if implementation == "xla":
            return _best(_total(scores, live), n)
        _check_held(f)
        return triton.union_neurons(
            scores, live, n, interpret=implementation == "triton_interpret"
        )


def needed_neurons(
    hidden: Float[Array, "b w"],
    up: Float[Array, "f r"],
    live: Bool[Array, " b"],
    n: int,
    *,
    implementation: Implementation | None = None,
) -> Int32[Array, " n"]:
    """The n neurons that the live sequences are least likely to do without together.

    Of a score as log odds, softplus is -log of the chance that a sequence does not need
    the neuron; the batch's chances multiply. Scores are a router's second product.

    Args:
        hidden: its inputs are the last r of each sequence's w numbers, rounded to the
            dtype of `up`.
        up: the router's second matrix.
        live: which sequences count.
        n: how many neurons to keep, 1..f.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        Neuron indices, int32 [n], ascending; of equal sums any may be kept.

    Raises:
        ValueError: if a shape or dtype is wrong, or n is out of range.
        NotImplementedError: if the implementation cannot serve the call.
    """
    if hidden.ndim != 2 or up.ndim != 2 or hidden.shape[1] < up.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and up {up.shape}; they must be [b, w] "
            "and [f, r], w no less than r"
        )
    f = len(up)
    _check(live, hidden.shape[0], n, f)
    implementation = resolve(implementation)
    hidden, up = lax.stop_gradient((hidden, up))
    with jax.named_scope("needed_neurons"):
        if implementation == "xla":
            return _best(needed_totals(hidden, up, live), n)
        _check_held(f)
        interpret = implementation == "triton_interpret"
        return triton.needed_neurons(hidden, up, live, n, interpret=interpret)


def needed_totals(
    hidden: Float[Array, "b w"], up: Float[Array, "f r"], live: Bool[Array, " b"]
) -> Float[Array, " f"]:
    """What `needed_neurons` ranks neurons by, in XLA; those of two batches add up.

    Args:
        hidden: [b, w], of which the last r numbers of each sequence go into the
            router's second matrix, rounded to its dtype.
        up: that matrix, [f, r].
        live: bool [b], which sequences count.

    Returns:
        Of each neuron, the live sequences' sum; a score that is NaN counts as 0.
    """
    x = hidden[:, hidden.shape[1] - up.shape[1] :].astype(up.dtype)
    return _total(jax.nn.softplus(product(x, up)), live)


def _check(live, b: int, n: int, f: int) -> None:
    if live.shape != (b,) or live.dtype != jnp.bool_:
        raise ValueError(
            f"live is {live.dtype}{list(live.shape)}; it must be bool[{b}]"
        )
    if not 1 <= n <= f:
        raise ValueError(f"n is {n}; it must be in 1..{f}, the number of neurons")


def _check_held(f: int) -> None:
    if f > _MAX_NEURONS:
        raise NotImplementedError(
            f"there are {f} neurons; the Triton kernel holds the sums of all in one "
            f"program's registers, at most {_MAX_NEURONS}: use 'xla'"
        )


def _best(totals, n: int):
    return jnp.sort(lax.top_k(totals, n)[1])


def _total(scores, live):
    counts = live[:, None] & (scores > 0)
    return jnp.sum(jnp.where(counts, scores.astype(jnp.float32), 0.0), axis=0)
