"""Loads for serving: prompts and answer lengths as users send them, and when.

The lengths follow published ones: of ShareGPT as vLLM samples it, of nano-vllm's
benchmark, and of models that reason (answers of thousands of tokens). A load is a
function of its arguments alone, so that every engine can be given the same. Request i
depends on the seed and on i: a shorter load is the beginning of a longer one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np

NAMES = ("chat", "uniform", "reasoning", "long", "shared-prefix")
PREFIXES, PREFIX_TOKENS = 32, 2048  # of "shared-prefix"

_LENGTHS, _IDS, _PREFIXES, _ARRIVALS = range(4)  # streams of random numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """What one request asks for.

    Attributes:
      prompt: int32[t], token ids.
      new_tokens: that it is continued by, exactly: no token ends it.
      cut: whether the load has it longer than the context has room for.
    """

    prompt: np.ndarray
    new_tokens: int
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a load amounts to, in tokens.

    Attributes:
      requests: of it.
      prompt_tokens: of all prompts.
      new_tokens: of all answers.
      longest: of a request, prompt and answer together.
      cut: requests that are shorter than the load has them, for want of context.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    longest: int
    cut: int


def make_load(
    name: str,
    requests: int,
    vocab_size: int,
    context: int,
    *,
    most_new_tokens: int | None = None,
    special: Collection[int] = (),
    seed: int = 0,
    drawing: int = 0,
) -> list[Ask]:
    """Draw a load.

    * chat: prompts lognormal, median 170, sigma 1.3; answers exponential, mean 200;
      drawn anew unless 4 <= prompt <= 1,024, 4 <= answer and both <= 2,048 together.
    * uniform: both uniform from 100 to 1,024.
    * reasoning: prompts lognormal, median 400, sigma 0.9, at most 4,096; answers
      lognormal, median 2,000, sigma 0.8, 64 to 12,000; drawn anew outside of that.
    * long: prompts uniform from 2,048 to 8,192, answers from 128 to 1,024.
    * shared-prefix: chat, each prompt after one of 32 system prompts of 2,048 tokens.

    Where a context has no room for both, an answer is cut to what the prompt leaves,
    though not below half of the context, the prompt to what the answer leaves, and a
    system prompt to half of that.

    Args:
      name: one of `NAMES`.
      requests: how many.
      vocab_size: of the model: ids of prompts are drawn uniformly from it.
      context: most tokens of a request, prompt and answer together.
      most_new_tokens: that answers are cut to; None for no other limit.
      special: token ids that no prompt has.
      seed: of the draws.
      drawing: loads that differ in this number alone ask for the same lengths with
        other ids: what an engine keeps of one prompt is of no use for the other.

    Raises:
      ValueError: if there is no such load, or a number is out of range; it is named.
    """
    if name not in NAMES:
        raise ValueError(f"no load {name!r}: there are {', '.join(NAMES)}")
    limits = {"requests": requests, "most_new_tokens": most_new_tokens}
    for word, number in limits.items():
        if number is not None and number < 1:
            raise ValueError(f"{word} must be a positive integer, got {number}")
    if context < 2:
        raise ValueError(f"context must be 2 or more, got {context}: prompt and answer")
    if seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed}")
    ids = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), [*special])
    if not len(ids):
        raise ValueError(f"all {vocab_size} token ids are special: none is left")
    prefixes: list[np.ndarray] = []
    if name == "shared-prefix":
        prefixes = [
            _drawn(ids, PREFIX_TOKENS, [seed, _PREFIXES, drawing, i])
            for i in range(PREFIXES)
        ]
    load = []
    for i in range(requests):
        rng = np.random.default_rng([seed, _LENGTHS, i])
        prompt, new = _lengths(name, rng)
        tokens = _drawn(ids, prompt, [seed, _IDS, drawing, i])
        shared = prefixes[rng.integers(PREFIXES)] if prefixes else ids[:0]
        whole = len(shared) + prompt
        new = min(new, most_new_tokens or new)
        cut = whole + new > context
        if cut:
            new = min(new, max(context // 2, context - whole))
            shared = shared[: (context - new + 1) // 2]
        tokens = np.concatenate([shared, tokens])[: context - new]
        load.append(Ask(tokens, new, cut))
    return load


def _drawn(ids: np.ndarray, count: int, seeds: Sequence[int]) -> np.ndarray:
    """So many of some ids, int32[count]."""
    return ids[np.random.default_rng(seeds).integers(len(ids), size=count)]


def _lengths(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """Tokens of a prompt, without what it shares, and of its answer."""
    if name == "uniform":
        return _between(rng, 100, 1024), _between(rng, 100, 1024)
    if name == "long":
        return _between(rng, 2048, 8192), _between(rng, 128, 1024)
    while True:
        if name == "reasoning":
            prompt, new = _lognormal(rng, 400, 0.9), _lognormal(rng, 2000, 0.8)
            if 1 <= prompt <= 4096 and 64 <= new <= 12000:
                return prompt, new
        else:
            prompt, new = _lognormal(rng, 170, 1.3), round(rng.exponential(200))
            if 4 <= prompt <= 1024 and new >= 4 and prompt + new <= 2048:
                return prompt, new


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _lognormal(rng: np.random.Generator, median: float, sigma: float) -> int:
    return round(rng.lognormal(math.log(median), sigma))


def sizes(load: Sequence[Ask]) -> Sizes:
    """Count the tokens of a load of at least one request."""
    return Sizes(
        requests=len(load),
        prompt_tokens=sum(len(ask.prompt) for ask in load),
        new_tokens=sum(ask.new_tokens for ask in load),
        longest=max(len(ask.prompt) + ask.new_tokens for ask in load),
        cut=sum(ask.cut for ask in load),
    )


def arrivals(requests: int, rate: float, seed: int = 0) -> list[float]:
    """When requests arrive, in seconds from the beginning, as a Poisson process has it.

    Args:
      requests: how many.
      rate: requests per second, a mean; infinity for all at once, at 0.
      seed: of the draws. Rates scale the same gaps.

    Raises:
      ValueError: if the rate is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"rate must be above 0 requests per second, got {rate}")
    gaps = np.random.default_rng([seed, _ARRIVALS]).exponential(size=requests)
    return (np.cumsum(gaps) / rate).tolist()
