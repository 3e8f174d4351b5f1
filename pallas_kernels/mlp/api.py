"""The public MLP function: checks its arguments, then dispatches."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tables
from pallas_kernels._backend import Implementation, resolve
from pallas_kernels.mlp import reference, triton

Activation = Literal["relu", "silu", "gelu"]

# Inputs up to which a product is bound by its rows.
_FEW = 128
_DTYPES = ("bfloat16", "float16", "float32")


def gathered_mlp(
    x: Float[Array, "b m"],
    weights: Mapping[str, Float[Array, "..."]],
    neurons: Int32[Array, " n"] | None = None,
    *,
    activation: Activation,
    implementation: Implementation | None = None,
) -> Float[Array, "b m"]:
    """Apply a feed-forward layer, reading only the selected neurons' weight rows.

    Plain: `act(x up^T + up_bias) down + down_bias`. Gated, when weights has "gate":
    `(act(x gate^T + gate_bias) * (x up^T + up_bias)) down + down_bias`. Sums are
    float32; the hidden activations are rounded to the dtype of x between the two
    products. So are both factors of a gate without biases where all neurons serve 1,024
    rows or more, as in prefill.

    Source: the selective MLP of Polar Sparsity section 4 (arXiv 2505.14884).

    Args:
        x: inputs, [b, m], bfloat16, float16 or float32.
        weights: "up" and "down" and optionally "gate", each [f, m] (neuron-major: a
            neuron is one row in every matrix) in the dtype of x; optionally the
            biases "up_bias" [f], "gate_bias" [f] beside a gate and "down_bias" [m]
            in any float dtype.
        neurons: rows to read, int32 [n] with n >= 1, one set for the whole batch,
            distinct, in 0..f-1, in any order. None reads all f (dense).
        activation: "relu", "silu" or "gelu" (the exact one, by the error function).
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own where neurons are selected, and "xla" where there is nothing
            to gather: a plain matrix product is the vendor library's. So it is, with
            None, above the fraction of neurons where that product over all f was
            measured faster than gathering: what is not selected then counts as 0, but
            is read, and its weights must be finite.

    Returns:
        The output [b, m] in the dtype of x. The down_bias is added once, whatever
        the selection.

    Raises:
        ValueError: if a shape, dtype, weight name or the activation is wrong.
        NotImplementedError: if the implementation cannot serve the call.
    """
    if implementation is None and neurons is None:
        implementation = "xla"
    return _mlp(x, weights, neurons, activation, implementation, parts=False)


def partial_mlp(
    x: Float[Array, "b m"],
    weights: Mapping[str, Float[Array, "..."]],
    neurons: Int32[Array, " n"] | None = None,
    *,
    activation: Activation,
    padded: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "p b m"]:
    """What `gathered_mlp` yields, in parts whose sum it is, for `add_norm` to add.

    Args:
        x: inputs, [b, m], bfloat16, float16 or float32.
        weights: "up" and "down" and optionally "gate", each [f, m] in the dtype of x,
            and optionally their biases.
        neurons: rows to read, int32 [n] with n >= 1, one set for the whole batch. None
            reads all f (dense).
        activation: "relu", "silu" or "gelu" (the exact one, by the error function).
        padded: whether numbers from f on stand among `neurons`, which are none and
            cost nothing.
        implementation: "xla", "triton", "triton_interpret", or None for the default
            backend's own where neurons are selected, or inputs of 16 bit are few, and
            "xla" else.

    Returns:
        float32 [p, b, m]; p is the implementation's.

    Raises:
        ValueError: if a shape, dtype, weight name or the activation is wrong.
        NotImplementedError: if the implementation cannot serve the call.
    """
    if neurons is None:
        implementation = few_inputs(x, implementation)
    return _mlp(
        x, weights, neurons, activation, implementation, parts=True, padded=padded
    )


def partial_product(
    x: Float[Array, "b m"],
    matrix: Float[Array, "..."],
    bias: Float[Array, " n"] | None = None,
    *,
    axis: Literal[0, 1] = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "p b n"]:
    """The products of few inputs with a matrix, as parts whose sum they are.

    What a decode step mostly does: bound by the reading of the matrix, and done the
    faster the fewer times its sums are written and read again before they are used.

    Args:
        x: inputs, [b, m].
        matrix: in the dtype of x, [n, m], or [m, n] with axis 0.
        bias: [n] or None.
        axis: of the matrix, that is summed over.
        implementation: "xla", "triton", "triton_interpret"; None for the default
            backend's own if x is of few inputs in 16 bit, else "xla".

    Returns:
        float32 [p, b, n]; p is the implementation's.

    Raises:
        ValueError: if shapes or dtypes do not fit.
        NotImplementedError: if the implementation cannot serve the call.
    """
    fits = x.ndim == 2 and matrix.ndim == 2 and matrix.shape[axis] == x.shape[1]
    if not fits or not matrix.size or not x.size:
        wanted = "[n, m]" if axis == 1 else "[m, n]"
        raise ValueError(
            f"x has shape {x.shape} and matrix {matrix.shape}; they must be [b, m] and "
            f"{wanted}, no axis 0"
        )
    if matrix.dtype != x.dtype:
        raise ValueError(f"matrix is {matrix.dtype}; it must be that of x, {x.dtype}")
    n = matrix.shape[1 - axis]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}; it must be [{n}]")
    implementation = few_inputs(x, implementation)
    implementation = resolve(implementation)
    with jax.named_scope("partial_product"):
        if implementation == "xla":
            return reference.partial_product(x, matrix, bias, axis)[None]
        interpret = implementation == "triton_interpret"
        return triton.partial_product(x, matrix, bias, axis, interpret=interpret)


def few_inputs(
    x: jax.Array, implementation: Implementation | None
) -> Implementation | None:
    """The implementation of dense products: of None, XLA's library for many inputs.

    So it is for float32, which runs on no tensor cores at full precision.
    """
    if implementation is not None:
        return implementation
    few = x.shape[0] <= _FEW and x.dtype.itemsize == 2
    return None if few else "xla"


def _mlp(x, weights, neurons, activation, implementation, *, parts, padded=False):
    # Weights that are None count as absent: a params tree may carry them so.
    weights = {name: w for name, w in weights.items() if w is not None}
    _check(x, weights, neurons, activation)
    named = implementation is not None
    implementation = resolve(implementation)
    gathers = neurons is not None and not named and implementation == "triton"
    dense = gathers and _dense_is_faster(x, weights, neurons)
    with jax.named_scope("gathered_mlp"):
        if dense or implementation == "xla":
            serve = reference.masked_mlp if dense else reference.mlp
            dtype = jnp.float32 if parts else x.dtype
            options = {"activation": activation, "dtype": dtype, "padded": padded}
            out = serve(x, weights, neurons, **options)
            return out[None] if parts else out
        return triton.mlp(
            x,
            weights,
            neurons,
            activation=activation,
            interpret=implementation == "triton_interpret",
            parts=parts,
            padded=padded,
        )


def _dense_is_faster(x, weights, neurons) -> bool:
    """Whether the product over all neurons was measured faster on this device."""
    b, m = x.shape
    f = weights["up"].shape[0]
    limit = tables.mlp_dense_above(
        b=b, m=m, f=f, gated="gate" in weights, itemsize=x.dtype.itemsize
    )
    return limit is not None and neurons.shape[0] / f > limit


def _check(x, weights, neurons, activation) -> None:
    if activation not in ("relu", "silu", "gelu"):
        raise ValueError(
            f"activation is {activation!r}; it must be 'relu', 'silu' or 'gelu'"
        )
    if x.ndim != 2 or min(x.shape) == 0:
        raise ValueError(f"x has shape {x.shape}; it must be [b, m], neither axis 0")
    if jnp.dtype(x.dtype).name not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; it must be one of {_DTYPES}")
    if missing := {"up", "down"} - set(weights):
        raise ValueError(f"weights lacks {sorted(missing)}; it has {sorted(weights)}")
    m = x.shape[1]
    f = weights["up"].shape[0] if weights["up"].ndim else 0
    shapes = {"up": (f, m), "down": (f, m), "gate": (f, m)}
    shapes |= {"up_bias": (f,), "down_bias": (m,)}
    if "gate" in weights:
        shapes["gate_bias"] = (f,)
    for name, weight in weights.items():
        if name not in shapes:
            raise ValueError(
                f"weights has an unknown {name!r}; it may have {sorted(shapes)}"
            )
        if weight.shape != shapes[name] or weight.size == 0:
            raise ValueError(
                f"weights[{name!r}] has shape {weight.shape}; with x {x.shape} and "
                f"{f} rows of 'up' it must be {shapes[name]}, no axis 0"
            )
        if weight.ndim == 2 and weight.dtype != x.dtype:
            raise ValueError(
                f"weights[{name!r}] has dtype {weight.dtype}; it must be that of x, "
                f"{x.dtype}"
            )
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(
                f"weights[{name!r}] has dtype {weight.dtype}; it must be a float"
            )
    if neurons is not None and (
        neurons.ndim != 1 or neurons.size == 0 or neurons.dtype != jnp.int32
    ):
        raise ValueError(
            f"neurons is {neurons.dtype}{list(neurons.shape)}; it must be int32[n] "
            "with n >= 1"
        )
