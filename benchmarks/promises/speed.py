"""How fast the engine is: a decode step, prefill, and a prompt that it knows."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from benchmarks.promises.common import (
    DENSITIES,
    Bench,
    Engine,
    Plans,
    drop,
    finish,
    settings,
    tokens_at_once,
)
from benchmarks.promises.sizes import FIRST, Wanted
from polarjax.bench import profiling
from polarjax.bench.loads import Ask
from polarjax.bench.prefills import make_prefill
from polarjax.engine.request import Request

# Steps over contiguous caches took 12.53 and 8.94 ms, before there were pages.
STEP = (
    Wanted("step_ms_dense", most=1.05 * 12.53),
    Wanted("step_ms_half", most=1.06 * 8.94),
    Wanted("mixed_off_mean", most=0.03),
    Wanted("idle_share", most=0.02),
    Wanted("idle_share_chat", most=0.02),
)
# They read 43,043 prompt tokens a second.
PREFILL = (Wanted("tokens_per_second", least=0.90 * 43_043),)
PREFIX = (Wanted("times_faster", least=8),)


def step(bench: Bench) -> dict[str, Any]:
    """Time decode steps of full batches: dense, half of the heads, and half of each.

    Returns:
      Of each kind the median and mean milliseconds of a step, and the positions that a
      request has in the middle of the steps; how far the mixed one is off the mean of
      the others; and the share of the time in which the device does nothing, of dense
      steps and amid chats.
    """
    engine, sizes = bench.engine, bench.sizes
    rng = bench.rng(1)
    tokens = sizes.positions - sizes.warm - sizes.steps // 2
    prompts = [bench.ids(rng, tokens) for _ in range(sizes.slots)]
    # Read once, and then known: so all begin to decode at about the same step.
    for prompt in prompts:
        engine.add(prompt, settings(1))
    finish(engine)
    found: dict[str, Any] = {}
    kinds = {"dense": DENSITIES[:1], "half": DENSITIES[1:], "mixed": DENSITIES}
    for name, densities in kinds.items():
        wanted = itertools.cycle(densities)
        batch = [
            engine.add(prompt, settings(engine.context - tokens, next(wanted)))
            for prompt in prompts
        ]
        while not all(one.tokens for one in batch):
            engine.step()
        seconds = _step_seconds(engine, sizes.warm, sizes.steps)
        before = np.mean([tokens + len(one.tokens) for one in batch])
        found[f"step_ms_{name}"] = 1e3 * float(np.median(seconds))
        found[f"step_ms_mean_{name}"] = 1e3 * float(np.mean(seconds))
        found[f"positions_{name}"] = float(before) - sizes.steps / 2
        if name == "dense":
            found |= _idle(engine, sizes.profiled, "idle_share")
        if not all(one.going for one in batch):
            raise RuntimeError("a request has ended while steps were timed")
        drop(engine, batch)
    pure = (found["step_ms_dense"] + found["step_ms_half"]) / 2
    found["mixed_over_mean"] = found["step_ms_mixed"] / pure
    found["mixed_off_mean"] = abs(found["mixed_over_mean"] - 1)
    return found | _idle_amid_chats(bench)


def _step_seconds(engine: Engine, warm: int, number: int) -> list[float]:
    """What each of some steps takes, after others."""
    for _ in range(warm):
        engine.step()
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def _idle(engine: Engine, number: int, name: str) -> dict[str, Any]:
    """The share of the time, under the profiler, in which the device does nothing."""

    def run() -> None:
        for _ in range(number):
            engine.step()

    summary = profiling.profile(run, number, ())
    if "error" in summary:
        return {name: None, f"{name}_note": summary["error"]}
    shares = {name: summary["gap_share"], f"{name}_long": summary["long_gap_share"]}
    return shares | {f"{name}_step_ms": summary["step_us"] / 1e3}


def _idle_amid_chats(bench: Bench) -> dict[str, Any]:
    """The same where requests come and go, and more wait than there are slots."""
    engine, sizes = bench.engine, bench.sizes
    chat = bench.chat(1)
    requests = [_add(engine, ask) for ask in itertools.islice(chat, 4 * sizes.slots)]
    while not any(one.finish_reason for one in requests[: sizes.slots]):
        engine.step()
    for _ in range(sizes.warm):
        engine.step()
    found = _idle(engine, sizes.profiled, "idle_share_chat")
    if not engine.waiting:
        raise RuntimeError("nobody waits any more: the batch was not full to the end")
    drop(engine, requests)
    return found


def _add(engine: Engine, ask: Ask) -> Request:
    return engine.add(ask.prompt.tolist(), settings(ask.new_tokens))


def prefill(bench: Bench) -> dict[str, Any]:
    """Time prompts that come together, to the last one's first token.

    Returns:
      The medians of tokens a second and of milliseconds; the same of the programs
      alone, called for as many prompts without waiting; and their ratio.
    """
    engine, sizes = bench.engine, bench.sizes
    rng = bench.rng(2)
    total = sizes.prompts * sizes.prompt_tokens
    seconds, programs = [], 0
    for repeat in range(1 + sizes.repeats):
        prompts = [bench.ids(rng, sizes.prompt_tokens) for _ in range(sizes.prompts)]
        with Plans(engine) as plans:
            start = time.perf_counter()
            asked = [engine.add(prompt, settings(1)) for prompt in prompts]
            while not all(one.tokens for one in asked):
                engine.step()
            if repeat:  # the first is there to warm up
                seconds.append(time.perf_counter() - start)
        finish(engine)
        programs = sum(bool(plan.reads) for plan in plans.made)
    at_once = tokens_at_once(engine)
    taken, alone = float(np.median(seconds)), _programs_seconds(bench, at_once)
    return {
        "tokens_per_second": total / taken,
        "ms": 1e3 * taken,
        "programs": programs,
        "tokens_at_once": at_once,
        "programs_tokens_per_second": total / alone,
        "of_programs": alone / taken,
    }


def _programs_seconds(bench: Bench, at_once: int) -> float:
    """How long programs that read so many tokens each take, one after the other."""
    sizes, seconds = bench.sizes, []
    with bench.building():
        read = make_prefill(bench.params, sizes.prompts, sizes.prompt_tokens, at_once)
        for _ in range(1 + sizes.repeats):
            start = time.perf_counter()
            read(lambda program, *args, **static: program(*args, **static))
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def prefix(bench: Bench) -> dict[str, Any]:
    """Time the first token of a prompt alone, and again when its pages are known.

    Returns:
      The medians of both in milliseconds; the prompt tokens that were known then; and
      how many times faster the second is.
    """
    engine, sizes = bench.engine, bench.sizes
    rng = bench.rng(3)
    cold, warm, cached = [], [], []
    for _ in range(1 + sizes.repeats):
        prompt = bench.ids(rng, sizes.prefix_tokens)
        for times in (cold, warm):
            request, seconds = _first_token(engine, prompt)
            times.append(seconds)
            cached.append(request.cached)
    if any(cached[::2]) or not all(cached[1::2]):
        raise RuntimeError(f"of the prompts {cached} tokens were known in turn")
    first, again = (float(np.median(times[1:])) for times in (cold, warm))
    return {
        "cold_ms": 1e3 * first,
        "cached_ms": 1e3 * again,
        "cached_tokens": cached[-1],
        "times_faster": first / again,
    }


def _first_token(engine: Engine, prompt: list[int]) -> tuple[Request, float]:
    """A request of an idle engine, and the seconds until its first token is here."""
    start = time.perf_counter()
    request = engine.add(prompt, settings(FIRST))
    while not request.tokens:
        engine.step()
    seconds = time.perf_counter() - start
    finish(engine)
    return request, seconds
