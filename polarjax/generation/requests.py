"""Checks of what users pass to `generate`, each with one clear error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.generation.sampling import Sampling
from polarjax.generation.templates import check_text
from polarjax.generation.tokenizer import Tokenizer


def encode_prompts(
    prompts: Any, tokenizer: Tokenizer | None, config: ModelConfig
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a list of str, or of lists of token ids.
      tokenizer: of the checkpoint, or None.
      config: of the model.

    Raises:
      TypeError: if prompts is not such a list.
      ValueError: if one is empty, too long, no Unicode text or has an id that the model
        lacks.
    """
    if not isinstance(prompts, list | tuple):
        raise TypeError(
            "prompts must be a list of str or of lists of token ids, "
            f"got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("prompts is empty: pass at least one")
    encoded = [_encode(i, p, tokenizer) for i, p in enumerate(prompts)]
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {i} is empty: it must have at least one token")
        if len(ids) >= config.context:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; the model's context is "
                f"{config.context}, so a prompt may have {config.context - 1} at most"
            )
        wrong = [x for x in ids if not 0 <= x < config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {i} has token id {wrong[0]}; ids go from 0 to "
                f"{config.vocab_size - 1}"
            )
    return encoded


def _encode(i: int, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompt {i} is a str, but this checkpoint has no tokenizer: pass "
                "lists of token ids"
            )
        return tokenizer.encode(prompt, name=f"prompt {i}")
    if isinstance(prompt, list | tuple | np.ndarray):
        whole = [isinstance(x, int | np.integer) for x in prompt]
        if all(whole) and not any(isinstance(x, bool) for x in prompt):
            return [int(x) for x in prompt]
    raise TypeError(f"prompt {i} must be a str or a list of token ids, got {prompt!r}")


def per_request(
    name: str, value: Any, batch: int, low: float, high: float, whole: bool = False
) -> list:
    """A setting for each request, from one number or one per request.

    Args:
      name: for messages.
      value: a number or a sequence of b numbers.
      batch: b.
      low: smallest value allowed.
      high: largest.
      whole: whether only integers will do.

    Raises:
      ValueError: naming the setting, the value and the range.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values: list[Any] = list(value) if many else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} values for {batch} prompts")
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    what = "an integer" if whole else "a number"
    for x in values:
        right = isinstance(x, kinds) and not isinstance(x, bool)
        if not right or not low <= float(x) <= high:
            raise ValueError(f"{name} must be {what} from {low} to {high}, got {x!r}")
    return values


def make_sampling(
    config: ModelConfig, batch: int, temperature: Any, top_k: Any, top_p: Any, seed: Any
) -> Sampling:
    """Settings of a batch, checked; see `generate`."""
    v = config.vocab_size
    temperatures = per_request("temperature", temperature, batch, 0.0, 1e6)
    ks = per_request("top_k", top_k, batch, 0, 2**31 - 1, whole=True)
    ks = [int(k) or v for k in ks]
    ps = per_request("top_p", top_p, batch, 0.0, 1.0)
    if min(ps) <= 0:
        raise ValueError(f"top_p must be above 0, got {min(ps)}")
    seeds = per_request("seed", seed, batch, 0, 2**32 - 1, whole=True)
    if np.ndim(seed) == 0:
        seeds = [(int(s) + i) % 2**32 for i, s in enumerate(seeds)]
    greedy = max(temperatures) == 0
    return Sampling(
        jnp.asarray(temperatures, jnp.float32),
        jnp.asarray([min(k, v) for k in ks], jnp.int32),
        jnp.asarray(ps, jnp.float32),
        jnp.asarray(np.array(seeds, np.uint32)),
        greedy=greedy,
        filtered=not greedy and (min(ks) < v or min(ps) < 1),
    )


def positive(name: str, value: Any) -> int:
    """A setting that counts something.

    Raises:
      ValueError: if it is not a positive integer.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def up_to_context(
    name: str, tokens: int | None, default: int, config: ModelConfig
) -> int:
    """A setting that counts tokens which the model is to read together.

    Args:
      name: of the setting.
      tokens: as it was set; None for the default.
      default: that, or the model's context if it is less.
      config: of the model.

    Raises:
      ValueError: if it is not a positive integer, or more than the context.
    """
    if tokens is None:
        return min(default, config.context)
    if positive(name, tokens) > config.context:
        raise ValueError(
            f"{name} is {tokens}, beyond the model's context of {config.context}"
        )
    return int(tokens)


def stop_strings(stop: Any, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The strings that end a text, from one or several.

    Raises:
      ValueError: if one is no string, empty or no Unicode text, or there is no
        tokenizer.
    """
    stops = stop if isinstance(stop, list | tuple) else (stop,)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop must be non-empty strings, got {stop!r}")
    for s in stops:
        check_text(s, f"the stop string {s!a}")
    if stops and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, this checkpoint has none")
    return tuple(stops)


def stop_tokens(stop_ids: Any, config: ModelConfig) -> tuple[int, ...]:
    """The token ids that end a request; None means the model's own.

    Raises:
      ValueError: if one is no token id of the model.
    """
    if stop_ids is None:
        return config.eos_ids
    v = config.vocab_size
    several = isinstance(stop_ids, Sequence | set | frozenset | np.ndarray)
    if not several or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids must be a list of token ids, got {stop_ids!r}")
    return tuple(
        per_request("stop_ids", list(stop_ids), len(stop_ids), 0, v - 1, whole=True)
    )


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two: one program serves all lengths up to it."""
    return max(smallest, 1 << (length - 1).bit_length())
