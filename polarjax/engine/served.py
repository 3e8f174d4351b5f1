"""What an engine is made for, and whether a request asks for nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from polarjax.config import ModelConfig
from polarjax.engine.checks import variant_of
from polarjax.engine.pages import PagePool
from polarjax.engine.sampling import Variant
from polarjax.engine.settings import Settings
from polarjax.engine.tokenizer import Tokenizer
from polarjax.policies.budgets import count
from polarjax.policy import Load, Policy
from polarjax.storage.quoted import quoted


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What an engine is made for: its requests may ask for nothing else.

    Attributes:
      variants: of drawing.
      logprobs: whether the most probable tokens are told at each step.
      prompt_logprobs: whether those of prompts are.
    """

    variants: tuple[Variant, ...] = tuple(Variant)
    logprobs: bool = True
    prompt_logprobs: bool = True

    def for_all(self, least: Variant) -> Variant | None:
        """Of the variants the first that draws all that another does; None if none."""
        order = list(Variant)
        fit = [one for one in self.variants if order.index(one) >= order.index(least)]
        return min(fit, key=order.index, default=None)


def check_length(ids: list[int], number: int, context: int) -> None:
    """Raise unless an engine has room for a prompt.

    Args:
      ids: token ids of the prompt.
      number: of it, for messages.
      context: tokens that a slot has room for.

    Raises:
      ValueError: saying how many it has, and what would do.
    """
    if len(ids) >= context:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens, and a slot of this engine has "
            f"room for {context} with the answer: shorten it, or make the engine with "
            "a larger context"
        )


def check_variants(variants: Any) -> tuple[Variant, ...]:
    """The ways of drawing that an engine is made for.

    Raises:
      TypeError: if one is none.
      ValueError: if there is none.
    """
    if not isinstance(variants, Iterable):
        raise TypeError(f"variants must be Variants of drawing, got {quoted(variants)}")
    variants = tuple(variants)
    if not all(isinstance(one, Variant) for one in variants):
        raise TypeError(f"variants must be Variants of drawing, got {quoted(variants)}")
    if not variants:
        raise ValueError("variants is empty: name at least one way of drawing")
    return variants


def check_served(
    one: Settings, tokenizer: Tokenizer | None, number: int, drawing: Drawing
) -> None:
    """Raise where a request asks for what an engine is not made for.

    Args:
      one: its settings.
      tokenizer: of the checkpoint, or None.
      number: of its prompt, for messages.
      drawing: what the engine is made for.

    Raises:
      ValueError: naming the setting.
    """
    if one.n != 1:
        raise ValueError(
            f"n must be 1 for one request, got {one.n}: add each of "
            "settings.samples(), or call generate"
        )
    if one.echo and tokenizer is None:
        raise ValueError("echo needs a tokenizer, this checkpoint has none")
    if one.logprobs is not None and not drawing.logprobs:
        raise ValueError(
            "this engine tells no alternatives of tokens: make it with logprobs=True"
        )
    if one.told_of_prompt is not None and not drawing.prompt_logprobs:
        raise ValueError(
            "this engine tells no log-probabilities of prompts: make it with "
            "prompt_logprobs=True"
        )
    if drawing.for_all(least := variant_of([one])) is None:
        raise ValueError(
            f"prompt {number} needs {least.value} drawing, and this engine is made "
            f"for {', '.join(v.value for v in drawing.variants)}: name it in variants"
        )


def check_asked(
    density: float, taken: bool, policy: Policy, config: ModelConfig, slots: int
) -> None:
    """Raise unless a request may ask an engine for a density of its own.

    Args:
      density: that it asks for.
      taken: whether the engine takes any.
      policy: bound.
      config: what the model is.
      slots: requests that share the neurons.

    Raises:
      ValueError: naming the density and the policy.
    """
    name = type(policy).__name__
    if not taken:
        raise ValueError(
            f"density {density:g}: this engine's policy, {name}, takes none of a "
            "request's own"
        )
    reads = policy.reads(config, Load(slots, config.context))
    whole = count(density, config.kv_heads) == config.kv_heads
    if whole and reads and min(reads.neuron_density) < 1:
        raise ValueError(
            f"density {density:g} promises a request its exact MLP, but the requests "
            "of this engine share a part of the neurons: make it with "
            f"{name}(neuron_density=1)"
        )


def check_pages(pool: PagePool, ids: list[int], limit: int, number: int) -> None:
    """Raise if a request could not run in all of a part's cache.

    Args:
      pool: its pages.
      ids: token ids of the prompt.
      limit: most tokens to draw.
      number: of the prompt, for messages.

    Raises:
      ValueError: saying how many pages it needs, and how many there are.
    """
    needed = pool.pages_for(len(ids) + limit - 1)
    if needed > pool.pages - 1:
        raise ValueError(
            f"prompt {number} of {len(ids)} tokens and up to {limit} new ones needs "
            f"{needed} pages of {pool.page} positions, and there are "
            f"{pool.pages - 1}: ask for fewer tokens, or make the engine with more "
            "pages"
        )
