"""Mosaic GPU and its hardware, and what the attention kernel can serve there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels._backend import traced_gpu
from pallas_kernels._sizes import ceil_multiple

# The one import of Pallas' Mosaic backend; its types differ from release to release.
plgpu: Any = mosaic_gpu
# Shared memory that a program can have.
_SHARED_BYTES = 227 * 1024
# The SMs of an H100 or H200, for whoever traces on a host without one.
_SMS = 132
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
    return Config(block, stages=min((_SHARED_BYTES - taken) // (4 * block * rows), 2))


def padded(g: int, d: int) -> tuple[int, int]:
    """Queries per group and head dim, as the tensor cores take them."""
    return ceil_multiple(g, 8), ceil_multiple(d, 64)


def check(q, s: int, g: int, interpret: bool) -> None:
    """Raise NotImplementedError for what the kernel cannot serve."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"the Mosaic attention kernel needs jax >= 0.11, not {jax.__version__}; "
            "implementation='triton' serves older ones"
        )
    if q.dtype.itemsize != 2:
        raise NotImplementedError(
            f"the Mosaic attention kernel serves bfloat16 and float16, not {q.dtype}; "
            "implementation='triton' serves that too"
        )
    if interpret and jax.default_backend() == "gpu":
        raise NotImplementedError(
            "the Mosaic interpreter would wait for ever on a GPU: what its threads "
            "compute there queues behind the call that waits for them; run it with "
            "JAX_PLATFORMS=cpu, or take implementation='mosaic'"
        )
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


def sms() -> int:
    """How many SMs the device has that is traced for; it must be of Hopper's kind."""
    device = traced_gpu()
    if device is None:
        return _SMS  # traced on a host without one
    if isinstance(device, jax.sharding.AbstractDevice):
        return device.num_cores or _SMS
    if device.compute_capability != "9.0":
        raise NotImplementedError(
            "the Mosaic kernels are for Hopper (compute capability 9.0), not "
            f"{device.device_kind} ({device.compute_capability})"
        )
    return device.core_count


def kernel(body: Callable[..., None], *, name: str, interpret: bool, **options) -> Any:
    """`plgpu.kernel`, compiled as all of ours are."""
    params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )
    return plgpu.kernel(
        body,
        kernel_name=name,
        compiler_params=params,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        **options,
    )
