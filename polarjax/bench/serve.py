"""Plays a load against an engine, or in static batches, and notes when tokens came.

The client is of the engine's own process and thread: what it adds to a latency is the
time between two calls of `step`, which is the engine's. A request counts from when it
arrives, also where the engine is busy then: who waited for it would not ask why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarjax import Engine, Output, Params, Settings, Stats, generate
from polarjax.bench.latencies import Trace
from polarjax.bench.loads import Ask
from polarjax.engine.engine import Stream

WARM_TOKENS = 32  # of a request that is there to warm up


@dataclasses.dataclass(frozen=True)
class Times:
    """The clock that a load is played by; tests have one of their own.

    Attributes:
      now: seconds since whenever.
      sleep: waits for so many seconds.
    """

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


@dataclasses.dataclass
class _Open:
    """A request on its way: its number, when it was sent, and what has come."""

    number: int
    request: Any
    sent: float
    tokens: int = 0
    chunks: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def take(self, new: int, now: float) -> None:
        """Note that so many tokens came now."""
        if new:
            self.tokens += new
            self.chunks.append((now, new))

    def trace(self, ask: Ask, reason: str) -> Trace:
        """What was seen of it, when it has ended.

        Raises:
          RuntimeError: unless it has got what it asked for.
        """
        if self.tokens != ask.new_tokens:
            raise RuntimeError(
                f"request {self.number} ended after {self.tokens} tokens of "
                f"{ask.new_tokens}, as {reason!r}: such a load measures nothing"
            )
        return Trace(len(ask.prompt), self.sent, tuple(self.chunks))


def play(
    engine: Engine,
    load: Sequence[Ask],
    due: Sequence[float],
    *,
    density: float | None = None,
    most_open: int | None = None,
    times: Times = Times(),
    ended: Callable[[], None] = lambda: None,
) -> list[Trace]:
    """Send requests as they arrive, and step the engine until all have ended.

    Args:
      engine: with no request of its own; it is left so.
      load: what the requests ask for, each with the ids and the length it has there.
      due: when each arrives, in seconds from the beginning, ascending.
      density: fraction of the KV groups that each asks for; None for the policy's own.
      most_open: requests that the client has open at once, at most; others are held
        back, and count from when they are sent. None for no limit.
      times: the clock.
      ended: called when a request has ended.

    Returns:
      What was seen of each request.

    Raises:
      RuntimeError: if a request ends without the tokens that it asked for, or the
        engine forgets one.
    """
    prompts = [ask.prompt.tolist() for ask in load]
    traces: list[Trace | None] = [None] * len(load)
    going: dict[int, _Open] = {}
    free = [0.0] * (most_open or 0)  # since when, of the client's places
    number, start = 0, times.now()
    try:
        while number < len(load) or going:
            now = times.now() - start
            while number < len(load) and due[number] <= now:
                if most_open and not free:
                    break
                sent = max(due[number], heapq.heappop(free) if most_open else 0.0)
                asked = Settings(
                    max_new_tokens=load[number].new_tokens,
                    density=density,
                    stop_ids=(),
                )
                request = engine.add(prompts[number], asked)
                going[id(request)] = _Open(number, request, sent)
                number += 1
            if not going:
                times.sleep(max(0.0, due[number] - now))
                continue
            if engine.idle:
                raise RuntimeError(f"the engine is idle, {len(going)} requests are not")
            news = engine.step()
            now = times.now() - start
            for request in news:
                one = going[id(request)]
                one.take(len(request.tokens) - one.tokens, now)
                if request.going:
                    continue
                del going[id(request)]
                ask = load[one.number]
                traces[one.number] = one.trace(ask, request.finish_reason)
                if most_open:
                    heapq.heappush(free, now)
                ended()
    except BaseException:
        for one in going.values():
            engine.cancel(one.request)
        raise
    return [trace for trace in traces if trace is not None]


def play_static(
    params: Params,
    load: Sequence[Ask],
    batch: int,
    *,
    options: Mapping[str, Any],
    times: Times = Times(),
    ended: Callable[[], None] = lambda: None,
) -> tuple[list[Trace], list[Stats]]:
    """Continue a load in static batches: the next begins when all of one have ended.

    Args:
      params: the model.
      load: all of it is there at the beginning.
      batch: requests of a batch, in the order of arrival; the last may have fewer.
      options: of `polarjax.generate`, such as the density.
      times: the clock.
      ended: called when a request has ended.

    Returns:
      What was seen of each request, and the statistics of each batch.

    Raises:
      RuntimeError: if a request ends without the tokens that it asked for.
    """
    traces, stats, start = [], [], times.now()
    for first in range(0, len(load), batch):
        part = load[first : first + batch]
        seen = [_Open(first + i, None, 0.0) for i in range(len(part))]
        out = _generate(params, part, _noting(seen, start, times), options)
        for one, ask, reason in zip(seen, part, out.finish_reasons, strict=True):
            traces.append(one.trace(ask, reason))
            ended()
        stats.append(out.stats)
    return traces, stats


def _noting(seen: Sequence[_Open], start: float, times: Times) -> Stream:
    """A stream that notes when tokens come, in seconds since the start."""

    def stream(i: int, text: str, tokens: list[int]) -> None:
        seen[i].take(len(tokens), times.now() - start)

    return stream


def _generate(
    params: Params, part: Sequence[Ask], stream: Stream, options: Mapping[str, Any]
) -> Output:
    return generate(
        params,
        [ask.prompt.tolist() for ask in part],
        max_new_tokens=[ask.new_tokens for ask in part],
        stop_ids=(),
        stream=stream,
        **options,
    )


def warm(
    engine: Engine,
    load: Sequence[Ask],
    density: float | None = None,
    times: Times = Times(),
) -> None:
    """Play the beginning of a load, all at once and with short answers.

    Args:
      engine: with no request of its own.
      load: as much of it as shall be played.
      density: as in `play`.
      times: the clock.
    """
    short = [Ask(ask.prompt, min(ask.new_tokens, WARM_TOKENS)) for ask in load]
    play(engine, short, [0.0] * len(short), density=density, times=times)


class _Warm(Exception):
    """Ends a batch that has begun to decode: its programs are compiled then."""


def warm_static(
    params: Params, load: Sequence[Ask], batch: int, options: Mapping[str, Any]
) -> None:
    """Begin every batch of `play_static`, so that what it needs is compiled.

    Args:
      params: the model.
      load: all of it: which programs a batch needs depends on its requests.
      batch: as there.
      options: as there.
    """

    def stop(i: int, text: str, tokens: list[int]) -> None:
        raise _Warm

    for first in range(0, len(load), batch):
        with contextlib.suppress(_Warm):
            _generate(params, load[first : first + batch], stop, options)
    # To its end, where a process measures its memory's bandwidth once.
    short = [Ask(load[0].prompt, 1)]
    _generate(params, short, lambda i, text, tokens: None, options)
