"""Which tokens of prompts are asked about, among those that one program reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from polarjax.engine.plans import Piece
from polarjax.engine.request import Request


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """Tokens that the model is asked about; of a mesh each part has its own share.

    Attributes:
      rows: int32[n], the place of the token before each, among those that are read.
      tokens: int32[n].
      count: int32[1], how many of both mean something: the first.
    """

    rows: Any
    tokens: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens of a prompt whose answers stand behind one another.

    Attributes:
      request: whose prompt it is.
      first: position of the token before the first of them.
      start: place of the first answer.
      count: of them.
    """

    request: Request
    first: int
    start: int
    count: int


def asked_of(
    reads: Sequence[Piece],
    requests: Mapping[int, Request],
    parts: int,
    each: int,
    tokens: int,
) -> tuple[Asked, list[Span]]:
    """What the requests ask about the pieces that one program reads.

    Args:
      reads: the pieces, which stand behind one another in each part's tokens.
      requests: whose each slot is.
      parts: of the batch.
      each: slots of each part.
      tokens: that the program reads in each part, n.

    Returns:
      The questions, as arrays of the host; and whose the answers are.
    """
    asked = Asked(
        rows=np.zeros(parts * tokens, np.int32),
        tokens=np.zeros(parts * tokens, np.int32),
        count=np.zeros(parts, np.int32),
    )
    spans, used = [], [0] * parts
    for piece in reads:
        part, request = piece.slot // each, requests[piece.slot]
        row = used[part]
        used[part] += piece.count
        if request.settings.told_of_prompt is None:
            continue
        # After the prompt's last token comes one that is drawn.
        new = request.prompt[piece.first + 1 : piece.first + piece.count + 1]
        start = part * tokens + int(asked.count[part])
        asked.rows[start : start + len(new)] = row + np.arange(len(new))
        asked.tokens[start : start + len(new)] = new
        asked.count[part] += len(new)
        spans.append(Span(request, piece.first, start, len(new)))
    return asked, spans
