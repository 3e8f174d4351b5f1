"""Tile sizes of the Triton attention kernels."""

import dataclasses

from pallas_kernels._sizes import ceil_power_of_two, floor_power_of_two


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    Attributes:
        block: cache positions per tile; a power of two, at least 16.
        programs: programs that share all tiles of the call evenly, cutting a
            sequence's cache wherever a share ends; a second kernel combines what was
            cut. 0 means a program for each selected group, which leaves nothing to
            combine.
        num_warps: warps per program.
        num_stages: tiles whose loads are in flight at once.
    """

    block: int
    programs: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class PagedConfig:
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
# Tiles of a whole cache below which a program computes a group alone.
_FEW_TILES = 4
# Tiles of the longest pieces, 1,024 positions.
_PIECE = 16
# Bytes of one tile of keys: 64 positions of 128 bfloat16. The tiles of keys and
# values of all stages lie in shared memory together.
_TILE_BYTES = 16 * 1024


def heuristic(*, b: int, n: int, g: int, s: int, d: int, itemsize: int) -> Config:
    """A config that always works, from the shapes and the bytes per element."""
    padded = ceil_power_of_two(d)
    block = floor_power_of_two(_TILE_BYTES // (padded * itemsize))
    block = min(max(block, 16), max(ceil_power_of_two(s), 16), 128)
    tiles = -(-s // block)
    programs = 0 if tiles <= _FEW_TILES else min(_PROGRAMS, b * n * tiles)
    # The accumulator is rows x d in float32 registers of the program's warps.
    num_warps = 4 if max(g, 16) * padded <= 64 * 128 else 8
    return Config(block=block, programs=programs, num_warps=num_warps, num_stages=3)


def paged_heuristic(
    *, b: int, n: int, g: int, s: int, d: int, itemsize: int, page: int | None = None
) -> PagedConfig:
    """A config of `paged` that always works.

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
    return PagedConfig(block, piece, programs, num_warps=num_warps, num_stages=3)


def candidates(
    *, b: int, n: int, g: int, s: int, d: int, itemsize: int
) -> list[Config]:
    """Configs worth measuring beside the heuristic's, for the tuner.

    A program for each group is not among them: with lengths that all are equal it can
    win by 3 % what it loses many times over with others.
    """
    base = heuristic(b=b, n=n, g=g, s=s, d=d, itemsize=itemsize)
    large = dataclasses.replace(base, block=2 * base.block)
    found = [
        dataclasses.replace(base, programs=_PROGRAMS * 3 // 2),
        dataclasses.replace(base, num_stages=4),
        dataclasses.replace(large, programs=_PROGRAMS // 2, num_warps=8),
        dataclasses.replace(large, num_stages=2),
    ]
    return [c for c in found if c.block <= max(s, 16)]
