"""`polarjax.plan`: what fits into a device, and how fast it can be, before it is there.

Nothing is loaded or allocated: shapes follow from the configuration, bytes from shapes,
and the speed is the floor, those bytes over the bandwidth of the device's memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig
from polarjax.generation.memory import (
    MEMORY_FRACTION,
    cache_bytes,
    capacities,
    check_fraction,
    largest,
    prefill_bytes,
    sampling_bytes,
)
from polarjax.generation.requests import bucket, positive
from polarjax.generation.stats import read_bandwidth
from polarjax.model import BLOCK_TOKENS, weight_shapes
from polarjax.params import Params
from polarjax.sparsity.adapter import as_stored
from polarjax.sparsity.cost import step_cost, tree_bytes
from polarjax.sparsity.routers import append_rows, router_shapes
from polarjax.sparsity.select import check_density, count

# From NVIDIA's datasheets: bytes of memory, bytes per second that it is read at.
GPUS = {
    "a100-40gb": (40e9, 1.555e12),
    "a100-80gb": (80e9, 2.039e12),
    "h100": (80e9, 3.35e12),
    "h100-pcie": (80e9, 2.0e12),
    "h200": (141e9, 4.8e12),
    "l4": (24e9, 300e9),
    "l40s": (48e9, 864e9),
    "rtx-3090": (24e9, 936e9),
    "rtx-4090": (24e9, 1008e9),
}
BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (2048, 8192, 32768)
DENSITIES = (1.0, 0.5)
_MOST = 2**20  # of a batch


@dataclasses.dataclass(frozen=True)
class Memory:
    """A device, as far as a plan knows it.

    Attributes:
      name: of the device.
      limit: bytes that XLA may take.
      bandwidth: bytes per second that its memory is read at.
      source: where these numbers come from.
      platform: "gpu", "cpu", ...
    """

    name: str
    limit: float
    bandwidth: float
    source: str
    platform: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One batch at one context and density.

    Attributes:
      batch: sequences.
      context: tokens of each, prompt and continuation.
      density: fraction of the KV groups that are read from layer 1 on; 1 is dense.
      neuron_density: fraction of the MLP neurons; 1 is dense.
      memory_bytes: weights, routers, cache and working memory.
      fits: whether the device has them.
      step_bytes: that a decode step reads, all sequences at `context`.
      step_ms: `step_bytes` over the bandwidth: no step can be faster.
      tokens_per_second: at that speed.
      over_dense: dense's `step_ms` by this one.
    """

    batch: int
    context: int
    density: float
    neuron_density: float
    memory_bytes: int
    fits: bool
    step_bytes: int
    step_ms: float
    tokens_per_second: float
    over_dense: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    Attributes:
      device: the device.
      usable_bytes: memory that weights, cache and all else may fill.
      weight_bytes: of the weights.
      rows: every batch at every context and density.
      largest_batch: by context, the largest batch that fits at every density, 0 for
        none.
    """

    device: Memory
    usable_bytes: float
    weight_bytes: int
    rows: tuple[Row, ...]
    largest_batch: dict[int, int]


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
) -> Plan:
    """Which batch x context fits into a device, and what speed its memory allows.

    Memory is that of weights, routers (and the QKV matrices that `generate` makes with
    router rows in them, beside the original ones), a KV cache as long as `generate`
    makes it, and an estimate, from above, of what prefill and sampling need meanwhile.

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

    Raises:
      ValueError: if a number is out of range, or nothing is known of the device.
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
    dtype = jnp.dtype(dtype)
    params = abstract_params(
        config, dtype, head_rank, neuron_rank if neuron_density < 1 else 0
    )
    memory = known_gpu(device) if isinstance(device, str) else _live(device)
    usable = memory.limit * memory_fraction
    weights = tree_bytes(params.weights)
    sparse = weights + tree_bytes(params.routers) + _bound_bytes(params)

    def needed(batch: int, context: int, density: float) -> int:
        # As `generate` rounds them.
        capacity, width = capacities(config, context)[1], bucket(context)
        return (
            (weights if density == 1 else sparse)
            + cache_bytes(config, batch, capacity, dtype)
            + prefill_bytes(
                *(config, batch, min(width, config.context), dtype),
                platform=memory.platform,
                prefill_tokens=BLOCK_TOKENS,
            )
            + sampling_bytes(config, batch)
        )

    rows = []
    k, layers = config.kv_heads, config.layers
    for context in contexts:
        for batch in batches:
            cost = step_cost(params, batch=batch, context=context)
            dense = cost.bytes_read((k,) * layers)
            for density in densities:
                budgets = (k, *(count(density, k),) * (layers - 1))
                part = 1.0 if density == 1 else neuron_density
                part = count(part, config.neurons) / config.neurons
                read = cost.bytes_read(budgets, (1.0, *(part,) * (layers - 1)))
                need = needed(batch, context, density)
                rows.append(
                    Row(
                        batch=batch,
                        context=context,
                        density=density,
                        neuron_density=part,
                        memory_bytes=need,
                        fits=need <= usable,
                        step_bytes=read,
                        step_ms=read / memory.bandwidth * 1e3,
                        tokens_per_second=batch * memory.bandwidth / read,
                        over_dense=dense / read,
                    )
                )
    sparsest = min(densities)
    return Plan(
        device=memory,
        usable_bytes=usable,
        weight_bytes=weights,
        rows=tuple(rows),
        largest_batch={
            s: largest(lambda b, s=s: needed(b, s, sparsest) <= usable, _MOST)
            for s in contexts
        },
    )


def known_gpu(name: str) -> Memory:
    """A GPU that is not at hand, by its name.

    Raises:
      ValueError: if it is not in the table.
    """
    if name.lower() not in GPUS:
        raise ValueError(
            f"device {name!r} is not known: there are {', '.join(GPUS)}; or leave it "
            "out for the device that is here"
        )
    total, bandwidth = GPUS[name.lower()]
    share = _xla_share()
    return Memory(
        name=name.lower(),
        limit=total * share,
        bandwidth=bandwidth,
        source=f"datasheet values, not measured; XLA takes {share:g} of the memory "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION)",
        platform="gpu",
    )


def _live(device: Any) -> Memory:
    device = jax.devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        limit, source = stats["bytes_limit"], "memory as the device says"
    elif device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        source = "memory of this machine"
    else:
        raise ValueError(
            f"{device.device_kind} does not say how much memory it has; name a GPU: "
            f"{', '.join(GPUS)}"
        )
    return Memory(
        name=device.device_kind,
        limit=limit,
        bandwidth=read_bandwidth(device),
        source=f"{source}, bandwidth measured",
        platform=device.platform,
    )


def _xla_share() -> float:
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


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
    return Params(weight_shapes(config, dtype), routers, config)


def _bound_bytes(params: Params) -> int:
    """Of the QKV matrices that binding makes, beside the original ones."""
    routed = range(1, params.config.layers)
    neurons = [i for i in routed if "neurons" in params.routers[f"layers_{i}"]]
    bound = jax.eval_shape(lambda p: append_rows(p, routed, neurons)[0], params)
    names = ("qkv", "qkv_bias")
    layers = (bound[f"layers_{i}"]["attention"] for i in routed)
    return sum(tree_bytes([layer[name] for name in names]) for layer in layers)
