"""Feed-forward layer over selected neurons as a Pallas kernel for Mosaic GPU (Hopper).

For one input, or very few: then each weight is used once, and the kernel is a stream.
An SM holds one program, which takes its share of the neurons all the way. One warpgroup
copies rows of the next neurons into a ring in shared memory (a bulk copy each), the
other multiplies. A program ends with a partial output; XLA adds those up.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._hopper import (
    SHARED_BYTES,
    THREADS,
    across_threads,
    check,
    kernel,
    plgpu,
    sms,
)
from pallas_kernels.mlp.activations import ACTIVATIONS

_COMPUTE, _LOAD = 0, 1  # the warpgroups of a program
# Of the registers of a thread, those that inputs and sums may take; and shared memory
# that is left to barriers and reductions.
_MAX_REGISTERS = 140
_OTHER_BYTES = 4 * 1024
_MAX_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    Attributes:
        neurons: how many are multiplied together.
        stages: such sets of rows in a program's ring.
        programs: how many share the work; None means one per SM.
    """

    neurons: int
    stages: int
    programs: int | None = None


def heuristic(*, m: int, gated: bool) -> Config:
    """Two neurons at a time if that leaves two stages, else one."""
    row_bytes = (3 if gated else 2) * m * 2
    neurons = 2 if 4 * row_bytes <= SHARED_BYTES - _OTHER_BYTES else 1
    stages = (SHARED_BYTES - _OTHER_BYTES) // (neurons * row_bytes)
    return Config(neurons, min(stages, _MAX_STAGES))


def mlp(
    x,
    weights,
    neurons,
    *,
    activation: str,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """See `gathered_mlp`; the arguments are checked there."""
    b, m = x.shape
    _check(x, interpret)
    config = config or heuristic(m=m, gated="gate" in weights)
    # Interpreted programs are threads of the host.
    programs = config.programs or (4 if interpret else sms())
    rings = {
        name: plgpu.SMEM((config.stages, config.neurons, m), x.dtype)
        for name in ("up", "gate", "down")
        if name in weights
    }
    copies = len(rings) * config.neurons
    biased = "up_bias" in weights
    sums = kernel(
        functools.partial(
            _kernel,
            act=ACTIVATIONS[activation],
            programs=programs,
            layout=across_threads(m),
        ),
        name="gathered_mlp",
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((programs, b, m), jnp.float32),
        scratch_types=dict(
            rings=rings,
            biases=plgpu.SMEM((config.stages, config.neurons), jnp.float32),
            full=plgpu.Barrier(
                num_arrivals=copies + biased, num_barriers=config.stages
            ),
            free=plgpu.Barrier(num_barriers=config.stages),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
    )(neurons, x, {name: weights[name] for name in rings}, weights.get("up_bias"))
    out = jnp.sum(sums, axis=0)
    if "down_bias" in weights:
        out += weights["down_bias"].astype(jnp.float32)
    return out.astype(x.dtype)


def _check(x, interpret: bool) -> None:
    b, m = x.shape
    check("MLP", x.dtype, interpret)
    registers = b * m * 3 // 2 // THREADS  # of inputs and sums
    if m % (2 * THREADS) or registers > _MAX_REGISTERS:
        raise NotImplementedError(
            f"the Mosaic MLP kernel serves model dims that are multiples of "
            f"{2 * THREADS}, up to {_MAX_REGISTERS * THREADS * 2 // 3} of all inputs "
            f"together, not {b} of {m}; implementation='triton' serves any"
        )


def _kernel(
    neurons_ref,  # [n], or None for all f
    x_ref,  # [b, m]
    weights_refs,  # "up", "down" and optionally "gate" [f, m]
    bias_ref,  # [f], or None
    out_ref,  # [programs, b, m] float32
    *,
    rings,  # of each matrix [stages, neurons, m]
    biases,  # [stages, neurons]
    full,
    free,
    act,
    programs: int,
    layout,
):
    b, m = x_ref.shape
    f = weights_refs["up"].shape[0]
    n = f if neurons_ref is None else neurons_ref.shape[0]
    stages, size = biases.shape
    program = lax.axis_index("program")
    warpgroup = lax.axis_index("warpgroup")
    first = lax.div(program * n, programs)
    count = lax.div((program + 1) * n, programs) - first
    steps = lax.div(count + (size - 1), size)

    @pl.when(warpgroup == _LOAD)
    def _():
        def select(step):
            """The rows of a step's neurons; beyond the last one, that again."""
            places = [jnp.minimum(step * size + i, count - 1) for i in range(size)]
            places = [jnp.clip(first + place, 0, n - 1) for place in places]
            if neurons_ref is None:
                return places
            return [jnp.clip(neurons_ref[place], 0, f - 1) for place in places]

        def fetch(rows):
            """Their biases."""
            if bias_ref is None:
                return []
            return [bias_ref[row].astype(jnp.float32) for row in rows]

        def load(step, carry):
            rows, values, following = carry
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(free.at[slot])
            for i, row in enumerate(rows):
                for name, ring in rings.items():
                    plgpu.copy_gmem_to_smem(
                        weights_refs[name].at[row],
                        ring.at[slot, i],
                        full.at[slot],
                        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                    )
            for i, value in enumerate(values):
                biases[slot, i] = value
            if values:
                plgpu.barrier_arrive(full.at[slot])
            # What is read from far off is used a step later, when it has come.
            return following, fetch(following), select(step + 2)

        rows = select(0)
        lax.fori_loop(0, steps, load, (rows, fetch(rows), select(1)))
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(warpgroup == _COMPUTE)
    def _():
        for slot in range(stages):
            plgpu.barrier_arrive(free.at[slot])

        def read(ref, layout):
            value = plgpu.load(ref, layout=layout, optimized=False)
            return value.astype(jnp.float32)

        def spread(value, axis):
            value = lax.broadcast_in_dim(value, (size, m), [1 - axis])
            return plgpu.layout_cast(value, layout)

        xs = [
            plgpu.load(x_ref.at[i], layout=layout.reduce(0), optimized=False)
            for i in range(b)
        ]

        def compute(step, totals):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])

            sums = {}
            for name in (name for name in rings if name != "down"):
                tile = read(rings[name].at[slot], layout)
                inputs = [spread(x.astype(jnp.float32), 0) for x in xs]
                sums[name] = [jnp.sum(tile * x, axis=1) for x in inputs]
            if bias_ref is not None:
                bias = read(biases.at[slot], layout.reduce(1))
                sums["up"] = [up + bias for up in sums["up"]]
            place = step * size + plgpu.broadcasted_iota(
                jnp.int32, (size,), 0, layout=layout.reduce(1)
            )
            hidden = []
            for i, up in enumerate(sums["up"]):
                value = act(sums["gate"][i]) * up if "gate" in sums else act(up)
                value = jnp.where(place < count, value, 0.0)
                hidden.append(value.astype(x_ref.dtype).astype(jnp.float32))
            down = read(rings["down"].at[slot], layout)
            pairs = zip(totals, hidden, strict=True)
            totals = [
                total + jnp.sum(spread(value, 1) * down, axis=0)
                for total, value in pairs
            ]
            plgpu.barrier_arrive(free.at[slot])
            return totals

        zeros = plgpu.layout_cast(jnp.zeros(m, jnp.float32), layout.reduce(0))
        totals = lax.fori_loop(0, steps, compute, [zeros] * b)
        for i, total in enumerate(totals):
            out_ref[program, i] = total
