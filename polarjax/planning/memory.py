"""What a batch takes of a device's memory, known before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.mesh.cut import DP, TP, axis_size, local_config, mesh_of
from polarjax.params import Params
from polarjax.planning.cost import kv_row_bytes
from polarjax.planning.host_memory import host_memory
from polarjax.storage.quoted import quoted

# Positions of a page of the cache.
PAGE = 64
# Tokens of prompts that one program reads: a GPU needs many to be busy, and where there
# are fewer a CPU computes the rest in vain.
_PREFILL_TOKENS = {"gpu": 2048, "cpu": 128}
# Of what XLA may take. The rest is for what is not counted: programs, gaps between
# buffers.
MEMORY_FRACTION = 0.95


def prefill_tokens_on(platform: str) -> int:
    """Prompt tokens that one program reads fastest on a kind of device, as "gpu"."""
    return _PREFILL_TOKENS.get(platform, _PREFILL_TOKENS["cpu"])


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


def prefill_bytes(config: ModelConfig, tokens: int, dtype: Any) -> int:
    """Bytes that reading pieces of prompts takes beside weights and cache.

    An estimate from above: what a program has of all its tokens, and what it has of
    them in one layer at its widest, either attention's products or the MLP's.

    Args:
      config: of the model.
      tokens: that one program reads, n.
      dtype: of the activations.
    """
    c, size = config, jnp.dtype(dtype).itemsize
    q, kv = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
    whole = size * (3 * c.dim + 2 * q + 2 * kv)
    mlp = c.neurons * (4 * (1 + c.gated_mlp) + size)
    layer = 4 * c.dim + max((q + kv) * (4 + size), mlp)
    return tokens * (whole + layer)


def cpu_step_bytes(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, weight_bytes: int
) -> int:
    """Bytes that a decode step takes on a CPU beside weights, cache and logits.

    An estimate from above: a layer's keys or values come once more, in the order of the
    tables. Of 16-bit numbers XLA makes float32 ones, and keeps some of every layer.

    Args:
      config: of the model.
      batch: sequences, b.
      capacity: positions of each, s.
      dtype: of weights and cache.
      weight_bytes: of all weights.
    """
    layer = cache_bytes(config, batch, capacity, dtype) // config.layers
    narrow = jnp.dtype(dtype).itemsize == 2
    copies = 3 * config.layers * layer // 4 + 2 * weight_bytes
    return 3 * layer // 2 + (copies if narrow else 0)


def sampling_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of a step's logits, float32, and of as much thrice to draw from them."""
    return 4 * 4 * batch * config.vocab_size


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
    each, batch = -(-context // page), room.part(slots)
    prefill = prefill_bytes(room.own, prefill_tokens, params.dtype)
    one = cache_bytes(room.own, 1, page, params.dtype)

    def working(batch: int, each: int) -> float:
        return room.working_bytes(params, batch, each * page, prefill)

    free = room.free - working(batch, each)
    most = min(batch * each + 1, most_pages(room.own, page))
    found = most if free == float("inf") else min(most, int(max(free, 0) // one))
    if found > each:
        return found

    def fits(each: int) -> bool:
        return (each + 1) * one + working(1, each) <= room.free

    shorter = page * largest(fits, each)
    would = [f"a context of {shorter}"] if 0 < shorter < context else []
    would += ["fewer slots"] * (batch > 1)
    raise ValueError(
        f"a request of {context} tokens needs {each + 1} pages of {page} positions, "
        f"{(each + 1) * one / 1e9:.3g} GB, and beside {working(batch, each) / 1e9:.3g} "
        f"GB of working memory for {slots} slots the device has "
        f"{max(free, 0) / 1e9:.3g} GB left (memory_fraction {memory_fraction:g}): "
        + (f"{' or '.join(would)} would fit" if would else "not one page would fit")
        + "; `polarjax plan` shows what does"
    )


def check_sizes(
    params: Params, slots: int, prefill_tokens: int | None, memory_fraction: float
) -> None:
    """Raise where a size alone asks for more memory than there is.

    Args:
      params: the model, in its devices' memory.
      slots: of all parts, b.
      prefill_tokens: prompt tokens that one program reads; None where nobody says.
      memory_fraction: of the memory that XLA may take, in (0, 1].

    Raises:
      ValueError: naming the size, and the most that would fit.
    """
    room = _Room.of(params, memory_fraction)
    one = prefill_bytes(room.own, 1, params.dtype)
    _check_fits("prefill_tokens", prefill_tokens or 1, one, room)
    _check_fits("slots", slots, sampling_bytes(params.config, 1) / room.dp, room)


def check_pages(params: Params, pages: int, page: int, memory_fraction: float) -> None:
    """Raise where a cache alone asks for more memory than there is.

    Args:
      params: the model, in its devices' memory.
      pages: of each part of the batch.
      page: positions of each.
      memory_fraction: of the memory that XLA may take, in (0, 1].

    Raises:
      ValueError: saying how many would fit.
    """
    room = _Room.of(params, memory_fraction)
    if pages > (most := most_pages(room.own, page)):
        raise ValueError(
            f"pages must be at most {most}, of {page} positions each, got "
            f"{quoted(pages)}: kernels number the elements of a cache in 32 bits"
        )
    _check_fits("pages", pages, cache_bytes(room.own, 1, page, params.dtype), room)


def _check_fits(name: str, count: int, each: float, room: _Room) -> None:
    if count * each > room.free >= each:  # with less it is not the size that is wrong
        raise ValueError(
            f"{name} must be at most {int(room.free // each)}, got {count}: they need "
            f"{count * each / 1e9:.3g} GB, and the device has {room.free / 1e9:.3g} GB "
            "left"
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
            "memory_fraction must be above 0 and at most 1, got "
            f"{quoted(memory_fraction)}"
        )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if all below it do; 0 for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
