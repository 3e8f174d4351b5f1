"""A device that executes plans on pages of plain lists, and lets no error pass.

What a position holds is a function of all that it should depend on: of a prompt's, the
salt and all tokens up to it, so that sequences with one beginning may share it; of a
drawn token's, the sequence. A cell is written once between two takings of its page.
"""

import collections
import itertools

from polarjax.engine.scheduler import Scheduler

PAGE = 4


def beginnings(prompt, salt):
    """For each position of a prompt what its cell is to hold."""
    steps = itertools.accumulate(prompt, lambda a, b: hash((a, b)), initial=hash(salt))
    return list(steps)[1:]


class Slot:
    """One live row of the device."""

    def __init__(self, sequence, length):
        self.sequence, self.length = sequence, length
        self.drawn, self.dead = 0, False


class Device:
    """Executes plans for a scheduler, whose pools it looks at for what is free.

    Args:
      scheduler: whose plans they are.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        page = self.page = scheduler.pools[0].page
        self.memory = [
            [[None] * page for _ in range(pool.pages)] for pool in scheduler.pools
        ]
        self.slots, self.tables = {}, {}
        self.host = {}  # of swapped-out sequences: their cells, slot and part
        self.want, self.lives = {}, {}  # by sequence
        self.finished = {}  # tokens drawn, by sequence
        self.reads = self.decoded = self.shared = 0

    def add(self, sequence, prompt, salt, new_tokens, stops_after=None):
        """Know what a sequence is to hold, and when its stop token comes."""
        self.want[sequence] = beginnings(prompt, salt)
        self.lives[sequence] = min(new_tokens, stops_after or new_tokens)

    def cell(self, sequence, position):
        prompt = self.want[sequence]
        if position < len(prompt):
            return prompt[position]
        return sequence, position

    def rows(self, slot):
        """Of its part, the cells that a slot's table leads to."""
        part = slot * self.scheduler.parts // self.scheduler.slots
        memory = self.memory[part]
        return [memory[page] for page in self.tables[slot]]

    def read(self, slot, length):
        one, rows = self.slots[slot], self.rows(slot)
        for position in range(length):
            got = rows[position // self.page][position % self.page]
            want = self.cell(one.sequence, position)
            assert got == want, f"{one.sequence} reads {got} at {position}, not {want}"

    def write(self, slot, position):
        row = self.rows(slot)[position // self.page]
        at = position % self.page
        assert row[at] is None, f"{slot} overwrites {row[at]}"
        row[at] = self.cell(self.slots[slot].sequence, position)

    def poison(self, slot, index, page):
        part = slot * self.scheduler.parts // self.scheduler.slots
        self.memory[part][page] = [None] * self.page

    def run(self, plan):
        """Execute a plan.

        Returns:
          Sequences that it has ended.
        """
        for out in plan.swaps_out:
            one = self.slots[out.slot]
            assert one.sequence == out.sequence
            assert self.tables[out.slot][: len(out.pages)] == list(out.pages)
            if not one.dead:
                assert one.length == out.positions
                self.read(out.slot, out.positions)
            rows = self.rows(out.slot)[: len(out.pages)]
            part = out.slot * self.scheduler.parts // self.scheduler.slots
            self.host[out.sequence] = [list(row) for row in rows], one, part
        for slot in plan.frees:
            del self.slots[slot]
            self.tables[slot] = [-1] * len(self.tables[slot])  # to be used by nobody
        for pool, memory in zip(self.scheduler.pools, self.memory, strict=True):
            for page in pool._free:
                memory[page] = [None] * self.page
        # What is fresh is all of a new table that no cache was found for, and what
        # comes later. It may hold anything; here, nothing.
        known = {begin.slot: begin.cached // self.page for begin in plan.begins}
        for back in plan.swaps_in:
            first = (
                back.copies[0][0] if back.copies else -(-back.positions // self.page)
            )
            known[back.slot] = first
        for slot, index, page in plan.tables:
            assert page > 0
            fresh = slot not in known or index >= known[slot]
            if fresh:
                self.poison(slot, index, page)
            self.shared += not fresh
        for slot in known:
            self.tables[slot] = []
        for slot, index, page in plan.tables:
            table = self.tables[slot]
            assert index == len(table), "a table has a gap"
            table.append(page)
        for back in plan.swaps_in:
            cells, one, part = self.host.pop(back.sequence)
            slots, parts = self.scheduler.slots, self.scheduler.parts
            assert part == back.slot * parts // slots, "its pages are elsewhere"
            assert back.slot not in self.slots
            for index, page in back.copies:
                assert self.tables[back.slot][index] == page
                self.rows(back.slot)[index][:] = cells[index]
            self.slots[back.slot] = one
            # What is not copied may be on its way: this plan's prefill comes first.
            assert one.dead or one.length == back.positions
        for begin in plan.begins:
            assert begin.slot not in self.slots
            assert begin.cached % self.page == 0
            self.slots[begin.slot] = Slot(begin.sequence, begin.cached)
        ended = []
        self.prefill(plan.reads, ended)
        for slot in plan.decodes:
            self.decode(slot, ended)
        return ended

    def prefill(self, pieces, ended):
        """All pieces write, then all read."""
        for piece in pieces:
            one = self.slots[piece.slot]
            assert piece.count > 0 and piece.first == one.length
            for position in range(piece.first, piece.first + piece.count):
                self.write(piece.slot, position)
            one.length += piece.count
            assert piece.last == (one.length == len(self.want[one.sequence]))
        for piece in pieces:
            self.read(piece.slot, piece.first + piece.count)
            self.reads += piece.count
            if piece.last:
                self.draw(self.slots[piece.slot], ended)

    def decode(self, slot, ended):
        one = self.slots[slot]
        if one.dead:
            return
        assert one.drawn, f"{one.sequence} decodes before its prompt is read"
        self.write(slot, one.length)
        one.length += 1
        self.read(slot, one.length)
        self.decoded += 1
        self.draw(one, ended)

    def draw(self, one, ended):
        one.drawn += 1
        if one.drawn == self.lives[one.sequence]:
            one.dead = True
            self.finished[one.sequence] = one.drawn
            ended.append(one.sequence)

    def forget(self, sequence):
        """The host has given a sequence up."""
        self.host.pop(sequence, None)


class Run:
    """A scheduler, its device, and a host that hears of endings some plans late."""

    def __init__(self, scheduler, late=0):
        self.scheduler, self.late = scheduler, late
        self.device = Device(scheduler)
        self.plans, self.given_up = [], set()
        self._coming = collections.deque([()] * late)

    def add(self, id, prompt, new, stops_after=None, **more):
        self.device.add(id, prompt, more.get("salt", b""), new, stops_after)
        self.scheduler.add(id, prompt, new, **more)

    def cancel(self, id):
        self.scheduler.cancel(id)
        self.device.forget(id)
        self.given_up.add(id)

    def step(self, now=0.0):
        plan = self.scheduler.plan(now)
        self.scheduler.check()
        for id in plan.expired:
            self.device.forget(id)
            self.given_up.add(id)
        self._coming.append(self.device.run(plan))
        for id in self._coming.popleft():
            self.scheduler.ended(id)
            self.device.forget(id)
        self.plans.append(plan)
        return plan

    def finish(self, most=10_000):
        for _ in range(most):
            if not len(self.scheduler):
                break
            self.step()
        assert not len(self.scheduler), "somebody never ends"
        self.step()
        for pool in self.scheduler.pools:
            assert pool.available == pool.pages - 1
        assert not self.device.host and not self.device.slots

    def begun(self):
        return [begin.sequence for plan in self.plans for begin in plan.begins]


def run(slots=4, pages=40, late=0, **more):
    return Run(Scheduler(slots, pages, page=PAGE, **more), late=late)
