"""Tile sizes of the Triton attention kernel of decode."""

import dataclasses

from pallas_kernels._sizes import ceil_power_of_two, floor_power_of_two


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs, pieces and tiles.

    Attributes:
        block: cache positions per tile; a power of two, at least 16, and a divisor of
            a page.
        piece: most tiles per piece of a list, see `pieces`; a power of two.
        programs: programs that share all pieces of the call evenly.
        num_warps: warps per program.
        num_stages: tiles whose loads are in flight at once.
    """

    block: int
    piece: int
    programs: int
    num_warps: int
    num_stages: int


# Two programs on each of the 132 SMs of an H100 or H200.
_PROGRAMS = 264
# Tiles of the longest pieces, 1,024 positions.
_PIECE = 16
# Bytes of one tile of keys: 64 positions of 128 bfloat16. The tiles of keys and
# values of all stages lie in shared memory together.
_TILE_BYTES = 16 * 1024


def heuristic(
    *, b: int, n: int, g: int, s: int, d: int, itemsize: int, page: int | None = None
) -> Config:
    """A config that always works.

    Args:
        b: batch.
        n: KV groups that can be selected.
        g: query heads per group.
        s: positions that a sequence may have.
        d: head dim.
        itemsize: bytes per element of the cache.
        page: positions of a page of the cache; None where each sequence has one.
    """
    padded = ceil_power_of_two(d)
    block = floor_power_of_two(_TILE_BYTES // (padded * itemsize))
    block = min(max(block, 16), max(ceil_power_of_two(s), 16), 128)
    if page is not None:
        block = min(block, page & -page)  # the largest power of two that divides it
    tiles = b * n * -(-s // block)
    # Long pieces where there is enough to do, short ones where programs would idle.
    piece = min(floor_power_of_two(max(tiles // 256, 1)), _PIECE)
    # The accumulator is rows x d in float32 registers of the program's warps.
    num_warps = 4 if max(g, 16) * padded <= 64 * 128 else 8
    programs = min(_PROGRAMS, tiles)
    return Config(block, piece, programs, num_warps=num_warps, num_stages=3)
