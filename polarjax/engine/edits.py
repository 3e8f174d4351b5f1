"""What the host tells the devices of their slots, packed for few copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine.checks import plain_sampling_of, stop_table, variant_of
from polarjax.engine.packed import Packed, pack
from polarjax.engine.request import Request
from polarjax.engine.rules import make_rules
from polarjax.engine.sampling import Variant
from polarjax.engine.settings import MOST_STOPS
from polarjax.engine.slots import Edit, Row, Ruled, no_rows, no_rules

# Slots and entries of page tables that one program edits, in each part of the batch:
# more take another call.
_ROWS, _ENTRIES = 8, 512


class Edits:
    """Makes the arguments of `polarjax.engine.slots.edit` and `set_rules`.

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
        self._rows = pack(no_rows(config, count), count)
        self._no_rules = Ruled(
            np.full(parts, each, np.int32),
            no_rules(config, parts),
            np.zeros((parts, context), np.int32),
        )

    def of(
        self,
        frees: Sequence[int],
        rows: Sequence[tuple[int, np.ndarray]],
        tables: Sequence[tuple[int, int, int]],
    ) -> Iterator[Packed]:
        """Edits, on the devices; several, where one has no room for all.

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
            words = self._rows.words.copy()
            slots = np.full(self._parts * _ROWS, self._each, np.int32)
            entries = np.full((self._parts * _ENTRIES, 3), self._each, np.int32)
            for part, (begins, new) in enumerate(by_part):
                for i, (own, row) in enumerate(begins[:_ROWS], part * _ROWS):
                    slots[i], words[i] = own, row
                if some := new[:_ENTRIES]:
                    at = part * _ENTRIES
                    entries[at : at + len(some)] = some
                del begins[:_ROWS], new[:_ENTRIES]
            begun = dataclasses.replace(self._rows, words=words)
            yield self._place(pack(Edit(dead, slots, begun, entries), self._parts))
            if not any(any(lists) for lists in by_part):
                return
            dead = np.zeros_like(dead)

    def rules_of(self, slot: int, ruled: Ruled | None) -> Packed:
        """The rules of a slot, on the devices.

        Args:
          slot: which.
          ruled: of a `Begin`; None for no slot's.
        """
        whole, (part, own) = self._no_rules, divmod(slot, self._each)
        if ruled is not None:
            whole = jax.tree.map(np.copy, whole)
            for array, one in zip(*map(jax.tree.leaves, (whole, ruled)), strict=True):
                array[part] = one[0]
            whole.slot[part] = own
        return self._place(pack(whole, self._parts))


@dataclasses.dataclass(frozen=True)
class Begin:
    """What a slot begins with, or goes on with.

    Attributes:
      words: int32[w], for the devices, of `row_words`.
      variant: number of the least variant that draws for it, as `Variant` lists them.
      told: whether it is told more than its tokens.
      ruled: rules, where it has any; of no slot yet.
    """

    words: np.ndarray
    variant: int
    told: bool
    ruled: Ruled | None = None


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
    one, ruled = request.settings, None
    stops = stop_table([one], MOST_STOPS)

    def number(value: Any) -> np.ndarray:
        return np.array([value], np.int32)

    if one.has_rules:
        tokens = np.zeros((1, context), np.int32)
        known = [*request.prompt, *drawn]
        tokens[0, : len(known)] = known
        ruled = Ruled(number(0), make_rules(config, [one], stops), tokens)
    row = Row(
        length=number(positions),
        token=number(drawn[-1] if drawn else 0),
        live=np.array([goes_on and request.going]),
        remaining=number(request.limit - len(drawn)),
        density=np.array([one.density or 0], np.float32),
        sampling=plain_sampling_of(config, [one]),
        stop_ids=stops,
        prompt=number(len(request.prompt)),
    )
    variant = tuple(Variant).index(variant_of([one]))
    return Begin(row_words(row), variant, one.logprobs is not None, ruled)


def row_words(row: Row) -> np.ndarray:
    """What one slot begins with, int32[w].

    Args:
      row: arrays of the host, of one slot.
    """
    return pack(row, 1).words[0]
