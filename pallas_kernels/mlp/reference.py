"""The reference in plain XLA; also what serves on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels._dot import product

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


def mlp(x, weights, neurons, *, activation):
    """See `partial_mlp`, one part; the arguments are checked there."""
    if neurons is None:
        rows = weights
    else:  # every tensor but down_bias is neuron-major
        rows = {
            name: tensor if name == "down_bias" else _take(tensor, neurons)
            for name, tensor in weights.items()
        }
    return _leave(_enter(x, rows, activation), rows, x.dtype)


def masked_mlp(x, weights, neurons, *, activation):
    """As `gathered_mlp`, by dense products: what is not selected is set to 0.

    Args:
        x: inputs, [b, m].
        weights: as there.
        neurons: int32 [n].
        activation: as there.
    """
    return masked(x, weights, neurons, activation=activation)[0].astype(x.dtype)


def masked(x, weights, neurons, *, activation):
    """`masked_mlp` as one part of float32."""
    f = weights["up"].shape[0]
    selected = jnp.zeros(f, bool).at[neurons].set(True, mode="clip")
    hidden = jnp.where(selected, _enter(x, weights, activation), 0.0)
    return _leave(hidden, weights, x.dtype)


def partial_product(x, matrix, bias, axis):
    """See `pallas_kernels.partial_product`, one part."""
    out = product(x, matrix if axis == 1 else matrix.T)
    return (out if bias is None else out + bias.astype(jnp.float32))[None]


def _enter(x, rows, activation):
    """The hidden values in float32."""
    act = _ACTIVATIONS[activation]
    up = product(x, rows["up"])
    if "up_bias" in rows:
        up = up + rows["up_bias"].astype(jnp.float32)
    return act(product(x, rows["gate"])) * up if "gate" in rows else act(up)


def _leave(hidden, rows, dtype):
    return partial_product(hidden.astype(dtype), rows["down"], rows.get("down_bias"), 0)


def _take(tensor, neurons):
    return jnp.take(tensor, neurons, axis=0, mode="clip")
