"""What the Mosaic attention kernel can serve on Hopper, and with which tiles."""

import dataclasses
import math

from pallas_kernels import _hopper
from pallas_kernels._hopper import SHARED_BYTES
from pallas_kernels._sizes import ceil_multiple

# What of the shared memory goes to barriers, reductions and gaps between arrays.
_OTHER_BYTES = 8 * 1024
# The accumulators are d x g registers of one warpgroup.
MAX_ACCUMULATOR = 64 * 128
_MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    Attributes:
        block: cache positions per tile; a multiple of 64.
        stages: tiles of keys, and as many of values, in a program's ring.
        programs: how many share the work; None means one per SM.
    """

    block: int
    stages: int
    programs: int | None = None


def heuristic(*, g: int, d: int) -> Config:
    """Tiles of 32 KiB, two of keys and two of values if they fit."""
    columns, rows = padded(g, d)
    # The scores are block x g registers of one warpgroup.
    block = 128 if rows <= 128 and columns <= 32 else 64
    taken = _OTHER_BYTES + 2 * columns * (5 * rows + block)
    return Config(block, stages=min((SHARED_BYTES - taken) // (4 * block * rows), 2))


def padded(g: int, d: int) -> tuple[int, int]:
    """Queries per group and head dim, as the tensor cores take them."""
    return ceil_multiple(g, 8), ceil_multiple(d, 64)


def check(q, s: int, g: int, interpret: bool) -> None:
    """Raise NotImplementedError for what the kernel cannot serve."""
    _hopper.check("attention", q.dtype, interpret)
    d = q.shape[2]
    if d > _MAX_HEAD_DIM or d % 16 or math.prod(padded(g, d)) > MAX_ACCUMULATOR:
        raise NotImplementedError(
            f"the Mosaic attention kernel serves head dims up to {_MAX_HEAD_DIM} that "
            f"are multiples of 16, and up to {MAX_ACCUMULATOR} elements in a KV "
            f"group's query heads, not a head dim of {d} and {g} heads per group; "
            "implementation='xla' serves any"
        )
    if s % 8:
        raise NotImplementedError(
            "the Mosaic attention kernel copies caches in rows of 8 positions; their "
            f"length must be a multiple of 8, not {s}"
        )
