"""`PagedEngine`: continuous batching over pages, the same answer under any load.

What becomes `polarjax.Engine` once it has been measured on a GPU, and until then is
measured beside it. In each step a plan of the scheduler is sent to the devices: at most
one program that reads pieces of prompts, then one decode step of all slots. The host
looks at what a step has drawn while the next is under way.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

from jax.sharding import Mesh

from pallas_kernels import Implementation, runnable
from polarjax.engine import programs
from polarjax.engine.batch import Batch, Sizes
from polarjax.engine.checks import Settings, check_params, check_stops, variant_of
from polarjax.engine.clock import Clock
from polarjax.engine.engine import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.flight import Flight
from polarjax.engine.places import on_devices
from polarjax.engine.plans import Plan
from polarjax.engine.programs import Drawn
from polarjax.engine.request import Request
from polarjax.engine.sampling import Variant
from polarjax.engine.scheduler import Scheduler
from polarjax.engine.stats import Tally
from polarjax.engine.swaps import Kept, default_swap_bytes
from polarjax.engine.tokenizer import Tokenizer
from polarjax.mesh.cut import DP, TP, axis_size, mesh_of, shard
from polarjax.mesh.processes import from_main
from polarjax.mesh.wire import Wire
from polarjax.model import check_weights
from polarjax.params import Params
from polarjax.planning.crossover import settle
from polarjax.planning.memory import MEMORY_FRACTION, cache_bytes, pages_that_fit
from polarjax.planning.sizes import at_least, positive
from polarjax.policy import Load, Policy
from polarjax.settings import default_numbers

# Tokens of prompts that one program reads: a GPU needs many to be busy, and where there
# are fewer a CPU computes the rest in vain.
_PREFILL_TOKENS = {"gpu": 2048, "cpu": 128}


class PagedEngine(Engine):
    """A model that continues requests, whose cache is a pool of pages.

    The tokens and log-probabilities of a request are a function of the weights and the
    request, to the last bit: not of its batch-mates, its slot, when it came, how its
    prompt was cut into pieces, what of it was in the cache already, nor whether it had
    to give way. Neuron sparsity, which is a union over the batch, is the exception.

    Args:
      params: the model, from `polarjax.load`.
      policy: a selection policy; None for the adapter's, without the axes that are
        predicted to cost more than they save, or `Dense()` without an adapter.
      slots: requests that are continued at once, b.
      context: most tokens of a request, prompt and answer together; None for the
        model's.
      pages: of the cache of each part of the batch, the trash page among them; None
        for as many as all slots can fill, or as fit into the memory. Where there are
        fewer, requests wait, or give way to others and come back.
      page: positions of each.
      prefill_tokens: prompt tokens that one program reads, of each part of the batch;
        None for what the device is good at.
      ahead: steps that are sent to the device before the host looks at what one has
        brought.
      swap_bytes: of the host's memory that each process may fill with pages of
        requests that gave way; None for a quarter of it, and at most 32 GiB. A request
        that finds no room there is computed again, from its prompt on.
      prefix_cache: whether prompts share the pages of what they begin with.
      memory_fraction: of the memory that XLA may take on a device, how much may be
        filled.
      max_waiting: most requests of `add` and `stream` that wait for a slot; one more
        is an error.
      load: what is expected of it: requests, and their mean context; for the choice of
        axes. None for all slots at half their context.
      densities: whether requests may ask for densities of their own.
      mesh: of `polarjax.mesh.cut.make_mesh`; None for where `params` is.
      implementation: of the kernels; None chooses by device.
      variants: of drawing that are compiled: requests may need no others.
      prompt_logprobs: whether requests may ask for those, for which one more program is
        compiled. That is a part of one layer and the head, so it is worth leaving out
        only where an engine is made for one call.

    Raises:
      ValueError: if a setting is out of range, the policy does not fit the model, or
        the memory has no room for a request of the context.
    """

    @default_numbers
    def __init__(
        self,
        params: Params,
        *,
        policy: Policy | None = None,
        slots: int = 64,
        context: int | None = None,
        pages: int | None = None,
        page: int = 64,
        prefill_tokens: int | None = None,
        ahead: int = 1,
        swap_bytes: int | None = None,
        prefix_cache: bool = True,
        memory_fraction: float = MEMORY_FRACTION,
        max_waiting: int = 65_536,
        load: Load | None = None,
        densities: bool = True,
        mesh: Mesh | None = None,
        implementation: Implementation | None = None,
        variants: Sequence[Variant] = tuple(Variant),
        prompt_logprobs: bool = True,
    ) -> None:
        params = check_params(params)
        if load is not None and not isinstance(load, Load):
            raise TypeError(f"load must be a polarjax.policy.Load, got {load!r:.60}")
        flags = {"densities": densities, "prefix_cache": prefix_cache}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r:.60}")
        variants = tuple(variants)
        if not all(isinstance(one, Variant) for one in variants):
            raise TypeError(f"variants must be Variants of drawing, got {variants!r}")
        if not variants:
            raise ValueError("variants is empty: name at least one way of drawing")
        runnable(implementation)
        if mesh_of(params.weights) is None:
            check_weights(params.weights, params.config)
        params = shard(params, mesh) if mesh is not None else on_devices(params)
        self.params, self.mesh = params, mesh_of(params.weights)
        config, parts = params.config, axis_size(self.mesh, DP)
        self.tokenizer = Tokenizer.load(config)
        context = config.context if context is None else positive("context", context)
        self.context = self.prompt_tokens = min(context, config.context)
        slots = positive("slots", slots)
        self.slots = slots + -slots % parts
        each = self.slots // parts
        load = load or Load(self.slots, max(1, self.context // 2))
        self._many = self.mesh is not None and self.mesh.is_multi_process
        self.policy, self._notes = settle(params, policy, load, densities)
        self.weights, self._bound = self.policy.bind(params)
        self._densities, self._prefix_cache = densities, prefix_cache
        self.max_waiting = positive("max_waiting", max_waiting)
        self._variants = variants
        self._prompt_logprobs = prompt_logprobs
        self._ahead = at_least("ahead", ahead, 0)
        platform = programs.device_of(params.weights).platform
        tokens = _PREFILL_TOKENS.get(platform, 128)
        if prefill_tokens is not None:
            tokens = positive("prefill_tokens", prefill_tokens)
        pieces, page = min(each, max(tokens // 32, 8)), positive("page", page)
        if pages is None:
            fit = pages_that_fit(
                params,
                self.slots,
                self.context,
                page,
                prefill_tokens=tokens,
                memory_fraction=memory_fraction,
            )
            count = from_main(fit) if self._many else fit
        else:
            count = at_least("pages", pages, 2)
        self._swap_bytes = (
            default_swap_bytes()
            if swap_bytes is None
            else at_least("swap_bytes", swap_bytes, 0)
        )
        sizes = Sizes(self.slots, self.context, count, page, tokens, pieces)
        self._scheduler = Scheduler(
            sizes.slots,
            sizes.pages,
            page=sizes.page,
            prefill_tokens=sizes.tokens,
            pieces=sizes.pieces,
            parts=parts,
            host_pages=self._host_pages(page, parts),
        )
        start = time.perf_counter()
        self._batch = Batch(
            params,
            self.weights,
            self._bound,
            sizes,
            variants=variants,
            prompt_logprobs=prompt_logprobs,
            implementation=implementation,
        )
        self._compiled_seconds = time.perf_counter() - start
        self._requests: dict[Hashable, Request] = {}  # by id, until they end
        self._owners: dict[int, Request] = {}  # by slot
        self._kept: dict[Hashable, Kept] = {}  # of those that gave way
        self._anew: set[Hashable] = set()  # those that gave way, and nothing is kept
        self._flights: deque[Flight] = deque()
        self._left: deque[Request] = deque()  # cancelled, and not yet looked at
        self._clock, self._tally = Clock(), Tally(config)
        self._wire = Wire() if self._many else None
        self._asked = hashlib.sha256()  # of all requests, for other processes
        self._counting = False
        self._calls = self._added = self._ids = 0
        self._ended, self._half_way = "", False

    def _host_pages(self, page: int, parts: int) -> int:
        """Pages of each part of the batch that the hosts may keep."""
        config, processes = self.params.config, 1
        if self.mesh is not None:
            processes = len({x.process_index for x in self.mesh.devices.flat})
        # Where there are more devices than KV groups, several have the same group.
        tp = axis_size(self.mesh, TP)
        groups = tp * -(-config.kv_heads // tp)
        one = cache_bytes(config, 1, page, self.params.dtype) * groups
        one //= config.kv_heads
        room = from_main(self._swap_bytes) if self._many else self._swap_bytes
        return room * processes // (parts * one)

    def _end(self, why: str) -> None:
        if self._ended:
            return
        self._ended = why
        for request in self._requests.values():
            request.cancel(why)
        self._requests, self._owners, self._kept, self._anew = {}, {}, {}, set()
        if self._wire is not None:
            self._wire.close()
        self._flights.clear()
        del self._batch, self._bound, self.weights

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, those that gave way among them."""
        return 0 if self._ended else self._scheduler.waiting

    @property
    def idle(self) -> bool:
        """Whether no request waits or goes on."""
        return not self._requests

    def _split(self, one: Settings) -> list[Settings]:
        return one.samples()

    def _check_served(self, one: Settings) -> None:
        check_stops(one)
        if one.n != 1:
            raise ValueError(
                f"n must be 1 for one request, got {one.n}: add each of "
                "settings.samples(), or call generate"
            )
        if one.echo and self.tokenizer is None:
            raise ValueError("echo needs a tokenizer, this checkpoint has none")
        if one.told_of_prompt is not None and not self._prompt_logprobs:
            raise ValueError(
                "this engine tells no log-probabilities of prompts: make it with "
                "prompt_logprobs=True"
            )

    def _request(self, ids: list[int], one: Settings, number: int) -> Request:
        order, least = list(Variant), variant_of([one])
        if order.index(least) > max(map(order.index, self._variants)):
            raise ValueError(
                f"prompt {number} needs {least.value} drawing, and this engine is made "
                f"for {', '.join(v.value for v in self._variants)}: name it in variants"
            )
        request = super()._request(ids, one, number)
        pool = self._scheduler.pools[0]
        needed = pool.pages_for(len(ids) + request.limit - 1)
        if needed > pool.pages - 1:
            raise ValueError(
                f"prompt {number} of {len(ids)} tokens and up to {request.limit} new "
                f"ones needs {needed} pages of {pool.page} positions, and there are "
                f"{pool.pages - 1}: ask for fewer tokens, or make the engine with more "
                "pages"
            )
        return request

    def _admit(self, request: Request) -> None:
        request.id, self._ids = self._ids, self._ids + 1
        request.left_by, request.together = self._left, self._many
        if self._many:
            said = request.id, request.prompt, request.limit, request.settings
            self._asked.update(repr(said).encode())
        # What is wanted of every position must be computed at every position.
        prefix = self._prefix_cache and request.settings.told_of_prompt is None
        self._scheduler.add(request.id, request.prompt, request.limit, prefix=prefix)
        self._requests[request.id] = request

    def _has(self, request: Request) -> bool:
        return self._requests.get(request.id) is request

    def _cancel(self, request: Request) -> None:
        request.cancel()
        if not request.going:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """It has ended: nothing more is computed for it."""
        if self._has(request):
            del self._requests[request.id]
            self._kept.pop(request.id, None)
            self._anew.discard(request.id)
            self._scheduler.ended(request.id)

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
        ends, known = wire.tell(([one.id for one in left if self._has(one)], asked))
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

    def _step(self) -> list[Request]:
        self._half_way = False
        left = self._take_left()
        for request in left if self._wire is None else self._agree(left, self._wire):
            self._forget(request)
        # Who gave way may come back at once: not before its newest token is here.
        gone = [self._requests[id] for id in (*self._kept, *self._anew)]
        pending = [i for i, one in enumerate(self._flights) if one.has(gone)]
        news = self._take_home(pending[-1] + 1 if pending else 0)
        with self._all_or_nothing():
            self._send(plan := self._scheduler.plan())
        ahead = self._ahead if plan.reads or plan.decodes else 0
        # What has been sent is under way while the host looks at what came before.
        news += self._take_home(self._due(ahead))
        if not self._requests:  # what is still under way is nobody's
            self._flights.clear()
        for kept in self._kept.values():  # what they had shall not fill the devices
            kept.come_home()
        news = list(dict.fromkeys(news))
        if failed := [one for one in news if one.finish_reason == "error"]:
            raise RequestFailed(failed)
        return news

    def _send(self, plan: Plan) -> None:
        """Have the devices do what a plan says."""
        swaps = self._batch.swaps
        bytes_before, seconds_before = swaps.bytes, swaps.seconds
        for gone in plan.swaps_out:
            self._kept[gone.sequence] = self._batch.keep(gone)
        self._anew.update(plan.restarts)
        for slot in plan.frees:
            self._owners.pop(slot, None)
        rows = []
        for back in plan.swaps_in:
            self._batch.restore(back, self._kept.pop(back.sequence))
            request = self._owners[back.slot] = self._requests[back.sequence]
            row = self._batch.row(request, back.positions, goes_on=True)
            rows.append((back.slot, row))
        if self._counting:
            self._tally.swapped_bytes += swaps.bytes - bytes_before
            self._tally.swap_seconds += swaps.seconds - seconds_before
        for one in plan.begins:
            request = self._owners[one.slot] = self._requests[one.sequence]
            if one.sequence in self._anew:
                self._anew.discard(one.sequence)
                request.repeats = len(request.tokens)
            else:
                request.cached = one.cached
            rows.append((one.slot, self._batch.row(request, one.cached)))
        if plan.frees or rows or plan.tables:
            self._batch.change(plan.frees, rows, plan.tables)
        if plan.reads:
            self._fly(self._batch.read(plan.reads, self._owners), not plan.decodes)
        if plan.decodes:
            self._fly(self._batch.decode(plan.decodes, self._owners), True)

    def _fly(self, flight: Flight, last: bool) -> None:
        flight.last = last
        flight.call = self._calls if self._counting else None
        self._flights.append(flight)

    def _due(self, ahead: int) -> int:
        """How many flights the host waits for, so that so many plans stay under way."""
        if not ahead:
            return len(self._flights)
        # Where nobody decodes, the host is not to run off, prompt after prompt.
        lasts = [i for i, one in enumerate(self._flights) if one.last]
        return lasts[-ahead] if len(lasts) > ahead else 0

    def _take_home(self, number: int) -> list[Request]:
        """Hand on what the first flights have brought.

        Returns:
          The requests that got tokens or ended, some perhaps more than once.
        """
        news: list[Request] = []
        for _ in range(number):
            flight = self._flights[0]
            new = flight.home()  # which may take a while
            self._clock.lap("prefill" if new.counts is None else "decode")
            with self._all_or_nothing():
                self._flights.popleft()
                counting = self._counting and flight.call == self._calls
                if new.counts is not None and counting:
                    one: Any = new.token, new.logprob, new.valid
                    drawn = (x[None] for x in one)
                    self._tally.add(Drawn(*drawn, *new.counts), 1)
                got = new.hand_on(flight.requests, flight.spans)
                for request in got:
                    if not request.going:
                        self._forget(request)
                news += got
        return news
