"""Compiled steps and prefills, run again and again on the same state."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from polarjax import Params
from polarjax.bench.prefills import make_prefill
from polarjax.bench.steps import Step, rewind, steps_in
from polarjax.engine.programs import Drawn
from polarjax.engine.room import prefill_tokens_of


def follow(step: Step, state: Any, context: int) -> tuple[Any, list[Drawn]]:
    """Steps after one another, as an engine sends them, up to a full context.

    Returns:
      The state, and what each step brought, when all are done.
    """
    drawn = []
    for _ in range(steps_in(context)):
        state, found = step(state)
        drawn.append(found)
    return jax.block_until_ready((state, drawn))


def times(
    each: Sequence[Step], state: Any, context: int, repeats: int
) -> tuple[Any, list[list[float]], list[list[Drawn]]]:
    """Seconds of a step, for each of several warm rounds over the same tokens.

    What is compared is timed in turn, within seconds of each other and in an order
    that alternates: a machine whose speed changes meanwhile changes for all.

    Args:
      each: to time, of one model and batch.
      state: that they go on from, donated.
      context: positions of its cache.
      repeats: rounds.

    Returns:
      The state; of each, the seconds of every round, and what its steps of the last
      round brought.
    """
    drawn: list[list[Drawn]] = [[] for _ in each]
    seconds: list[list[float]] = [[] for _ in each]
    for turn in range(repeats + 1):  # the first is to warm up
        order = list(enumerate(each))
        for i, step in order if turn % 2 else reversed(order):
            state = jax.block_until_ready(rewind(state, context))
            begin = time.perf_counter()
            state, drawn[i] = follow(step, state, context)
            seconds[i].append((time.perf_counter() - begin) / steps_in(context))
    return state, [found[1:] for found in seconds], drawn


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and range in milliseconds, as rows hold them."""
    return {
        "ms": statistics.median(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
        "repeats": len(seconds),
    }


def timed_compile(lower: Callable[[], Sequence[Any]]) -> tuple[list[Any], dict]:
    """Compiled programs, and the seconds that tracing and compiling them took."""
    begin = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = [program.compile() for program in lowered]  # kept: calls find them
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

    seen = set()

    def compiled(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function not in seen:
            seen.add(function)
            _, found = timed_compile(lambda: [function.lower(*args, **kwargs)])
            for name, each in found.items():
                known[name] += each
        return function(*args, **kwargs)

    def plainly(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    read = make_prefill(params, prompts, tokens, prefill_tokens_of(params))
    read(compiled)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        read(plainly)
        seconds.append(time.perf_counter() - begin)
    return seconds, known
