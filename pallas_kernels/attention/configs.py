"""Tile sizes of the Triton attention kernel."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    Attributes:
        block: cache positions read per loop step; a power of two, at least 16.
        splits: programs that share one sequence's cache; their partial results are
            combined by a second kernel unless there is one.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight at once.
    """

    block: int
    splits: int
    num_warps: int
    num_stages: int


# Enough programs for every SM of a big GPU to hold a few, and the fewest positions
# for which one more program pays.
_PROGRAMS = 1024
_SPLIT_POSITIONS = 256
# Bytes of one tile of keys: 64 positions of 128 bfloat16. The tiles of keys and
# values of all stages lie in shared memory together.
_TILE_BYTES = 16 * 1024


def heuristic(*, b: int, n: int, g: int, s: int, d: int, itemsize: int) -> Config:
    """A config that always works, from the shapes and the bytes per element."""
    block = _floor_power_of_two(_TILE_BYTES // (d * itemsize))
    block = min(max(block, 16), max(_ceil_power_of_two(s), 16), 128)
    wanted = _ceil_power_of_two(-(-_PROGRAMS // (b * n)))
    splits = min(wanted, _floor_power_of_two(max(s // _SPLIT_POSITIONS, 1)), 32)
    # The accumulator is rows x d in float32 registers of the program's warps.
    num_warps = 4 if max(g, 16) * d <= 64 * 128 else 8
    return Config(block=block, splits=splits, num_warps=num_warps, num_stages=3)


def _ceil_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _floor_power_of_two(x: int) -> int:
    return 1 << (x.bit_length() - 1)
