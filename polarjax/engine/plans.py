"""What the scheduler tells the engine to send to the device, one iteration at a time.

The parts of a `Plan` take effect in the order of its fields, as if each were a program
of its own after those before it:

    copy swapped-out pages to the host -> mark freed slots dead -> copy swapped-in pages
    to the device -> fill new slots -> edit page tables -> read prompts -> decode

So a page that one slot gives back may be in the table of another in the same plan, and
a slot may be freed and begun.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

# Pages that one program copies to the host or back: it keeps them in such groups.
SWAP_PAGES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class SwapOut:
    """A sequence gives way: the engine keeps its pages, and its row of slot data.

    The device may have ended it, and nobody know yet: that is in the row.

    Attributes:
      sequence: its id.
      slot: that it had.
      pages: in order, all that hold something, those of the prompt too. These may stay
        known to the prefix cache, but who gives way does so because pages are short,
        and then they are taken first.
      positions: that they hold.
    """

    sequence: Hashable
    slot: int
    pages: tuple[int, ...]
    positions: int


@dataclasses.dataclass(frozen=True, slots=True)
class SwapIn:
    """A sequence that gave way goes on where it was.

    Attributes:
      sequence: its id.
      slot: that it has now.
      copies: (index in the sequence's pages, page): what the host has kept of the one
        is to be copied to the other. What is missing was found in the prefix cache.
      positions: that its pages hold, and so the position of its next token.
    """

    sequence: Hashable
    slot: int
    copies: tuple[tuple[int, int], ...]
    positions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Begin:
    """A slot is given to a sequence of which nothing has been drawn.

    It may be a second time: a sequence that gave way while its prompt was being read,
    or of which nothing was kept, begins anew.

    Attributes:
      sequence: its id.
      slot: that it has now.
      cached: first tokens of the prompt whose pages are known, and need no reading.
    """

    sequence: Hashable
    slot: int
    cached: int


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt to read.

    Attributes:
      slot: of the sequence.
      first: position of its first token.
      count: tokens, at least one.
      last: whether the prompt ends here, so that the first token is drawn after it.
    """

    slot: int
    first: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One iteration of the engine.

    Attributes:
      number: of the plan, from 0.
      expired: ids of sequences whose deadline has passed; they are gone.
      swaps_out: of sequences that give way.
      restarts: ids of sequences that give way while they decode, and of which the host
        has no room to keep anything: they will begin anew.
      frees: slots that are dead from here on: of sequences that are gone, or swapped
        out, or begin anew later, or whose last token has been asked for. Their rows of
        the page table stay as they are, and must not be used.
      swaps_in: of sequences that go on.
      begins: of sequences that start.
      tables: edits of page tables, (slot, index in the row, page). All of a row up to
        the position that is written next is said when the slot is taken, and what comes
        later as it is needed.
      reads: pieces of prompts, for one program; empty for none.
      decodes: slots in order that take one decode step, those among them whose prompt's
        last piece is in `reads`; empty for none.
    """

    number: int
    expired: tuple[Hashable, ...] = ()
    swaps_out: tuple[SwapOut, ...] = ()
    restarts: tuple[Hashable, ...] = ()
    frees: tuple[int, ...] = ()
    swaps_in: tuple[SwapIn, ...] = ()
    begins: tuple[Begin, ...] = ()
    tables: tuple[tuple[int, int, int], ...] = ()
    reads: tuple[Piece, ...] = ()
    decodes: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send to the device."""
        return not (self.frees or self.tables or self.reads or self.decodes)


@dataclasses.dataclass(slots=True)
class Draft:
    """A plan that is being made: its lists so far."""

    swaps_out: list[SwapOut] = dataclasses.field(default_factory=list)
    restarts: list[Hashable] = dataclasses.field(default_factory=list)
    frees: list[int] = dataclasses.field(default_factory=list)
    swaps_in: list[SwapIn] = dataclasses.field(default_factory=list)
    begins: list[Begin] = dataclasses.field(default_factory=list)
    tables: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    reads: list[Piece] = dataclasses.field(default_factory=list)
