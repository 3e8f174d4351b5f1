"""`packed`: trees of small arrays as one array of words, and back."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from polarjax.engine.packed import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Some:
    flags: Any
    numbers: Any
    seeds: Any
    scale: Any


def make(parts, fill):
    return Some(
        flags=np.resize([True, False, True], parts * 2),
        numbers=np.arange(parts * 3 * 5, dtype=np.int32).reshape(parts * 3, 5) - fill,
        seeds=np.full(parts, 2**32 - 1 - fill, np.uint32),
        scale=np.resize(np.float32([0.1, -0.0, np.inf, np.nan]), (parts * 2, 2)),
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_each_part_gets_its_own_to_the_last_bit(parts):
    layout, tree = Layout.of(make(parts, 0), parts), make(parts, 7)
    words = layout.pack(tree)
    assert words.dtype == np.int32 and words.shape == (parts, 2 + 15 + 1 + 4)
    for part in range(parts):
        found = jax.jit(layout.unpack)(words[part : part + 1])
        for one, whole in zip(
            jax.tree.leaves(found), jax.tree.leaves(tree), strict=True
        ):
            expected = np.split(whole, parts)[part]
            assert one.dtype == expected.dtype and one.shape == expected.shape
            assert np.asarray(one).tobytes() == expected.tobytes()


def test_layouts_of_equal_trees_are_equal():
    one, other = (Layout.of(make(2, fill), 2) for fill in (0, 5))
    assert one == other and hash(one) == hash(other)
    assert one != Layout.of(make(2, 0), 1)


def test_other_numbers_are_refused():
    with pytest.raises(TypeError, match="int64 is neither bool nor of 32 bits"):
        Layout.of([np.zeros(3, np.int64)], 1)
