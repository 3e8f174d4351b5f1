"""Work cut into batches: alike lengths together, contexts that are shared read once."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np

from polarjax.planning.sizes import bucket

Mode = Literal["decode", "kernel", "mask"]
"""How continuations are scored; see `polarjax.evaluation.scoring`."""


# Shorter contexts are filled up: a program less to compile is worth more.
_SMALLEST_PREFIX = _SMALLEST_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens of which the last ones are scored, given those before them.

    Attributes:
      tokens: context, then continuation.
      scored: how many of the last ones are scored, from 1 to all but one.
      name: for messages.
    """

    tokens: tuple[int, ...]
    scored: int
    name: str = "a continuation"

    def __post_init__(self) -> None:
        if not 1 <= self.scored < len(self.tokens):
            raise ValueError(
                f"{self.name}: {self.scored} of {len(self.tokens)} tokens are to be "
                "scored; it must be at least one, with at least one before it"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a continuation stands in a batch.

    Attributes:
      item: which one, in the list that was cut.
      tokens: its tokens.
      start: how many of them are read dense and at once.
      scored: how many of the last are scored.
    """

    item: int
    tokens: tuple[int, ...]
    start: int
    scored: int

    @property
    def steps(self) -> int:
        """Tokens that are read one by one."""
        return len(self.tokens) - 1 - self.start


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together, and the shape of the arrays that hold them.

    Attributes:
      rows: at most as many as the batch size.
      contexts: room for different contexts, c.
      prefix: room for a context's tokens; 0 if none is read dense.
      steps: room for the tokens read one by one.
      room: of the cache for them, which is less where no row needs all.
    """

    rows: tuple[Row, ...]
    contexts: int
    prefix: int
    steps: int
    room: int

    def arrays(self, batch: int, parts: int = 1) -> tuple[tuple, tuple]:
        """Padded arrays for a batch size.

        Args:
          batch: rows, b.
          parts: of the batch, to a multiple of which it is filled up.

        Returns:
          (the contexts, int32[c, prefix], their lengths, int32[c], and the context of
          each row, int32[b]), (each row's tokens, int32[b, steps + 1], and how many of
          the steps it takes, int32[b], 0 for rows that fill up). As numpy. Each part
          has contexts of its own, from which its rows count.
        """
        each = -(-batch // parts)
        batch, most = each * parts, min(self.contexts, each)
        contexts = np.zeros((parts * most, self.prefix), np.int32)
        lengths = np.zeros(len(contexts), np.int32)
        rows, counts = np.zeros((2, batch), np.int32)
        tokens = np.zeros((batch, self.steps + 1), np.int32)
        known: list[dict[tuple[int, ...], int]] = [{} for _ in range(parts)]
        for i, row in enumerate(self.rows):
            head, tail = row.tokens[: row.start], row.tokens[row.start :]
            part = i // each
            rows[i] = known[part].setdefault(head, len(known[part]))
            at = part * most + rows[i]
            contexts[at, : len(head)], lengths[at] = head, len(head)
            tokens[i, : len(tail)], counts[i] = tail, len(tail) - 1
        return (contexts, lengths, rows), (tokens, counts)


def make_batches(
    items: Sequence[Continuation], batch: int, context: int, mode: Mode
) -> list[Batch]:
    """Cut work into batches that depend on the arguments alone.

    They come in an order that mixes long and short ones, so that the first tenth tells
    how long the rest will take.

    Args:
      items: what to score.
      batch: rows computed together.
      context: of the model, in tokens.
      mode: only in "decode" are contexts read dense, but for their last token.

    Raises:
      ValueError: if an item is longer than the context.
    """
    families: dict[tuple[int, ...], list[Row]] = {}
    for i, item in enumerate(items):
        if len(item.tokens) > context + 1:  # the last one is never read
            raise ValueError(
                f"{item.name} has {len(item.tokens)} tokens, the model's context is "
                f"{context}, and one more can be scored"
            )
        start = 0 if mode != "decode" else len(item.tokens) - item.scored - 1
        row = Row(i, item.tokens, start, item.scored)
        families.setdefault(item.tokens[:start], []).append(row)

    def width(length: int) -> int:
        return min(bucket(length, _SMALLEST_PREFIX), context) if length else 0

    # Rows of one context stay together, as far as a batch holds them.
    parts = []
    for rows in families.values():
        rows = sorted(rows, key=lambda row: row.steps)
        parts += [rows[at : at + batch] for at in range(0, len(rows), batch)]
    parts.sort(key=lambda rows: (width(rows[0].start), rows[-1].steps, rows[0].start))
    usual = sorted(map(len, parts))[len(parts) // 2] if parts else 1
    contexts = max(1, batch // usual)
    groups: list[list[list[Row]]] = []
    for rows in parts:
        last = groups[-1] if groups else []
        fits = sum(map(len, last)) + len(rows) <= batch and len(last) < contexts
        alike = last and width(last[0][0].start) == width(rows[0].start)
        if fits and alike:
            last.append(rows)
        else:
            groups.append([rows])
    batches = []
    for group in groups:
        rows = tuple(row for part in group for row in part)
        room = max(row.steps for row in rows)
        prefix = width(group[0][0].start)
        if mode == "mask":  # which computes all that it has room for
            batches.append(Batch(rows, 1, 0, width(room), 0))
            continue
        # Decoding computes only what it needs: much room spares programs.
        capacity, steps = bucket(prefix + room, 128), _SMALLEST_STEPS
        while steps < room:
            steps *= 4
        room = min(steps, capacity - prefix)
        batches.append(Batch(rows, contexts, prefix, steps, room))
    random.Random(0).shuffle(batches)
    return batches
