"""`polarjax.plan`: what fits into a device, and how fast it can be, before it is there.

Nothing is loaded or allocated: shapes follow from the configuration, bytes from shapes,
and the speed is the floor, those bytes over the bandwidth of the device's memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig
from polarjax.mesh.cut import check_tp
from polarjax.model import weight_shapes
from polarjax.params import Params
from polarjax.planning.cost import StepCost, tree_bytes
from polarjax.planning.devices import Memory, check_link, known_gpu, live, sending_ms
from polarjax.planning.memory import (
    MEMORY_FRACTION,
    PAGE,
    cache_bytes,
    check_fraction,
    cpu_step_bytes,
    largest,
    prefill_bytes,
    prefill_tokens_on,
    sampling_bytes,
)
from polarjax.planning.per_device import (
    bound_bytes,
    device_cost,
    of_device,
    step_sent_bytes,
)
from polarjax.planning.sizes import at_least, bucket, positive
from polarjax.policies.adapter import as_stored, of_learned
from polarjax.policies.budgets import check_density, check_parts, count, in_parts
from polarjax.policies.routers import router_shapes
from polarjax.policy import Learned, Reads
from polarjax.settings import default_numbers

BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (2048, 8192, 32768)
DENSITIES = (1.0, 0.5)
_MOST = 2**20  # of a batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One batch at one context and density. Bytes are those of each device.

    Attributes:
      batch: sequences, of all devices together.
      context: tokens of each, prompt and continuation.
      density: fraction of the KV groups that are read from layer 1 on, a whole number
        of them; 1 is dense.
      neuron_density: fraction of the MLP neurons; 1 is dense.
      memory_bytes: weights, routers, cache and working memory.
      fits: whether the device has them.
      step_bytes: that a decode step reads, all sequences at `context`. Of several
        devices, on average: what the busiest reads, too, if the selection is balanced,
        else the least that it can be.
      sent_bytes: that a decode step sends to other devices, see
        `polarjax.planning.per_device`.
      read_ms: `step_bytes` over the bandwidth.
      sent_ms: `sent_bytes` over the link between devices. Real collectives take longer:
        each some microseconds, however small.
      step_ms: both, one after the other: the step's floor.
      tokens_per_second: at that speed: the most that there can be, since no step is
        faster than its floor.
      over_dense: dense's `step_ms` by this one.
    """

    batch: int
    context: int
    density: float
    neuron_density: float
    memory_bytes: int
    fits: bool
    step_bytes: int
    sent_bytes: int
    read_ms: float
    sent_ms: float
    step_ms: float
    tokens_per_second: float
    over_dense: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    Attributes:
      device: the device, of which there are tp x dp.
      tp: devices that share a model.
      dp: copies of the model, which share a batch.
      balanced: whether each device chooses among its own groups and neurons.
      usable_bytes: memory of a device that weights, cache and all else may fill.
      weight_bytes: of the weights that a device has.
      rows: every batch at every context and density.
      largest_batch: by context, and then by the rows' density, the largest batch that
        fits; 0 for none.
      notes: what a reader of the rows should know.
    """

    device: Memory
    tp: int
    dp: int
    balanced: bool
    usable_bytes: float
    weight_bytes: int
    rows: tuple[Row, ...]
    largest_batch: dict[int, dict[float, int]]
    notes: tuple[str, ...] = ()


@default_numbers
def plan(
    config: ModelConfig,
    device: Any = None,
    *,
    dtype: Any = jnp.bfloat16,
    densities: Sequence[float] = DENSITIES,
    neuron_density: float = 1.0,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] | None = None,
    head_rank: int = 64,
    neuron_rank: int = 1024,
    memory_fraction: float = MEMORY_FRACTION,
    tp: int = 1,
    dp: int = 1,
    balanced: bool = False,
    link_gb_s: float | None = None,
) -> Plan:
    """Which batch x context fits into a device, and what speed its memory allows.

    Memory is that of weights, routers (and the QKV matrices that `generate` makes with
    router rows in them, beside the original ones), a KV cache as long as `generate`
    makes it, and an estimate, from above, of what prefill and sampling need meanwhile.

    Over several devices a plan is of one of them, as `polarjax.mesh.cut` cuts the
    model. What is selected of all is taken to lie evenly on the devices: how unevenly
    it does, the weights decide, and `generate` says (`Stats.imbalance`).

    Args:
      config: of the model.
      device: a `jax.Device`: its memory as it says, its bandwidth measured; or the
        name of a GPU that is not at hand ("h100", "h200", "a100-80gb", ...), with its
        datasheet's numbers; None for the first device.
      dtype: of weights and cache.
      densities: fractions of the KV groups to read from layer 1 on, in (0, 1].
      neuron_density: fraction of the MLP neurons to read wherever density is below 1
        (ReLU models).
      batches: numbers of sequences.
      contexts: tokens of a sequence, prompt and continuation; None for 2048, 8192 and
        32768, as far as the model goes.
      head_rank: of the head routers' quadratic form, 0 for none.
      neuron_rank: of the neuron routers.
      memory_fraction: of the memory that XLA may take, in (0, 1]. XLA takes 0.75 of
        a GPU, or XLA_PYTHON_CLIENT_MEM_FRACTION.
      tp: devices that share a model.
      dp: copies of the model, which share a batch, each as large a part as the
        largest.
      balanced: as `Polar(density, balanced=tp)`: each device reads as many of its own
        groups and neurons, rounded up; else the best of all, whatever device has them.
      link_gb_s: GB per second that a device sends to the others; None for NVLink's
        datasheet value of a GPU that has it.

    Raises:
      ValueError: if a number is out of range or changes nothing, if tp does not divide
        the model (or its KV groups, where they are to be balanced), or if nothing is
        known of the device or of the link that it needs.
    """
    if contexts is None:
        contexts = [s for s in CONTEXTS if s < config.context][:3]
        contexts = contexts if len(contexts) == 3 else [*contexts, config.context]
    batches = [positive("batch", b) for b in batches]
    contexts = [positive("context", s) for s in contexts]
    if too_long := [s for s in contexts if s > config.context]:
        raise ValueError(
            f"context {too_long[0]}: the model's own is {config.context} tokens"
        )
    densities = [check_density(d) for d in densities]
    if check_density(neuron_density) < 1 and config.activation != "relu":
        raise ValueError(
            f"neuron sparsity needs a ReLU MLP, the model's is {config.activation}: "
            "leave neuron_density out"
        )
    check_fraction(memory_fraction)
    head_rank = at_least("head_rank", head_rank, 0)
    if neuron_density < 1:
        neuron_rank = positive("neuron_rank", neuron_rank)
    tp, dp = positive("tp", tp), positive("dp", dp)
    check_tp(tp, config)
    if neuron_density < 1 and min(densities) == 1:
        raise ValueError(
            "neuron_density has no effect where no density is below 1: leave it out"
        )
    if balanced and tp == 1:
        raise ValueError("balanced has no effect on one device: give tp, or leave it")
    if link_gb_s is not None and tp * dp == 1:
        raise ValueError("link_gb_s has no effect on one device: leave it out")
    parts = tp if balanced else 1
    check_parts(config.kv_heads, parts)
    dtype = jnp.dtype(dtype)
    params = abstract_params(
        config, dtype, head_rank, neuron_rank if neuron_density < 1 else 0
    )
    memory = known_gpu(device) if isinstance(device, str) else live(device)
    if link_gb_s is not None:
        memory = dataclasses.replace(memory, link=check_link(link_gb_s) * 1e9)
    usable = memory.limit * memory_fraction
    own = of_device(params, tp)
    weights = tree_bytes(own.weights)
    # Routers lie whole on every device, but for the rows that neurons have in them.
    routers = tree_bytes(params.routers)
    ups = (router.get("neurons", {}).get("up") for router in params.routers.values())
    routers -= (tp - 1) * tree_bytes(list(ups)) // tp
    k, f, layers = config.kv_heads, config.neurons, config.layers

    def reads(density: float) -> tuple[int, int]:
        """KV groups and neurons of a sparse layer."""
        neurons = count(1.0 if density == 1 else neuron_density, f)
        return in_parts(count(density, k), parts), in_parts(neurons, parts)

    def added(density: float) -> tuple[int, int]:
        """Bytes beside the weights: of bound ones, and of routers."""
        groups, neurons = reads(density)
        bound = bound_bytes(own, groups < k, neurons < f)
        return bound, (density < 1) * routers

    held_bytes = {density: weights + sum(added(density)) for density in densities}

    def needed(batch: int, context: int, density: float) -> int:
        capacity, part, step = -(-context // PAGE) * PAGE, -(-batch // dp), 0
        if memory.platform == "cpu":
            step = cpu_step_bytes(own.config, part, capacity, dtype, weights)
        # As many prompt tokens as `generate` reads at once, at most.
        tokens = min(prefill_tokens_on(memory.platform), bucket(part * context))
        prefill = prefill_bytes(own.config, tokens, dtype)
        return (
            held_bytes[density]
            + cache_bytes(own.config, part, capacity, dtype)
            + max(prefill, step)
            + sampling_bytes(config, part)
        )

    def step(cost: StepCost, part: int, density: float) -> tuple[int, int]:
        """Bytes read, and sent."""
        groups, neurons = reads(density)
        picks = neurons < f
        score_rows = (groups < k) * (k + head_rank) + picks * neuron_rank
        rest = layers - 1
        sent = step_sent_bytes(
            config,
            tp,
            dp,
            part,
            dtype,
            score_rows=(0, *(score_rows,) * rest),
            picks_neurons=(False, *(picks,) * rest),
            balanced=balanced,
        )
        sparse = (float(groups),) * rest
        read = cost.bytes_read(Reads((k, *sparse), (1.0, *(neurons / f,) * rest)))
        return read, sent

    def times(read: int, sent: int) -> tuple[float, float]:
        return read / memory.bandwidth * 1e3, sending_ms(sent, memory)

    rows = []
    for context in contexts:
        for batch in batches:
            part = -(-batch // dp)
            cost = device_cost(own, k, part, context)
            dense = sum(times(*step(cost, part, 1.0)))
            for density in densities:
                groups, neurons = reads(density)
                read, sent = step(cost, part, density)
                read_ms, sent_ms = times(read, sent)
                need = needed(batch, context, density)
                rows.append(
                    Row(
                        batch=batch,
                        context=context,
                        density=groups / k,
                        neuron_density=neurons / f,
                        memory_bytes=need,
                        fits=need <= usable,
                        step_bytes=read,
                        sent_bytes=sent,
                        read_ms=read_ms,
                        sent_ms=sent_ms,
                        step_ms=read_ms + sent_ms,
                        tokens_per_second=batch / (read_ms + sent_ms) * 1e3,
                        over_dense=dense / (read_ms + sent_ms),
                    )
                )

    def most(context: int, density: float) -> int:
        return largest(lambda b: needed(b, context, density) <= usable, _MOST)

    notes = []
    for density in densities:
        groups, neurons = reads(density)
        notes += rounded("density", density, groups, k, "KV groups")
        if density < 1:
            notes += rounded("neuron density", neuron_density, neurons, f, "neurons")
    bound, kept = map(max, zip(*map(added, densities), strict=True))
    if bound:
        notes.append(
            f"sparse rows hold {(bound + kept) / 1e9:.2f} GB more: "
            f"{bound / 1e9:.2f} GB of QKV matrices with router rows, beside the "
            "original ones, which prefill reads, and "
            f"{kept / 1e9:.2f} GB of routers"
        )
    return Plan(
        device=memory,
        tp=tp,
        dp=dp,
        balanced=balanced,
        usable_bytes=usable,
        weight_bytes=weights,
        rows=tuple(rows),
        largest_batch={
            s: {reads(d)[0] / k: most(s, d) for d in densities} for s in contexts
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def rounded(name: str, asked: float, count: int, of: int, things: str) -> list[str]:
    """A note where a density is not the one that was asked for.

    Args:
      name: of the density.
      asked: the density.
      count: that are read.
      of: that there are.
      things: what they are.
    """
    if abs(asked - count / of) < 5e-4:  # as far as it is shown
        return []
    return [f"{name} {asked:.3g} was asked for: it is {count} of {of} {things}"]


def abstract_params(
    config: ModelConfig, dtype: Any, head_rank: int, neuron_rank: int
) -> Params:
    """A model with routers from layer 1 on, as `jax.ShapeDtypeStruct`.

    Args:
      config: of the model.
      dtype: of the weights; routers have those that adapters keep.
      head_rank: of the head routers' quadratic form, 0 for none.
      neuron_rank: of the neuron routers, 0 for none.
    """
    shapes = router_shapes(config, head_rank or None, neuron_rank or None)
    router = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    routers = {f"layers_{i}": router for i in range(1, config.layers)}
    routers = jax.eval_shape(as_stored, routers)
    policy = of_learned(Learned(routers))
    return Params(weight_shapes(config, dtype), policy, config)
