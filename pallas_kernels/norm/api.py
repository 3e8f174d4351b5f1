"""The public functions: they check their arguments, then dispatch."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.norm import reference, triton


def normalize(
    x: Float[Array, "... m"],
    scale: Float[Array, " m"],
    shift: Float[Array, " m"] | None = None,
    *,
    center: bool,
    eps: float,
    dtype: Any = None,
) -> Float[Array, "... m"]:
    """RMSNorm, or LayerNorm with `center`, computed in float32.

    Args:
        x: [..., m].
        scale: [m].
        shift: [m] or None.
        center: whether the mean is taken away first.
        eps: added to the mean square.
        dtype: of the result; None for that of x.

    Returns:
        As x.
    """
    return reference.normalize(x, scale, shift, center=center, eps=eps, dtype=dtype)


def add_norm(
    x: Float[Array, "b m"],
    parts: Float[Array, "p b m"],
    scale: Float[Array, " m"],
    shift: Float[Array, " m"] | None = None,
    *,
    center: bool,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
    """Add to the residual stream, and normalise what it then is.

    Args:
        x: the stream, [b, m].
        parts: what is added is their sum over p, rounded to the dtype of x.
        scale: of the norm, [m].
        shift: of the norm, [m], or None.
        center: whether the norm takes the mean away first (LayerNorm), or not
            (RMSNorm).
        eps: added to the mean square.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        The sum and its normalisation, both [b, m] in the dtype of x.

    Raises:
        ValueError: if shapes do not fit.
        NotImplementedError: if the implementation cannot serve the call.
    """
    b, m = x.shape
    if parts.ndim != 3 or parts.shape[1:] != (b, m) or not parts.shape[0]:
        raise ValueError(
            f"parts has shape {parts.shape}; with x {x.shape} it must be [p, {b}, {m}]"
        )
    for name, each in (("scale", scale), ("shift", shift)):
        if each is not None and each.shape != (m,):
            raise ValueError(f"{name} has shape {each.shape}; it must be [{m}]")
    implementation = resolve(implementation)
    with jax.named_scope("add_norm"):
        if implementation == "xla":
            return reference.add_norm(x, parts, scale, shift, center=center, eps=eps)
        interpret = implementation == "triton_interpret"
        return triton.add_norm(
            x, parts, scale, shift, center=center, eps=eps, interpret=interpret
        )
