"""Checks of what users pass to `generate`, each with one clear error."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from polarjax.config import ModelConfig
from polarjax.engine.sampling import Sampling
from polarjax.engine.templates import check_text
from polarjax.engine.tokenizer import Tokenizer
from polarjax.params import Params
from polarjax.planning.sizes import bucket, positive
from polarjax.policies.budgets import check_densities, count
from polarjax.policy import Load, Policy


def check_params(params: Any) -> Params:
    """The model, if it is one.

    Raises:
      TypeError: naming what it is instead.
    """
    if not isinstance(params, Params):
        raise TypeError(f"params must be polarjax.Params, got {params!r:.60}")
    return params


def check_errors(errors: Any) -> Any:
    """What is to be done with requests that fail, if it is something.

    Raises:
      ValueError: if not.
    """
    if errors not in ("raise", "keep"):
        raise ValueError(f"errors must be 'raise' or 'keep', got {errors!r:.60}")
    return errors


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
    listed = enumerate(_several(prompts))
    return [encode_prompt(i, p, tokenizer, config) for i, p in listed]


def encode_or_say_why(
    prompts: Any, tokenizer: Tokenizer | None, config: ModelConfig
) -> tuple[list[list[int]], list[str | None]]:
    """As `encode_prompts`, but that a wrong prompt is no reason to refuse the others.

    Returns:
      Token ids, none of a wrong prompt; and what is wrong with each, None if nothing.

    Raises:
      TypeError: if prompts is no list.
    """
    encoded: list[list[int]] = []
    errors: list[str | None] = []
    for i, prompt in enumerate(_several(prompts)):
        ids, why = [], None
        try:
            ids = encode_prompt(i, prompt, tokenizer, config)
        except (TypeError, ValueError) as error:
            why = str(error)
        encoded.append(ids)
        errors.append(why)
    return encoded, errors


def _several(prompts: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        prompts = list(prompts)  # of one length
    if not isinstance(prompts, list | tuple):
        raise TypeError(
            "prompts must be a list of str or of lists of token ids, "
            f"got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("prompts is empty: pass at least one")
    return prompts


def encode_prompt(
    number: int, prompt: Any, tokenizer: Tokenizer | None, config: ModelConfig
) -> list[int]:
    """Token ids of one prompt.

    Args:
      number: of it, for messages.
      prompt: a str, or a list or array of token ids.
      tokenizer: of the checkpoint, or None.
      config: of the model.

    Raises:
      TypeError: if it is neither.
      ValueError: if it is empty, too long, no Unicode text or has an id that the model
        lacks.
    """
    ids = _encode(number, prompt, tokenizer)
    if not ids:
        raise ValueError(f"prompt {number} is empty: it must have at least one token")
    if len(ids) >= config.context:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens; the model's context is "
            f"{config.context}, so a prompt may have {config.context - 1} at most"
        )
    wrong = [x for x in ids if not 0 <= x < config.vocab_size]
    if wrong:
        raise ValueError(
            f"prompt {number} has token id {wrong[0]}; ids go from 0 to "
            f"{config.vocab_size - 1}"
        )
    return ids


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
    raise TypeError(
        f"prompt {i} must be a str or a list of token ids, got {reprlib.repr(prompt)}"
    )


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


def _each(name: str, value: Any, batch: int) -> list[Any]:
    """A list of one value per request, of one for all or of as many.

    Raises:
      ValueError: if there are several, but not one per request.
    """
    value = _listed(name, value)
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values: list[Any] = list(value) if many else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} values for {batch} prompts")
    return values


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
    values = _each(name, value, batch)
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    what = "an integer" if whole else "a number"
    for x in values:
        right = isinstance(x, kinds) and not isinstance(x, bool)
        if not right or not low <= x <= high:
            raise ValueError(
                f"{name} must be {what} from {low} to {high}, got {reprlib.repr(x)}"
            )
    return values


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one request is continued; see `polarjax.generate`.

    Attributes:
      max_new_tokens: most tokens to add.
      density: fraction of the KV groups to read; None for the policy's own budgets.
      temperature: 0 for greedy.
      top_k: most probable tokens to draw from; 0 for all.
      top_p: probability mass to draw from.
      seed: of the draws.
      stop: strings that end the text.
      stop_ids: token ids that end it; None for the model's own.
    """

    max_new_tokens: int = 64
    density: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None


def settings_of(
    config: ModelConfig, tokenizer: Tokenizer | None, batch: int, asked: dict[str, Any]
) -> list[Settings]:
    """Settings of each request of a batch, checked.

    Args:
      config: what the model is.
      tokenizer: of the checkpoint, or None.
      batch: requests, b.
      asked: fields of `Settings` by name, one value or one per request.

    Raises:
      ValueError: naming the setting, the value and the range.
    """
    plain = vars(Settings())
    if unknown := sorted(asked.keys() - plain.keys()):
        raise TypeError(f"no setting {unknown[0]!r}: there are {', '.join(plain)}")
    given = {**plain, **asked}
    name = "max_new_tokens"
    most = [
        min(positive(name, n), config.context) for n in _each(name, given[name], batch)
    ]
    stops = stop_strings(given["stop"], tokenizer)
    ends = stop_tokens(given["stop_ids"], config)
    densities = check_densities(given["density"], batch)
    temperatures = per_request("temperature", given["temperature"], batch, 0.0, 1e6)
    ks = per_request("top_k", given["top_k"], batch, 0, 2**31 - 1, whole=True)
    ps = per_request("top_p", given["top_p"], batch, 0.0, 1.0)
    if min(ps) <= 0:
        raise ValueError(f"top_p must be above 0, got {min(ps)}")
    seeds = per_request("seed", given["seed"], batch, 0, 2**32 - 1, whole=True)
    if np.ndim(given["seed"]) == 0:
        seeds = [(int(s) + i) % 2**32 for i, s in enumerate(seeds)]
    return [
        Settings(
            max_new_tokens=limit,
            density=float(density) or None,
            temperature=float(temperature),
            top_k=int(k),
            top_p=float(p),
            seed=int(seed),
            stop=stops,
            stop_ids=ends,
        )
        for limit, density, temperature, k, p, seed in zip(
            most, densities, temperatures, ks, ps, seeds, strict=True
        )
    ]


def check_lengths(ids: list[int], number: int, context: int, most: int) -> None:
    """Raise unless an engine has room for a prompt.

    Args:
      ids: token ids of the prompt.
      number: of it, for messages.
      context: tokens that a slot has room for.
      most: tokens of a prompt that the engine is made for.

    Raises:
      ValueError: saying how many it has, and what would do.
    """
    if len(ids) >= context:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens, and a slot of this engine has "
            f"room for {context} with the answer: shorten it, or make the engine with "
            "a larger context"
        )
    if len(ids) > most:
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens, and this engine is made for "
            f"prompts of {most}: shorten it, or make the engine with more prompt_tokens"
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


def make_sampling(config: ModelConfig, requests: Sequence[Settings]) -> Sampling:
    """How each of a batch of requests draws.

    Args:
      config: what the model is.
      requests: settings of each, checked.
    """
    v = config.vocab_size
    ks = [min(one.top_k or v, v) for one in requests]
    ps = [one.top_p for one in requests]
    greedy = all(one.temperature == 0 for one in requests)

    def put(numbers: list, dtype: Any) -> jax.Array:
        return jax.device_put(np.array(numbers, dtype))  # which compiles nothing

    return Sampling(
        put([one.temperature for one in requests], np.float32),
        put(ks, np.int32),
        put(ps, np.float32),
        put([one.seed for one in requests], np.uint32),
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


def stop_tokens(stop_ids: Any, config: ModelConfig) -> tuple[int, ...]:
    """The token ids that end a request; None means the model's own.

    Raises:
      ValueError: if one is no token id of the model.
    """
    if stop_ids is None:
        return config.eos_ids
    v = config.vocab_size
    stop_ids = _listed("stop_ids", stop_ids)
    several = isinstance(stop_ids, Sequence | set | frozenset)
    if not several or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids must be a list of token ids, got {stop_ids!r}")
    many = list(stop_ids)
    found = per_request("stop_ids", many, len(many), 0, v - 1, whole=True)
    return tuple(int(x) for x in found)


def stop_table(requests: Sequence[Settings]) -> np.ndarray:
    """The token ids that end each request.

    Returns:
      int32[b, e], filled up with -1, which no token is: one program serves any number
      up to 8, the next up to 16, and so on.
    """
    ends = [one.stop_ids or () for one in requests]
    table = np.full((len(ends), bucket(max(map(len, ends)), 8)), -1, np.int32)
    for row, ids in zip(table, ends, strict=True):
        row[: len(ids)] = ids
    return table
