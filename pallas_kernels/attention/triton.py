"""Attention over selected KV groups as a Pallas kernel for Triton.

One program computes one selected group of one sequence, all `g` query heads at once,
so that the group's keys and values are read once: decoding is bound by those bytes.
Long caches are split over several programs, whose partial results a second, small
kernel combines (FlashDecoding). Programs beyond a sequence's `n_active` exit at once.

Triton wants arrays of power-of-two size and dots of at least 16 rows: head dims and
groups are padded with masked loads, never in memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._backend import pltriton
from pallas_kernels.attention.configs import Config, heuristic

_MAX_GROUP = 128
_MAX_HEAD_DIM = 256


def attend(
    q,
    k_cache,
    v_cache,
    lengths,
    heads,
    n_active,
    *,
    scale: float,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """See `select_head_attention`; the arguments are checked there."""
    b, h, d = q.shape
    k, s = k_cache.shape[1:3]
    g = h // k
    if g > _MAX_GROUP or d > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the Triton attention kernel serves up to {_MAX_GROUP} query heads per "
            f"KV group and a head dim up to {_MAX_HEAD_DIM}, not {g} and {d}; "
            "implementation='xla' serves any"
        )
    if heads is None:
        heads = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (b, k))
    n = heads.shape[1]
    if n_active is None:
        n_active = jnp.full(b, n, jnp.int32)
    if config is None:
        config = heuristic(b=b, n=n, g=g, s=s, d=d, itemsize=q.dtype.itemsize)
    call = functools.partial(_pallas_call, interpret=interpret)

    # The kernels write the selected heads into an array of zeros that they alias.
    zeros = jnp.zeros_like(q)
    selection = (lengths, heads, n_active)
    attend_group = functools.partial(_attend_group, scale=scale, config=config)
    if config.splits == 1:
        return call(
            attend_group,
            grid=(b, n, 1),
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            input_output_aliases={6: 0},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )(*selection, q, k_cache, v_cache, zeros)

    partials = (b, n, config.splits, g)
    out, logs = call(
        functools.partial(_attend_split, attend_group),
        grid=(b, n, config.splits),
        out_shape=(
            jax.ShapeDtypeStruct((*partials, d), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )(*selection, q, k_cache, v_cache)
    return call(
        _combine_splits,
        grid=(b, n, g),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases={4: 0},
        num_warps=2,
        num_stages=1,
    )(heads, n_active, out, logs, zeros)


def _pallas_call(kernel, *, num_warps, num_stages, interpret, **kwargs):
    params = pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, interpret=interpret, compiler_params=params, **kwargs)


def _attend_split(attend_group, *refs):
    """`_attend_group` without the array of zeros, which the partials do not need."""
    *inputs, out_ref, logs_ref = refs
    attend_group(*inputs, None, out_ref, logs_ref)


def _attend_group(
    lengths_ref,  # [b]
    heads_ref,  # [b, n]
    n_active_ref,  # [b]
    q_ref,  # [b, h, d]
    k_ref,  # [b, k, s, d]
    v_ref,  # [b, k, s, d]
    _,  # what out_ref aliases
    out_ref,  # [b, h, d], or the splits' [b, n, splits, g, d] float32
    logs_ref=None,  # [b, n, splits, g] float32: log2 of each split's sum of weights
    *,
    scale: float,
    config: Config,
):
    i, j, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    k, s, d = k_ref.shape[1:]
    g = q_ref.shape[1] // k
    rows = jnp.arange(max(pl.next_power_of_2(g), 16), dtype=jnp.int32)
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)[None, :]
    steps = jnp.arange(config.block, dtype=jnp.int32)
    in_group = rows < g
    in_head = cols < d  # [1, d padded]

    @pl.when(j < n_active_ref[i])
    def _():
        # The clips keep wrong indices and lengths from reading outside of the cache.
        group = jnp.clip(heads_ref[i, j], 0, k - 1)
        length = jnp.clip(lengths_ref[i], 0, s)
        q = pltriton.load(
            q_ref.at[i, (group * g + rows)[:, None], cols],
            mask=in_group[:, None] & in_head,
            other=0,
        )
        blocks = pl.cdiv(length, config.block)
        # Each split takes an equal share of this sequence's own blocks.
        share = pl.cdiv(blocks, config.splits)
        first = split * share
        last = jnp.minimum(first + share, blocks)

        def step(index, carry):
            top, total, acc = carry  # [rows], [rows], [rows, d padded]
            positions = index * config.block + steps
            valid = positions < length
            # Masked loads yield 0 beyond the length, where the cache may hold NaN.
            tile = (i, group, positions[:, None], cols)
            mask = valid[:, None] & in_head
            keys = pltriton.load(k_ref.at[tile], mask=mask, other=0)
            values = pltriton.load(v_ref.at[tile], mask=mask, other=0)
            # In units of log2, since exp2 is what the hardware has.
            scores = _dot(q, keys, 1) * (scale * math.log2(math.e))
            scores = jnp.where(valid[None, :], scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_top[:, None])
            rescale = jnp.exp2(top - new_top)
            total = total * rescale + jnp.sum(weights, axis=1)
            acc = acc * rescale[:, None] + _dot(weights.astype(values.dtype), values, 0)
            return new_top, total, acc

        top = jnp.full(rows.shape, -jnp.inf, jnp.float32)
        total = jnp.zeros(rows.shape, jnp.float32)
        acc = jnp.zeros((rows.shape[0], cols.shape[1]), jnp.float32)
        top, total, acc = lax.fori_loop(first, last, step, (top, total, acc))
        # Nothing attended to (length 0, or a split without a share): acc is 0.
        acc = acc / jnp.where(total == 0.0, 1.0, total)[:, None]
        mask = in_group[:, None] & in_head
        if logs_ref is None:
            heads_out = (group * g + rows)[:, None]
            pltriton.store(
                out_ref.at[i, heads_out, cols], acc.astype(out_ref.dtype), mask=mask
            )
        else:
            pltriton.store(out_ref.at[i, j, split, rows[:, None], cols], acc, mask=mask)
            logs = top + jnp.log2(total)  # -inf where nothing was attended to
            pltriton.store(logs_ref.at[i, j, split, rows], logs, mask=in_group)


def _combine_splits(
    heads_ref,  # [b, n]
    n_active_ref,  # [b]
    partial_ref,  # [b, n, splits, g, d] float32
    logs_ref,  # [b, n, splits, g] float32
    _,  # what out_ref aliases
    out_ref,  # [b, h, d]
):
    i, j, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, g, d = partial_ref.shape[2:]
    k = out_ref.shape[1] // g
    cols = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)

    @pl.when(j < n_active_ref[i])
    def _():
        split = jnp.arange(splits, dtype=jnp.int32)
        logs = logs_ref[i, j, split, row]
        top = jnp.max(logs, axis=0)
        weights = jnp.exp2(logs - jnp.where(top == -jnp.inf, 0.0, top))
        total = jnp.sum(weights, axis=0)
        partial = pltriton.load(
            partial_ref.at[i, j, split[:, None], row, cols[None, :]],
            mask=(cols < d)[None, :],
            other=0,
        )
        out = jnp.sum(partial * weights[:, None], axis=0)
        out = out / jnp.where(total == 0.0, 1.0, total)
        group = jnp.clip(heads_ref[i, j], 0, k - 1)
        pltriton.store(
            out_ref.at[i, group * g + row, cols],
            out.astype(out_ref.dtype),
            mask=cols < d,
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
