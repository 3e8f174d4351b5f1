"""Compiled chunks and prefills, run again and again on the same state."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from polarjax import Params
from polarjax.bench.steps import STEPS, Chunk, chunks_in, make_prefill, rewind
from polarjax.engine.prefill import run_plainly
from polarjax.engine.programs import Drawn


def follow(chunk: Chunk, state: Any, context: int) -> tuple[Any, list[Drawn]]:
    """Chunks after one another, as `generate` has them, up to a full context.

    Returns:
      The state, and what each chunk brought, when all are done.
    """
    drawn = []
    for _ in range(chunks_in(context)):
        state, found = chunk(state)
        drawn.append(found)
    return jax.block_until_ready((state, drawn))


def times(
    chunks: Sequence[Chunk], state: Any, context: int, repeats: int
) -> tuple[Any, list[list[float]], list[list[Drawn]]]:
    """Seconds of a step, for each of several warm rounds over the same tokens.

    What is compared is timed in turn, within seconds of each other and in an order
    that alternates: a machine whose speed changes meanwhile changes for all.

    Args:
      chunks: to time, of one model and batch.
      state: that they go on from, donated.
      context: positions of its cache.
      repeats: rounds.

    Returns:
      The state; of each chunk, the seconds of every round, and what its chunks of the
      last round brought.
    """
    count = chunks_in(context)
    drawn: list[list[Drawn]] = [[] for _ in chunks]
    seconds: list[list[float]] = [[] for _ in chunks]
    for turn in range(repeats + 1):  # the first is to warm up
        order = list(enumerate(chunks))
        for i, chunk in order if turn % 2 else reversed(order):
            state = jax.block_until_ready(rewind(state, context))
            begin = time.perf_counter()
            state, drawn[i] = follow(chunk, state, context)
            seconds[i].append((time.perf_counter() - begin) / STEPS / count)
    return state, [each[1:] for each in seconds], drawn


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and range in milliseconds, as rows hold them."""
    return {
        "ms": statistics.median(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
        "repeats": len(seconds),
    }


def timed_compile(lower: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A compiled program, and the seconds that tracing and compiling it took."""
    begin = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()  # kept: the call finds it
    return compiled, {
        "trace_s": traced - begin,
        "compile_s": time.perf_counter() - traced,
    }


def prefill_times(
    params: Params, prompts: int, tokens: int, repeats: int
) -> tuple[list[float], dict[str, float]]:
    """Seconds of reading prompts, first token of each drawn, and those of compiling.

    Args:
      params: the model.
      prompts: b.
      tokens: of each.
      repeats: warm calls.
    """
    known = {"trace_s": 0.0, "compile_s": 0.0}

    def compiled(function: Any, *args: Any, **kwargs: Any) -> Any:
        _, found = timed_compile(lambda: function.lower(*args, **kwargs))
        for name, each in found.items():
            known[name] += each
        return function(*args, **kwargs)

    read = make_prefill(params, prompts, tokens)
    read(compiled)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        read(run_plainly)
        seconds.append(time.perf_counter() - begin)
    return seconds, known
