"""What each iteration of a serving engine does, decided from what was asked alone.

A sequence waits until a slot is free and its whole prompt has room in the page pool.
Then its prompt is read, in pieces where it is long, and from then on it takes one
decode step in every plan, until all its tokens have been asked of the device, or
somebody says that it has ended:

    waiting --> reading --> decoding --> drawn --> gone, as from everywhere
       ^           |         |    ^
       '-----------'         v    |
                           swapped

The way back is for those who give way where pages are short. A prompt that was being
read is read again. What was decoded cannot be computed again, since reading is dense:
its pages go to the host, and come back before new sequences of its priority start.

The scheduler knows numbers only: positions, pages and slots. It never learns which
tokens were drawn, so plans can be made ahead of their results; and it is a function of
the calls made, so what happened can be played again. `polarjax.engine.waiting` says who
goes next, `polarjax.engine.running` who has slots and pages.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np

from polarjax.engine import sequence as sequences
from polarjax.engine.pages import PagePool
from polarjax.engine.plans import Draft, Plan
from polarjax.engine.running import Part
from polarjax.engine.sequence import State
from polarjax.engine.waiting import Waiting
from polarjax.planning.sizes import at_least, positive
from polarjax.storage.quoted import quoted

# Rests between prefill programs that are not full, where requests wait for slots. With
# 64 slots and chats, a program of 512 tokens is half full after one decode step, and
# costs as much as three: see `benchmarks/results`.
PATIENCE = 8


class Scheduler:
    """Makes a plan for each iteration of an engine.

    Args:
      slots: rows of the running batch, of all parts together.
      pages: of the KV cache of each part, the trash page among them.
      page: positions of each.
      prefill_tokens: that one prefill program reads, in each part.
      pieces: of prompts that one prefill program reads, in each part.
      rest: plans without one that follow a prefill program, while others decode, unless
        the next would be full: what it costs does not depend on what is in it. They are
        `PATIENCE` times as many while more wait than there are free slots.
      parts: equal parts that a mesh cuts the batch into. Part i has the slots from
        i * slots / parts on and pages of its own, which its rows of the table number.
      root: what the pages' contents depend on, see `PagePool`.
      host_pages: most that the host keeps of sequences that gave way, for each part, in
        groups of `SWAP_PAGES`. Where there is no room a sequence begins anew.

    Attributes:
      preemptions: times that a sequence had to give way.

    Raises:
      ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        slots: int,
        pages: int,
        *,
        page: int = 64,
        prefill_tokens: int = 512,
        pieces: int = 16,
        rest: int = 0,
        parts: int = 1,
        root: bytes = b"",
        host_pages: float = math.inf,
    ) -> None:
        self.slots, self.parts = positive("slots", slots), positive("parts", parts)
        if self.slots % self.parts:
            raise ValueError(f"{slots} slots cannot be cut into {parts} equal parts")
        tokens = positive("prefill_tokens", prefill_tokens)
        pieces = positive("pieces", pieces)
        self._tokens, self._rest = tokens, at_least("rest", rest, 0)
        self._reads = -1  # number of the newest plan that has read prompts
        each = self.slots // self.parts
        self._parts = [
            Part(
                range(i * each, (i + 1) * each),
                PagePool(pages, page, root),
                tokens,
                pieces,
                host_pages,
            )
            for i in range(self.parts)
        ]
        self.preemptions = 0
        self._sequences: dict[Hashable, sequences.Sequence] = {}
        self._waiting = Waiting()
        self._deadlines: list[tuple[float, int, sequences.Sequence]] = []  # a heap
        self._draft = Draft()  # of the next plan
        self._arrivals = 0

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """Of each part, for its figures."""
        return tuple(part.pool for part in self._parts)

    @property
    def waiting(self) -> int:
        """Sequences without a slot, those that gave way among them."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Slots that are taken."""
        return sum(len(part.live) for part in self._parts)

    def __len__(self) -> int:
        """Sequences that were added and are not gone."""
        return len(self._sequences)

    def __contains__(self, id: Hashable) -> bool:
        return id in self._sequences

    def add(
        self,
        id: Hashable,
        prompt: Sequence[int] | np.ndarray,
        max_new_tokens: int,
        *,
        priority: int = 0,
        client: Hashable = None,
        salt: bytes = b"",
        deadline: float | None = None,
        prefix: bool = True,
    ) -> None:
        """A sequence waits from now on.

        Args:
          id: names it until it is gone.
          prompt: token ids.
          max_new_tokens: most tokens to draw, the one after the prompt among them.
          priority: smaller numbers go first, and give way last.
          client: whose it is: tokens are shared fairly between clients.
          salt: it shares pages with sequences of the same salt only.
          deadline: the time, as `plan` is told it, from which on it is not continued.
          prefix: whether known pages may stand for reading its prompt; not if something
            is wanted of every position.

        Raises:
          ValueError: if the id is in use, a value is out of range, or it could never
            run, for which there would have to be more pages.
          TypeError: if a value is of another type.
        """
        if id in self._sequences:
            raise ValueError(
                f"sequence {quoted(id)} is here already: give each its own id"
            )
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise TypeError(f"priority must be an integer, got {quoted(priority)}")
        if not isinstance(salt, bytes):
            raise TypeError(f"salt must be bytes, got {quoted(salt)}")
        if deadline is not None and math.isnan(deadline):
            raise ValueError("deadline must be a number or None, got nan")
        pool = self._parts[0].pool
        hashed = pool.prompt(prompt, salt)
        new = positive("max_new_tokens", max_new_tokens)
        hash(client)  # or a TypeError now, before it is anywhere
        sequence = sequences.Sequence(
            id,
            self._arrivals,
            hashed,
            new,
            priority=priority,
            client=client,
            deadline=deadline,
            prefix=prefix,
        )
        needed = pool.pages_for(sequence.end)
        if needed > pool.pages - 1:
            raise ValueError(
                f"sequence {quoted(id)} of {hashed.length} prompt tokens and up to "
                f"{new} new ones needs {needed} pages of {pool.page} positions, and "
                f"there are {pool.pages - 1}: ask for fewer tokens, or give the cache "
                "more pages"
            )
        self._arrivals += 1
        self._sequences[id] = sequence
        self._waiting.add(sequence)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, sequence.order, sequence))

    def cancel(self, id: Hashable) -> bool:
        """Nobody wants a sequence any more; its slot is among the next plan's `frees`.

        Returns:
          Whether it was here: to say so twice does no harm.
        """
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._drop(sequence)
        return sequence is not None

    def ended(self, id: Hashable) -> bool:
        """A sequence has drawn its last token, as device or host found out.

        Returns:
          Whether it was here, as for `cancel`.
        """
        return self.cancel(id)

    def plan(self, now: float = 0.0) -> Plan:
        """What to do next. It is taken as done: plans must be sent in order, all.

        Args:
          now: the time that deadlines are compared to; it must not go back.
        """
        expired, draft = self._expire(now), self._draft
        preempted = [each for part in self._parts for each in part.grow(draft)]
        for sequence in preempted:
            self._waiting.put_back(sequence)
        self.preemptions += len(preempted)
        if not self._reads_now():
            for part in self._parts:
                part.rest()
        if not preempted:  # or they would come back at once
            self._admit(draft)
        for part in self._parts:
            while part.reader and part.may_read:
                part.read(draft)
        plan = Plan(
            self._parts[0].number,
            expired,
            tuple(draft.swaps_out),
            tuple(draft.restarts),
            tuple(draft.frees),
            tuple(draft.swaps_in),
            tuple(draft.begins),
            tuple(draft.tables),
            tuple(draft.reads),
            tuple(chain.from_iterable(part.decodes for part in self._parts)),
        )
        if plan.reads:
            self._reads = plan.number
        self._draft = Draft()
        for part in self._parts:
            part.next_plan()
        return plan

    def _reads_now(self) -> bool:
        """Whether this plan may read prompts."""
        free, waiting = sum(len(part.free) for part in self._parts), self.waiting
        # Who waits long for a slot hardly cares; the sooner the others end the better.
        rest = self._rest * (PATIENCE if waiting > free else 1)
        if self._parts[0].number > self._reads + rest:
            return True
        if not any(part.decodes for part in self._parts):
            return True  # nobody is kept from anything else
        # About what those who wait would bring, as far as there are slots for them.
        new = self._waiting.tokens * min(free, waiting) // max(waiting, 1)
        unread = sum(part.unread for part in self._parts)
        return unread + new >= self._tokens * self.parts

    def _admit(self, draft: Draft) -> None:
        """Give slots to those who wait, in order, while there is room for the next."""
        full: set[int] = set()  # for those whose pages they keep, who go before others
        while (sequence := self._waiting.first(full)) is not None:
            if sequence.keeper >= 0:
                keeper = self._parts[sequence.keeper]
                if keeper.free and keeper.admit(sequence, draft):
                    self._waiting.take(sequence)
                else:
                    full.add(sequence.keeper)
                continue
            rooms = [
                p for p in self._parts if p.free and p.may_read and p.index not in full
            ]
            if not rooms:
                return
            part = max(rooms, key=lambda part: part.pool.available)
            reader = part.reader
            # Who is being read goes on first, so that an equal prompt finds its pages;
            # unless the new one matters more.
            if reader and reader.priority <= sequence.priority:
                part.read(draft)
            elif part.admit(sequence, draft):
                self._waiting.take(sequence)
            else:
                return

    def _expire(self, now: float) -> tuple[Hashable, ...]:
        """Drop those whose time is over; returns their ids."""
        expired, heap = [], self._deadlines
        while heap and (heap[0][2].state is State.GONE or heap[0][0] <= now):
            _, _, sequence = heapq.heappop(heap)
            # Of one that is drawn all that was asked for is on its way.
            if sequence.state not in (State.GONE, State.DRAWN):
                self._drop(sequence)
                expired.append(sequence.id)
        # The gone ones' far deadlines lie about: not for ever.
        if len(heap) > 2 * len(self._sequences) + 16:
            self._deadlines = [x for x in heap if x[2].state is not State.GONE]
            heapq.heapify(self._deadlines)
        return tuple(expired)

    def _drop(self, sequence: sequences.Sequence) -> None:
        """It is gone, and what it has is given back."""
        unused = sequence.cost - sequence.used(self._parts[0].number)
        if sequence.slot >= 0:
            part = self._parts[sequence.slot * self.parts // self.slots]
            part.vacate(sequence, self._draft)
        if sequence.keeper >= 0:
            self._parts[sequence.keeper].let_go(sequence)
        self._waiting.leave(sequence, unused)
        sequence.state = State.GONE
        del self._sequences[sequence.id]

    def check(self) -> None:
        """Compare all that is known; for tests, as it looks at everything.

        Raises:
          AssertionError: naming what does not agree.
        """
        live = {}
        for part in self._parts:
            part.check()
            live |= part.live
        for sequence in self._sequences.values():
            has_slot = live.pop(sequence.slot, None) is sequence
            assert has_slot or sequence.slot == -1, f"{sequence.id!r} is lost"
            queued = sequence.state in (State.WAITING, State.SWAPPED)
            assert sequence.queued == queued, f"{sequence.id!r} waits for nothing"
            # A drawn one has none, but for the plan that draws its only token.
            assert has_slot != queued or sequence.state is State.DRAWN
        for part in self._parts:
            kept = sum(
                s.kept for s in self._sequences.values() if s.keeper == part.index
            )
            assert kept == part.kept <= part.host_pages, "what does the host keep?"
        assert not live, f"slots {sorted(live)} are taken by nobody"
        assert len(self._waiting) == sum(s.queued for s in self._sequences.values())
