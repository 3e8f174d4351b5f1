"""`polarjax.Engine`: a model ready to continue as many requests as it has slots.

Binding, placing, sizing and compiling are done once, when it is made or first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import Implementation, runnable
from polarjax.engine import prefill, programs
from polarjax.engine.checks import (
    Settings,
    check_asked,
    check_errors,
    check_lengths,
    check_params,
    check_served,
    encode_or_say_why,
    encode_prompt,
    encode_prompts,
    make_sampling,
    settings_of,
    stop_table,
    variant_of,
)
from polarjax.engine.chunk import Chunk, take
from polarjax.engine.clock import Clock
from polarjax.engine.errors import QueueFull, RequestFailed, yields_nan
from polarjax.engine.follow import finish
from polarjax.engine.output import Output
from polarjax.engine.places import insert, on_devices, place_rows
from polarjax.engine.progress import Progress, following
from polarjax.engine.request import Request
from polarjax.engine.rules import History
from polarjax.engine.stats import Tally, make_stats
from polarjax.engine.streams import TokenStream
from polarjax.engine.tokenizer import Tokenizer
from polarjax.mesh.cut import DP, axis_size, mesh_of, shard
from polarjax.mesh.processes import from_main, to_host
from polarjax.model import BLOCK_TOKENS, check_weights, make_decoder
from polarjax.params import Params
from polarjax.planning.crossover import settle
from polarjax.planning.memory import MEMORY_FRACTION, cache_capacity
from polarjax.planning.sizes import positive
from polarjax.policy import Load, Policy
from polarjax.settings import default_numbers

Stream = Callable[[int, str, list[int]], None]
Errors = Literal["raise", "keep"]

_IDLE = Settings(max_new_tokens=1)


class Engine:
    """A model that continues requests, in rows that they take and leave.

    A request is read as soon as a row is free; its neighbours go on meanwhile from
    chunk to chunk. What it gets does not depend on them, but for rounding and for
    neuron sparsity, see `polarjax.generate`. One thread at a time may call it.

    Args:
      params: the model, from `polarjax.load`.
      policy: a selection policy; None for the adapter's, without the axes that are
        predicted to cost more than they save, or `Dense()` without an adapter.
      slots: requests that are continued at once, b.
      context: most tokens of a request, prompt and answer together; None for the
        model's.
      prompt_tokens: most tokens of a prompt, for the memory that reading it takes;
        None for as many as there is context.
      chunk: most decode steps between two looks of the host. A GPU always takes so
        many.
      prefill_tokens: prompt tokens, padding included, that are computed at once.
      memory_fraction: of the memory that XLA may take on a device, how much may be
        filled.
      load: what is expected of it: requests, and their mean context; for the choice of
        axes. None for all slots at half their context.
      densities: whether requests may ask for densities of their own.
      max_waiting: most requests of `add` and `stream` that wait for a row; one more is
        an error.
      mesh: of `polarjax.mesh.cut.make_mesh`; None for where `params` is.
      implementation: of the kernels; None chooses by device.

    Raises:
      ValueError: if a setting is out of range, the policy does not fit the model, or
        the slots do not fit into the memory; what would fit is named.
    """

    @default_numbers
    def __init__(
        self,
        params: Params,
        *,
        policy: Policy | None = None,
        slots: int = 64,
        context: int | None = None,
        prompt_tokens: int | None = None,
        chunk: int = 16,
        prefill_tokens: int = BLOCK_TOKENS,
        memory_fraction: float = MEMORY_FRACTION,
        load: Load | None = None,
        densities: bool = True,
        max_waiting: int = 65_536,
        mesh: Mesh | None = None,
        implementation: Implementation | None = None,
    ) -> None:
        params = check_params(params)
        if load is not None and not isinstance(load, Load):
            raise TypeError(f"load must be a polarjax.policy.Load, got {load!r:.60}")
        if not isinstance(densities, bool):
            raise TypeError(f"densities must be True or False, got {densities!r:.60}")
        runnable(implementation)
        if mesh_of(params.weights) is None:
            check_weights(params.weights, params.config)
        params = shard(params, mesh) if mesh is not None else on_devices(params)
        self.params, self.mesh = params, mesh_of(params.weights)
        config = params.config
        self.tokenizer = Tokenizer.load(config)
        context = config.context if context is None else positive("context", context)
        self.context = min(context, config.context)
        longest = self.context if prompt_tokens is None else prompt_tokens
        self.prompt_tokens = min(positive("prompt_tokens", longest), self.context)
        self.chunk = min(positive("chunk", chunk), config.context)
        self._prefill_tokens = positive("prefill_tokens", prefill_tokens)
        slots = positive("slots", slots)
        self.slots = slots + -slots % axis_size(self.mesh, DP)
        load = load or Load(self.slots, max(1, self.context // 2))
        positive("load's batch", load.batch)
        positive("load's context", load.context)
        self._many = self.mesh is not None and self.mesh.is_multi_process
        self.policy, self._notes = settle(params, policy, load, densities)
        self.weights, self._bound = self.policy.bind(params)
        self._densities = densities
        capacity = cache_capacity(
            params,
            self.slots,
            self.context,
            prefill_tokens=self._prefill_tokens,
            prompt_tokens=self.prompt_tokens,
            memory_fraction=memory_fraction,
        )
        capacity = from_main(capacity) if self._many else capacity
        self._dense = make_decoder(
            config.architecture, params.weights, implementation=implementation
        )
        self._model = self._dense.clone(score_rows=self._bound.wants.scores)
        self._state, self._logits = programs.empty_state(
            self._dense, self.slots, capacity, params.weights
        )
        self._rows: list[Request | None] = [None] * self.slots
        self._settings = [_IDLE] * self.slots
        self._given: Any = None
        # In order, and any of them is found and taken out at once.
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self.max_waiting = positive("max_waiting", max_waiting)
        self._begun: list[Chunk] = []
        self._clock, self._tally = Clock(), Tally(config)
        self._compiled_seconds = 0.0
        # While `generate` runs: what came of `add` alone would grow without an end.
        self._counting = False
        self._calls = self._added = 0
        self._ended, self._half_way = "", False
        if self.slots > 1 and programs.takes_whole_chunks(params.weights):
            self._compile_prefill()

    def _compile_prefill(self) -> None:
        """Compile the calls for prompts of every width, several at a time.

        On a GPU each takes seconds, and which ones a batch needs depends on its
        prompts: no later call shall wait for them.
        """
        shapes = prefill.prefill_shapes(
            self.slots,
            self.prompt_tokens,
            self.params.config,
            self._prefill_tokens,
            axis_size(self.mesh, DP),
        )
        start = time.perf_counter()
        prefill.compile_shapes(
            shapes,
            self.params.weights,
            self._state.cache,
            self._logits,
            model=self._dense,
            prefill_tokens=self._prefill_tokens,
        )
        self._compiled_seconds = time.perf_counter() - start

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request, and give the memory of cache and bound weights back."""
        self._end("this engine is closed: make a new one")

    def _end(self, why: str) -> None:
        """Cancel what is open; the arrays go, whatever became of them."""
        if self._ended:
            return
        self._ended = why
        for request in [*self._waiting, *(one for one in self._rows if one)]:
            request.cancel(why)
        self._waiting, self._begun = OrderedDict(), []
        self._rows = [None] * self.slots
        self._given = None
        del self._state, self._logits, self._bound, self.weights

    def _check_open(self) -> None:
        if self._ended:
            raise RuntimeError(self._ended)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request waits or goes on."""
        return not self._waiting and not self._begun and not any(self._rows)

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
        if self.waiting >= self.max_waiting:
            raise QueueFull(
                f"{self.waiting} requests wait for this engine, the most that it "
                "lets wait: add this one when some have ended, or make the engine with "
                "a larger max_waiting"
            )
        config, settings = self.params.config, settings or Settings()
        if not isinstance(settings, Settings):
            raise TypeError(f"settings must be polarjax.Settings, got {settings!r}")
        ids = encode_prompt(number or 0, prompt, self.tokenizer, config)
        [one] = settings_of(config, self.tokenizer, 1, vars(settings))
        request = self._request(ids, one, number or 0)
        request.number = self._added if number is None else number
        self._added += 1
        self._admit(request)
        return request

    def _admit(self, request: Request) -> None:
        """It waits from now on."""
        self._waiting[request] = None

    def _request(self, ids: list[int], one: Settings, number: int) -> Request:
        self._check_served(one)
        check_lengths(ids, number, self.context, self.prompt_tokens)
        if one.density is not None:
            takes = self._densities and self.policy.flexible
            check_asked(one.density, takes, self._bound, self.params.config, self.slots)
        limit = min(one.max_new_tokens, self.context - len(ids))
        return Request(
            ids, limit, self.tokenizer, one.stop, settings=one, number=number
        )

    def _check_served(self, one: Settings) -> None:
        check_served(one)

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
        """End a request of this engine: it gets no further tokens."""
        if not isinstance(request, Request):
            raise TypeError(f"cancel takes what add returned, got {request!r}")
        if request.going and not self._has(request):
            raise ValueError("this request is another engine's, which can cancel it")
        self._cancel(request)

    def _has(self, request: Request) -> bool:
        """Whether it waits or goes on here."""
        return request in self._waiting or request in self._rows

    def _cancel(self, request: Request) -> None:
        self._waiting.pop(request, None)
        request.cancel()

    @default_numbers
    def step(self) -> list[Request]:
        """Go on: begin what waits, decode a chunk, and hand on what has come.

        An interruption while the host waits loses nothing. After one that leaves the
        arrays on the devices half-way, the requests are cancelled and the engine is of
        no further use.

        Returns:
          The requests that got tokens or ended.

        Raises:
          RequestFailed: if the model yields NaN for requests, which have ended then;
            the others go on. It is a ValueError.
          RuntimeError: if the engine is closed, or was interrupted half-way.
        """
        self._check_open()
        try:
            return self._step()
        except BaseException:
            if self._half_way:
                self._end("this engine was interrupted in a step: make a new one")
            raise

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What is done within cannot be taken up again where it was interrupted."""
        self._half_way = True
        yield
        self._half_way = False

    def _step(self) -> list[Request]:
        self._half_way = False
        done: list[Request] = []
        looks = any(one is not None and one.stops for one in self._rows)
        if looks or self._waiting:
            # The host has to look before it knows who goes on, and which row is free.
            done += self._deliver()
        if self._waiting and None in self._rows:
            self._begin()
            if any(one is not None and one.stops for one in self._rows):
                done += self._deliver()
        live = self._going()
        earlier = len(self._begun)
        if live:
            self._decode(live)
        done += self._deliver(earlier)  # while the device is at the next chunk
        return done

    def _going(self) -> list[int]:
        """Rows of requests that the device still continues, once it has done all."""
        rows = enumerate(self._rows)
        going = [i for i, one in rows if one is not None and one.going and one.left > 0]
        for chunk in self._begun:  # before the next takes their buffers
            chunk.live = to_host(chunk.live)
            going = [i for i in going if chunk.live[i]]
        return going

    def _begin(self) -> None:
        with self._all_or_nothing():
            self._read_waiting()
        self._clock.lap("prefill")

    def _read_waiting(self) -> None:
        """Read prompts that wait into free rows, and draw the first token of each."""
        free = [i for i, one in enumerate(self._rows) if one is None]
        taken: dict[int, Request] = {}
        while self._waiting and len(taken) < len(free):
            request, _ = self._waiting.popitem(last=False)
            if request.going:  # else its own `cancel` was called
                taken[free[len(taken)]] = request
        if not taken:
            return
        remaining = np.ones(self.slots, np.int32)
        admitted = np.zeros(self.slots, bool)
        for row, request in taken.items():
            self._rows[row], self._settings[row] = request, request.settings
            remaining[row], admitted[row] = request.limit, True
            request.left = request.limit - 1
        self._given = None
        self._note_prompts(taken)
        state = self._state
        cache, self._logits = prefill.read_prompts(
            self.params.weights,
            {row: request.prompt for row, request in taken.items()},
            state.cache,
            self._logits,
            model=self._dense,
            prefill_tokens=self._prefill_tokens,
            call=self._clock.run,
        )
        self._state, drawn = self._clock.run(
            programs.first_token,
            dataclasses.replace(state, cache=cache),
            self._logits,
            self._placed(admitted),
            self._placed(remaining),
            self._slot_data(),
        )
        rows = [taken.get(i) for i in range(self.slots)]
        live = to_host(self._state.live)
        self._begun.append(Chunk(drawn, live, rows, call=None))

    def _note_prompts(self, taken: dict[int, Request]) -> None:
        """Put prompts into the history, which there is once a request has rules."""
        room, parts = self._state.cache.capacity, axis_size(self.mesh, DP)
        each = self.slots // parts
        for row, request in taken.items():
            if not request.settings.has_rules:
                continue
            history = self._state.history
            if history is None:
                history = self._placed(History.empty(self.slots, room))
            # One at a time, as a part of the batch has one: a single program.
            new, to = History.empty(parts, room), np.full(parts, each, np.int32)
            part, to[row // each] = row // each, row % each
            new.tokens[part, : len(request.prompt)] = request.prompt
            new.prompt[part] = len(request.prompt)
            history = self._clock.run(insert, history, new, to, mesh=self.mesh)
            self._state = dataclasses.replace(self._state, history=history)

    def _decode(self, live: list[int]) -> None:
        left = max(self._rows[i].left for i in live)  # type: ignore[union-attr]
        whole = programs.takes_whole_chunks(self.params.weights)
        number = min(self.chunk, left)
        go_on = np.zeros(self.slots, bool)
        go_on[live] = True
        with self._all_or_nothing():
            self._state, drawn = self._clock.run(
                programs.decode_chunk,
                self.weights,
                self._bound,
                self._state,
                self._placed(go_on),
                self._slot_data(),
                None if whole else np.int32(number),
                model=self._model,
                steps=self.chunk,
            )
            steps = self.chunk if whole else number
            for i in live:
                self._rows[i].left -= number  # type: ignore[union-attr]
            call = self._calls if self._counting else None
            rows = list(self._rows)
            self._begun.append(Chunk(drawn, self._state.live, rows, call, steps))

    def _slot_data(self) -> programs.SlotData:
        """What each row's request asked for, on the devices."""
        if self._given is None:
            config = self.params.config
            density = np.array([s.density or 0 for s in self._settings], np.float32)
            sampling = make_sampling(config, self._settings)
            variant, kind = variant_of(self._settings), type(self._bound)
            ends: Any = stop_table(self._settings)
            given: Any = density
            data = programs.SlotData(given, sampling, ends, variant, kind)
            self._given = jax.tree.map(self._placed, data)
        return self._given

    def _placed(self, array: Any) -> jax.Array:
        return place_rows(array, self.mesh)

    def _deliver(self, number: int | None = None) -> list[Request]:
        """Hand on what the first chunks brought, and free the rows that ended."""
        news: dict[int, Request] = {}
        wrong: list[Request] = []
        for _ in range(len(self._begun) if number is None else number):
            chunk = self._begun[0]
            drawn, live = to_host((chunk.drawn, chunk.live))  # which may take a while
            with self._all_or_nothing():
                del self._begun[0]
                if self._counting and chunk.call == self._calls:
                    self._tally.add(drawn, chunk.steps)
                for i, request in enumerate(chunk.rows):
                    if request is None or not request.going:
                        continue
                    if not take(request, drawn, i, ended=not live[i]):
                        request.fail(yields_nan(request.number))
                        wrong.append(request)
                    news[id(request)] = request
        self._free()
        if wrong:
            raise RequestFailed(wrong)
        return list(news.values())

    def _free(self) -> None:
        """Give the rows of requests that have ended to others."""
        for i, request in enumerate(self._rows):
            if request is not None and not request.going:
                self._rows[i], self._settings[i] = None, _IDLE
                self._given = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[Tally]:
        """Count what decode steps bring that are begun and handed on within.

        Yields:
          The sums, of every request that goes on.

        Raises:
          RuntimeError: if the engine is closed, or counts already.
        """
        self._check_open()
        if self._counting:
            raise RuntimeError("this engine counts already, for `generate` or another")
        self._tally = Tally(self.params.config)
        self._counting, self._calls = True, self._calls + 1
        try:
            yield self._tally
        finally:
            self._counting = False

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
        if self._counting:
            raise RuntimeError(
                "generate of this engine goes on already, whose figures would be mixed "
                "with yours: take add and step, or an engine of your own"
            )
        if stream is not None and not callable(stream):
            raise TypeError(f"stream must be a function, got {stream!r}")
        if check_errors(errors) == "keep":
            tried = encode_or_say_why(prompts, self.tokenizer, self.params.config)
        else:
            found = encode_prompts(prompts, self.tokenizer, self.params.config)
            tried = found, [None] * len(found)
        encoded, wrong = from_main(tried) if self._many else tried
        asked = settings_of(self.params.config, self.tokenizer, len(encoded), settings)
        self._clock, self._tally = Clock(), Tally(self.params.config)
        self._clock.seconds["compile"] += self._compiled_seconds
        self._compiled_seconds = 0.0
        requests = []
        for i, (ids, one, why) in enumerate(zip(encoded, asked, wrong, strict=True)):
            try:
                if why:
                    raise ValueError(why)
                requests += [self._request(ids, each, i) for each in self._split(one)]
            except ValueError as error:
                if errors == "raise":
                    raise
                requests += [_refused(i, str(error), each) for each in one.samples()]
        self._counting, self._calls = True, self._calls + 1
        try:
            with following(progress, len(requests)) as tell:
                for request in requests:
                    if request.going:
                        self._admit(request)
                finish(requests, self.step, stream, tell, errors == "keep")
        except BaseException:  # of weights, a stream or a user who waits no longer
            for request in requests:
                self._cancel(request)
            raise
        finally:
            self._counting = False
        self._check_open()  # which a stream may have closed
        self._clock.lap("decode")
        return self._output(requests)

    def _split(self, one: Settings) -> list[Settings]:
        """Of each request that a prompt makes, all of which the engine can take."""
        return [one]

    def _output(self, requests: list[Request]) -> Output:
        stats = make_stats(
            self.params,
            self.weights,
            self._bound,
            self._tally,
            self._clock.seconds,
            name=type(self.policy).__name__,
            prompt_tokens=sum(len(request.prompt) for request in requests),
            new_tokens=sum(len(request.tokens) for request in requests),
            notes=self._notes,
        )
        of_prompts = [one.settings.told_of_prompt is not None for one in requests]
        texts = [one.text for one in requests] if self.tokenizer else None
        return Output(
            tokens=[request.tokens for request in requests],
            texts=texts,
            logprobs=[request.logprobs for request in requests],
            finish_reasons=[request.finish_reason for request in requests],
            stats=stats,
            errors=[request.error or None for request in requests],
            prompts=[request.number for request in requests],
            samples=[request.settings.sample for request in requests],
            alternatives=[
                None if request.settings.logprobs is None else request.alternatives
                for request in requests
            ],
            prompt_logprobs=[
                request.prompt_logprobs if told else None
                for request, told in zip(requests, of_prompts, strict=True)
            ],
            prompt_alternatives=[
                request.prompt_alternatives if told else None
                for request, told in zip(requests, of_prompts, strict=True)
            ],
        )


def _refused(number: int, error: str, settings: Settings) -> Request:
    """A request that has failed before it began."""
    request = Request([], 0, number=number, settings=settings)
    request.fail(error)
    return request
