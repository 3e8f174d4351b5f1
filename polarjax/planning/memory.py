"""What a batch takes of a device's memory, known before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.mesh.cut import DP, TP, axis_size, local_config, mesh_of
from polarjax.model.causal import BLOCK, flash_serves
from polarjax.params import Params
from polarjax.planning.blocks import rows_of
from polarjax.planning.cost import kv_row_bytes
from polarjax.planning.host_memory import host_memory
from polarjax.planning.sizes import bucket

# A cache for which memory is short has a multiple of so many positions.
_TIGHT = 64
# Of what XLA may take. The rest is for what is not counted: programs, gaps between
# buffers.
MEMORY_FRACTION = 0.95


class Taken(TypedDict, total=False):
    """What a batch needs beside its cache, and of which memory.

    Attributes:
      prefill_tokens: prompt tokens that are computed at once.
      prompt_tokens: of the longest prompt.
      memory_fraction: of the memory that XLA may take, in (0, 1].
    """

    prefill_tokens: Required[int]
    prompt_tokens: Required[int]
    memory_fraction: float


def capacities(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """Positions of the cache that `generate` makes for so many tokens a request.

    Returns:
      A power of two, so that one program serves many lengths; and, where there is no
      room for that, few more than the tokens.
    """
    roomy, tight = bucket(tokens), -(-tokens // _TIGHT) * _TIGHT
    return min(roomy, config.context), min(roomy, tight, config.context)


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> int:
    """Bytes of the KV cache of a batch.

    Args:
      config: of the model.
      batch: sequences, b.
      capacity: positions of each, s.
      dtype: of keys and values.
    """
    rows = batch * capacity * config.layers * config.kv_heads
    return rows * kv_row_bytes(config, dtype)


def prefill_bytes(
    config: ModelConfig,
    batch: int,
    width: int,
    dtype: Any,
    *,
    platform: str,
    prefill_tokens: int,
) -> int:
    """Bytes that prefill takes beside weights and cache.

    An estimate from above: what a call has of all its tokens, and of one block a layer
    at its widest: either attention's products or the MLP's, which are float32 in small
    blocks. Where attention is not flash attention its weights are counted too.

    Args:
      config: of the model.
      batch: sequences, b.
      width: tokens of each prompt, padding included.
      dtype: of the activations.
      platform: of the device: "gpu", ...
      prefill_tokens: that are computed at once.
    """
    c, size = config, jnp.dtype(dtype).itemsize
    q, kv = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
    # Keys and values come once more, before they are laid out as the cache has them.
    whole = size * (3 * c.dim + 2 * q + 2 * kv)
    if platform != "gpu" or not flash_serves(size, width, c.head_dim):
        whole += 3 * 4 * c.heads * min(width, BLOCK)
    mlp = c.neurons * (4 * (1 + c.gated_mlp) + size)
    block = 4 * c.dim + max((q + kv) * (4 + size), mlp)
    # A longer prompt is a call of its own.
    rows = rows_of(batch, width, prefill_tokens)
    tokens = max(width, min(rows * width, prefill_tokens))
    # What a call has read is copied into the batch's cache, but on a GPU.
    kept = 0 if platform == "gpu" else cache_bytes(config, 1, tokens, dtype)
    return kept + tokens * whole + min(tokens, prefill_tokens) * block


def cpu_step_bytes(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, weight_bytes: int
) -> int:
    """Bytes that a decode step takes on a CPU beside weights, cache and logits.

    An estimate from above: a layer's values come once more, masked. Of 16-bit numbers
    XLA makes float32 ones, a layer's values at a time and all weights for a chunk, and
    keeps a copy of all keys, or of all values.

    Args:
      config: of the model.
      batch: sequences, b.
      capacity: positions of each, s.
      dtype: of weights and cache.
      weight_bytes: of all weights.
    """
    layer = cache_bytes(config, batch, capacity, dtype) // config.layers
    narrow = jnp.dtype(dtype).itemsize == 2
    copies = config.layers * layer // 2 + 2 * weight_bytes
    return layer + copies if narrow else layer


def sampling_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of a step's logits, float32, and of as much thrice to draw from them."""
    return 4 * 4 * batch * config.vocab_size


def cache_capacity(
    params: Params, batch: int, tokens: int, **taken: Unpack[Taken]
) -> int:
    """The first of `capacities` with which a batch fits into its devices' memory.

    CPU devices share this machine's memory. What tells nothing of its own is taken to
    have enough.

    Args:
      params: the model, in its devices' memory.
      batch: sequences, b.
      tokens: most of a request, prompt and continuation.
      **taken: what else there has to be room for, and of which memory.

    Returns:
      Positions of the cache, s.

    Raises:
      ValueError: if it does not fit; it names what would.
    """
    shapes = [(batch, s) for s in capacities(params.config, tokens)]
    return _first_that_fits(params, shapes, **taken)[1]


def room_for(
    params: Params, batch: int, tokens: int, **taken: Unpack[Taken]
) -> tuple[int, int]:
    """Slots and context of an engine for a batch: powers of two where there is room.

    Args:
      params: the model, in its devices' memory.
      batch: sequences, b.
      tokens: most of a request, prompt and continuation.
      **taken: what else there has to be room for, and of which memory.

    Raises:
      ValueError: if the batch does not fit; it names what would.
    """
    roomy, tight = capacities(params.config, tokens)
    shapes = [(bucket(batch, 1), roomy), (batch, roomy), (batch, tight)]
    return _first_that_fits(params, shapes, **taken)


def _first_that_fits(
    params: Params,
    shapes: Sequence[tuple[int, int]],
    *,
    prefill_tokens: int,
    prompt_tokens: int,
    memory_fraction: float = MEMORY_FRACTION,
) -> tuple[int, int]:
    """Of some sequences and positions of a cache, the first that there is room for.

    Args:
      params: the model, in its devices' memory.
      shapes: (b, s) each, the smallest last, which an error is about.
      prefill_tokens: prompt tokens, padding included, that are computed at once.
      prompt_tokens: of the longest prompt.
      memory_fraction: of the memory that XLA may take, in (0, 1].
    """
    room = _Room.of(params, memory_fraction)
    width = min(bucket(prompt_tokens), params.config.context)

    def needed(batch: int, capacity: int) -> float:
        batch = room.part(batch)
        prefill = room.prefill_bytes(params, batch, width, prefill_tokens)
        cache = cache_bytes(room.own, batch, capacity, params.dtype)
        return cache + room.working_bytes(params, batch, capacity, prefill)

    free = room.free
    for shape in shapes:
        if needed(*shape) <= free:
            return shape
    batch, capacity = shapes[-1]
    need = needed(batch, capacity)
    smaller = largest(lambda b: needed(b, capacity) <= free, batch)
    most = -(-capacity // _TIGHT)
    shorter = _TIGHT * largest(lambda n: needed(batch, n * _TIGHT) <= free, most)
    fits = [f"batch {smaller}"] if smaller else []
    if shorter > prompt_tokens:
        fits.append(f"max_new_tokens={shorter - prompt_tokens}")
    raise ValueError(
        f"batch {batch} with {capacity} tokens of context needs {need / 1e9:.2f} GB "
        f"for its cache and working memory, and the device has "
        f"{max(free, 0) / 1e9:.2f} GB left (memory_fraction {memory_fraction:g}): "
        + (f"{' or '.join(fits)} would fit" if fits else "not even batch 1 would fit")
        + "; `polarjax plan` shows what does"
    )


def pages_that_fit(
    params: Params,
    slots: int,
    context: int,
    page: int,
    *,
    prefill_tokens: int,
    memory_fraction: float = MEMORY_FRACTION,
) -> int:
    """Pages of each part of the batch's cache: for all slots, or as many as fit.

    Args:
      params: the model, in its devices' memory.
      slots: of all parts, b.
      context: positions of a request.
      page: positions of a page.
      prefill_tokens: prompt tokens that one program reads.
      memory_fraction: of the memory that XLA may take, in (0, 1].

    Returns:
      With the trash page.

    Raises:
      ValueError: if not even one request of the context fits; it says what would.
    """
    room = _Room.of(params, memory_fraction)
    each = -(-context // page)
    batch = room.part(slots)
    prefill = room.prefill_bytes(params, 1, prefill_tokens, prefill_tokens)
    working = room.working_bytes(params, batch, each * page, prefill)
    one = cache_bytes(room.own, 1, page, params.dtype)
    free = room.free - working
    most = batch * each + 1
    most = min(most, most_pages(room.own, page))
    found = most if free == float("inf") else min(most, int(max(free, 0) // one))
    if found > each:
        return found
    raise ValueError(
        f"a request of {context} tokens needs {each + 1} pages of {page} positions, "
        f"{(each + 1) * one / 1e9:.2f} GB, and beside {working / 1e9:.2f} GB of "
        f"working memory for {slots} slots the device has {max(free, 0) / 1e9:.2f} GB "
        f"left (memory_fraction {memory_fraction:g}): make the engine with fewer slots "
        "or a smaller context"
    )


def most_pages(config: ModelConfig, page: int) -> int:
    """Pages of a cache whose elements can be numbered, as kernels do, in 32 bits.

    Args:
      config: of what one device has of the model.
      page: positions of a page.
    """
    return (2**31 - 1) // (config.kv_heads * page * config.head_dim)


@dataclasses.dataclass(frozen=True)
class _Room:
    """What there is of the memory of a model's devices, and what a device has of it.

    Attributes:
      free: bytes that a batch may take of each.
      on_host: whether they are the machine's.
      platform: of the devices.
      dp: parts of the batch.
      own: the model that one device runs.
      weight_bytes: of all weights that it has.
    """

    free: float
    on_host: bool
    platform: str
    dp: int
    own: ModelConfig
    weight_bytes: int

    @classmethod
    def of(cls, params: Params, memory_fraction: float) -> _Room:
        check_fraction(memory_fraction)
        devices = params.weights["embed"]["tokens"].sharding.addressable_devices
        rooms = [_free(device, memory_fraction, len(devices)) for device in devices]
        free, on_host = min(rooms)
        shards = (x.addressable_shards[0].data for x in jax.tree.leaves(params.weights))
        mesh = mesh_of(params.weights)
        return cls(
            free,
            on_host,
            next(iter(devices)).platform,
            axis_size(mesh, DP),
            local_config(params.config, axis_size(mesh, TP)),
            sum(shard.nbytes for shard in shards),
        )

    def part(self, batch: int) -> int:
        """Sequences of one part of the batch."""
        return -(-batch // self.dp)

    def prefill_bytes(
        self, params: Params, batch: int, width: int, prefill_tokens: int
    ) -> int:
        """See the function of this name."""
        return prefill_bytes(
            self.own,
            batch,
            width,
            params.dtype,
            platform=self.platform,
            prefill_tokens=prefill_tokens,
        )

    def working_bytes(
        self, params: Params, batch: int, capacity: int, prefill: int
    ) -> float:
        """Bytes beside weights and cache: of prefill or a step, and of drawing."""
        step = 0
        if self.on_host:
            step = cpu_step_bytes(
                self.own, batch, capacity, params.dtype, self.weight_bytes
            )
        return max(prefill, step) + sampling_bytes(params.config, batch)


def _free(device: Any, memory_fraction: float, devices: int) -> tuple[float, bool]:
    """Bytes that a batch may take of a device, and whether they are the machine's.

    Args:
      device: of this machine.
      memory_fraction: of all its memory; on a CPU, of what is available.
      devices: that share what is the machine's.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return memory_fraction * stats["bytes_limit"] - stats["bytes_in_use"], False
    host = host_memory() if device.platform == "cpu" else None
    if host is None:
        return float("inf"), False
    # What others hold of a machine is not this process' to leave free as well.
    return memory_fraction * (host.limit - host.in_use) / devices, True


def check_fraction(memory_fraction: float) -> None:
    """Raise unless it is a fraction of a memory.

    Raises:
      ValueError: naming the value.
    """
    number = isinstance(memory_fraction, int | float | np.number)
    if not number or isinstance(memory_fraction, bool) or not 0 < memory_fraction <= 1:
        raise ValueError(
            f"memory_fraction must be above 0 and at most 1, got {memory_fraction!r}"
        )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if all below it do; 0 for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
