"""Tile sizes of the Triton MLP kernels."""

import dataclasses

from pallas_kernels._backend import shared_bytes
from pallas_kernels._sizes import (
    ceil_multiple,
    ceil_power_of_two,
    floor_power_of_two,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut into programs and tiles.

    Loads are padded to powers of two with rows that are not read, so the work of a
    program need not be one. With 16-bit weights, tiles of 64 neurons or more of the
    first product and 64 inputs or more of the second run on wgmma.

    Attributes:
        batch: inputs per program, padded to this many: a power of two >= 16. More
            inputs read the weights again.
        up_neurons: neurons per program of the first product.
        up_columns: model dimensions it reads per loop step, a power of two >= 16.
        up_splits: programs that share the model dimensions of the same neurons. If
            there are several, XLA sums their results and applies the activation.
        up_folds: parts of the model dimensions that stand as rows of their own in a
            tile, a power of two. It makes few neurons the 64 rows that wgmma wants,
            and the chain of dependent products shorter; all parts are multiplied with
            all those of the inputs, most of it for nothing.
        up_warps: warps per program.
        up_stages: loop steps whose tiles are in shared memory at once.
        down_columns: model dimensions per program of the second product, a multiple
            of 16.
        down_neurons: neurons it reads per loop step, a power of two >= 16.
        down_splits: programs that share the neurons of the same model dimensions. If
            there are several, XLA sums their results.
        down_warps: warps per program.
        down_stages: loop steps whose tiles are in shared memory at once.
        fused: programs of the kernel that does both products, for very few inputs;
            0 for one kernel each. Of the fields above it reads up_warps alone, and
            the others are 0.
    """

    batch: int
    up_neurons: int
    up_columns: int
    up_splits: int
    up_folds: int
    up_warps: int
    up_stages: int
    down_columns: int
    down_neurons: int
    down_splits: int
    down_warps: int
    down_stages: int
    fused: int


# Multiprocessors of a big GPU, and the bytes that its L2 cache delivers in the time
# that one more small kernel takes, about 1.3 us.
_SMS = 132
_KERNEL_BYTES = 7e6
# Of the shared memory, what the indices and the compiler need.
_OTHER_BYTES = 19 * 1024
# Bytes of one tile of weights that are worth a loop step, where that leaves several.
_TILE_BYTES = 32 * 1024


def heuristic(*, b: int, n: int, m: int, itemsize: int, gated: bool) -> Config:
    """A config that works, from the shapes and the bytes per element.

    Its tiles take nearly all the shared memory of a multiprocessor: half, for two
    programs each, was a fifth slower at wide batches.

    Args:
        b: inputs.
        n: selected neurons.
        m: model dimensions.
        itemsize: bytes per element of the weights.
        gated: whether there is a "gate".
    """
    # The kernel for both products has every model dimension in a program's registers.
    if b == 1 and m * itemsize <= 8192:
        return _one_kernel(2 * _SMS, 16, n, m)
    up = _enter(b, n, m, itemsize, gated)
    return Config(**up, **_leave(b, n, m, itemsize), fused=0)


def candidates(*, b: int, n: int, m: int, itemsize: int, gated: bool) -> list[Config]:
    """Configs worth timing at this shape beside the heuristic's, for the tuner.

    Some need more registers than there are.
    """
    ups = [_enter(b, n, m, itemsize, gated, splits) for splits in (None, 1, 2, 4)]
    downs = [_leave(b, n, m, itemsize, wider) for wider in (1, 2, 0.5)]
    found = [Config(**ups[0], **down, fused=0) for down in downs]
    found += [Config(**up, **downs[0], fused=0) for up in ups[1:]]
    if b <= 2:
        for programs, warps in ((1, 16), (2, 16), (3, 16), (3, 8), (4, 8)):
            found.append(_one_kernel(programs * _SMS, warps, n, m))
    return list(dict.fromkeys(found))


def product_config(axis: int, *, b: int, n: int, m: int, itemsize: int) -> Config:
    """A config for one product with a matrix that is read whole.

    Args:
        axis: of the matrix, that is summed over: 1 for rows as those of "up", whose
            fields alone are set, 0 for "down".
        b: inputs.
        n: outputs.
        m: numbers of each input.
        itemsize: bytes per element.
    """
    if axis == 1:
        entering = _enter(b, n, m, itemsize, gated=False)
        return dataclasses.replace(_unused(), **entering)
    leaving = _leave(b, m, n, itemsize)
    return dataclasses.replace(_unused(), batch=_batch(b, itemsize), **leaving)


def product_candidates(
    axis: int, *, b: int, n: int, m: int, itemsize: int
) -> list[Config]:
    """As `candidates`, of `product_config`."""
    heuristic = product_config(axis, b=b, n=n, m=m, itemsize=itemsize)
    if axis == 1:
        ways = [_enter(b, n, m, itemsize, False, splits) for splits in (1, 2, 4)]
    else:
        ways = [_leave(b, m, n, itemsize, wider) for wider in (2, 0.5)]
    found = [heuristic, *(dataclasses.replace(heuristic, **way) for way in ways)]
    return list(dict.fromkeys(found))


def _one_kernel(programs: int, warps: int, n: int, m: int) -> Config:
    warps = min(max(ceil_power_of_two(m) // 256, 1), warps)
    return dataclasses.replace(_unused(), up_warps=warps, fused=min(n, programs))


def _unused() -> Config:
    """A config whose fields are all 0: each kernel sets those that it reads."""
    return Config(**{field.name: 0 for field in dataclasses.fields(Config)})


def _enter(b, n, m, itemsize, gated, splits: int | None = None) -> dict[str, int]:
    """The first product, in one even wave of programs, one to a multiprocessor.

    Each program reads its share of the inputs, and partial sums are written and read:
    of the ways to make that many programs, the one that moves the fewest bytes beside
    the weights. The cache delivers half as many bytes again while the memory delivers
    the weights: what the inputs have of those costs nothing.
    """
    batch, matrices = _batch(b, itemsize), 1 + gated
    most = _most(batch, itemsize) // matrices
    weights = matrices * n * m * itemsize
    ways = []
    for parts in range(1, 17) if splits is None else [splits]:
        # Sharing sums did not pay with more than 128 neurons in a program.
        size = _even(n, _SMS // parts, most if parts == 1 else min(most, 128))
        programs = -(-n // size)
        if ways and programs * parts > _SMS:
            break
        moved = max(programs * batch * m * itemsize, weights // 2)
        if parts > 1:
            moved += _KERNEL_BYTES + 2 * parts * batch * n * 4 * matrices
        ways.append((moved, size, parts))
    _, size, parts = min(ways)
    rows = max(ceil_power_of_two(size), 16)
    # Folding pays where it makes 64 rows, for a few inputs and many columns.
    folds = 1
    if itemsize == 2 and rows < 64 and m >= 2048:
        folds = max(min(64 // rows, 64 // batch), 1)
    tile, inputs = rows * matrices * folds, batch * folds
    # A step reads at least a cache line of each row.
    columns = _step(tile, inputs, itemsize, least=128 // itemsize)
    return {
        "batch": batch,
        "up_neurons": size,
        "up_columns": columns,
        "up_splits": min(parts, -(-m // (folds * columns))),
        "up_folds": folds,
        "up_warps": _warps(tile, inputs, itemsize),
        "up_stages": _stages((tile + inputs) * columns * itemsize),
    }


def _leave(b, n, m, itemsize, wider: float = 1) -> dict[str, int]:
    """The second product: few columns for few inputs, and splits to fill the device.

    Tiles that are no power of two were slower, even where they made an evener wave.
    """
    batch = _batch(b, itemsize)
    size = int(min(4 * batch * wider, _most(batch, itemsize)))
    while _SMS * size // m > 4 and size > 32:  # partial sums cost too
        size //= 2
    rows = _step(size, batch, itemsize, least=32)
    programs = -(-m // size)
    splits = max(_SMS // programs, 1)
    if programs > _SMS:
        # A last wave of a few programs takes as long as a full one; shorter waves
        # waste less, but each has a start, and more sums to write.
        splits = min(range(1, 9), key=lambda x: -(-programs * x // _SMS) / x + x / 20)
    splits = min(splits, -(-n // rows))
    stages = _stages((size + batch) * rows * itemsize)
    # A sum of few steps would be over before all of its stages are in use; to have
    # more of them instead was no faster.
    while rows > 64 and n < 16 * splits * rows:
        rows //= 2
    return {
        "down_columns": size,
        "down_neurons": rows,
        "down_splits": splits,
        "down_warps": _warps(size, batch, itemsize),
        "down_stages": stages,
    }


def _batch(b, itemsize):
    return min(max(ceil_power_of_two(b), 16), 128 if itemsize == 2 else 64)


def _most(batch, itemsize):
    # Of neurons or columns: float32 runs on no tensor cores, where registers bound it.
    return 64 if itemsize == 4 else 256 if batch <= 64 else 128


def _even(total, programs, most):
    """A multiple of 16, at most `most`, that cuts a total into even parts."""
    each = -(-total // programs)
    rounds = -(-each // most)
    return ceil_multiple(-(-each // rounds), 16)


def _step(tile, inputs, itemsize, least):
    wanted = min(_TILE_BYTES, shared_bytes() // 6) // (tile * itemsize)
    wanted = min(max(floor_power_of_two(wanted), least), 128 if itemsize == 2 else 32)
    # Two stages must fit.
    most = (shared_bytes() - _OTHER_BYTES) // (2 * (tile + inputs) * itemsize)
    return min(wanted, floor_power_of_two(most))


def _warps(tile, batch, itemsize):
    return 4 if itemsize == 2 and tile * batch <= 64 * 64 else 8


def _stages(tile_bytes):
    return min(max((shared_bytes() - _OTHER_BYTES) // tile_bytes, 2), 8)
