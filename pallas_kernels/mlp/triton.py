"""Feed-forward layer over selected neurons in Pallas kernels for Triton.

Two kernels: the first gathers the selected rows of `up` (and `gate`) and multiplies
them with the inputs, which yields the activations of those neurons; the second gathers
the rows of `down` and multiplies. Each weight row is read where it lies: no selected
copy of the weights is ever made. A program has many neurons or columns, for else
reading the inputs again in each program would cost more than the weights. Where that
leaves too few programs, several share a sum: each writes a partial one and XLA adds
them up.

For very few inputs one kernel does both products, see `one_kernel`.

Few neurons in a program would leave tensor cores without enough rows: their columns are
then folded, one row for every fold.

Triton wants arrays of power-of-two size and dots of at least 16 rows: batches, neurons
and model dims are padded with masked loads, never in memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tables
from pallas_kernels._backend import once, pltriton
from pallas_kernels._dot import dot
from pallas_kernels._sizes import ceil_multiple, ceil_power_of_two
from pallas_kernels.mlp import one_kernel, tiles
from pallas_kernels.mlp.activations import ACTIVATIONS
from pallas_kernels.mlp.configs import Config, heuristic, product_config


@once("activation", "interpret", "config", "parts", "padded")
def mlp(
    x,
    weights,
    neurons,
    *,
    activation: str,
    interpret=False,
    config: Config | None = None,
    parts=False,
    padded=False,
) -> jax.Array:
    """See `gathered_mlp` and `partial_mlp`; the arguments are checked there."""
    b, m = x.shape
    n = weights["up"].shape[0] if neurons is None else neurons.shape[0]
    if config is None:
        facts = {"b": b, "n": n, "m": m, "itemsize": x.dtype.itemsize}
        facts["gated"] = "gate" in weights
        config = tables.mlp_config(heuristic(**facts), **facts)
    act = ACTIVATIONS[activation]
    if config.fused:
        args = (x, weights, neurons, n, act, config, interpret)
        sums = one_kernel.mlp(*args, padded=padded)
        # So many that XLA adds them up faster than whoever takes parts.
        return sums[None] if parts else sums.astype(x.dtype)
    hidden = _enter(x, weights, neurons, n, act, config, interpret, padded)
    args = (weights, neurons, n, config, interpret, parts)
    sums = _leave(hidden, *args, padded=padded)
    if parts:
        return sums
    return sums[0] if len(sums) == 1 else jnp.sum(sums, axis=0).astype(x.dtype)


@once("axis", "interpret", "config")
def partial_product(
    x, matrix, bias, axis, *, interpret=False, config: Config | None = None
) -> jax.Array:
    """See `pallas_kernels.partial_product`; the arguments are checked there."""
    b, m = x.shape
    n = matrix.shape[1 - axis]
    if config is None:
        facts = {"axis": axis, "b": b, "n": n, "m": m, "itemsize": x.dtype.itemsize}
        config = tables.product_config(product_config(**facts), **facts)
    if axis == 0:  # as the second product of an MLP whose neurons are the inputs
        weights = {"down": matrix, "down_bias": bias}
        options = {"parts": True, "name": "product_columns"}
        return _leave(x, weights, None, m, config, interpret, **options)
    entering = {"up": matrix} if bias is None else {"up": matrix, "up_bias": bias}
    shape = (config.up_splits, b, n)
    [parts] = _enter_call(
        x,
        entering,
        None,
        n,
        lambda sums: sums,
        config,
        interpret,
        [jax.ShapeDtypeStruct(shape, jnp.float32)],
        "product_rows",
    )
    return parts


def _enter(x, weights, neurons, n, act, config: Config, interpret, padded):
    """The activations [b, n or more]; 0 from n to the next multiple of 16."""
    b = x.shape[0]
    entering = {name: w for name, w in weights.items() if "down" not in name}
    splits = config.up_splits
    programs = pl.cdiv(ceil_multiple(n, 16), config.up_neurons)
    shape = (splits, b, ceil_multiple(programs * config.up_neurons, 16))
    names, dtype = tiles.sums(entering), jnp.float32
    if splits == 1:
        names, dtype = ("hidden",), x.dtype
    outs = [jax.ShapeDtypeStruct(shape, dtype) for _ in names]
    parts = _enter_call(
        x,
        entering,
        neurons,
        n,
        act,
        config,
        interpret,
        outs,
        "mlp_enter",
        padded=padded,
    )
    if splits == 1:
        return parts[0][0]
    sums = {k: jnp.sum(part, axis=0) for k, part in zip(names, parts, strict=True)}
    return tiles.activations(sums, act).astype(x.dtype)


def _enter_call(
    x, entering, neurons, n, act, config: Config, interpret, outs, name, padded=False
):
    programs = pl.cdiv(ceil_multiple(n, 16), config.up_neurons)
    return pl.pallas_call(
        functools.partial(_enter_kernel, n=n, act=act, config=config, padded=padded),
        grid=(pl.cdiv(x.shape[0], config.batch), programs, config.up_splits),
        out_shape=outs,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.up_warps, num_stages=config.up_stages
        ),
        name=name,
    )(x, entering, neurons)


def _leave(
    hidden,
    weights,
    neurons,
    n,
    config: Config,
    interpret,
    parts,
    name="mlp_leave",
    padded=False,
):
    """The output from the activations, [splits, b, m], in float32 if it is parts."""
    b = hidden.shape[0]
    m = weights["down"].shape[1]
    splits = config.down_splits
    dtype = hidden.dtype if splits == 1 and not parts else jnp.float32
    stages = config.down_stages
    if neurons is not None:
        # Which rows to read is loaded too, as many steps ahead of them as they are
        # ahead of their product.
        stages = 2 * stages - 1
    return pl.pallas_call(
        functools.partial(_leave_kernel, n=n, config=config, padded=padded),
        grid=(pl.cdiv(b, config.batch), pl.cdiv(m, config.down_columns), splits),
        out_shape=jax.ShapeDtypeStruct((splits, b, m), dtype),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.down_warps, num_stages=stages
        ),
        name=name,
    )(hidden, weights["down"], weights.get("down_bias"), neurons)


def _enter_kernel(
    x_ref,  # [b, m]
    weights_refs,  # "up" and optionally "gate" [f, m], optionally biases [f]
    neurons_ref,  # [n], or None for all f
    *out_refs,  # [splits, b, n or more], activations or sums of "up" (and "gate")
    n: int,
    act,
    config: Config,
    padded: bool,
):
    b, m = x_ref.shape
    split, folds = pl.program_id(2), config.up_folds
    size = max(ceil_power_of_two(config.up_neurons), 16)
    f = weights_refs["up"].shape[0]
    folded = pl.cdiv(m, folds * config.up_columns) * config.up_columns

    def inputs(own):
        rows = pl.program_id(0) * config.batch + own
        return rows, tiles.below(rows, b, config.batch)

    def neurons(own):
        places = pl.program_id(1) * config.up_neurons + own  # in the selection
        mask = tiles.below(places, n, math.lcm(config.up_neurons, 16))
        return places, tiles.both(tiles.below(own, config.up_neurons, size), mask)

    def load(ref, rows, row_mask, parts, index):
        cols = tiles.block(index, config.up_columns)
        if folds > 1:
            cols = parts[:, None] * folded + cols[None, :]
        col_mask = tiles.below(cols, m, folds * config.up_columns)
        return tiles.load_tile(ref, rows, cols, row_mask, col_mask)

    own, input_parts = _fold(config.batch, folds)
    row, row_mask = inputs(own)
    own, parts = _fold(size, folds)
    place, place_mask = neurons(own)
    neuron, place_mask = tiles.selected(neurons_ref, place, place_mask, f, padded)

    def step(index, sums):
        x = load(x_ref, row, row_mask, input_parts, index)

        def add(total, name):
            tile = load(weights_refs[name], neuron, place_mask, parts, index)
            # Neurons first: wgmma wants 64 rows or more, the batch may have few.
            return total + dot(tile, x, 1)

        return {name: add(total, name) for name, total in sums.items()}

    zeros = jnp.zeros((neuron.size, row.size), jnp.float32)
    sums = {name: zeros for name in tiles.sums(weights_refs)}
    steps = tiles.share(folded // config.up_columns, split, config.up_splits)
    sums = lax.fori_loop(*steps, step, sums)
    for name in sums:
        if (bias := f"{name}_bias") in weights_refs:
            mask = tiles.both(place_mask, (parts == 0) & (split == 0))
            values = tiles.load(weights_refs[bias].at[neuron], mask)
            sums[name] += values.astype(jnp.float32)[:, None]
    if folds > 1:
        sums = {name: _unfold(total, folds) for name, total in sums.items()}
    if config.up_splits == 1:
        outs = [tiles.activations(sums, act)]
    else:
        outs = [sums[name] for name in tiles.sums(weights_refs)]
    rows, row_mask = inputs(tiles.arange(config.batch))
    own = tiles.arange(size)
    places, _ = neurons(own)
    # Also what is not selected, which the second product then multiplies by nothing.
    own_mask = tiles.below(own, config.up_neurons, size)
    end = out_refs[0].shape[2]
    own_mask = tiles.both(own_mask, tiles.below(places, end, config.up_neurons))
    for out_ref, value in zip(out_refs, outs, strict=True):
        # The batch is the major axis in memory.
        pltriton.store(
            out_ref.at[split, rows[None, :], places[:, None]],
            value.astype(out_ref.dtype),
            mask=tiles.both(tiles.column(own_mask), tiles.row(row_mask)),
        )


def _leave_kernel(
    hidden_ref,  # [b, n or more]
    down_ref,  # [f, m]
    bias_ref,  # [m] or None
    neurons_ref,  # [n], or None for all f
    out_ref,  # [splits, b, m]
    *,
    n: int,
    config: Config,
    padded: bool,
):
    b = hidden_ref.shape[0]
    f, m = down_ref.shape
    split = pl.program_id(2)
    rows = tiles.block(pl.program_id(0), config.batch)
    row_mask = tiles.below(rows, b, config.batch)
    own = tiles.arange(ceil_power_of_two(config.down_columns))
    cols = pl.program_id(1) * config.down_columns + own
    col_mask = tiles.both(
        tiles.below(own, config.down_columns, own.size),
        tiles.below(cols, m, config.down_columns),
    )

    def step(index, total):
        places = tiles.block(index, config.down_neurons)
        # Not n: a mask by a multiple of 16 loads 16 bytes at once. But not beyond what
        # is there: whatever lies behind, NaN perhaps, would meet rows of 0.
        limit = min(ceil_multiple(n, 16), hidden_ref.shape[1])
        hidden_mask = tiles.below(places, limit, places.size)
        hidden = tiles.load_tile(hidden_ref, rows, places, row_mask, hidden_mask)
        place_mask = tiles.below(places, n, places.size)
        neuron, place_mask = tiles.selected(neurons_ref, places, place_mask, f, padded)
        down = tiles.load_tile(down_ref, neuron, cols, place_mask, col_mask)
        return total + dot(hidden, down, 0)

    total = jnp.zeros((config.batch, own.size), jnp.float32)
    steps = tiles.share(pl.cdiv(n, config.down_neurons), split, config.down_splits)
    total = lax.fori_loop(*steps, step, total)
    if bias_ref is not None:
        mask = tiles.both(col_mask, split == 0)
        total += tiles.load(bias_ref.at[cols], mask).astype(jnp.float32)[None, :]
    pltriton.store(
        out_ref.at[split, rows[:, None], cols[None, :]],
        total.astype(out_ref.dtype),
        mask=tiles.both(tiles.column(row_mask), tiles.row(col_mask)),
    )


def _fold(size, folds):
    """The index and the part of each of size x folds rows."""
    rows = tiles.arange(size * folds)
    return (rows, rows * 0) if folds == 1 else (rows // folds, rows % folds)


def _unfold(sums, folds):
    """The sums over all columns, from products of every fold with every other one."""
    row, column = (tiles.arange(size) % folds for size in sums.shape)
    sums = jnp.where(row[:, None] == column[None, :], sums, 0.0)
    neurons, inputs = (size // folds for size in sums.shape)
    sums = jnp.sum(sums.reshape(neurons, folds, inputs * folds), axis=1)
    return jnp.sum(sums.reshape(neurons, inputs, folds), axis=2)
