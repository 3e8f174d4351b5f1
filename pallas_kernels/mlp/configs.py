"""Tile sizes of the Triton MLP kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles; blocks are powers of two >= 16.

    Attributes:
        batch: inputs per program, padded to this many; more inputs read the weights
            again.
        up_neurons: neurons per program of the first product.
        up_columns: model dimensions it reads per loop step.
        down_neurons: neurons per loop step of the second product.
        down_columns: model dimensions per program of it.
        splits: programs that share the neurons of one output tile in the second
            product; XLA sums their partial results.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight at once.
    """

    batch: int
    up_neurons: int
    up_columns: int
    down_neurons: int
    down_columns: int
    splits: int
    num_warps: int
    num_stages: int


# Two programs for each SM of a big GPU.
_PROGRAMS = 264


def heuristic(*, b: int, n: int, m: int, itemsize: int) -> Config:
    """A config that always works, from the shapes and the bytes per element."""
    batch = min(max(_ceil_power_of_two(b), 16), 128)
    # Three stages of one input and two weight tiles take at most 96 KiB.
    columns = (128 if batch <= 64 else 64) * 2 // itemsize
    up_neurons = 32 if n >= 32 * _PROGRAMS // 2 else 16
    down_neurons = 32
    tiles = -(-m // columns) * -(-b // batch)
    splits = max(min(_PROGRAMS // tiles, 16, -(-n // down_neurons)), 1)
    return Config(
        batch=batch,
        up_neurons=up_neurons,
        up_columns=columns,
        down_neurons=down_neurons,
        down_columns=columns,
        splits=splits,
        num_warps=8 if batch == 128 else 4,
        num_stages=3,
    )


def _ceil_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()
