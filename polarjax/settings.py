"""What JAX's settings, which are the user's, must not change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import numpy as np

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


def draw_key(seed: int | jax.Array) -> jax.Array:
    """A key whose draws depend on the seed alone.

    Other generators (`jax_default_prng_impl`) give a row other numbers in a larger
    batch, and 64-bit types (`jax_enable_x64`) other numbers to the same seed: a draw
    names its dtype too.

    Args:
      seed: an integer, of which the lowest 32 bits count; or uint32[].
    """
    whole = isinstance(seed, int | np.integer)
    bits = np.uint32(int(seed) % 2**32) if whole else seed
    return jax.random.key(bits, impl="threefry2x32")


def default_numbers(
    function: Callable[_Given, _Returned],
) -> Callable[_Given, _Returned]:
    """Let a function compute as JAX does by default.

    Who forbids promotion in programs of their own, or has 64-bit numbers there
    (`jax_numpy_dtype_promotion="strict"`, `jax_numpy_rank_promotion="raise"`,
    `jax_enable_x64`), need not do so here, and gets the same; so does who draws by the
    older order of random bits (`jax_threefry_partitionable`).
    """

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.threefry_partitionable(True),
        ):
            return function(*args, **kwargs)

    return run
