"""Trees of small arrays as one array, which goes to the devices in one copy.

Each copy to a device waits for the programs that are enqueued there, however little it
takes along: so what one program is given goes together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.engine.places import ROWS
from polarjax.model import Decoder

_DTYPES = frozenset(map(np.dtype, (np.bool_, np.int32, np.uint32, np.float32)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each array of a tree is in a row of words.

    Attributes:
      structure: of the tree, `jax.tree.structure`.
      shapes: of each array's share in one row of words.
      dtypes: of each array.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of arrays as one array.

    Attributes:
      words: int32[n, w]; each row has its share of each array: booleans as 0 and 1,
        other numbers by their bits. Of a mesh each part has its own rows.
      layout: of the arrays in a row.
    """

    words: Any
    layout: Layout


def pack(tree: Any, rows: int) -> Packed:
    """Arrays of the host as one.

    Args:
      tree: of arrays [rows * x, ...], bool, int32, uint32 or float32; x is each
        array's own.
      rows: of words, n.

    Raises:
      TypeError: naming the dtype, if an array has another.
    """
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if leaf.dtype not in _DTYPES:
            raise TypeError(
                f"an array of {leaf.dtype} cannot be packed: make it bool, int32, "
                "uint32 or float32"
            )
    words = [
        (
            leaf.astype(np.int32)
            if leaf.dtype == np.bool_
            else np.ascontiguousarray(leaf).view(np.int32)
        ).reshape(rows, leaf.size // rows)
        for leaf in leaves
    ]
    shapes = tuple((len(leaf) // rows, *leaf.shape[1:]) for leaf in leaves)
    layout = Layout(structure, shapes, tuple(leaf.dtype for leaf in leaves))
    return Packed(np.concatenate(words, axis=1), layout)


def unpack(packed: Packed) -> Any:
    """The tree again, on the devices, in a compiled program.

    Args:
      packed: all rows of words, or those of one part.
    """
    words, layout, leaves, start = packed.words, packed.layout, [], 0
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        size = math.prod(shape)
        leaf = words[:, start : start + size].reshape(len(words) * shape[0], *shape[1:])
        start += size
        if dtype == np.bool_:
            leaf = leaf != 0
        elif dtype != np.int32:
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(dtype))
        leaves.append(leaf)
    return jax.tree.unflatten(layout.structure, leaves)


@functools.partial(jax.jit, static_argnames=("model",))
def take_apart(packed: Packed, *, model: Decoder) -> Any:
    """The arrays of a tree, for programs that take them one by one.

    Args:
      packed: on the devices, with one row of words for each part of the batch.
      model: that the batch is of.
    """
    return model.share.over(unpack, (ROWS,), ROWS)(packed)
