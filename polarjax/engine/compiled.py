"""Which programs are compiled, and that those that are kept stay few."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax

# Kept at once of each of the engine's functions, one for each shape: some 10 MB each.
# Beyond that all are dropped: to compile anew now and then is better than memory that
# grows with every kind of call.
MOST_PROGRAMS = 64

# What batches of this process were compiled for since programs were last dropped.
_known: set[Hashable] = set()


def shapes_of(tree: Any) -> Hashable:
    """What of a tree of arrays is part of a program."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)


def are_known(functions: Sequence[Any], key: Hashable) -> bool:
    """Whether a batch is compiled; if not, there is room for its programs now.

    Args:
      functions: of all batches, compiled by jax.
      key: what the programs of a batch depend on, as told to `noted`.
    """
    sizes = [function._cache_size() for function in functions]
    if not any(sizes):  # somebody has dropped them
        _known.clear()
    if key in _known:
        return True
    if max(sizes) >= MOST_PROGRAMS:
        for function in functions:
            function.clear_cache()  # what is running stays until it ends
        _known.clear()
    return False


def noted(key: Hashable) -> None:
    """A batch is compiled now."""
    _known.add(key)
