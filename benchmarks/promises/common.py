"""What measurements of promises share: the model, engines, and a look inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.promises.sizes import Sizes
from polarjax import Engine, Params, Settings
from polarjax.bench import counts
from polarjax.bench.loads import Ask, make_load
from polarjax.bench.random_weights import load_model
from polarjax.bench.shapes import TOY_MODELS
from polarjax.engine.plans import Plan
from polarjax.engine.request import Request
from polarjax.engine.sampling import Variant

DENSITIES = (1.0, 0.5)  # of requests that differ in it


class Bench:
    """The model, and the engines that measurements share.

    Args:
      shape: of `polarjax.bench.shapes`.
      sizes: how much is measured.
      seed: of prompts and loads.

    Attributes:
      sizes: see there.
      seed: likewise.
      built: programs compiled to make engines, or beside them.
    """

    def __init__(self, shape: str, sizes: Sizes, seed: int = 0) -> None:
        self.sizes, self.seed, self.built = sizes, seed, 0
        self._shape = shape
        self.params = make_params(shape)
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """With pages for all that its slots can have; idle between measurements."""
        if self._engine is None:
            self._engine = self.make_engine()
        return self._engine

    def make_engine(self, pages: int | None = None) -> Engine:
        """One of its own, to be closed by the caller.

        Args:
          pages: of its cache; None for as many as all slots can fill.
        """
        with self.building():
            return make_engine(self._shape, self.params, self.sizes, pages)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """What is compiled within is no engine's fault."""
        with counts.compilations() as compiled:
            yield
        self.built += compiled.count

    def rng(self, *numbers: int) -> np.random.Generator:
        """Random numbers for one purpose."""
        return np.random.default_rng([self.seed, *numbers])

    def ids(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """A prompt of so many tokens."""
        return rng.integers(1, self.params.config.vocab_size, tokens).tolist()

    def chat(self, purpose: int, number: int = 256) -> Iterator[Ask]:
        """Requests as in a chat, without end: the same lengths again, with other ids.

        Args:
          purpose: loads of different purposes have different ids.
          number: of requests until their lengths are repeated.
        """
        vocabulary, drawing = self.params.config.vocab_size, purpose << 20
        while True:
            yield from make_load(
                "chat",
                number,
                vocabulary,
                self.sizes.context,
                seed=self.seed,
                drawing=drawing,
            )
            drawing += 1

    def close(self) -> None:
        """Let the shared engine go."""
        if self._engine is not None:
            self._engine.close()


def make_params(shape: str) -> Params:
    """Random weights and routers: bfloat16, and float32 of a toy."""
    dtype = jnp.dtype("float32" if shape in TOY_MODELS else "bfloat16")
    return load_model(shape, None, dtype, 0)


def make_engine(
    shape: str, params: Params, sizes: Sizes, pages: int | None = None
) -> Engine:
    """As users make it: for all ways of drawing, but a toy for the simple ones."""
    simple = Variant.GREEDY, Variant.SAMPLED
    return Engine(
        params,
        policy=params.policy,
        slots=sizes.slots,
        context=sizes.context,
        pages=pages,
        prefill_tokens=sizes.prefill_tokens,
        variants=simple if shape in TOY_MODELS else tuple(Variant),
    )


def settings(new_tokens: int, density: float | None = None, **more: Any) -> Settings:
    """Of a request whose answer no token ends."""
    return Settings(max_new_tokens=new_tokens, density=density, stop_ids=(), **more)


def finish(engine: Engine) -> None:
    """Step until no request is left, and nothing is under way."""
    while not engine.idle:
        engine.step()
    engine.step()


def drop(engine: Engine, requests: Iterable[Request]) -> None:
    """Cancel requests, and leave the engine idle."""
    for request in requests:
        engine.cancel(request)
    finish(engine)


class Plans:
    """The plans that an engine makes from here on; a context manager.

    Args:
      engine: whose.

    Attributes:
      made: in order.
    """

    def __init__(self, engine: Engine) -> None:
        self._scheduler = engine._runner.scheduler
        self.made: list[Plan] = []

    def __enter__(self) -> Plans:
        ask = self._scheduler.plan

        def plan(*args: Any, **kwargs: Any) -> Plan:
            self.made.append(ask(*args, **kwargs))
            return self.made[-1]

        self._scheduler.plan = plan
        return self

    def __exit__(self, *_: object) -> None:
        del self._scheduler.plan  # its class has the method


def pages_lost(engine: Engine) -> dict[str, Any]:
    """Pages that an idle engine's cache has, and how many of them are nowhere.

    The scheduler also compares all that it knows of itself: `books_wrong` is 1 if
    something does not agree, and `books` then says what.
    """
    scheduler = engine._runner.scheduler
    pages = sum(pool.pages - 1 for pool in scheduler.pools)
    free = sum(pool.free for pool in scheduler.pools)
    cached = sum(pool.idle for pool in scheduler.pools)
    found = {"pages_lost": pages - free - cached, "books_wrong": 0}
    found |= {"pages": pages, "free": free, "cached": cached}
    try:
        scheduler.check()
    except AssertionError as error:
        return {**found, "books_wrong": 1, "books": str(error)}
    return found


def tokens_at_once(engine: Engine) -> int:
    """Prompt tokens that one program of an engine reads."""
    return engine._runner.batch.sizes.tokens


def preemptions(engine: Engine) -> int:
    """Times that a request of an engine had to give way."""
    return engine._runner.scheduler.preemptions


def answers(requests: Sequence[Request]) -> list[tuple]:
    """Tokens and log-probabilities of requests that have ended, to be compared.

    Raises:
      RuntimeError: if one has not got all tokens that it asked for.
    """
    for number, one in enumerate(requests):
        if one.going or len(one.tokens) != one.limit:
            raise RuntimeError(
                f"request {number} has {len(one.tokens)} tokens of {one.limit} "
                f"({one.finish_reason or 'going'}): such a load measures nothing"
            )
    return [(tuple(one.tokens), tuple(one.logprobs)) for one in requests]
