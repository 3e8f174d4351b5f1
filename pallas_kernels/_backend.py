"""Which implementation serves a call, and the one import of Pallas' Triton backend.

The Triton backend lives under `jax.experimental`, so every kernel takes it from
here: if it moves, this is the one file to change.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.experimental.pallas import triton as pltriton

__all__ = [
    "Implementation",
    "default_implementation",
    "once",
    "pltriton",
    "resolve",
    "runnable",
    "shared_bytes",
    "traced_gpu",
]

# "triton_interpret" runs on any host, slowly: it is for tests.
Implementation = Literal["xla", "triton", "triton_interpret"]


def default_implementation() -> Implementation:
    """The implementation for the default backend: `triton` on a GPU, else `xla`."""
    return "triton" if jax.default_backend() == "gpu" else "xla"


def resolve(implementation: Implementation | None) -> Implementation:
    """Fill in the default for None; a named implementation is taken at its word.

    Args:
        implementation: a name, or None for the default backend's own. Only None
            looks at the backend: a named kernel can be traced on any host.

    Raises:
        ValueError: if the name is not an implementation.
    """
    if implementation is None:
        return default_implementation()
    named = isinstance(implementation, str)
    if not named or implementation not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        shown = repr(implementation[:40]) if named else type(implementation).__name__
        raise ValueError(
            f"implementation is {shown}; it must be one of {names}, or "
            "None for the default backend's own"
        )
    return implementation


def runnable(implementation: Implementation | None) -> Implementation:
    """As `resolve`, for who is going to run the kernels here.

    Args:
        implementation: a name, or None for the default backend's own.

    Raises:
        ValueError: if the name is not an implementation, or needs a GPU and the
            default backend is none.
    """
    implementation = resolve(implementation)
    backend = jax.default_backend()
    if implementation == "triton" and backend != "gpu":
        raise ValueError(
            f"implementation 'triton' needs a GPU, and jax runs on the {backend} here: "
            "leave it out, or take 'xla'"
        )
    return implementation


def once(*static: str) -> Callable[[Callable], Any]:
    """Trace and lower a function once for such arguments, however often it is called.

    A model calls each kernel in every layer; to lower one takes 10 ms and more.

    Args:
        *static: names of the arguments that are no arrays.
    """
    return functools.partial(jax.jit, static_argnames=static)


def traced_gpu() -> Any:
    """The GPU that is traced for, abstract or the default device; None without one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract
    return jax.devices()[0] if jax.default_backend() == "gpu" else None


def shared_bytes() -> int:
    """Shared memory that one program may have on the GPU that is traced for.

    Where there is none, or only an abstract one, that of a Hopper.
    """
    capability = str(getattr(traced_gpu(), "compute_capability", "9.0"))
    return _SHARED_KIB.get(capability, min(_SHARED_KIB.values())) * 1024


# By compute capability (CUDA C++ Programming Guide, "Technical Specifications").
_SHARED_KIB = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
