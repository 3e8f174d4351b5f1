"""How much is measured of the promises, and what is wanted of the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from polarjax.bench.shapes import parse_model

FIRST = 8  # tokens of an answer whose first one matters


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      slots: of the engine.
      prefill_tokens: prompt tokens that one of its programs reads; None for its own
        choice.
      positions: that each request has in the middle of the timed decode steps.
      room: positions that the engine's context has beyond those.
      warm: steps before the timed ones.
      steps: that are timed.
      profiled: steps that are profiled.
      prompts: that are read at once, to time that.
      prompt_tokens: of each of them.
      prefix_tokens: of the prompt that is asked for again.
      repeats: of what is timed several times.
      equal_prompts: that are asked for many times.
      copies: of each.
      equal_tokens: of an answer to one.
      most_equal: tokens of such a prompt, at most.
      traffic: other requests meanwhile.
      crowd: requests that are played where pages are short.
      crowd_prompt: tokens of a prompt there, least and most.
      crowd_answer: tokens of an answer there, likewise.
      minutes: that the engine is kept busy for.
    """

    slots: int = 64
    prefill_tokens: int | None = None
    positions: int = 4096
    room: int = 256
    warm: int = 16
    steps: int = 128
    profiled: int = 32
    prompts: int = 8
    prompt_tokens: int = 2048
    prefix_tokens: int = 4096
    repeats: int = 5
    equal_prompts: int = 20
    copies: int = 50
    equal_tokens: int = 128
    most_equal: int = 1024
    traffic: int = 400
    crowd: int = 128
    crowd_prompt: tuple[int, int] = (512, 1536)
    crowd_answer: tuple[int, int] = (512, 1536)
    minutes: float = 6.0

    @property
    def context(self) -> int:
        """Of the engine, in tokens."""
        return self.positions + self.room


TOY = Sizes(
    slots=4,
    positions=320,
    room=192,
    warm=2,
    steps=8,
    profiled=4,
    prompts=2,
    prompt_tokens=192,
    prefix_tokens=448,
    repeats=2,
    equal_prompts=3,
    copies=6,
    equal_tokens=8,
    most_equal=160,
    traffic=6,
    crowd=8,
    crowd_prompt=(10, 60),
    crowd_answer=(120, 200),
    minutes=0.05,
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is promised of a figure.

    Attributes:
      figure: its name.
      least: that it must be; None for no such limit.
      most: that it may be; likewise.
      timed: whether it is a matter of time, and so promised of one H200 and the whole
        size alone.
    """

    figure: str
    least: float | None = None
    most: float | None = None
    timed: bool = True

    def holds(self, found: float | None) -> bool | None:
        """Whether a figure is what it should be; None if it was not measured."""
        if found is None:
            return None
        low = self.least is None or found >= self.least
        return low and (self.most is None or found <= self.most)

    def __str__(self) -> str:
        """As in "at least 0.9"."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}"


def check_sizes(shape: str, sizes: Sizes, promises: Sequence[str]) -> None:
    """Raise if a context has no room for what is measured.

    Args:
      shape: of the model.
      sizes: how much is measured.
      promises: what of.

    Raises:
      ValueError: naming what is too large.
    """
    found = parse_model(shape)
    assert found is not None
    if sizes.context > found[0].context:
        raise ValueError(
            f"--positions {sizes.positions} and {sizes.room} beyond are more than the "
            f"context of {shape}, {found[0].context}"
        )
    if sizes.positions <= sizes.warm + sizes.steps // 2:
        raise ValueError(
            f"--positions is {sizes.positions}: in the middle of {sizes.steps} steps "
            f"after {sizes.warm} there are more than that"
        )
    needed = {
        "prefill": sizes.prompt_tokens + 1,
        "prefix": sizes.prefix_tokens + FIRST,
        "invariant": sizes.most_equal + sizes.equal_tokens,
        "preempt": sizes.crowd_prompt[1] + sizes.crowd_answer[1],
    }
    for name, tokens in needed.items():
        if name in promises and tokens > sizes.context:
            raise ValueError(
                f"{name} has requests of {tokens} tokens, and --positions "
                f"{sizes.positions} makes an engine's context {sizes.context}: it must "
                f"be at least {tokens - sizes.room}"
            )
