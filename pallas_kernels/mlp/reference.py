"""The reference in plain XLA; also what serves on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


def mlp(x, weights, neurons, *, activation):
    """See `gathered_mlp`; the arguments are checked there."""
    act = _ACTIVATIONS[activation]
    if neurons is None:
        rows = weights
    else:  # every tensor but down_bias is neuron-major
        rows = {
            name: tensor if name == "down_bias" else _take(tensor, neurons)
            for name, tensor in weights.items()
        }
    hidden = _dot(x, rows["up"], 1)
    if "up_bias" in rows:
        hidden = hidden + rows["up_bias"].astype(jnp.float32)
    if "gate" in rows:
        hidden = act(_dot(x, rows["gate"], 1)) * hidden
    else:
        hidden = act(hidden)
    out = _dot(hidden.astype(x.dtype), rows["down"], 0)
    if "down_bias" in rows:
        out = out + rows["down_bias"].astype(jnp.float32)
    return out.astype(x.dtype)


def _take(tensor, neurons):
    return jnp.take(tensor, neurons, axis=0, mode="clip")


def _dot(x, rows, axis):
    """Contract the last axis of x with the given axis of rows, summed in float32."""
    return lax.dot_general(
        x,
        rows,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # keeps float32 operands out of TF32
        preferred_element_type=jnp.float32,
    )
