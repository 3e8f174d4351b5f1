"""Attention over selected KV groups as a Pallas kernel for Mosaic GPU (Hopper).

Decoding is bound by the bytes of the caches, so the kernel is a stream: each SM holds
one program that reads its share of all the tiles that the call has to read, and always
has the next few tiles in flight, across the boundaries of groups and sequences too. The
pieces of a group that lies in several shares are combined by a second, small kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import hopper
from pallas_kernels.attention.hopper import Config, kernel, plgpu, sms
from pallas_kernels.attention.reference import append
from pallas_kernels.attention.shares import Work
from pallas_kernels.attention.stream import attend_pieces, full, spread, store

# Pieces that are combined at once at least: unequal lengths cut a group into more.
_PIECES = 8


def attend(
    q,
    k_cache,
    v_cache,
    lengths,
    heads,
    n_active,
    new=None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `select_head_attention` and, for new, `append_and_attend`.

    XLA appends: the copy engine reads the caches on a path of its own, which does not
    see what the kernel itself has just written.

    Returns:
        The output, and the caches: as they came, or with the new keys and values.
    """
    if new is not None:
        k_cache, v_cache = append(k_cache, v_cache, lengths, new)
    b, h, d = q.shape
    k, s = k_cache.shape[1:3]
    g = h // k
    hopper.check(q, s, g, interpret)
    n = k if heads is None else heads.shape[1]
    columns, padded = hopper.padded(g, d)
    config = config or hopper.heuristic(g=g, d=d)
    # Interpreted programs are threads of the host.
    programs = config.programs or (4 if interpret else sms())
    work = Work(s=s, n=n, block=config.block, window=window, programs=programs)

    # Rows of a tile in shared memory are as wide as the widest swizzle that divides
    # the head dim; columns beyond the head dim are filled with zeros by the copy.
    swizzle = 2 * math.gcd(d, 64)
    layout = (
        plgpu.TilingTransform((8, swizzle // 2)),
        plgpu.SwizzleTransform(swizzle),
    )
    ring = plgpu.SMEM((config.stages, config.block, padded), q.dtype, transforms=layout)
    barriers = plgpu.Barrier(num_barriers=config.stages)
    call = functools.partial(kernel, interpret=interpret)
    out, partials, logs, cuts = call(
        functools.partial(
            attend_pieces,
            work=work,
            g=g,
            scale=scale,
            softcap=softcap,
        ),
        name="select_head_attention",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((programs, 2, padded, columns), jnp.float32),
            jax.ShapeDtypeStruct((programs, 2, columns), jnp.float32),
            jax.ShapeDtypeStruct((programs, 4), jnp.int32),
        ),
        scratch_types=dict(
            rows=plgpu.SMEM((2, columns, padded), q.dtype),
            queries=plgpu.SMEM((columns, padded), q.dtype, transforms=layout),
            keys=ring,
            values=ring,
            weights=plgpu.SMEM((columns, config.block), q.dtype, transforms=layout),
            results=plgpu.SMEM((columns, padded), q.dtype),
            zeros=plgpu.SMEM((columns, padded), q.dtype),
            q_full=plgpu.Barrier(num_barriers=2),
            q_free=plgpu.Barrier(num_barriers=2),
            k_full=barriers,
            k_free=barriers,
            v_full=barriers,
            v_free=barriers,
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
    )(lengths, n_active, heads, q, k_cache, v_cache)
    out = jax.new_ref(out)  # the second kernel adds to it
    # It waits for memory most of the time: more programs wait for less each, and load
    # all pieces of a group at once if all are equally long, as far as registers go.
    part = 64 if d % 64 == 0 else padded
    pieces = max(programs // (b * n) + 2, _PIECES)
    steps = pl.cdiv(pieces, 2 * hopper.MAX_ACCUMULATOR // (part * columns))
    call(
        functools.partial(_combine_pieces, g=g, unroll=pl.cdiv(pieces, steps)),
        name="combine_pieces",
        out_type=(),
        scratch_types=dict(results=plgpu.SMEM((columns, part), q.dtype)),
        grid=(programs, padded // part),
        grid_names=("program", "part"),
    )(cuts, partials, logs, out)
    # In a loop that keeps the outputs, XLA would let the second kernel write straight
    # into the kept array, forgetting that it adds to what the first has written.
    return lax.optimization_barrier(jax.freeze(out)), k_cache, v_cache


def _combine_pieces(
    cuts_ref,  # [programs, 4]
    partials_ref,  # [programs, 2, d padded, g padded] float32
    logs_ref,  # [programs, 2, g padded] float32
    out_ref,  # [b, h, d]
    *,
    results,  # [g padded, part of d padded]
    g: int,
    unroll: int,
):
    """Combine the pieces of a group that a share begins and another ends.

    A program does so for a part of the head dim.
    """
    program = lax.axis_index("program")
    columns, rows = results.shape
    first = lax.axis_index("part") * rows
    pieces = cuts_ref[program, 0]

    def add(step, carry):
        top, total, acc = carry
        # Several at a time, so that they are on their way together.
        logs, partials = [], []
        for x in range(unroll):
            number = step * unroll + x
            share = program + jnp.minimum(number, pieces - 1)
            # The first piece may be the second of its share; the others begin theirs.
            place = 0 if x else jnp.where(step == 0, cuts_ref[program, 1], 0)
            log = load(logs_ref.at[share, place], plgpu.Layout.WGMMA.reduce(0))
            logs.append(jnp.where(number < pieces, log, -jnp.inf))
            partial = partials_ref.at[share, place, pl.ds(first, rows)]
            partials.append(load(partial, plgpu.Layout.WGMMA))
        new_top = functools.reduce(jnp.maximum, logs, top)
        rescale = jnp.exp2(top - new_top)
        total, acc = total * rescale, acc * spread(rescale, acc)
        for log, partial in zip(logs, partials, strict=True):
            weight = jnp.exp2(log - new_top)
            total, acc = total + weight, acc + partial * spread(weight, acc)
        return new_top, total, acc

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    @pl.when(pieces > 0)
    def _():
        carry = (
            full((columns,), -jnp.inf),
            full((columns,), 0.0),
            full((rows, columns), 0.0),
        )
        steps = lax.div(pieces + (unroll - 1), unroll)
        _, total, acc = lax.fori_loop(0, steps, add, carry)
        acc = acc * spread(1.0 / total, acc)
        i, group = cuts_ref[program, 2], cuts_ref[program, 3]
        store(acc, results, out_ref, i, group, g, first)
