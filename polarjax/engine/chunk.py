"""What a program has begun to draw, and how requests get it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from polarjax.engine.programs import Drawn
from polarjax.engine.request import Request


@dataclasses.dataclass
class Chunk:
    """What a program has begun to draw.

    Attributes:
      drawn: on the devices, each leaf with an axis of steps first.
      live: bool[b], who goes on after it; on the devices until that is asked.
      rows: who had which row.
      call: of `generate`, in whose statistics they count; None for none.
      steps: that it takes.
    """

    drawn: Drawn
    live: Any
    rows: list[Request | None]
    call: int | None
    steps: int = 0


def take(request: Request, drawn: Drawn, row: int, ended: bool) -> bool:
    """Hand a request what a chunk drew in its row; False if that is NaN."""
    keep = drawn.valid[:, row]
    logprobs = drawn.logprob[keep, row]
    if np.isnan(logprobs).any():
        return False
    request.add(drawn.token[keep, row].tolist(), logprobs.tolist(), ended=ended)
    return True
