"""The public function: checks its arguments, then dispatches."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.qkv import reference, triton


def split_heads(
    parts: Float[Array, "p b w"],
    cos: Float[Array, "b c"] | None,
    sin: Float[Array, "b c"] | None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries, keys and values of one token of each sequence, from their product.

    Args:
        parts: whose sum over p is, for each sequence, the queries of all heads, the
            keys, the values, and then anything else, such as routers' scores.
        cos: of the angles that queries and keys are rotated by, dimension i with
            i + d / 2: float32 [b, d / 2]; None where they are not.
        sin: likewise.
        heads: h.
        kv_heads: k.
        head_dim: d, even.
        dtype: of the result; sums are rounded to it before they are rotated.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own.

    Returns:
        q [b, h, d]; k and v [b, k, d]; the rest float32 [b, r], None if there is none.

    Raises:
        ValueError: if shapes do not fit.
        NotImplementedError: if the implementation cannot serve the call.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even")
    least = (heads + 2 * kv_heads) * head_dim
    if parts.ndim != 3 or parts.shape[2] < least or not parts.shape[0]:
        raise ValueError(
            f"parts has shape {parts.shape}; with {heads} heads, {kv_heads} KV heads "
            f"and head_dim {head_dim} it must be [p, b, {least} or more]"
        )
    for name, each in (("cos", cos), ("sin", sin)):
        if each is not None and each.shape != (parts.shape[1], head_dim // 2):
            raise ValueError(
                f"{name} has shape {each.shape}; it must be "
                f"[{parts.shape[1]}, {head_dim // 2}]"
            )
    implementation = resolve(implementation)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    with jax.named_scope("split_heads"):
        if implementation == "xla":
            return reference.split_heads(parts, cos, sin, dtype=dtype, **sizes)
        interpret = implementation == "triton_interpret"
        return triton.split_heads(
            parts, cos, sin, dtype=dtype, interpret=interpret, **sizes
        )
