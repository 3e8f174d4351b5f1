"""Which prompts prefill reads together, and how wide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from polarjax.planning.sizes import bucket


@dataclasses.dataclass(frozen=True)
class Block:
    """One call of prefill.

    Attributes:
      prompts: which of the batch it reads, as indices.
      rows: computed, of each part of the batch at least as many; a power of two.
      width: tokens of each row; a power of two, or the model's context.
    """

    prompts: tuple[int, ...]
    rows: int
    width: int


def plan_blocks(
    lengths: Sequence[int],
    slots: int,
    context: int,
    budget: int,
    parts: int = 1,
    where: Sequence[int] | None = None,
) -> list[Block]:
    """Cut prompts into calls of one shape for each width.

    Widest first. Each prompt is read in rows of its own width, as many as `rows_of`
    says, whatever lengths its batch-mates have: in 16 bit a wider row, or another
    number of rows, rounds otherwise; and no other prompts need another program.

    Args:
      lengths: tokens of each prompt, at least 1.
      slots: rows of each part of the batch, which the prompts are read into.
      context: most tokens that the model takes.
      budget: most tokens, rows x width, of a call, or of one part's rows. A longer
        prompt has a call of its own.
      parts: of the batch, which different devices read; each has its own rows in a
        call.
      where: the part that each prompt is of; None for as many of each, one behind the
        other.

    Returns:
      Blocks that hold each prompt once.
    """
    sizes = [bucket(length) for length in lengths]
    each, blocks = len(lengths) // parts, []
    if where is None:
        where = [i // each for i in range(len(lengths))]
    # Longest first: blocks of padding alone are left out.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for size in sorted(set(sizes), reverse=True):
        width = min(size, context)
        rows = rows_of(slots, width, budget)
        same = [i for i in order if sizes[i] == size]
        left = [[i for i in same if where[i] == part] for part in range(parts)]
        while any(left):
            taken = [i for part in left for i in part[:rows]]
            blocks.append(Block(tuple(taken), rows, width))
            left = [part[rows:] for part in left]
    return blocks


def rows_of(slots: int, width: int, budget: int) -> int:
    """Rows of the calls that read prompts of one width, a power of two.

    Args:
      slots: rows of the batch.
      width: tokens of each row.
      budget: most tokens of a call.
    """
    # Of few prompts of many lengths most rows are padding: short ones get half as many.
    most = max(1, budget // width // (2 if width <= budget // 8 else 1))
    return min(bucket(slots, 1), 1 << (most.bit_length() - 1))
