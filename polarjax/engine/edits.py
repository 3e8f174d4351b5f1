"""What the host tells the devices of their slots, packed for few copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine.checks import MOST_STOPS, sampling_of, stop_table, variant_of
from polarjax.engine.packed import Packed, pack
from polarjax.engine.request import Request
from polarjax.engine.rules import History
from polarjax.engine.sampling import Variant
from polarjax.engine.slots import Edit, Row, no_rows

# Slots and entries of page tables that one program edits, in each part of the batch:
# more take another call.
_ROWS, _ENTRIES = 8, 512


class Edits:
    """Makes the arguments of `polarjax.engine.slots.edit`.

    Args:
      config: what the model is.
      parts: of the batch.
      each: slots of each part.
      context: positions that a request may have.
      place: puts a tree of arrays on the devices, each part's share on its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: int,
        each: int,
        context: int,
        place: Callable[[Any], Any],
    ) -> None:
        self._parts, self._each, self._place = parts, each, place
        count = parts * _ROWS
        self._rows = pack(no_rows(config, count, context), count)
        # Most edits begin no slot: what says so is on the devices once and for all.
        self._no_rows = place(self._rows)

    def nothing(self) -> tuple[Packed, Packed]:
        """An edit that changes nothing, on the devices."""
        return next(self.of((), (), ()))

    def of(
        self,
        frees: Sequence[int],
        rows: Sequence[tuple[int, np.ndarray]],
        tables: Sequence[tuple[int, int, int]],
    ) -> Iterator[tuple[Packed, Packed]]:
        """Edits, on the devices; several, where one has no room for all.

        Each takes one copy to the devices, and one more where slots begin.

        Args:
          frees: slots that are dead from here on.
          rows: what others begin with, of `row_words`.
          tables: entries of page tables: slot, index in its row, page.
        """
        by_part: list[tuple[list, list]] = [([], []) for _ in range(self._parts)]
        for slot, row in rows:
            part, own = divmod(slot, self._each)
            by_part[part][0].append((own, row))
        for slot, index, page in tables:
            part, own = divmod(slot, self._each)
            by_part[part][1].append((own, index, page))
        dead = np.zeros(self._parts * self._each, bool)
        dead[list(frees)] = True
        while True:
            begun = any(begins for begins, _ in by_part)
            words = self._rows.words.copy() if begun else None
            slots = np.full(self._parts * _ROWS, self._each, np.int32)
            entries = np.full((self._parts * _ENTRIES, 3), self._each, np.int32)
            for part, (begins, new) in enumerate(by_part):
                for i, (own, row) in enumerate(begins[:_ROWS], part * _ROWS):
                    assert words is not None
                    slots[i], words[i] = own, row
                if some := new[:_ENTRIES]:
                    at = part * _ENTRIES
                    entries[at : at + len(some)] = some
                del begins[:_ROWS], new[:_ENTRIES]
            change = pack(Edit(dead, slots, entries), self._parts)
            if words is None:
                yield self._place(change), self._no_rows
            else:
                yield self._place(
                    (change, dataclasses.replace(self._rows, words=words))
                )
            if not any(any(lists) for lists in by_part):
                return
            dead = np.zeros_like(dead)


@dataclasses.dataclass(frozen=True)
class Begin:
    """What a slot begins with, or goes on with.

    Attributes:
      words: int32[w], for the devices, of `row_words`.
      variant: number of the least variant that draws for it, as `Variant` lists them.
      told: whether it is told more than its tokens.
    """

    words: np.ndarray
    variant: int
    told: bool


def begin_of(
    config: ModelConfig,
    context: int,
    request: Request,
    positions: int,
    goes_on: bool = False,
) -> Begin:
    """What a request's slot begins with, or goes on with.

    Args:
      config: what the model is.
      context: positions that a request may have.
      request: whose slot it is.
      positions: that the cache has of it.
      goes_on: whether it does so after its tokens, of which none is on its way; else it
        begins, and they will be drawn again.
    """
    # Of one that was computed again it may have been amid what it repeats.
    here = len(request.tokens) - request.repeats
    drawn = request.tokens[:here] if goes_on else []
    settings = [request.settings]
    stops = stop_table(settings, MOST_STOPS)
    sampling = sampling_of(config, settings, stops)
    tokens = np.zeros((1, context), np.int32)
    known = [*request.prompt, *drawn]
    tokens[0, : len(known)] = known

    def number(value: Any) -> np.ndarray:
        return np.array([value], np.int32)

    history: Any = History(tokens, number(len(request.prompt)))  # type: ignore
    row = Row(
        length=number(positions),
        token=number(drawn[-1] if drawn else 0),
        live=np.array([goes_on and request.going]),
        remaining=number(request.limit - len(drawn)),
        density=np.array([request.settings.density or 0], np.float32),
        sampling=sampling,
        stop_ids=stops,
        history=history,
    )
    variant = tuple(Variant).index(variant_of(settings))
    told = request.settings.logprobs is not None
    return Begin(row_words(row), variant, told)


def row_words(row: Row) -> np.ndarray:
    """What one slot begins with, int32[w].

    Args:
      row: arrays of the host, of one slot.
    """
    return pack(row, 1).words[0]
