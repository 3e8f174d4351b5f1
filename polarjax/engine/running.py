"""Who runs: the slots and pages of one part of the batch, and what each needs next.

All that decode take one step in each plan. So the position of each is the number of the
plan plus a constant, and the plan at which it needs its next page, or has asked for all
its tokens, is known when it starts or grows: it is noted under that plan's number, and
`Part.grow` looks at those that are due, not at all.

A page that is needed and not there makes somebody give way: of those with the largest
priority number, who has computed least; and never one alone. The other end of that
order always goes on, so all come to their end.

What one that decodes has computed is kept by the host, and copied back when there is
room again. Where the host's share is full the sequence begins anew: it will draw the
same tokens once more, at the price of computing them.

Who is admitted gets the pages of a whole prompt, and of the position after it. Between
two plans the table of one that decodes has just the pages that hold something; the next
one comes in the plan whose step writes the first position there.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort

from polarjax.engine.pages import PagePool
from polarjax.engine.plans import SWAP_PAGES, Begin, Draft, Piece, SwapIn, SwapOut
from polarjax.engine.sequence import Sequence, State


class Part:
    """Slots of the batch, and the pool that their pages are from.

    Args:
      slots: their numbers.
      pool: of the pages.
      tokens: of prompts, at most, that one prefill program reads for this part.
      pieces: of prompts, at most, that these are of.
      host_pages: most that the host keeps of those who gave way.

    Attributes:
      index: number of this part.
      kept: pages that it keeps.
      number: of the plan that is made, or else of the next.
      free: slots that nobody has, a heap.
      live: who has the others.
    """

    def __init__(
        self,
        slots: range,
        pool: PagePool,
        tokens: int,
        pieces: int,
        host_pages: float = math.inf,
    ) -> None:
        self.slots, self.pool = slots, pool
        self.index = slots.start // len(slots)
        self.host_pages, self.kept = host_pages, 0
        self.number = 0
        self.free = list(slots)
        self.live: dict[int, Sequence] = {}
        self._most = tokens, pieces
        self._tokens, self._pieces = self._most  # left of this plan's prefill program
        self._readers: list[tuple[int, int, Sequence]] = []  # by priority and arrival
        self._due: dict[int, list[Sequence]] = {}  # by number of the plan
        self._decoding: set[int] = set()
        self._decodes: tuple[int, ...] | None = ()  # the same in order; None if old
        self._owed = 0  # pages that all who have slots may yet grow by
        # The last that found no room, and when that was, in releases of pages.
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def may_read(self) -> bool:
        """Whether this plan's prefill program has room for another piece."""
        return self._tokens > 0 and self._pieces > 0

    @property
    def unread(self) -> int:
        """Tokens of prompts that have a slot and are still to be read."""
        return sum(each.prompt.length - each.done for *_, each in self._readers)

    def rest(self) -> None:
        """No prompt is read in this plan."""
        self._tokens = 0

    @property
    def reader(self) -> Sequence | None:
        """Whose prompt is read next; None if all have been read."""
        return self._readers[0][2] if self._readers else None

    @property
    def decodes(self) -> tuple[int, ...]:
        """Slots that take a step in this plan, in order."""
        if self._decodes is None:
            self._decodes = tuple(sorted(self._decoding))
        return self._decodes

    def next_plan(self) -> None:
        """This plan is made."""
        self.number += 1
        self._tokens, self._pieces = self._most

    def admit(self, sequence: Sequence, draft: Draft) -> bool:
        """Give a sequence a slot, which must be free, and pages, if there is room.

        Returns:
          Whether there was room: for all of its prompt, and some to grow for those who
          run.
        """
        pool, prompt = self.pool, sequence.prompt
        if self._blocked == (sequence, pool.releases):
            return False  # nothing has been given back since
        resumed = sequence.state is State.SWAPPED
        positions = sequence.done if resumed else prompt.length
        # The last token of a new prompt is read in any case, for its logits. Whoever
        # decodes has a page for the position that is written next.
        most = prompt.length if resumed else prompt.length - 1
        found = pool.match(prompt, most) if sequence.prefix else []
        fresh = pool.pages_for(min(positions + 1, sequence.end)) - len(found)
        owed = pool.pages_for(sequence.end) - len(found) - fresh
        spare = min(self._watermark(), self._owed + owed)
        if fresh + pool.idle_among(found) + spare > pool.available:
            self._blocked = (sequence, pool.releases)
            return False
        pool.share(found)
        sequence.table = found + pool.take(fresh)
        self._owed += owed
        slot = sequence.slot = heapq.heappop(self.free)
        self.live[slot] = sequence
        draft.tables += [(slot, i, page) for i, page in enumerate(sequence.table)]
        if resumed:
            kept = range(len(found), pool.pages_for(positions))
            copies = tuple((i, sequence.table[i]) for i in kept)
            draft.swaps_in.append(SwapIn(sequence.id, slot, copies, positions))
            self.let_go(sequence)
            pool.enter(prompt, sequence.table, range(len(found), len(prompt.hashes)))
            self._start_decoding(sequence, positions)
            return True
        sequence.state, sequence.done = State.READING, len(found) * pool.page
        if sequence.prefix:
            pool.count(prompt.length, sequence.done)
        draft.begins.append(Begin(sequence.id, slot, sequence.done))
        insort(self._readers, (sequence.priority, sequence.order, sequence))
        return True

    def _growth(self, sequence: Sequence) -> int:
        """Pages that one who has a slot may yet grow by."""
        return self.pool.pages_for(sequence.end) - len(sequence.table)

    def _watermark(self) -> int:
        """Pages that stay available when somebody comes, if those who run may grow."""
        if not self.live:
            return 0
        return max(-(-self.pool.pages // 100), len(self.live) + 1)

    def read(self, draft: Draft) -> None:
        """A piece of the next prompt, as long as this plan may; `may_read` says if."""
        sequence = self._readers[0][2]
        prompt, first = sequence.prompt, sequence.done
        count = min(prompt.length - first, self._tokens)
        sequence.done = first + count
        self._tokens -= count
        self._pieces -= 1
        whole = range(first // self.pool.page, sequence.done // self.pool.page)
        self.pool.enter(prompt, sequence.table, whole)
        last = sequence.done == prompt.length
        draft.reads.append(Piece(sequence.slot, first, count, last))
        if last:
            del self._readers[0]
            if sequence.new_tokens == 1:
                sequence.state, sequence.due = State.DRAWN, self.number + 1
                self._due.setdefault(sequence.due, []).append(sequence)
            else:
                self._start_decoding(sequence, prompt.length)

    def _start_decoding(self, sequence: Sequence, positions: int) -> None:
        """It takes a step in this plan, which writes the position after so many."""
        sequence.state = State.DECODING
        sequence.done = positions - self.number
        self._decoding.add(sequence.slot)
        self._decodes = None
        self._note(sequence)

    def _stop_decoding(self, sequence: Sequence, state: State) -> None:
        sequence.done = sequence.positions(self.number)
        sequence.state, sequence.due = state, -1
        self._decoding.remove(sequence.slot)
        self._decodes = None

    def _note(self, sequence: Sequence) -> None:
        """Find out at which plan it needs a page, or has asked for all its tokens."""
        covered = len(sequence.table) * self.pool.page
        sequence.due = min(covered, sequence.end) - sequence.done
        self._due.setdefault(sequence.due, []).append(sequence)

    def grow(self, draft: Draft) -> list[Sequence]:
        """Give pages to those who need one for this plan's step.

        Whose last token has been asked for leaves slot and pages to others.

        Returns:
          Those who had to give way for it, to be put back into the queue.
        """
        growing: list[Sequence] = []
        for sequence in self._due.pop(self.number, ()):
            if sequence.due != self.number:
                continue  # it has left meanwhile, or is here twice: it began anew
            sequence.due = -1
            if sequence.positions(self.number) == sequence.end:
                self.vacate(sequence, draft)
            else:
                growing.append(sequence)
        preempted = []
        while self.pool.available < len(growing):
            preempted.append(victim := self._victim())
            self._preempt(victim, draft)
            growing = [each for each in growing if each.state is State.DECODING]
        for sequence in growing:
            [page] = self.pool.take(1)
            draft.tables.append((sequence.slot, len(sequence.table), page))
            sequence.table.append(page)
            self._owed -= 1
            self._note(sequence)
        return preempted

    def _victim(self) -> Sequence:
        def rank(sequence: Sequence) -> tuple[int, int, int]:
            computed = sequence.positions(self.number)
            return sequence.priority, -computed, sequence.order

        assert len(self.live) > 1, "one alone has all pages"
        return max(self.live.values(), key=rank)

    def _preempt(self, victim: Sequence, draft: Draft) -> None:
        slot, table, state = victim.slot, victim.table, victim.state
        self.vacate(victim, draft)
        if state is State.READING:  # dense, and so read again as it was
            victim.state = State.WAITING
        else:
            kept = -(-len(table) // SWAP_PAGES) * SWAP_PAGES
            if self.kept + kept > self.host_pages:
                victim.state = State.WAITING
                draft.restarts.append(victim.id)
                return
            self.kept += kept
            victim.state, victim.keeper, victim.kept = State.SWAPPED, self.index, kept
            draft.swaps_out.append(SwapOut(victim.id, slot, tuple(table), victim.done))

    def let_go(self, sequence: Sequence) -> None:
        """The host keeps nothing of a sequence any more."""
        self.kept -= sequence.kept
        sequence.keeper, sequence.kept = -1, 0

    def vacate(self, sequence: Sequence, draft: Draft) -> None:
        """Take slot and pages from a sequence, for others from this plan on.

        Its state becomes `State.DRAWN`, of which nothing more is to be computed, unless
        the caller knows better.
        """
        slot = sequence.slot
        if sequence.state is State.READING:
            key = (sequence.priority, sequence.order)
            del self._readers[bisect_left(self._readers, key)]
        elif sequence.state is State.DECODING:
            self._stop_decoding(sequence, State.DRAWN)
        del self.live[slot]
        heapq.heappush(self.free, slot)
        draft.frees.append(slot)
        self._owed -= self._growth(sequence)
        self.pool.release(sequence.table)
        sequence.slot, sequence.table, sequence.due = -1, [], -1

    def check(self) -> None:
        """Compare all that is known; for tests, as it looks at everything.

        Raises:
          AssertionError: naming what does not agree.
        """
        self.pool.check(sequence.table for sequence in self.live.values())
        assert sorted([*self.free, *self.live]) == list(self.slots), "slots are lost"
        by_state: dict[State, set[int]] = {}
        for slot, sequence in self.live.items():
            assert sequence.slot == slot, f"{sequence.id!r} is not where it should be"
            by_state.setdefault(sequence.state, set()).add(slot)
        reading = sorted(sequence.slot for *_, sequence in self._readers)
        assert reading == sorted(by_state.pop(State.READING, ())), "who is read?"
        assert self._decoding == by_state.pop(State.DECODING, set()), "who decodes?"
        # Of one token, which the next plan finds out.
        assert set(by_state) <= {State.DRAWN}, "somebody has a slot for nothing"
        owed = sum(map(self._growth, self.live.values()))
        assert owed == self._owed, "who may grow by how much?"
        noted = {id(each) for due in self._due.values() for each in due}
        for slot in self._decoding:
            sequence = self.live[slot]
            assert id(sequence) in noted, f"{sequence.id!r} will not grow"
            needed = self.pool.pages_for(sequence.positions(self.number))
            assert len(sequence.table) == needed, f"{sequence.id!r} has other pages"
