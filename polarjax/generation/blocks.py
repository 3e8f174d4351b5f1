"""Which prompts prefill reads together, and how wide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from polarjax.generation.requests import bucket


@dataclasses.dataclass(frozen=True)
class Block:
    """One call of prefill.

    Attributes:
      prompts: which of the batch it reads, as indices.
      rows: computed, at least as many; a power of two.
      width: tokens of each row; a power of two, or the model's context.
    """

    prompts: tuple[int, ...]
    rows: int
    width: int


def plan_blocks(lengths: Sequence[int], context: int, budget: int) -> list[Block]:
    """Cut a batch of prompts into calls of bounded size and few shapes.

    Longest first. Each call is as wide as its longest prompt needs; prompts of smaller
    buckets only fill rows that would be empty otherwise.

    Args:
      lengths: tokens of each prompt, at least 1.
      context: most tokens that the model takes.
      budget: most tokens, rows x width, of a call. A longer prompt has a call of its
        own.

    Returns:
      Blocks that hold each prompt once.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    blocks = []
    while left:
        size = bucket(lengths[left[0]])
        width = min(size, context)
        same = sum(bucket(lengths[i]) == size for i in left)
        rows = 1 << (same - 1).bit_length()
        # A few empty rows cost less than one more program.
        if (rows - same) * width > budget // 8:
            rows //= 2
        most = max(1, budget // width)
        rows = min(rows, 1 << (most.bit_length() - 1))
        blocks.append(Block(tuple(left[:rows]), rows, width))
        left = left[rows:]
    return blocks
