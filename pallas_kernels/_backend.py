"""Which implementation serves a call, and the one import of Pallas' Triton backend.

The Triton backend lives under `jax.experimental`, so every kernel takes it from
here: if it moves, this is the one file to change.
"""

from typing import Literal, get_args

import jax
from jax.experimental.pallas import triton as pltriton

__all__ = [
    "Implementation",
    "default_implementation",
    "gathering",
    "pltriton",
    "resolve",
]

# Those that end in "_interpret" run on any host, slowly: they are for tests.
Implementation = Literal[
    "xla", "triton", "triton_interpret", "mosaic", "mosaic_interpret"
]


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
    if implementation not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {names}, or "
            "None for the default backend's own"
        )
    return implementation


def gathering(implementation: Implementation | None) -> Implementation | None:
    """The implementation of what gathers rows or selects, beside one of attention.

    Hopper's copy engine gathers no rows, so that there Mosaic serves attention alone
    and Triton is its companion; the others are their own.
    """
    if implementation is not None and implementation.startswith("mosaic"):
        return "triton_interpret" if implementation.endswith("_interpret") else "triton"
    return implementation
