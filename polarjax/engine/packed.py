"""Small arrays of the host as one: one copy to the devices where there were many.

A copy waits for all programs that were sent before it, and takes a device as long as a
small kernel, whatever its size.
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tree of arrays lies in words of 32 bits. It can be a static argument.

    Attributes:
      tree: its structure.
      leaves: shape and dtype of each array, as one part of a batch has it.
    """

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def of(cls, tree: Any, parts: int) -> Layout:
        """That of a tree like another.

        Args:
          tree: of arrays [parts * x, ...] of bool, or of numbers of 32 bits.
          parts: of the batch.

        Raises:
          TypeError: if an array is of another dtype.
        """
        leaves, structure = jax.tree.flatten(tree)
        for leaf in leaves:
            if leaf.dtype != bool and leaf.dtype.itemsize != 4:
                raise TypeError(f"{leaf.dtype} is neither bool nor of 32 bits")
        each = [((len(x) // parts, *x.shape[1:]), x.dtype.name) for x in leaves]
        return cls(structure, tuple(each))

    def pack(self, tree: Any) -> np.ndarray:
        """The words of a tree, int32[parts, n]."""
        words = []
        for leaf, ((rows, *_), _) in zip(
            jax.tree.leaves(tree), self.leaves, strict=True
        ):
            word = leaf.astype(np.int32) if leaf.dtype == bool else leaf.view(np.int32)
            words.append(word.reshape(len(leaf) // rows, -1))
        return np.concatenate(words, axis=1)

    def unpack(self, words: jax.Array) -> Any:
        """The tree of one part, from its words, int32[1, n]; in a program."""
        found, at = [], 0
        for shape, name in self.leaves:
            size = math.prod(shape)
            leaf, at = words[0, at : at + size].reshape(shape), at + size
            if name == "bool":
                leaf = leaf != 0
            elif name != "int32":
                leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(name))
            found.append(leaf)
        return jax.tree.unflatten(self.tree, found)


@functools.partial(jax.jit, static_argnames=("model", "layout"))
def unpacked(words: jax.Array, *, model: Decoder, layout: Layout) -> Any:
    """The arrays that were packed, on the devices.

    Args:
      words: int32[parts, n]; of a mesh each part has its own share.
      model: that the batch is of.
      layout: of the tree.
    """
    return model.share.over(layout.unpack, (ROWS,), ROWS)(words)
