"""Feed-forward layer over selected neurons as two Pallas kernels for Triton.

The first gathers the selected rows of `up` (and `gate`) and writes the activations of
those neurons, [b, n]; the second gathers the rows of `down` and multiplies. Each
weight row is read where it lies: no selected copy of the weights is ever made. The
second product sums over the neurons, so several programs share them and XLA adds up
their partial results, the bias with them.

Triton wants arrays of power-of-two size and dots of at least 16 rows: batches and
model dims are padded with masked loads, never in memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels.mlp.configs import Config, heuristic


def mlp(
    x,
    weights,
    neurons,
    *,
    activation: str,
    interpret=False,
    config: Config | None = None,
) -> jax.Array:
    """See `gathered_mlp`; the arguments are checked there."""
    b, m = x.shape
    n = weights["up"].shape[0] if neurons is None else neurons.shape[0]
    if config is None:
        config = heuristic(b=b, n=n, m=m, itemsize=x.dtype.itemsize)
    call = functools.partial(
        pl.pallas_call,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
    )
    batches = pl.cdiv(b, config.batch)
    entering = {name: w for name, w in weights.items() if "down" not in name}
    hidden = call(
        functools.partial(_activate, activation=activation, config=config),
        grid=(pl.cdiv(n, config.up_neurons), batches),
        out_shape=jax.ShapeDtypeStruct((b, n), x.dtype),
    )(x, entering, neurons)
    partials = call(
        functools.partial(_project, config=config),
        grid=(pl.cdiv(m, config.down_columns), config.splits, batches),
        out_shape=jax.ShapeDtypeStruct((config.splits, b, m), jnp.float32),
    )(hidden, weights["down"], neurons)
    out = jnp.sum(partials, axis=0)
    if "down_bias" in weights:
        out = out + weights["down_bias"].astype(jnp.float32)
    return out.astype(x.dtype)


def _activate(
    x_ref,  # [b, m]
    weights_refs,  # "up" and optionally "gate" [f, m], optionally "up_bias" [f]
    neurons_ref,  # [n], or None for all f
    hidden_ref,  # [b, n]
    *,
    activation: str,
    config: Config,
):
    b, m = x_ref.shape
    n = hidden_ref.shape[1]
    rows = _block(pl.program_id(1), config.batch)  # of the batch
    places = _block(pl.program_id(0), config.up_neurons)  # in the selection
    neuron = _selected(neurons_ref, places, n, weights_refs["up"].shape[0])
    matrices = [name for name in ("up", "gate") if name in weights_refs]

    def step(index, sums):
        cols = _block(index, config.up_columns)
        x = _load_tile(x_ref, rows, cols, rows < b, cols < m)

        def product(name):
            tile = _load_tile(weights_refs[name], neuron, cols, places < n, cols < m)
            return _dot(x, tile, 1)

        return tuple(
            total + product(name) for total, name in zip(sums, matrices, strict=True)
        )

    zeros = jnp.zeros((config.batch, config.up_neurons), jnp.float32)
    steps = pl.cdiv(m, config.up_columns)
    sums = lax.fori_loop(0, steps, step, (zeros,) * len(matrices))
    up = sums[0]
    if "up_bias" in weights_refs:
        bias = pltriton.load(
            weights_refs["up_bias"].at[neuron], mask=places < n, other=0
        )
        up = up + bias.astype(jnp.float32)[None, :]
    act = _ACTIVATIONS[activation]
    hidden = act(sums[1]) * up if "gate" in weights_refs else act(up)
    pltriton.store(
        hidden_ref.at[rows[:, None], places[None, :]],
        hidden.astype(hidden_ref.dtype),
        mask=(rows < b)[:, None] & (places < n)[None, :],
    )


def _project(
    hidden_ref,  # [b, n]
    down_ref,  # [f, m]
    neurons_ref,  # [n], or None for all f
    partials_ref,  # [splits, b, m] float32
    *,
    config: Config,
):
    b, n = hidden_ref.shape
    f, m = down_ref.shape
    cols = _block(pl.program_id(0), config.down_columns)
    split = pl.program_id(1)
    rows = _block(pl.program_id(2), config.batch)
    blocks = pl.cdiv(n, config.down_neurons)
    share = pl.cdiv(blocks, config.splits)
    first = split * share
    last = jnp.minimum(first + share, blocks)

    def step(index, total):
        places = _block(index, config.down_neurons)
        neuron = _selected(neurons_ref, places, n, f)
        hidden = _load_tile(hidden_ref, rows, places, rows < b, places < n)
        down = _load_tile(down_ref, neuron, cols, places < n, cols < m)
        return total + _dot(hidden, down, 0)

    zeros = jnp.zeros((config.batch, config.down_columns), jnp.float32)
    total = lax.fori_loop(first, last, step, zeros)
    pltriton.store(
        partials_ref.at[split, rows[:, None], cols[None, :]],
        total,
        mask=(rows < b)[:, None] & (cols < m)[None, :],
    )


def _block(index, size):
    """The indices of the index-th block of a size."""
    return index * size + jnp.arange(size, dtype=jnp.int32)


def _selected(neurons_ref, places, n, f):
    """The rows to read for these places in the selection of n."""
    if neurons_ref is None:
        return places
    neuron = pltriton.load(neurons_ref.at[places], mask=places < n, other=0)
    # The clip keeps a wrong index from reading outside of the weights.
    return jnp.clip(neuron, 0, f - 1)


def _load_tile(ref, rows, cols, row_mask, col_mask):
    """Load ref[rows, cols], 0 where masked."""
    return pltriton.load(
        ref.at[rows[:, None], cols[None, :]],
        mask=row_mask[:, None] & col_mask[None, :],
        other=0,
    )


def _dot(x, y, axis):
    """Contract the last axis of x with the given axis of y, summed in float32."""
    return lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # float32 operands would become TF32
        preferred_element_type=jnp.float32,
    )


def _gelu(x):
    """The exact GELU; Pallas lowers no erf for Triton, so its formula is here."""
    # Abramowitz and Stegun 7.1.26: within 1.5e-7 of erf.
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + coefficient
    tail = series * t * jnp.exp(-z * z)  # 1 - erf(z)
    return jnp.where(x < 0, 0.5 * x * tail, x - 0.5 * x * tail)


_ACTIVATIONS = {
    "relu": lambda x: jnp.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu": _gelu,
}
