"""Pages of requests that give way: into the memory of their host, and back.

On the way nothing waits: programs gather a fixed number of pages, transfers take whole
arrays between a device and the pinned memory of its host, and the host's own threads
never touch a byte. Pages come back to the devices that they were on, so no process
sends any to another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from polarjax.engine.places import PAGE_GROUPS, ROWS, place_own
from polarjax.engine.plans import SWAP_PAGES
from polarjax.engine.slots import Slots, put_pages, take_pages
from polarjax.model import Decoder

_PINNED = "pinned_host"
# Pinned memory that is taken before requests come, at some 0.4 s per GB: taken when the
# first of them gives way it would stop all others meanwhile. Once taken it is kept.
_PINNED_AT_ONCE = 4 << 30


@dataclasses.dataclass
class Kept:
    """What the host has of a request that gave way.

    Attributes:
      part: of the batch, that it was in.
      groups: of each `SWAP_PAGES` pages, by device of that part, arrays
        [2 layers, SWAP_PAGES, k, page, d] in the memory of this process' host.
    """

    part: int
    groups: list[dict[Any, Any]]

    def come_home(self) -> None:
        """Let the devices' copies go where they have no pinned memory; may wait."""
        self.groups = [
            {at: _in_host_memory(array) for at, array in group.items()}
            for group in self.groups
        ]


def _in_host_memory(array: Any) -> Any:
    pinned = isinstance(array, jax.Array) and array.sharding.memory_kind == _PINNED
    return array if pinned else np.asarray(array)


class Swaps:
    """Copies pages of a batch to the hosts and back.

    Args:
      model: that the batch is of.
      device: that it is on, where it is on no mesh.

    Attributes:
      bytes: of this process, copied either way, those that fill groups up included.
      seconds: that this process' thread has spent on it. The transfers themselves go
        on beside it.
    """

    def __init__(self, model: Decoder, device: Any) -> None:
        self._model, self._device = model, device
        self._mesh, self._parts = model.mesh, model.share.dp
        self.bytes, self.seconds = 0, 0.0

    def keep(self, slots: Slots, pages: Sequence[int], part: int) -> Kept:
        """Begin to copy pages to the host; what they hold now is what is kept.

        Args:
          slots: of the batch.
          pages: their numbers in a part of the batch.
          part: which.
        """
        start, groups = time.perf_counter(), []
        for at in range(0, len(pages), SWAP_PAGES):
            some = pages[at : at + SWAP_PAGES]
            numbers = np.zeros((self._parts, SWAP_PAGES), np.int32)
            numbers[part, : len(some)] = some
            taken = self._take(slots, numbers)
            own = {at: x for at, x in _shards(taken).items() if _part(x) == part}
            groups.append({at: _to_host(x.data) for at, x in own.items()})
        self._count(groups, start)
        return Kept(part, groups)

    def restore(
        self, slots: Slots, copies: Sequence[tuple[int, int]], kept: Kept
    ) -> Slots:
        """Copy pages back.

        Args:
          slots: donated.
          copies: which of the pages that were kept goes to which page of the part.
          kept: what `keep` returned.
        """
        start, groups = time.perf_counter(), []
        for i, group in enumerate(kept.groups):
            numbers = np.zeros((self._parts, SWAP_PAGES), np.int32)
            for index, page in copies:
                if index // SWAP_PAGES == i:
                    numbers[kept.part, index % SWAP_PAGES] = page
            if numbers.any():  # else the prefix cache has them all
                data = self._on_devices(slots, group)
                slots = self._put(slots, data, numbers)
                groups.append(group)
        self._count(groups, start)
        return slots

    def warm(self, slots: Slots, host_pages: int) -> Slots:
        """Compile all that is needed, take pinned memory, and copy trash to trash.

        Args:
          slots: donated.
          host_pages: most that the host may keep of each part of the batch at once.
        """
        nowhere = np.zeros((self._parts, SWAP_PAGES), np.int32)
        shards = _shards(self._take(slots, nowhere))
        count = 1
        if all(at.platform != "cpu" for at in shards):  # whose memory is all the host's
            room = _PINNED_AT_ONCE // sum(x.data.nbytes for x in shards.values())
            count = max(1, min(room, host_pages // SWAP_PAGES))
        groups = [
            {at: _to_host(shard.data) for at, shard in shards.items()}
            for _ in range(count)
        ]
        jax.block_until_ready([list(group.values()) for group in groups])
        return self._put(slots, self._on_devices(slots, groups[0]), nowhere)

    def _take(self, slots: Slots, numbers: np.ndarray) -> jax.Array:
        return take_pages(slots, self._placed(numbers), model=self._model)

    def _put(self, slots: Slots, data: jax.Array, numbers: np.ndarray) -> Slots:
        return put_pages(slots, data, self._placed(numbers), model=self._model)

    def _placed(self, numbers: np.ndarray) -> Any:
        where = self._device if self._mesh is None else NamedSharding(self._mesh, ROWS)
        return place_own(numbers.ravel(), where)

    def _on_devices(self, slots: Slots, group: dict[Any, Any]) -> jax.Array:
        """What the host has kept, as `put_pages` takes it."""
        arrays = {at: jax.device_put(x, _memory_of(at)) for at, x in group.items()}
        if self._mesh is None:
            return arrays[self._device]
        # Other parts of the batch get what their trash pages hold, for the same.
        others = self._take(slots, np.zeros((self._parts, SWAP_PAGES), np.int32))
        shards = [arrays.get(at, x.data) for at, x in _shards(others).items()]
        return jax.make_array_from_single_device_arrays(
            others.shape, NamedSharding(self._mesh, PAGE_GROUPS), shards
        )

    def _count(self, groups: list[dict[Any, Any]], start: float) -> None:
        self.bytes += sum(x.nbytes for group in groups for x in group.values())
        self.seconds += time.perf_counter() - start


def _shards(array: jax.Array) -> dict[Any, Any]:
    return {shard.device: shard for shard in array.addressable_shards}


def _part(shard: Any) -> int:
    return (shard.index[1].start or 0) // SWAP_PAGES


def _memory_of(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=device.default_memory().kind)


def _to_host(array: jax.Array) -> jax.Array:
    """Begin to move an array of one device into pinned memory, if it knows any."""
    [device] = array.devices()
    kinds = {memory.kind for memory in device.addressable_memories()}
    if _PINNED in kinds:
        where = SingleDeviceSharding(device, memory_kind=_PINNED)
        return jax.device_put(array, where)
    array.copy_to_host_async()
    return array
