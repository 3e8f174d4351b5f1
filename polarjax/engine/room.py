"""How large an engine is: what is asked for, and what the memory has room for."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from polarjax.engine.batch import Sizes
from polarjax.engine.programs import device_of
from polarjax.mesh.cut import DP, TP, axis_size, mesh_of
from polarjax.mesh.processes import from_main
from polarjax.params import Params
from polarjax.planning.host_memory import host_memory
from polarjax.planning.memory import (
    MEMORY_FRACTION,
    PAGE,
    cache_bytes,
    check_fraction,
    check_pages,
    check_sizes,
    pages_that_fit,
    prefill_tokens_on,
)
from polarjax.planning.sizes import at_least, bucket, positive

# Requests that one call of `generate` continues at once. More would hardly be faster,
# and the host has work to do for each.
_MOST_SLOTS = 512
# Prompt tokens that one program reads while others decode, who wait for it: about as
# long as a decode step takes.
ONLINE_TOKENS = 512

# Of the host's memory, how much may hold pages of requests that gave way if nobody
# says; and at most so much, half of what XLA takes for pinned memory by default.
_SWAP_SHARE, _MOST_SWAPPED = 0.25, 32 << 30


def prefill_tokens_of(params: Params) -> int:
    """Prompt tokens that one program reads fastest."""
    return prefill_tokens_on(device_of(params.weights).platform)


def sizes_of(
    params: Params,
    slots: int,
    context: int,
    *,
    page: int,
    pages: int | None,
    prefill_tokens: int | None,
    memory_fraction: float,
) -> Sizes:
    """The sizes of an engine.

    Args:
      params: the model, in its devices' memory.
      slots: of all parts of the batch.
      context: positions of a request.
      page: positions of a page.
      pages: of each part's cache; None for as many as all slots can fill, or as fit.
      prefill_tokens: that one program reads; None for what those who decode meanwhile
        can wait for.
      memory_fraction: of the memory that XLA may take, in (0, 1].

    Raises:
      ValueError: if one is out of range, or there is no room for a request.
    """
    mesh = mesh_of(params.weights)
    page = positive("page", page, bucket(max(context, PAGE)))
    check_fraction(memory_fraction)
    tokens = min(prefill_tokens_of(params), ONLINE_TOKENS)
    if prefill_tokens is not None:
        tokens = positive("prefill_tokens", prefill_tokens)
    check_sizes(params, slots, prefill_tokens, memory_fraction)
    if pages is None:
        count = pages_that_fit(
            params,
            slots,
            context,
            page,
            prefill_tokens=tokens,
            memory_fraction=memory_fraction,
        )
        if mesh is not None and mesh.is_multi_process:  # whose hosts may differ
            count = from_main(count)
    else:
        count = at_least("pages", pages, 2)
        check_pages(params, count, page, memory_fraction)
    pieces = min(slots // axis_size(mesh, DP), max(tokens // 32, 8))
    return Sizes(slots, context, count, page, tokens, pieces)


def host_pages_of(params: Params, page: int, swap_bytes: int | None) -> int:
    """Pages of each part of a batch that the hosts may keep for it.

    Args:
      params: the model, in its devices' memory.
      page: positions of a page.
      swap_bytes: of the memory of each process' host; None for a share of it.

    Raises:
      ValueError: if it is out of range.
    """
    config, mesh = params.config, mesh_of(params.weights)
    if swap_bytes is None:
        host = host_memory()
        share = int(_SWAP_SHARE * host.limit) if host else _MOST_SWAPPED
        room = min(share, _MOST_SWAPPED)
    else:
        host = host_memory()
        room = at_least("swap_bytes", swap_bytes, 0, host.limit if host else math.inf)
    if mesh is not None and mesh.is_multi_process:  # whose hosts may differ
        room = from_main(room)
        room *= len({device.process_index for device in mesh.devices.flat})
    # Where there are more devices than KV groups, several have the same group.
    tp = axis_size(mesh, TP)
    groups = tp * -(-config.kv_heads // tp)
    one = cache_bytes(config, 1, page, params.dtype) // config.kv_heads * groups
    return room // (axis_size(mesh, DP) * one)


def room_for(
    params: Params,
    tokens: Sequence[int],
    *,
    prefill_tokens: int,
    memory_fraction: float = MEMORY_FRACTION,
) -> tuple[int, int]:
    """Slots and context of an engine for one call: powers of two where there is room.

    Args:
      params: the model, in its devices' memory.
      tokens: most of each request, prompt and answer.
      prefill_tokens: prompt tokens that one program reads.
      memory_fraction: of the memory that XLA may take, in (0, 1].

    Returns:
      As many slots as there are requests, or fewer, if the pages for all of them do
      not fit into the memory.

    Raises:
      ValueError: if not even the longest request fits; it says what would.
    """
    parts, batch = axis_size(mesh_of(params.weights), DP), len(tokens)
    most = params.config.context
    context = min(bucket(max(tokens)), most)
    room = {"prefill_tokens": prefill_tokens, "memory_fraction": memory_fraction}
    slots = min(bucket(batch, 1), _MOST_SLOTS)
    for tried in _fewer(slots, batch):
        try:
            pages = pages_that_fit(params, tried, context, PAGE, **room)
        except ValueError:
            continue
        each = -(-tried // parts)
        if pages > sum(-(-n // PAGE) for n in heapq.nlargest(each, tokens)):
            return tried, context
    tight = min(-(-max(tokens) // PAGE) * PAGE, context)
    pages_that_fit(params, 1, tight, PAGE, **room)
    return 1, tight


def _fewer(slots: int, batch: int) -> list[int]:
    """Numbers of slots to try, the largest first."""
    halves = [slots >> i for i in range(slots.bit_length())]
    return sorted({*halves, min(batch, slots)}, reverse=True)
