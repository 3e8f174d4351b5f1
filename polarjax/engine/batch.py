"""The running batch of an engine: does on the devices what a plan says."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from pallas_kernels import Implementation
from polarjax.engine import steps
from polarjax.engine.alternatives import Alternatives
from polarjax.engine.chunk import Chunk, ask, asks_of, empty_chunk
from polarjax.engine.compiled import are_known, noted, shapes_of
from polarjax.engine.edits import Begin, Edits, begin_of
from polarjax.engine.flight import Flight
from polarjax.engine.packed import pack, take_apart
from polarjax.engine.places import ROWS, everywhere, place_own
from polarjax.engine.plans import Piece, SwapIn, SwapOut
from polarjax.engine.programs import device_of
from polarjax.engine.request import Request
from polarjax.engine.sampling import Variant
from polarjax.engine.scoring import Span, asked_of
from polarjax.engine.served import Drawing
from polarjax.engine.slots import (
    Ruled,
    Slots,
    edit,
    empty_slots,
    put_pages,
    set_rules,
    take_pages,
)
from polarjax.engine.swaps import Kept, Swaps
from polarjax.model import make_decoder
from polarjax.params import Params
from polarjax.policy import Policy, Tree
from polarjax.settings import default_numbers

# Of all batches: what is kept of them is bounded.
_PROGRAMS = (
    ask,
    edit,
    everywhere,
    put_pages,
    set_rules,
    take_pages,
    steps.begin,
    steps.decode,
    steps.draw_tokens,
    steps.read_pieces,
    steps.score,
    steps.tell,
    take_apart,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs of a batch are compiled for.

    Attributes:
      slots: of all parts of the batch, b.
      context: positions that a request may have.
      pages: of each part's cache, the trash page among them.
      page: positions of each.
      tokens: of prompts, that one program reads in each part.
      pieces: of prompts, likewise.
    """

    slots: int
    context: int
    pages: int
    page: int
    tokens: int
    pieces: int


class Batch:
    """Slots on the devices, and the programs that take them on.

    Args:
      params: the model.
      weights: bound to the policy.
      policy: bound.
      sizes: that it has.
      drawing: that requests may need.
      host_pages: most that the host keeps of each part, of requests that give way.
      implementation: of the kernels; None chooses by device.

    Attributes:
      compile_seconds: that its programs took, 0 where they were there already.
    """

    def __init__(
        self,
        params: Params,
        weights: Tree,
        policy: Policy,
        sizes: Sizes,
        *,
        drawing: Drawing,
        host_pages: int = 0,
        implementation: Implementation | None = None,
    ) -> None:
        config = params.config
        self.config, self.sizes, self.context = config, sizes, sizes.context
        self._original, self._weights, self._policy = params.weights, weights, policy
        self._dense = make_decoder(
            config.architecture, params.weights, implementation=implementation
        )
        self._model = self._dense.clone(score_rows=policy.wants.scores)
        self.mesh, self.parts = self._dense.mesh, self._dense.share.dp
        self.each = sizes.slots // self.parts
        self._device = None if self.mesh else device_of(params.weights)
        slots = empty_slots(
            self._dense,
            sizes.slots,
            sizes.context,
            sizes.pages,
            sizes.page,
            params.weights,
        )
        chunk = empty_chunk(self._dense, sizes.tokens, sizes.pieces, params.weights)
        if not self.mesh:
            # Committed, as programs return them: or the first is compiled twice.
            slots, chunk = jax.device_put((slots, chunk), self._device)
        self.slots, self.chunk = slots, chunk
        self._drawing = drawing
        self.swaps = Swaps(self._dense, self._device)
        where = NamedSharding(self.mesh, ROWS) if self.mesh else self._device
        # Each part's share of arrays of the host goes to its devices. No method: what
        # knows this batch would keep its memory when it ends.
        self._placed = functools.partial(place_own, where=where)
        self._edits = Edits(config, self.parts, self.each, sizes.context, self._placed)
        # Of each slot, as its `Begin` says.
        self._needs = np.zeros(sizes.slots, np.int32)
        self._told = np.zeros(sizes.slots, bool)
        self.compile_seconds = 0.0
        self._compile_once()
        if self._may_give_way:
            most = min(host_pages, sizes.pages)
            self.slots = self.swaps.warm(self.slots, most)

    def _variant(self, slots: Sequence[int]) -> Variant:
        """The least that is compiled and draws for all of some slots."""
        least = tuple(Variant)[self._needs[list(slots)].max(initial=0)]
        found = self._drawing.for_all(least)
        assert found is not None, f"no {least.value} drawing"
        return found

    @property
    def _may_give_way(self) -> bool:
        """Whether requests may have to give way."""
        sizes = self.sizes
        return sizes.pages - 1 < self.each * -(-sizes.context // sizes.page)

    def _compile_once(self) -> None:
        """Compile the programs, unless a batch of these sizes has done so."""
        policy = self._policy
        shapes = shapes_of((self._original, self._weights, policy))
        # jax 0.10 takes the trees of two dataclasses with equal fields for the same.
        sizes = self.sizes, self._drawing, self._device
        key = self._dense, self._model, type(policy), shapes, sizes
        if not are_known(_PROGRAMS, key):
            start = time.perf_counter()
            self._compile()
            self.compile_seconds = time.perf_counter() - start
            noted(key)

    def _compile(self) -> None:
        """Run each program once on nothing, so that none is compiled later."""
        self._ask((), {})
        change, variants = next(self._edits.of((), (), ())), self._drawing.variants
        dense, bare = {"model": self._dense}, self.slots.bare
        if next(iter(self.slots.token.devices())).platform == "gpu":
            # Each takes seconds, and several can be compiled at a time.
            reading = self._original, self.chunk, self.slots
            decoding = self._weights, self._policy, self.slots
            slow = [
                (edit, (bare, change), dense),
                (steps.read_pieces, reading, dense),
                (steps.decode, decoding, self._decoding),
            ]
            if self._drawing.logprobs:
                told = self.slots.logits, self.slots.mass, self.slots.token
                slow.append((steps.tell, told, dense))
            slow += [
                (steps.draw_tokens, (bare,), {**dense, "variant": variant})
                for variant in variants
            ]
            with ThreadPoolExecutor(len(slow)) as pool:
                list(pool.map(_compile_one, slow))
        self._on_rows(edit, change, **dense)
        if Variant.FULL in variants:
            self._rule(0, None)
        self._read()
        if self._drawing.prompt_logprobs:
            self._score((), {})
        self._decode()
        for variant in variants:
            first, _ = self._begin(variant)
            drawn, _ = self._draw(variant)
            if self._drawing.logprobs:
                self._tell_all(self.chunk, first[0])
                self._tell_all(self.slots, drawn.token)

    def _read(self) -> None:
        self.chunk, self.slots = steps.read_pieces(
            self._original, self.chunk, self.slots, model=self._dense
        )

    def _decode(self) -> None:
        self.slots = steps.decode(
            self._weights, self._policy, self.slots, **self._decoding
        )

    def _begin(self, variant: Variant) -> Any:
        chunk, static = self.chunk, {"model": self._dense, "variant": variant}
        asks, logits, mass = chunk.asks, chunk.logits, chunk.mass
        found = self._on_rows(steps.begin, asks, logits, mass, **static)
        return self._for_all(found)

    def _draw(self, variant: Variant) -> Any:
        found = self._on_rows(steps.draw_tokens, model=self._dense, variant=variant)
        return self._for_all(found)

    def _tell_all(self, those: Chunk | Slots, token: jax.Array) -> Alternatives:
        """What there is to tell of tokens that were drawn from those logits."""
        found = steps.tell(those.logits, those.mass, token, model=self._dense)
        return self._for_all(found)

    def _on_rows(self, program: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Call a program that leaves keys and values as they are.

        They are not passed: each array takes the host a microsecond or two, and there
        are two of every layer.

        Args:
          program: of slots first, which it gives back, before what else it yields.
          *args: others.
          **static: of the program.

        Returns:
          What else it yields.
        """
        cache = self.slots.cache
        found = program(self.slots.bare, *args, **static)
        slots, yields = (found, None) if isinstance(found, Slots) else found
        self.slots = slots.over(cache)
        return yields

    @property
    def _decoding(self) -> dict[str, Any]:
        """The static arguments of `steps.decode`."""
        return {"model": self._model, "kind": type(self._policy)}

    def _for_all(self, tree: Any) -> Any:
        """Arrays of the devices where every process can look at all of them.

        That is so where one process has all devices. Where not, they are sent round
        after what computes them, so that nobody waits.
        """
        if self.mesh is None or not self.mesh.is_multi_process:
            return tree
        return everywhere(tree, mesh=self.mesh)

    def change(
        self,
        frees: Sequence[int],
        begins: Sequence[tuple[int, Begin]],
        tables: Sequence[tuple[int, int, int]],
    ) -> None:
        """Edit slots; by several programs, where one has no room for all.

        Args:
          frees: slots that are dead from here on.
          begins: what others begin with.
          tables: entries of page tables: slot, index in its row, page.
        """
        for slot, begin in begins:
            self._needs[slot], self._told[slot] = begin.variant, begin.told
        rows = [(slot, begin.words) for slot, begin in begins]
        for change in self._edits.of(frees, rows, tables):
            self._on_rows(edit, change, model=self._dense)
        for slot, begin in begins:
            if begin.ruled is not None:
                self._rule(slot, begin.ruled)

    def _rule(self, slot: int, ruled: Ruled | None) -> None:
        rules = self._edits.rules_of(slot, ruled)
        self._on_rows(set_rules, rules, model=self._dense)

    def row(self, request: Request, positions: int, goes_on: bool = False) -> Begin:
        """What a request's slot begins with, see `polarjax.engine.edits.begin_of`."""
        return begin_of(self.config, self.context, request, positions, goes_on)

    def _ask(
        self, reads: Sequence[Piece], requests: Mapping[int, Request]
    ) -> list[Request | None]:
        """Say which pieces are read next; whose first token is drawn after each."""
        sizes, parts = self.sizes, self.parts
        asks, owners = asks_of(
            reads, requests, parts, self.each, sizes.tokens, sizes.pieces
        )
        packed = self._placed(pack(asks, parts))
        asks = ask(self.chunk.asks, packed, model=self._dense)
        self.chunk = dataclasses.replace(self.chunk, asks=asks)
        return owners

    def read(self, reads: Sequence[Piece], requests: Mapping[int, Request]) -> Flight:
        """Read pieces of prompts, and draw the first token of those that end.

        Args:
          reads: of a plan.
          requests: whose each slot is.
        """
        owners = self._ask(reads, requests)
        self._read()
        scored, spans = self._score(reads, requests)
        drawing = [piece.slot for piece in reads if piece.last]
        (token, logprob, valid), live = self._begin(self._variant(drawing))
        told = self._tell(self.chunk, token, drawing)
        return Flight(
            token, logprob, valid, live, owners, told, scored=scored, spans=spans
        )

    def _score(
        self, reads: Sequence[Piece], requests: Mapping[int, Request]
    ) -> tuple[Alternatives | None, list[Span]]:
        """What there is to tell of tokens of prompts, and whose it is.

        Nothing is computed where nobody asks, unless there is nothing to read.
        """
        each, tokens = self.each, self.sizes.tokens
        asked, spans = asked_of(reads, requests, self.parts, each, tokens)
        if reads and not spans:
            return None, spans
        asked = take_apart(self._placed(pack(asked, self.parts)), model=self._dense)
        x, o = self.chunk.x, self.chunk.o
        scored = steps.score(self._original, x, o, asked, model=self._dense)
        return self._for_all(scored), spans

    def _tell(
        self, those: Chunk | Slots, token: jax.Array, slots: Sequence[int]
    ) -> Alternatives | None:
        """What there is to tell of tokens, if the request of some slot asks."""
        asked = self._told[list(slots)].any()
        return self._tell_all(those, token) if asked else None

    def decode(self, slots: Sequence[int], requests: Mapping[int, Request]) -> Flight:
        """One decode step.

        Args:
          slots: that take it.
          requests: whose each slot is.
        """
        self._decode()
        owners: list[Request | None] = [None] * (self.parts * self.each)
        for slot in slots:
            owners[slot] = requests[slot]
        drawn, live = self._draw(self._variant(slots))
        told = self._tell(self.slots, drawn.token, slots)
        counts = drawn.reads, drawn.visible, drawn.own
        return Flight(
            drawn.token, drawn.logprob, drawn.valid, live, owners, told, counts
        )

    def keep(self, gone: SwapOut) -> Kept:
        """Take what a request has to the host, before its slot is freed.

        Args:
          gone: of a plan.
        """
        return self.swaps.keep(self.slots, gone.pages, gone.slot // self.each)

    def restore(self, back: SwapIn, kept: Kept) -> None:
        """Put pages of a request back; its slot is still to be filled.

        Args:
          back: of a plan.
          kept: what the host has.
        """
        self.slots = self.swaps.restore(self.slots, back.copies, kept)


@default_numbers
def _compile_one(job: tuple[Any, tuple, dict[str, Any]]) -> None:
    function, args, static = job
    function.lower(*args, **static).compile()  # kept: the call finds it
