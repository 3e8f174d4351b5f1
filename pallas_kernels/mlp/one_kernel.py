"""Feed-forward layer of very few inputs in one Pallas kernel for Triton.

A program takes its neurons through both products, and writes a partial output.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels._sizes import ceil_power_of_two
from pallas_kernels.mlp import tiles
from pallas_kernels.mlp.configs import Config


def mlp(x, weights, neurons, n, act, config: Config, interpret, padded=False):
    """See `gathered_mlp`; the output [b, m], float32."""
    b, m = x.shape
    sums = pl.pallas_call(
        functools.partial(_both_products, n=n, act=act, config=config, padded=padded),
        grid=(config.fused,),
        out_shape=jax.ShapeDtypeStruct((config.fused, b, m), jnp.float32),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.up_warps,
            num_stages=1,  # by hand, see below
        ),
    )(x, weights, neurons)
    return jnp.sum(sums, axis=0)


def _both_products(
    x_ref,  # [b, m]
    weights_refs,  # "up", "down" and optionally "gate" [f, m], the biases [f] and [m]
    neurons_ref,  # [n], or None for all f
    out_ref,  # [programs, b, m] float32
    *,
    n: int,
    act,
    config: Config,
    padded: bool,
):
    b, m = x_ref.shape
    f = weights_refs["up"].shape[0]
    program = pl.program_id(0)
    cols = tiles.arange(max(ceil_power_of_two(m), 8))
    col_mask = cols < m
    first, last = tiles.share(n, program, config.fused)
    entering = [name for name in weights_refs if "down" not in name]

    def select(place):
        return tiles.selected(neurons_ref, place, place < last, f, padded)

    def load(name, selected):
        neuron, mask = selected
        ref = weights_refs[name]
        if name.endswith("_bias"):
            return tiles.load(ref.at[neuron], mask)
        return tiles.load(ref.at[neuron, cols], mask & col_mask)

    xs = [tiles.load(x_ref.at[i, cols], col_mask) for i in range(b)]

    def step(place, carry):
        # While one neuron is multiplied, the rows of the next are under way. A row is
        # replaced when it has been used, not before: its successor takes its
        # registers, and nothing waits for a load to move it.
        following, tile, totals = carry
        rows = {name: row.astype(jnp.float32) for name, row in tile.items()}
        products = [
            {name: rows[name] * x.astype(jnp.float32) for name in tiles.sums(rows)}
            for x in xs
        ]
        tile = {name: load(name, following) for name in entering}
        for i, product in enumerate(products):
            sums = {name: _sum(value) for name, value in product.items()}
            for name in sums:
                if (bias := f"{name}_bias") in rows:
                    sums[name] += rows[bias]
            hidden = tiles.activations(sums, act).astype(x_ref.dtype)
            totals[i] += hidden.astype(jnp.float32) * rows["down"]
        tile["down"] = load("down", following)
        return select(place + 2), tile, totals

    zeros = jnp.zeros(cols.shape, jnp.float32)
    if "down_bias" in weights_refs:
        mask = col_mask & (program == 0)
        zeros = tiles.load(weights_refs["down_bias"].at[cols], mask).astype(jnp.float32)
    tile = {name: load(name, select(first)) for name in [*entering, "down"]}
    carry = (select(first + 1), tile, [zeros] * b)
    _, _, totals = lax.fori_loop(first, last, step, carry)
    for i, total in enumerate(totals):
        pltriton.store(out_ref.at[program, i, cols], total, mask=col_mask)


def _sum(x):
    """The sum of all, first of the even and of the odd ones of every 8.

    That keeps pairs of 16-bit values together in a register from when they are loaded
    until they are used: a loop would else wait for them to split them.
    """
    return jnp.sum(jnp.sum(x.reshape(-1, 4, 2), axis=1))
