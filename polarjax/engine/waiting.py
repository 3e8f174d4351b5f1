"""Who of those that wait goes next: by priority, then fairly between clients.

Priorities are kept apart: while one of a smaller number waits, nobody of a larger one
goes. Within a priority those who were running already and had to give way go first, in
the order in which they came. Then new ones: of each client the one that has waited
longest, and among the clients the one who has been given the fewest tokens so far. A
client is charged for all that a sequence may take when it goes, and paid back what it
did not use when it leaves. Who comes, or comes back, starts no lower than the clients
who are being served: nobody saves up by not asking.

That is deficit round robin, of rounds that are numbers instead of walks: a queue of any
length, of any number of clients, costs no more than the logarithm of the clients.
"""

from __future__ import annotations

import dataclasses
import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable

from polarjax.engine.sequence import Sequence


@dataclasses.dataclass(eq=False, slots=True)
class _Client:
    """One client within one priority."""

    served: int = 0  # tokens charged
    waiting: OrderedDict[int, Sequence] = dataclasses.field(default_factory=OrderedDict)
    going: int = 0  # sequences taken that have not left

    @property
    def key(self) -> tuple[int, int] | None:
        """Where it stands among others, the smallest first; None if nothing waits."""
        return (self.served, next(iter(self.waiting))) if self.waiting else None

    def __lt__(self, other: _Client) -> bool:
        return False  # asked of two equal keys, which are of one client


class _Level:
    """All of one priority."""

    def __init__(self) -> None:
        self.clients: dict[Hashable, _Client] = {}
        self.back: list[tuple[int, Sequence]] = []  # preempted, by order of arrival
        self._floor = 0  # what the client had been served who went last
        self._heap: list[tuple[int, int, _Client]] = []  # keys that may be old
        self._waiting = 0  # clients with something that waits

    @property
    def empty(self) -> bool:
        return not self.clients and not self.back

    def add(self, sequence: Sequence) -> None:
        client = self.clients.get(sequence.client)
        if client is None:
            client = self.clients[sequence.client] = _Client()
        if not client.waiting:
            self._waiting += 1
            client.served = max(client.served, self._floor)
        client.waiting[sequence.order] = sequence
        if len(client.waiting) == 1:
            self._push(client)

    def first(self) -> Sequence | None:
        if self.back:
            return self.back[0][1]
        while self._heap:
            served, order, client = self._heap[0]
            if client.key == (served, order):
                return client.waiting[order]
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Out of the queue, wherever in it."""
        if sequence.charged:
            del self.back[bisect_left(self.back, (sequence.order,))]
            return
        client = self.clients[sequence.client]
        del client.waiting[sequence.order]
        self._changed(client)

    def charge(self, sequence: Sequence) -> None:
        """It goes."""
        client = self.clients[sequence.client]
        self._floor = max(self._floor, client.served)
        client.served += sequence.cost
        client.going += 1
        del client.waiting[sequence.order]
        self._changed(client)

    def pay_back(self, sequence: Sequence, unused: int) -> None:
        """It leaves."""
        client = self.clients[sequence.client]
        client.going -= 1
        client.served -= unused
        if client.waiting:
            self._push(client)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """The client of a sequence, if nothing of it is left."""
        client = self.clients[sequence.client]
        if not client.waiting and not client.going:
            del self.clients[sequence.client]

    def _changed(self, client: _Client) -> None:
        if client.waiting:
            self._push(client)
        else:
            self._waiting -= 1

    def _push(self, client: _Client) -> None:
        served, order = client.key or (0, 0)
        heapq.heappush(self._heap, (served, order, client))
        # Old keys lie about until they come up: not for ever.
        if len(self._heap) > 2 * self._waiting + 16:
            keys = [(each.key, each) for each in self.clients.values()]
            self._heap = [(*key, each) for key, each in keys if key]
            heapq.heapify(self._heap)


class Waiting:
    """The queue: `len` of it are all that wait, the preempted ones among them.

    Attributes:
      tokens: of all their prompts.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []  # of the levels, in order
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        level = self._levels.get(sequence.priority)
        if level is None:
            level = self._levels[sequence.priority] = _Level()
            insort(self._priorities, sequence.priority)
        level.add(sequence)
        self._queue(sequence, True)

    def put_back(self, sequence: Sequence) -> None:
        """It was taken and must wait again, before new ones of its priority."""
        insort(self._levels[sequence.priority].back, (sequence.order, sequence))
        self._queue(sequence, True)

    def first(self) -> Sequence | None:
        """Who goes next; None if nobody waits."""
        for priority in self._priorities:
            sequence = self._levels[priority].first()
            if sequence is not None:
                return sequence
        return None

    def take(self, sequence: Sequence) -> None:
        """It goes."""
        level = self._levels[sequence.priority]
        if sequence.charged:
            level.remove(sequence)
        else:
            level.charge(sequence)
        self._queue(sequence, False)
        sequence.charged = True

    def leave(self, sequence: Sequence, unused: int) -> None:
        """It will not come again, whether it waits or runs.

        Args:
          sequence: that was added.
          unused: of its cost, if it was ever taken.
        """
        level = self._levels[sequence.priority]
        if sequence.queued:
            level.remove(sequence)
            self._queue(sequence, False)
        if sequence.charged:
            level.pay_back(sequence, unused)
        else:
            level.forget(sequence)
        if level.empty:
            del self._levels[sequence.priority]
            del self._priorities[bisect_left(self._priorities, sequence.priority)]

    def _queue(self, sequence: Sequence, queued: bool) -> None:
        self._count += 1 if queued else -1
        self.tokens += sequence.prompt.length * (1 if queued else -1)
        sequence.queued = queued
