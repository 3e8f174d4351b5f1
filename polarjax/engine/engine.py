"""`polarjax.Engine`: a model ready to continue as many requests as it has slots.

Binding, placing, sizing and compiling are done once, when it is made.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from pallas_kernels import Implementation, runnable
from polarjax.engine.batch import Batch
from polarjax.engine.checks import (
    Settings,
    check_errors,
    check_flags,
    check_params,
    encode_or_say_why,
    encode_prompt,
    encode_prompts,
    settings_of,
    settings_of_one,
)
from polarjax.engine.clock import Clock
from polarjax.engine.errors import QueueFull
from polarjax.engine.follow import finish
from polarjax.engine.output import Output, make_output
from polarjax.engine.places import on_devices
from polarjax.engine.progress import Progress, following
from polarjax.engine.request import Request
from polarjax.engine.room import ONLINE_TOKENS, host_pages_of, sizes_of
from polarjax.engine.runner import Runner
from polarjax.engine.sampling import Variant
from polarjax.engine.scheduler import Scheduler
from polarjax.engine.served import (
    Drawing,
    check_asked,
    check_length,
    check_pages,
    check_served,
    check_variants,
)
from polarjax.engine.stats import Tally, make_stats
from polarjax.engine.streams import TokenStream
from polarjax.engine.tokenizer import Tokenizer
from polarjax.mesh.cut import DP, axis_size, mesh_of, shard
from polarjax.mesh.processes import from_main
from polarjax.mesh.wire import Wire
from polarjax.model import check_weights
from polarjax.params import Params
from polarjax.planning.crossover import settle
from polarjax.planning.memory import MEMORY_FRACTION, PAGE
from polarjax.planning.sizes import at_least, positive
from polarjax.policies.budgets import check_density
from polarjax.policy import Load, Policy
from polarjax.settings import default_numbers
from polarjax.storage.quoted import quoted

# More steps than hide any host; each ended request is drawn for in vain as long.
_MOST_AHEAD = 64

Stream = Callable[[int, str, list[int]], None]
Errors = Literal["raise", "keep"]


class Engine:
    """A model that continues requests, in slots that they take and leave.

    A request begins as soon as a slot is free and the cache, a pool of pages, has room
    for its prompt. Its tokens and log-probabilities are a function of the weights, the
    request and the engine's sizes, to the last bit: not of its batch-mates, its slot,
    when it came, how its prompt was cut into pieces, what of it was in the cache
    already, nor whether it had to give way. Neuron sparsity, which is a union over the
    batch, is the exception. One thread at a time may call it.

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
      prefill_tokens: prompt tokens that one program reads, of each part of the batch,
        while those who decode wait; None for 512 on a GPU. 2,048 are read about 1.13
        times as fast, and let others wait almost four times as long.
      ahead: steps that are sent to the device before the host looks at what one has
        brought; at most 64.
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
      logprobs: whether requests may ask for the most probable tokens at each step.
      prompt_logprobs: whether requests may ask for those of their prompts. Both are
        worth leaving out only where an engine is made for one call, which then waits
        for fewer programs to be compiled.

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
        page: int = PAGE,
        prefill_tokens: int | None = None,
        ahead: int = 2,
        swap_bytes: int | None = None,
        prefix_cache: bool = True,
        memory_fraction: float = MEMORY_FRACTION,
        max_waiting: int = 65_536,
        load: Load | None = None,
        densities: bool = True,
        mesh: Mesh | None = None,
        implementation: Implementation | None = None,
        variants: Sequence[Variant] = tuple(Variant),
        logprobs: bool = True,
        prompt_logprobs: bool = True,
    ) -> None:
        params = check_params(params)
        if load is not None and not isinstance(load, Load):
            raise TypeError(f"load must be a polarjax.policy.Load, got {quoted(load)}")
        check_flags(
            densities=densities,
            prefix_cache=prefix_cache,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        self._drawing = Drawing(check_variants(variants), logprobs, prompt_logprobs)
        runnable(implementation)
        if mesh_of(params.weights) is None:
            check_weights(params.weights, params.config)
        params = shard(params, mesh) if mesh is not None else on_devices(params)
        self.params, self.mesh = params, mesh_of(params.weights)
        config, parts = params.config, axis_size(self.mesh, DP)
        self.tokenizer = Tokenizer.load(config)
        most = config.context if context is None else context
        self.context = min(positive("context", most, math.inf), config.context)
        slots = positive("slots", slots)
        self.slots = slots + -slots % parts
        load = load or Load(self.slots, max(1, self.context // 2))
        positive("load's batch", load.batch)
        positive("load's context", load.context)
        if load.density is not None:
            check_density(load.density, "load's density")
        self._many = self.mesh is not None and self.mesh.is_multi_process
        self.policy, self._notes = settle(params, policy, load, densities)
        self.weights, self._bound = self.policy.bind(params)
        self._densities = densities
        self.max_waiting = positive("max_waiting", max_waiting, math.inf)
        sizes = sizes_of(
            params,
            self.slots,
            self.context,
            page=page,
            pages=pages,
            prefill_tokens=prefill_tokens,
            memory_fraction=memory_fraction,
        )
        ahead = at_least("ahead", ahead, 0, _MOST_AHEAD)
        host_pages = host_pages_of(params, sizes.page, swap_bytes)
        scheduler = Scheduler(
            sizes.slots,
            sizes.pages,
            page=sizes.page,
            prefill_tokens=sizes.tokens,
            pieces=sizes.pieces,
            # About as many decode steps as take as long as such a program.
            rest=sizes.tokens // ONLINE_TOKENS,
            parts=parts,
            host_pages=host_pages,
        )
        batch = Batch(
            params,
            self.weights,
            self._bound,
            sizes,
            drawing=self._drawing,
            host_pages=host_pages,
            implementation=implementation,
        )
        self._compiled_seconds = batch.compile_seconds
        self._runner = Runner(
            scheduler,
            batch,
            config,
            ahead=ahead,
            prefix_cache=prefix_cache,
            wire=Wire() if self._many else None,
        )
        self._added, self._ended = 0, ""
        # An `AsyncEngine`'s, which alone may call this one; and what ends both.
        self._thread: threading.Thread | None = None
        self._close_owner: Callable[[], None] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request, and give the memory of cache and bound weights back.

        Where an `AsyncEngine` has this engine, that is closed too.
        """
        if self._close_owner is None or self._thread is threading.current_thread():
            self._end("this engine is closed: make a new one")
        else:
            self._close_owner()

    def _end(self, why: str) -> None:
        """Cancel what is open; the arrays go, whatever became of them."""
        if self._ended:
            return
        self._ended = why
        self._runner.end(why)
        self._thread = self._close_owner = None
        del self._bound, self.weights

    def _lend(self, thread: threading.Thread, close: Callable[[], None]) -> None:
        """Serve one thread alone from now on, whose owner is closed by `close`."""
        self._check_open()
        if self._runner.going:
            raise RuntimeError(
                "requests of this engine go on, which an AsyncEngine would have to "
                "share with whoever drives them: read them to their end, or cancel them"
            )
        self._thread, self._close_owner = thread, close

    def _check_open(self) -> None:
        if self._ended:
            raise RuntimeError(self._ended)
        self._check_thread()

    def _check_thread(self) -> None:
        if self._thread not in (None, threading.current_thread()):
            raise RuntimeError(
                "this engine is an AsyncEngine's, which alone calls it, in a thread of "
                "its own: call add and stream of that one, or make another engine"
            )

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, those that gave way among them."""
        return self._runner.waiting

    @property
    def idle(self) -> bool:
        """Whether no request waits or goes on."""
        return self._runner.idle

    @default_numbers
    def add(
        self,
        prompt: str | Sequence[int],
        settings: Settings | None = None,
        *,
        number: int | None = None,
    ) -> Request:
        """Take a request, which begins at one of the next calls of `step`.

        Args:
          prompt: a text, or token ids.
          settings: how it is continued.
          number: that messages give the prompt; None for 0 while it is checked, and
            then how many were added before it.

        Returns:
          What fills as `step` is called.

        Raises:
          TypeError: if the prompt is neither.
          ValueError: if it or a setting is out of range; it is named.
          QueueFull: if `max_waiting` requests wait already.
          RuntimeError: if the engine is closed.
        """
        self._check_open()
        self._check_room()
        request = self._prepare(prompt, settings, number or 0)
        return self._take(request, number)

    def _check_room(self) -> None:
        if self.waiting >= self.max_waiting:
            raise QueueFull(
                f"{self.waiting} requests wait for this engine, the most that it "
                "lets wait: add this one when some have ended, or make the engine with "
                "a larger max_waiting"
            )

    def _prepare(
        self,
        prompt: str | Sequence[int],
        settings: Settings | None = None,
        number: int = 0,
    ) -> Request:
        """A request for `_take`, checked. It changes nothing: any thread may call it.

        While another closes the engine, it may raise anything.
        """
        config = self.params.config
        one = settings_of_one(config, self.tokenizer, settings)
        ids = encode_prompt(number, prompt, self.tokenizer, config, self.context)
        return self._request(ids, one, number)

    def _take(self, request: Request, number: int | None = None) -> Request:
        """Let a request of `_prepare` wait, if there is room for one more."""
        self._check_open()
        self._check_room()
        request.number = self._added if number is None else number
        self._added += 1
        self._runner.admit(request)
        return request

    def _request(self, ids: list[int], one: Settings, number: int) -> Request:
        check_served(one, self.tokenizer, number, self._drawing)
        check_length(ids, number, self.context)
        if one.density is not None:
            takes = self._densities and self.policy.flexible
            check_asked(one.density, takes, self._bound, self.params.config, self.slots)
        limit = min(one.max_new_tokens, self.context - len(ids))
        check_pages(self._runner.scheduler.pools[0], ids, limit, number)
        return Request(
            ids, limit, self.tokenizer, one.stop, settings=one, number=number
        )

    def stream(
        self, prompt: str | Sequence[int], settings: Settings | None = None
    ) -> TokenStream:
        """Take a request, and give what it gets piece by piece.

        Several at a time share the steps, whoever asks for his next piece. One that is
        closed, or that nobody holds any more, is cancelled.

        Args:
          prompt: a text, or token ids.
          settings: how it is continued.

        Returns:
          An iterator of `polarjax.Piece`, and a context manager. It calls `step` where
          nothing new is there.

        Raises:
          TypeError: if the prompt is neither.
          ValueError: if it or a setting is out of range; it is named.
          QueueFull: if `max_waiting` requests wait already.
          RuntimeError: if the engine is closed.
        """
        return TokenStream(self.add(prompt, settings), self.step)

    def cancel(self, request: Request) -> None:
        """End a request of this engine: it gets no further tokens.

        Raises:
          RuntimeError: if the engine is an `AsyncEngine`'s.
        """
        if not isinstance(request, Request):
            raise TypeError(f"cancel takes what add returned, got {quoted(request)}")
        self._check_thread()
        if request.going and not self._runner.has(request):
            raise ValueError("this request is another engine's, which can cancel it")
        self._runner.cancel(request)

    @default_numbers
    def step(self) -> list[Request]:
        """Go on: begin what waits, take a decode step, and hand on what has come.

        Ctrl-C loses nothing: it is heard while the host waits, or once what was begun
        is done. After an exception that leaves the arrays on the devices half-way, the
        requests are cancelled and the engine is of no further use.

        Returns:
          The requests that got tokens or ended.

        Raises:
          RequestFailed: if the model yields NaN for requests, which have ended then;
            the others go on. It is a ValueError.
          RuntimeError: if the engine is closed, or was interrupted half-way.
        """
        self._check_open()
        try:
            return self._runner.step()
        except BaseException:
            if self._runner.half_way:
                self._end("this engine was interrupted in a step: make a new one")
            raise

    @contextlib.contextmanager
    def counting(self) -> Iterator[Tally]:
        """Count what decode steps bring that are begun and handed on within.

        Yields:
          The sums, of every request that goes on.

        Raises:
          RuntimeError: if the engine is closed, or counts already.
        """
        self._check_open()
        if self._runner.counting:
            raise RuntimeError("this engine counts already, for `generate` or another")
        with self._runner.count() as tally:
            yield tally

    @default_numbers
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        stream: Stream | None = None,
        progress: bool | Progress = False,
        errors: Errors = "raise",
        **settings: Any,
    ) -> Output:
        """Continue prompts, however many there are.

        Args:
          prompts: texts, or token ids.
          stream: called as stream(entry, text, tokens) with what is new of an entry of
            the output.
          progress: True for a bar on stderr, if that is a terminal; or a function,
            called as progress(requests that ended, requests, new tokens).
          errors: "raise" if one request that fails shall end them all; "keep" if it
            shall fail alone: the prompt is wrong, too long, asks for what the policy
            does not take, or the model yields NaN for it. `Output.errors` says why.
          **settings: fields of `Settings`, one value or one per request.

        Raises:
          TypeError: if prompts are no list, or, unless kept, not of str or token ids.
          ValueError: if a setting is out of range, or, unless kept, a prompt; it is
            named.
          RuntimeError: if the engine is closed, or another `generate` of it goes on.
        """
        self._check_open()
        if self._runner.counting:
            raise RuntimeError(
                "generate of this engine goes on already, whose figures would be mixed "
                "with yours: take add and step, or an engine of your own"
            )
        if stream is not None and not callable(stream):
            raise TypeError(f"stream must be a function, got {quoted(stream)}")
        config = self.params.config
        if check_errors(errors) == "keep":
            tried = encode_or_say_why(prompts, self.tokenizer, config, self.context)
        else:
            found = encode_prompts(prompts, self.tokenizer, config, self.context)
            tried = found, [None] * len(found)
        encoded, wrong = from_main(tried) if self._many else tried
        asked = settings_of(config, self.tokenizer, len(encoded), settings)
        clock = self._runner.clock = Clock()
        clock.seconds["compile"] += self._compiled_seconds
        self._compiled_seconds = 0.0
        requests = []
        for i, (ids, one, why) in enumerate(zip(encoded, asked, wrong, strict=True)):
            try:
                if why:
                    raise ValueError(why)
                requests += [self._request(ids, each, i) for each in one.samples()]
            except ValueError as error:
                if errors == "raise":
                    raise
                requests += [_refused(i, str(error), each) for each in one.samples()]
        with self._runner.count() as tally:
            try:
                with following(progress, len(requests)) as tell:
                    for request in requests:
                        if request.going:
                            self._runner.admit(request)
                    finish(requests, self.step, stream, tell, errors == "keep")
            except BaseException:  # of weights, a stream or who waits no longer
                for request in requests:
                    self._runner.cancel(request)
                raise
        self._check_open()  # which a stream may have closed
        clock.lap("decode")
        return self._output(requests, tally, clock)

    def _output(self, requests: list[Request], tally: Tally, clock: Clock) -> Output:
        stats = make_stats(
            self.params,
            self.weights,
            self._bound,
            tally,
            clock.seconds,
            name=type(self.policy).__name__,
            prompt_tokens=sum(len(request.prompt) for request in requests),
            new_tokens=sum(len(request.tokens) for request in requests),
            notes=self._notes,
        )
        return make_output(requests, stats, texts=self.tokenizer is not None)


def _refused(number: int, error: str, settings: Settings) -> Request:
    """A request that has failed before it began."""
    request = Request([], 0, number=number, settings=settings)
    request.fail(error)
    return request
