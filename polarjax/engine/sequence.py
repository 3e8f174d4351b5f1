"""One sequence as the scheduler knows it: numbers, never the tokens that were drawn."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable

from polarjax.engine.pages import Prompt


class State(enum.Enum):
    """Where a sequence is on its way, see `polarjax.engine.scheduler`."""

    WAITING = "waiting"
    READING = "reading"
    DECODING = "decoding"
    DRAWN = "drawn"  # all its tokens have been asked of the device
    SWAPPED = "swapped"
    GONE = "gone"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One that was added; equal to itself alone.

    Attributes:
      id: the caller's name for it.
      order: of its arrival; no two have the same.
      prompt: its tokens, hashed.
      new_tokens: most that are drawn.
      priority: smaller numbers go first.
      client: who asks.
      deadline: from when on it is not continued; None for never.
      prefix: whether known pages may stand for reading its prompt.
      state: where it is.
      queued: whether it is in the queue.
      charged: whether it has ever left the queue for a slot.
      slot: that it has; -1 for none.
      table: its pages, in order.
      done: positions computed; while it decodes, less the number of the next plan, as
        each plan adds one.
      due: number of the plan that must look at it; -1 for none.
      keeper: number of the part of the batch whose host has what it had, and where
        alone it can go on; -1 for none.
      kept: pages of that host's memory that it takes.
    """

    id: Hashable
    order: int
    prompt: Prompt
    new_tokens: int
    priority: int = 0
    client: Hashable = None
    deadline: float | None = None
    prefix: bool = True
    state: State = State.WAITING
    queued: bool = False
    charged: bool = False
    slot: int = -1
    table: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    due: int = -1
    keeper: int = -1
    kept: int = 0

    @property
    def end(self) -> int:
        """Positions that it has in the end: the last token drawn is not written."""
        return self.prompt.length + self.new_tokens - 1

    @property
    def cost(self) -> int:
        """Tokens, read and drawn, that it may take."""
        return self.prompt.length + self.new_tokens

    def positions(self, number: int) -> int:
        """That all plans before the one of this number compute for it."""
        return self.done + number if self.state is State.DECODING else self.done

    def used(self, number: int) -> int:
        """Of its cost, what the plans before the one of this number take."""
        # The newest of those drawn is not written.
        drawn = self.state not in (State.WAITING, State.READING)
        return self.positions(number) + drawn
