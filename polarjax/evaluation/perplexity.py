"""Perplexity of a text: over windows, strided, or per word as lm-eval has it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polarjax.evaluation.batches import Continuation, Mode
from polarjax.evaluation.measure import measure
from polarjax.evaluation.scoring import Scorer
from polarjax.evaluation.statistics import Interval, mean_interval, within
from polarjax.params import Params
from polarjax.planning.sizes import at_least
from polarjax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      nll: float64[windows], negative log-likelihood of each window's scored tokens,
        summed, in nats.
      scored: int[windows], how many each has.
      density: KV groups read / KV groups there, mean over layers.
    """

    nll: np.ndarray
    scored: np.ndarray
    density: float = 1.0

    @property
    def value(self) -> float:
        """Exponential of the mean negative log-likelihood per token."""
        return math.exp(self.nll.sum() / self.scored.sum())

    def interval(self) -> Interval:
        """With a 95 % interval, by a bootstrap over windows."""
        return _exp(within(mean_interval(self.nll / self.scored, self.scored), 0))

    def ratio(self, baseline: Perplexity) -> Interval:
        """This perplexity / a baseline's on the same windows, with a 95 % interval.

        The interval is a paired bootstrap over windows.
        """
        change = (self.nll - baseline.nll) / self.scored
        return _exp(mean_interval(change, self.scored))


def _exp(interval: Interval) -> Interval:
    return Interval(*(float(np.exp(x)) for x in interval))


def window_items(
    tokens: Sequence[int] | np.ndarray, window: int, prefix: int = 1
) -> list[Continuation]:
    """Windows that do not overlap; what is left over at the end is dropped.

    Args:
      tokens: of the text.
      window: tokens per window.
      prefix: tokens at each one's start that are not scored.

    Raises:
      ValueError: if there is not one window, or nothing of it is scored.
    """
    at_least("window", window, 2)
    _check("prefix", prefix, 1, window - 1)
    if len(tokens) < window:
        raise ValueError(f"{len(tokens)} tokens are less than one window of {window}")
    return [
        _item(tokens[start : start + window], window - prefix, start)
        for start in range(0, len(tokens) - window + 1, window)
    ]


def strided_items(
    tokens: Sequence[int] | np.ndarray, window: int, stride: int, prefix: int = 1
) -> list[Continuation]:
    """Windows that move by a stride and score what is new in each.

    So every token but the first window's has at least window - stride before it.

    Args:
      tokens: of the text.
      window: most tokens per window.
      stride: tokens by which it moves.
      prefix: tokens at the start of the first one that are not scored.

    Raises:
      ValueError: if a number is out of range, or there is nothing to score.
    """
    at_least("window", window, 2)
    _check("stride", stride, 1, window - 1)
    _check("prefix", prefix, 1, window - 1)
    if len(tokens) <= prefix:
        raise ValueError(f"{len(tokens)} tokens, after {prefix}, leave none to score")
    end = min(window, len(tokens))
    items = [_item(tokens[:end], end - prefix, 0)]
    while end < len(tokens):
        new = min(stride, len(tokens) - end)
        end += new
        items.append(_item(tokens[end - window : end], new, end - window))
    return items


def rolling_items(
    tokens: Sequence[int] | np.ndarray, window: int, start: int
) -> list[Continuation]:
    """Every token once, as lm-eval's `loglikelihood_rolling` cuts a text.

    The first window follows a start token, each further one the token before it; the
    last is filled up with what came before. Nothing is read dense but the context that
    the last one repeats.

    Args:
      tokens: of the text.
      window: tokens scored per window.
      start: the token that starts a text.

    Raises:
      ValueError: if there are no tokens.
    """
    if not len(tokens):
        raise ValueError("no tokens: the text is empty")
    whole = [start, *map(int, tokens)]
    items = []
    for at in range(0, len(tokens), window):
        new = min(window, len(tokens) - at)
        # The text that a window's tokens follow, and those tokens.
        first = at if new == window or not at else len(tokens) - window
        items.append(_item(whole[first : at + new + 1], new, first))
    return items


def perplexity(
    params: Params,
    items: Sequence[Continuation],
    policies: Mapping[str, Policy],
    *,
    mode: Mode = "decode",
    batch: int = 16,
    **options: Any,
) -> dict[str, Perplexity]:
    """Perplexity of policies on the same windows.

    Args:
      params: the model.
      items: from one of the functions above.
      policies: by label, not yet bound.
      mode: how they are scored, see `polarjax.evaluation.scoring`. In "decode", what
        comes before the scored tokens is read dense.
      batch: windows computed together, no more than there are.
      **options: of `measure`; and `implementation`.

    Raises:
      ValueError: if a window is longer than the model's context.
    """
    implementation = options.pop("implementation", None)
    batch = min(batch, len(items))
    scorer = Scorer(
        params, policies, mode=mode, batch=batch, implementation=implementation
    )
    scored = np.array([item.scored for item in items])
    return {
        label: Perplexity(found.nll, scored, found.density)
        for label, found in measure(scorer, items, **options).items()
    }


def _item(tokens: Sequence[int] | np.ndarray, scored: int, at: int) -> Continuation:
    return Continuation(tuple(map(int, tokens)), scored, f"the window at token {at}")


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
