"""Checks of what users pass to `generate`, each with one clear error."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.config import ModelConfig
from polarjax.engine.sampling import Sampling
from polarjax.engine.templates import check_text
from polarjax.engine.tokenizer import Tokenizer
from polarjax.planning.sizes import bucket


def encode_prompts(
    prompts: Any, tokenizer: Tokenizer | None, config: ModelConfig
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a list of str, or of lists or arrays of token ids, or int[b, t].
      tokenizer: of the checkpoint, or None.
      config: of the model.

    Raises:
      TypeError: if prompts is not such a list.
      ValueError: if one is empty, too long, no Unicode text or has an id that the model
        lacks.
    """
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        prompts = list(prompts)  # of one length
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
    ids = _listed(f"prompt {i}", prompt)
    if isinstance(ids, list | tuple):
        whole = [isinstance(x, int | np.integer) for x in ids]
        if all(whole) and not any(isinstance(x, bool) for x in ids):
            return [int(x) for x in ids]
    raise TypeError(f"prompt {i} must be a str or a list of token ids, got {prompt!r}")


def _listed(name: str, value: Any) -> Any:
    """What an array holds, as Python has it; anything else as it is.

    Raises:
      TypeError: if the array is being traced.
    """
    if isinstance(value, list | tuple):
        return [_listed(name, x) if isinstance(x, jax.Array) else x for x in value]
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} is being traced: generate looks at its values, so it cannot be "
            "called inside jax.jit"
        )
    return value.tolist() if isinstance(value, np.ndarray | jax.Array) else value


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
    value = _listed(name, value)
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values: list[Any] = list(value) if many else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} values for {batch} prompts")
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    what = "an integer" if whole else "a number"
    for x in values:
        right = isinstance(x, kinds) and not isinstance(x, bool)
        if not right or not low <= x <= high:
            raise ValueError(
                f"{name} must be {what} from {low} to {high}, got {reprlib.repr(x)}"
            )
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


def stop_tokens(stop_ids: Any, config: ModelConfig) -> np.ndarray:
    """The token ids that end a request; None means the model's own.

    Returns:
      int32[e], filled up with -1, which no token is: one program serves any number up
      to 8, the next up to 16, and so on.

    Raises:
      ValueError: if one is no token id of the model.
    """
    if stop_ids is None:
        return _filled_up(config.eos_ids)
    v = config.vocab_size
    stop_ids = _listed("stop_ids", stop_ids)
    several = isinstance(stop_ids, Sequence | set | frozenset)
    if not several or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids must be a list of token ids, got {stop_ids!r}")
    return _filled_up(
        per_request("stop_ids", list(stop_ids), len(stop_ids), 0, v - 1, whole=True)
    )


def _filled_up(ids: Sequence[int]) -> np.ndarray:
    filled = np.full(bucket(len(ids), 8), -1, np.int32)
    filled[: len(ids)] = ids
    return filled
