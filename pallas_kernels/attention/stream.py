"""The Mosaic attention kernel that streams the caches, and what it is made of.

One warpgroup of a program copies tiles into a ring in shared memory (TMA), one
computes, and one writes the zeros of groups that are not selected. Decoding has few
queries, so they are the narrow operand of the tensor cores: scores = keys @ queries^T
is [block, g] and acc = values^T @ weights is [d, g], and g is padded to 8 where queries
as rows would be padded to 64.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.hopper import plgpu
from pallas_kernels.attention.shares import Work

_LOG2E = math.log2(math.e)
_COMPUTE, _LOAD, _ZERO = 0, 1, 2  # the warpgroups of a program
_ROUND = 64  # sequences of which a program looks up the lengths at the same time


def attend_pieces(
    lengths_ref,  # [b]
    n_active_ref,  # [b]; None is n
    heads_ref,  # [b, n]; None is every group
    q_ref,  # [b, h, d]
    k_ref,  # [b, k, s, d]
    v_ref,  # [b, k, s, d]
    out_ref,  # [b, h, d]
    partials_ref,  # [programs, 2, d padded, g padded] float32
    logs_ref,  # [programs, 2, g padded] float32: log2 of the sums of weights
    cuts_ref,  # [programs, 4], of the group that a share begins and another ends: its
    # number of pieces or 0, the place of the first one, the sequence and the group
    *,
    rows,  # [2, g padded, d padded]: queries as they come
    queries,  # [g padded, d padded]: as the tensor cores want them
    keys,  # [stages, block, d padded]
    values,  # [stages, block, d padded]
    weights,  # [g padded, block]
    results,  # [g padded, d padded]
    zeros,  # [g padded, d padded]
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    work: Work,
    g: int,
    scale: float,
    softcap: float | None,
):
    """Attend over one program's share of all tiles.

    Groups that lie in the share as a whole go to out_ref, the pieces of others to
    partials_ref. Zeros go to the groups that are not selected.
    """
    program = lax.axis_index("program")
    warpgroup = lax.axis_index("warpgroup")
    b, k = k_ref.shape[:2]
    stages, block, padded = keys.shape
    columns = queries.shape[0]

    def groups(i):
        """How many of a sequence's groups are selected."""
        return work.n if n_active_ref is None else work.groups(n_active_ref[i])

    def selected(i, j):
        return j if heads_ref is None else jnp.clip(heads_ref[i, j], 0, k - 1)

    def line(i):
        """Tiles of one of a sequence's groups, and of all the selected ones."""
        blocks = work.tiles(lengths_ref[i])[1]
        return blocks, blocks * groups(i)

    # Of no use to the warpgroup that writes zeros, which would slow down the others.
    whole_line, *begin = lax.cond(
        warpgroup != _ZERO,
        lambda: find_share(lambda i: line(i)[1], b, work, program),
        lambda: (jnp.int32(0),) * 4,
    )

    def for_each_piece(body):
        def step(state):
            i, j, skip, left, ring, piece = state
            # Some sequence from i on has tiles, since some are left.
            i, _ = lax.while_loop(
                lambda state: state[1] == 0,
                lambda state: (state[0] + 1, line(state[0] + 1)[1]),
                (i, line(i)[1]),
            )
            first, blocks = work.tiles(lengths_ref[i])
            count = jnp.minimum(blocks - skip, left)
            body(i, selected(i, j), first + skip, count, ring, piece)
            last = j + 1 == groups(i)
            return (
                jnp.where(last, i + 1, i),
                jnp.where(last, 0, j + 1),
                jnp.int32(0),
                left - count,
                ring + count,
                piece + 1,
            )

        i, skip, left = begin
        blocks = jnp.maximum(line(i)[0], 1)  # 0 if the share is empty
        state = (i, lax.div(skip, blocks), lax.rem(skip, blocks), left)
        state = (*state, jnp.int32(0), jnp.int32(0))
        lax.while_loop(lambda state: state[3] > 0, step, state)

    def zero_unselected():
        """Write zeros for every so many-th group of all."""
        zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
        plgpu.commit_smem()

        def zero(x, _):
            number = program + x * work.programs
            i, group = lax.div(number, k), lax.rem(number, k)
            active = groups(i)

            def find(j, found):
                return found | ((selected(i, j) == group) & (j < active))

            unseen = line(i)[0] == 0
            if not (heads_ref is None and n_active_ref is None):
                unseen |= jnp.logical_not(lax.fori_loop(0, work.n, find, False))

            @pl.when(unseen)
            def _():
                _copy_out(zeros, out_ref, i, group, g)

            return 0

        mine = lax.div(b * k - program + work.programs - 1, work.programs)
        lax.fori_loop(0, mine, zero, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == _LOAD)
    def _():
        def load(i, group, first, count, ring, piece):
            slot = lax.rem(piece, 2)
            plgpu.barrier_wait(q_free.at[slot])
            # More rows than g where g is padded; nobody looks at those.
            q_rows = q_ref.at[i, pl.ds(group * g, columns), pl.ds(0, padded)]
            plgpu.copy_gmem_to_smem(q_rows, rows.at[slot], q_full.at[slot])

            def load_tile(t, _):
                slot = lax.rem(ring + t, stages)
                tile = (i, group, pl.ds((first + t) * block, block), pl.ds(0, padded))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[tile], keys.at[slot], k_full.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                plgpu.copy_gmem_to_smem(
                    v_ref.at[tile], values.at[slot], v_full.at[slot]
                )
                return 0

            lax.fori_loop(0, count, load_tile, 0)

        for_each_piece(load)
        for slot in range(2):
            plgpu.barrier_wait(q_free.at[slot])
        for slot in range(stages):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

    @pl.when(warpgroup == _ZERO)
    def _():
        zero_unselected()

    @pl.when(warpgroup == _COMPUTE)
    def _():
        for slot in range(2):
            plgpu.barrier_arrive(q_free.at[slot])
        for slot in range(stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])

        def compute(i, group, first, count, ring, piece):
            start, end = work.positions(lengths_ref[i])
            slot = lax.rem(piece, 2)
            plgpu.barrier_wait(q_full.at[slot])
            queries.transpose((1, 0))[...] = plgpu.load(
                rows.at[slot].transpose((1, 0)),
                layout=plgpu.Layout.WGMMA_TRANSPOSED,
                optimized=False,
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_free.at[slot])

            def valid(position, shape):
                position += plgpu.broadcasted_iota(
                    jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
                )
                return (position >= start) & (position < end)

            def attend_tile(t, carry):
                top, total, acc = carry
                slot = lax.rem(ring + t, stages)
                position = (first + t) * block
                plgpu.barrier_wait(k_full.at[slot])
                scores = _dot(keys.at[slot], queries.transpose((1, 0)))
                plgpu.barrier_arrive(k_free.at[slot])
                # In units of log2, since exp2 is what the hardware has.
                if softcap is None:
                    scores = scores * (scale * _LOG2E)
                else:
                    # tanh(x) = 1 - 2 / (1 + exp(2 x)); the hardware's is too coarse.
                    power = jnp.exp2(scores * (2 * scale / softcap * _LOG2E))
                    scores = softcap * _LOG2E * (1.0 - 2.0 / (1.0 + power))
                scores = jnp.where(valid(position, scores.shape), scores, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(scores, axis=0))
                rescale = jnp.exp2(top - new_top)
                weight = jnp.exp2(scores - spread(new_top, scores))
                # Summed along the positions at the end of the piece.
                total = total * spread(rescale, total) + weight
                weights.transpose((1, 0))[...] = plgpu.layout_cast(
                    weight.astype(weights.dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                plgpu.barrier_wait(v_full.at[slot])

                @pl.when((position < start) | (position + block > end))
                def _():
                    # A weight of 0 does not silence the NaN that may stand there.
                    for row in range(0, block, 64):
                        part = values.at[slot, pl.ds(row, 64)]
                        tile = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                        keep = valid(position + row, tile.shape)
                        part[...] = jnp.where(keep, tile, jnp.zeros((), tile.dtype))
                    plgpu.commit_smem()

                acc = acc * spread(rescale, acc) + _dot(
                    values.at[slot].transpose((1, 0)), weights.transpose((1, 0))
                )
                plgpu.barrier_arrive(v_free.at[slot])
                return new_top, total, acc

            carry = (
                full((columns,), -jnp.inf),
                full((block, columns), 0.0),
                full((padded, columns), 0.0),
            )
            top, total, acc = lax.fori_loop(0, count, attend_tile, carry)
            total = jnp.sum(total, axis=0)
            acc = acc * spread(1.0 / total, acc)
            first_tile, tiles = work.tiles(lengths_ref[i])
            begins = first == first_tile
            ends = first + count == first_tile + tiles

            @pl.when(begins & ends)
            def _():
                store(acc, results, out_ref, i, group, g)

            # A share can cut two groups: that which it begins in, and the last one.
            place = (piece > 0).astype(jnp.int32)

            @pl.when(jnp.logical_not(begins & ends))
            def _():
                partials_ref[program, place] = acc
                logs_ref[program, place] = top + jnp.log2(total)

            @pl.when(begins & jnp.logical_not(ends))
            def _():
                following, _ = work.share(whole_line, program + 1)
                last = work.owner(whole_line, following + tiles - count - 1)
                cut = (last + 1 - program, place, i, group)
                for x, value in enumerate(cut):
                    cuts_ref[program, x] = value

        cuts_ref[program, 0] = jnp.int32(0)
        for_each_piece(compute)


def find_share(tiles, b: int, work: Work, program):
    """Where in the line a program's share begins.

    Each program counts for itself: as XLA's, this would be kernels before the kernel.

    Args:
        tiles: gives the number of tiles of all the selected groups of a sequence.
        b: how many sequences there are.
        work: what there is to do.
        program: whose share.

    Returns:
        The length of the line, the sequence that the share begins in, how many of its
        tiles lie before the share, and how many the share has.
    """

    def for_each_sequence(body, carry):
        # In rounds, since the loads of a round are on their way together.
        whole = b - b % _ROUND
        for start, end in ((0, whole), (whole, b)):
            if start < end:
                unroll = min(end - start, _ROUND)
                carry = lax.fori_loop(start, end, body, carry, unroll=unroll)
        return carry

    def pass_by(i, carry):
        sequence, before, end = carry
        end += tiles(i)
        passed = end <= begin
        sequence += passed.astype(jnp.int32)
        return sequence, jnp.where(passed, end, before), end

    total = for_each_sequence(lambda i, total: total + tiles(i), jnp.int32(0))
    begin, count = work.share(total, program)
    sequence, before, _ = for_each_sequence(pass_by, (jnp.int32(0),) * 3)
    # Empty shares lie behind all sequences.
    return total, jnp.minimum(sequence, b - 1), begin - before, count


def store(acc, results, out_ref, i, group, g: int, first=0):
    """Write acc [columns, g padded] to a group's query heads, from column first."""
    results.transpose((1, 0))[...] = plgpu.layout_cast(
        acc.astype(results.dtype), plgpu.Layout.WGMMA_TRANSPOSED
    )
    plgpu.commit_smem()
    _copy_out(results, out_ref, i, group, g, first)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_out(rows, out_ref, i, group, g: int, first=0):
    # Columns beyond the head dim are not written, rows beyond g not copied. But a
    # single row is copied as so many bytes, whatever lies behind the head.
    cols = rows.shape[1] if g > 1 else min(rows.shape[1], out_ref.shape[2])
    heads = out_ref.at[i, pl.ds(group * g, g), pl.ds(first, cols)]
    plgpu.copy_smem_to_gmem(rows.at[pl.ds(0, g), pl.ds(0, cols)], heads)


def _dot(x, y):
    """Multiply on the tensor cores, and wait for it; float32."""

    def multiply(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    shape = (x.shape[0], y.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def full(shape, value):
    """A float32 array as the tensor cores lay it out; a vector is one per column."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(0)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(vector, like):
    """A value per column, for every row."""
    return lax.broadcast_in_dim(vector, like.shape, [1])
