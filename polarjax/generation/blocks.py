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
        rows = filled_rows(same, width, budget)
        most = max(1, budget // width)
        rows = min(rows, 1 << (most.bit_length() - 1))
        blocks.append(Block(tuple(left[:rows]), rows, width))
        left = left[rows:]
    return blocks


def filled_rows(prompts: int, width: int, budget: int) -> int:
    """Rows that prompts of one width begin to fill, a power of two.

    Some may be empty: a few of them cost less than one more program.

    Args:
      prompts: how many.
      width: tokens of each row.
      budget: most tokens of a call.
    """
    rows = bucket(prompts, 1)
    return rows if (rows - prompts) * width <= budget // 8 else rows // 2
