"""The reference in plain XLA; also what serves on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels._dot import product

# Rows from which on the products are bound by arithmetic: float32 values between them,
# 115 kB a row in LLaMA-3.1-8B, then take time of their own.
_MANY = 1024
_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


def activate(x, activation):
    """What an activation function makes of an array.

    Args:
      x: the array.
      activation: name of the function: "relu", "silu" or "gelu".
    """
    return _ACTIVATIONS[activation](x)


def mlp(x, weights, neurons, *, activation, dtype, padded=False):
    """See `partial_mlp`, in dtype; the arguments are checked there."""
    if neurons is None:
        rows = weights
    else:  # every tensor but down_bias is neuron-major
        rows = {
            name: tensor if name == "down_bias" else _take(tensor, neurons, padded)
            for name, tensor in weights.items()
        }
    rounded = neurons is None and x.shape[0] >= _MANY
    hidden = _enter(x, rows, activation, x.dtype if rounded else jnp.float32)
    return _leave(hidden.astype(x.dtype), rows, dtype)


def masked_mlp(x, weights, neurons, *, activation, dtype=None, padded=False, keep=None):
    """As `gathered_mlp`, by dense products: what is not selected is set to 0.

    Args:
        x: inputs, [b, m].
        weights: "up" and "down" and optionally "gate", each [f, m], and their biases.
        neurons: int32 [n], or None for all.
        activation: "relu", "silu" or "gelu".
        dtype: of the output; None for that of x.
        padded: whether numbers from f on stand among `neurons`, which are none.
        keep: applied to the hidden values, float32 [b, f], before they leave; None for
            nothing.
    """
    f = weights["up"].shape[0]
    hidden = _enter(x, weights, activation)
    if neurons is not None:
        mode = "drop" if padded else "clip"
        selected = jnp.zeros(f, bool).at[neurons].set(True, mode=mode)
        hidden = jnp.where(selected, hidden, 0.0)
    if keep is not None:
        hidden = keep(hidden)
    return _leave(hidden.astype(x.dtype), weights, dtype or x.dtype)


def partial_product(x, matrix, bias, axis, dtype=jnp.float32):
    """See `pallas_kernels.partial_product`, without the axis of parts, in dtype."""
    rows = matrix if axis == 1 else matrix.T
    if bias is None:
        return product(x, rows, dtype)
    return (product(x, rows) + bias.astype(jnp.float32)).astype(dtype)


def _enter(x, rows, activation, dtype=jnp.float32):
    """The hidden values in float32, of products rounded to dtype."""
    act = _ACTIVATIONS[activation]

    def enter(name):
        if (bias := rows.get(f"{name}_bias")) is None:
            return product(x, rows[name], dtype).astype(jnp.float32)
        return product(x, rows[name]) + bias.astype(jnp.float32)

    up = enter("up")
    return act(enter("gate")) * up if "gate" in rows else act(up)


def _leave(hidden, rows, dtype):
    return partial_product(hidden, rows["down"], rows.get("down_bias"), 0, dtype)


def _take(tensor, neurons, padded):
    mode = "fill" if padded else "clip"
    return jnp.take(tensor, neurons, axis=0, mode=mode, fill_value=0)
