"""What runs the steps of an engine: plans go to the devices, tokens come back.

In each step a plan of the scheduler is sent to the devices: at most one program that
reads pieces of prompts, then one decode step of all slots. The host looks at what a
step has drawn while the next is under way.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

from polarjax.config import ModelConfig
from polarjax.engine.batch import Batch
from polarjax.engine.clock import Clock
from polarjax.engine.errors import RequestFailed
from polarjax.engine.flight import Flight
from polarjax.engine.interrupts import held_back
from polarjax.engine.plans import Plan
from polarjax.engine.programs import Drawn
from polarjax.engine.request import Request
from polarjax.engine.scheduler import Scheduler
from polarjax.engine.stats import Tally
from polarjax.engine.swaps import Kept
from polarjax.mesh.wire import Wire


class Runner:
    """Requests on their way through a running batch.

    Args:
      scheduler: that says who reads and who decodes.
      batch: that does it.
      config: what the model is.
      ahead: steps that are sent to the devices before the host looks at what one has
        brought.
      prefix_cache: whether prompts share the pages of what they begin with.
      wire: from process 0, where several processes have the batch; else None.

    Attributes:
      scheduler: as above.
      batch: as above, until `end`.
      kept: what the host has of requests that gave way, by id.
      anew: ids of those of which it has nothing, and which will begin anew.
      wire: as above.
      flights: what the devices have begun, in order.
      half_way: whether a step was interrupted that cannot be taken up again.
      clock: where the time goes.
      tally: of the decode steps that count.
      counting: whether they do.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        batch: Batch,
        config: ModelConfig,
        *,
        ahead: int,
        prefix_cache: bool,
        wire: Wire | None = None,
    ) -> None:
        self.scheduler, self.batch = scheduler, batch
        self._config, self._ahead, self._prefix_cache = config, ahead, prefix_cache
        self._requests: dict[Hashable, Request] = {}  # by id, until they end
        self._owners: dict[int, Request] = {}  # by slot
        self.kept: dict[Hashable, Kept] = {}
        self.anew: set[Hashable] = set()
        self.wire = wire
        self._asked = hashlib.sha256()  # of all requests, for other processes
        self.flights: deque[Flight] = deque()
        self._left: deque[Request] = deque()  # cancelled, and not yet looked at
        self._ids = self._calls = 0
        self.half_way = self.counting = False
        self.clock, self.tally = Clock(), Tally(config)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, those that gave way among them."""
        return self.scheduler.waiting if self._requests else 0

    @property
    def idle(self) -> bool:
        """Whether no request waits or goes on."""
        return not self._requests

    @property
    def going(self) -> bool:
        """Whether a request goes on that nobody has cancelled."""
        return any(request.going for request in self._requests.values())

    def admit(self, request: Request) -> None:
        """A request waits from now on."""
        request.id, self._ids = self._ids, self._ids + 1
        request.left_by, request.together = self._left, self.wire is not None
        if self.wire is not None:
            said = request.id, request.prompt, request.limit, request.settings
            self._asked.update(repr(said).encode())
        # What is wanted of every position must be computed at every position.
        prefix = self._prefix_cache and request.settings.told_of_prompt is None
        self.scheduler.add(request.id, request.prompt, request.limit, prefix=prefix)
        self._requests[request.id] = request

    def has(self, request: Request) -> bool:
        """Whether it waits or goes on here."""
        return self._requests.get(request.id) is request

    def cancel(self, request: Request) -> None:
        """End a request, where several processes have it at the next step."""
        request.cancel()
        if not request.going:
            self._forget(request)

    def end(self, why: str) -> None:
        """Cancel what is open; the arrays go, whatever became of them."""
        for request in self._requests.values():
            request.cancel(why)
        self._requests, self._owners, self.kept, self.anew = {}, {}, {}, set()
        self.flights.clear()
        if self.wire is not None:
            self.wire.close()
        del self.batch

    @contextlib.contextmanager
    def count(self) -> Iterator[Tally]:
        """Count what decode steps bring that are begun and handed on within."""
        self.tally = Tally(self._config)
        self.counting, self._calls = True, self._calls + 1
        try:
            yield self.tally
        finally:
            self.counting = False

    def _forget(self, request: Request) -> None:
        """It has ended: nothing more is computed for it."""
        if self.has(request):
            del self._requests[request.id]
            self.kept.pop(request.id, None)
            self.anew.discard(request.id)
            self.scheduler.ended(request.id)

    def _take_left(self) -> list[Request]:
        left = []
        while self._left:
            left.append(self._left.popleft())
        return left

    def _agree(self, left: list[Request], wire: Wire) -> list[Request]:
        """End what process 0 wants ended: all that is not the same by itself.

        What was added must be the same, and what is drawn is; plans follow from both.

        Args:
          left: those that this process would end.
          wire: from process 0.

        Returns:
          Those that it wants ended.

        Raises:
          ValueError: if this process was given other requests than process 0.
        """
        asked = self._asked.hexdigest()
        ends, known = wire.tell(([one.id for one in left if self.has(one)], asked))
        if known != asked:
            raise ValueError(
                "this process was given other requests than process 0, or in another "
                "order: add the same prompts and settings on every process"
            )
        ended = [self._requests[id] for id in ends]
        for request in ended:
            request.together = False
            request.cancel()
        return ended

    def step(self) -> list[Request]:
        """Go on, see `polarjax.Engine.step`.

        Raises:
          RequestFailed: if the model yields NaN for requests.
        """
        self.half_way = False
        left = self._take_left()
        for request in left if self.wire is None else self._agree(left, self.wire):
            self._forget(request)
        # Who gave way may come back at once: not before its newest token is here.
        gone = [self._requests[id] for id in (*self.kept, *self.anew)]
        pending = [i for i, one in enumerate(self.flights) if one.has(gone)]
        news = self._take_home(pending[-1] + 1 if pending else 0)
        ahead = self._ahead
        if self._under_way <= ahead:
            with self._all_or_nothing():
                self._send(plan := self.scheduler.plan())
            if not plan.reads and not plan.decodes:
                ahead = 0  # there is nothing else to do
        # What has been sent is under way while the host looks at what came before.
        while self.flights and (self._under_way > ahead or not ahead):
            first = self.flights[0]
            news += self._take_home(1)
            # First tokens wait for no decode step, whatever comes next is sent already.
            if news and not first.last and ahead:
                break
        if not self._requests:  # what is still under way is nobody's
            self.flights.clear()
        for kept in self.kept.values():  # what they had shall not fill the devices
            kept.come_home()
        news = list(dict.fromkeys(news))
        if failed := [one for one in news if one.finish_reason == "error"]:
            raise RequestFailed(failed)
        return news

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What is done within cannot be taken up again where it was interrupted."""
        with held_back():
            self.half_way = True
            yield
            self.half_way = False

    def _send(self, plan: Plan) -> None:
        """Have the devices do what a plan says."""
        swaps = self.batch.swaps
        bytes_before, seconds_before = swaps.bytes, swaps.seconds
        for gone in plan.swaps_out:
            self.kept[gone.sequence] = self.batch.keep(gone)
        self.anew.update(plan.restarts)
        for slot in plan.frees:
            self._owners.pop(slot, None)
        rows = []
        for back in plan.swaps_in:
            self.batch.restore(back, self.kept.pop(back.sequence))
            request = self._owners[back.slot] = self._requests[back.sequence]
            row = self.batch.row(request, back.positions, goes_on=True)
            rows.append((back.slot, row))
        if self.counting:
            self.tally.swapped_bytes += swaps.bytes - bytes_before
            self.tally.swap_seconds += swaps.seconds - seconds_before
        for one in plan.begins:
            request = self._owners[one.slot] = self._requests[one.sequence]
            if one.sequence in self.anew:
                self.anew.discard(one.sequence)
                request.repeats = len(request.tokens)
            else:
                request.cached = one.cached
            rows.append((one.slot, self.batch.row(request, one.cached)))
        if plan.frees or rows or plan.tables:
            self.batch.change(plan.frees, rows, plan.tables)
        if plan.reads:
            self._fly(self.batch.read(plan.reads, self._owners), not plan.decodes)
        if plan.decodes:
            self._fly(self.batch.decode(plan.decodes, self._owners), True)

    def _fly(self, flight: Flight, last: bool) -> None:
        flight.last = last
        flight.call = self._calls if self.counting else None
        self.flights.append(flight)

    @property
    def _under_way(self) -> int:
        """Plans that were sent, and that not all has come home of."""
        return sum(flight.last for flight in self.flights)

    def _take_home(self, number: int) -> list[Request]:
        """Hand on what the first flights have brought.

        Returns:
          The requests that got tokens or ended, some perhaps more than once.
        """
        news: list[Request] = []
        for _ in range(number):
            flight = self.flights[0]
            new = flight.home()  # which may take a while
            self.clock.lap("prefill" if new.counts is None else "decode")
            with self._all_or_nothing():
                self.flights.popleft()
                counting = self.counting and flight.call == self._calls
                if new.counts is not None and counting:
                    one: Any = new.token, new.logprob, new.valid
                    self.tally.add(Drawn(*one, *new.counts))
                got = new.hand_on(flight.requests, flight.spans)
                for request in got:
                    if not request.going:
                        self._forget(request)
                news += got
        return news
