"""What the Mosaic GPU kernels share: the backend, the hardware, what they refuse."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels._backend import traced_gpu

# The one import of Pallas' Mosaic backend; its types differ from release to release.
plgpu: Any = mosaic_gpu
# Shared memory that a program can have.
SHARED_BYTES = 227 * 1024
THREADS = 128  # of a warpgroup
# The SMs of an H100 or H200, for whoever traces on a host without one.
_SMS = 132


def check(kernel: str, dtype: Any, interpret: bool) -> None:
    """Raise NotImplementedError where no Mosaic kernel can serve.

    Args:
        kernel: its name, for the message.
        dtype: of what it multiplies.
        interpret: whether it is to be interpreted.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"the Mosaic {kernel} kernel needs jax >= 0.11, not {jax.__version__}; "
            "implementation='triton' serves older ones"
        )
    if dtype.itemsize != 2:
        raise NotImplementedError(
            f"the Mosaic {kernel} kernel serves bfloat16 and float16, not {dtype}; "
            "implementation='triton' serves that too"
        )
    if interpret and jax.default_backend() == "gpu":
        raise NotImplementedError(
            "the Mosaic interpreter would wait for ever on a GPU: what its threads "
            "compute there queues behind the call that waits for them; run it with "
            "JAX_PLATFORMS=cpu, or take implementation='mosaic'"
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


def across_threads(m: int) -> Any:
    """A layout of [rows, m]: each row across all threads of a warpgroup.

    A thread has up to 8 neighbours (16 bytes) at a time, as far as m allows, which must
    be a multiple of 256.
    """
    vector = next(size for size in (8, 4, 2) if m % (THREADS * size) == 0)
    tiling = fragmented_array.Tiling(
        ((1, THREADS * vector), (THREADS // 4 * vector,), (vector,))
    )
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
