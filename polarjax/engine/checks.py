"""Checks of what users pass to `generate`, each with one clear error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine.rules import make_rules
from polarjax.engine.sampling import Sampling, Variant
from polarjax.engine.settings import (
    MOST_ALTERNATIVES,
    MOST_BIASES,
    MOST_SAMPLES,
    Settings,
)
from polarjax.engine.stops import stop_strings, stop_tokens
from polarjax.engine.tokenizer import Tokenizer
from polarjax.engine.values import (
    biases,
    each,
    flags,
    is_array,
    length,
    listed,
    per_request,
    token_sets,
)
from polarjax.params import Params
from polarjax.planning.sizes import bucket, positive
from polarjax.policies.budgets import check_densities
from polarjax.storage.quoted import quoted


def check_params(params: Any) -> Params:
    """The model, if it is one.

    Raises:
      TypeError: naming what it is instead.
    """
    if not isinstance(params, Params):
        raise TypeError(f"params must be polarjax.Params, got {quoted(params)}")
    return params


def check_errors(errors: Any) -> Any:
    """What is to be done with requests that fail, if it is something.

    Raises:
      ValueError: if not.
    """
    if not isinstance(errors, str) or errors not in ("raise", "keep"):
        raise ValueError(f"errors must be 'raise' or 'keep', got {quoted(errors)}")
    return errors


def check_flags(**flags: Any) -> None:
    """Raise unless all of some settings are True or False.

    Raises:
      TypeError: naming one that is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {quoted(value)}")


def encode_prompts(
    prompts: Any,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    context: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a list of str, or of lists or arrays of token ids, or int[b, t].
      tokenizer: of the checkpoint, or None.
      config: of the model.
      context: as of `encode_prompt`.

    Raises:
      TypeError: if prompts is not such a list.
      ValueError: if one is empty, too long, no Unicode text or has an id that the model
        lacks.
    """
    listed = enumerate(_several(prompts))
    return [encode_prompt(i, p, tokenizer, config, context) for i, p in listed]


def encode_or_say_why(
    prompts: Any,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    context: int | None = None,
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
            ids = encode_prompt(i, prompt, tokenizer, config, context)
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
    number: int,
    prompt: Any,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    context: int | None = None,
) -> list[int]:
    """Token ids of one prompt.

    Args:
      number: of it, for messages.
      prompt: a str, or a list or array of token ids.
      tokenizer: of the checkpoint, or None.
      config: of the model.
      context: tokens that there is room for, with the answer: a text that is far
        beyond is refused before it is encoded, which would hold up others. None for
        the model's. Others that are too long are for `check_length` to refuse.

    Raises:
      TypeError: if it is neither.
      ValueError: if it is empty, too long, no Unicode text or has an id that the model
        lacks.
    """
    room = min(context or config.context, config.context)
    if isinstance(prompt, list | tuple) or is_array(prompt):
        _check_context(number, length(prompt), config)  # before a look at each
    ids = _encode(number, prompt, tokenizer, room)
    if not ids:
        raise ValueError(f"prompt {number} is empty: it must have at least one token")
    _check_context(number, len(ids), config)
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        wrong = next(x for x in ids if not 0 <= x < config.vocab_size)
        raise ValueError(
            f"prompt {number} has token id {quoted(wrong)}; ids go from 0 to "
            f"{config.vocab_size - 1}"
        )
    return ids


def _check_context(number: int, tokens: int, config: ModelConfig) -> None:
    if tokens >= config.context:
        raise ValueError(
            f"prompt {number} has {tokens} tokens; the model's context is "
            f"{config.context}, so a prompt may have {config.context - 1} at most"
        )


def _encode(
    i: int, prompt: Any, tokenizer: Tokenizer | None, context: int
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompt {i} is a str, but this checkpoint has no tokenizer: pass "
                "lists of token ids"
            )
        check_text_fits(prompt, tokenizer, context, f"prompt {i}")
        return tokenizer.encode(prompt, name=f"prompt {i}")
    if isinstance(prompt, list | tuple) and set(map(type, prompt)) == {int}:
        return list(prompt)  # nearly all are so, and looking at each takes long
    ids = listed(f"prompt {i}", prompt)
    if isinstance(ids, list | tuple):
        whole = [isinstance(x, int | np.integer) for x in ids]
        if all(whole) and not any(isinstance(x, bool) for x in ids):
            return [int(x) for x in ids]
    raise TypeError(
        f"prompt {i} must be a str or a list of token ids, got {quoted(prompt)}"
    )


def check_text_fits(text: str, tokenizer: Tokenizer, context: int, name: str) -> None:
    """Raise if a text has more tokens than there is room for, before any are made.

    Args:
      text: any.
      tokenizer: that it is for.
      context: tokens that there is room for, with the answer.
      name: of the text, for the message.

    Raises:
      ValueError: saying how many tokens it has at least.
    """
    if len(text) >= context and (least := tokenizer.least_tokens(text)) >= context:
        raise ValueError(
            f"{name} has {len(text)} characters, which are {least} tokens at least, "
            f"and there is room for {context} with the answer: shorten it"
        )


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
        name = quoted(unknown[0], 30)
        raise TypeError(f"no setting {name}: there are {', '.join(plain)}")
    given = {**plain, **asked}
    v, found = config.vocab_size, {}

    def numbers(name: str, low: float, high: float, **kind: bool) -> None:
        values = per_request(name, given[name], batch, low, high, **kind)
        plain_type = int if kind.get("whole") else float
        found[name] = [x if x is None else plain_type(x) for x in values]

    name = "max_new_tokens"
    found[name] = [
        min(positive(name, n, math.inf), config.context)
        for n in each(name, given[name], batch)
    ]
    numbers("temperature", 0.0, 1e6)
    numbers("top_k", 0, 2**31 - 1, whole=True)
    numbers("top_p", 0.0, 1.0)
    if min(found["top_p"]) <= 0:
        raise ValueError(f"top_p must be above 0, got {min(found['top_p'])}")
    numbers("min_p", 0.0, 1.0)
    numbers("seed", 0, 2**32 - 1, whole=True)
    if np.ndim(given["seed"]) == 0:
        found["seed"] = [(s + i) % 2**32 for i, s in enumerate(found["seed"])]
    # Beyond these the scores may be infinite, and no longer say which is the best.
    numbers("repetition_penalty", 0.01, 100.0)
    numbers("presence_penalty", -2.0, 2.0)
    numbers("frequency_penalty", -2.0, 2.0)
    numbers("min_tokens", 0, 2**31 - 1, whole=True)
    numbers("n", 1, MOST_SAMPLES, whole=True)
    numbers("sample", 0, 2**30, whole=True)
    for name in ("logprobs", "prompt_logprobs"):
        numbers(name, 0, MOST_ALTERNATIVES, whole=True, optional=True)
    for name in ("ignore_eos", "echo"):
        found[name] = flags(name, given[name], batch)
    name = "logit_bias"
    found[name] = biases(name, given[name], batch, v, MOST_BIASES)
    name = "allowed_token_ids"
    found[name] = token_sets(name, given[name], batch, v)
    found["density"] = [
        float(density) or None for density in check_densities(given["density"], batch)
    ]
    found["stop"] = [stop_strings(given["stop"], tokenizer)] * batch
    ends = stop_tokens(given["stop_ids"], config)
    own = given["stop_ids"] is None
    found["stop_ids"] = [
        () if own and not_ours else ends for not_ours in found["ignore_eos"]
    ]
    rows = zip(*found.values(), strict=True)
    settings = [Settings(**dict(zip(found, row, strict=True))) for row in rows]
    return [_of_one_mind(one, v) for one in settings]


def settings_of_one(
    config: ModelConfig, tokenizer: Tokenizer | None, settings: Settings | None
) -> Settings:
    """Settings of one request, checked; None for those that there are by default.

    Args:
      config: what the model is.
      tokenizer: of the checkpoint, or None.
      settings: each field of which is one value, never a list of one per request.

    Raises:
      TypeError: if they are no settings.
      ValueError: naming the setting, the value and the range.
    """
    if settings is None:
        settings = Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be polarjax.Settings, got {quoted(settings)}")
    alike = ("stop", "stop_ids")  # which `generate` has for all requests
    asked = {
        name: value
        if name in alike or (name == "density" and value is None)
        else [value]
        for name, value in vars(settings).items()
    }
    [one] = settings_of(config, tokenizer, 1, asked)
    return one


def _of_one_mind(one: Settings, vocabulary: int) -> Settings:
    """Settings that do not contradict each other.

    Raises:
      ValueError: naming two that do.
    """
    if one.min_tokens > one.max_new_tokens:
        raise ValueError(
            f"min_tokens must be at most max_new_tokens, {one.max_new_tokens}, got "
            f"{one.min_tokens}"
        )
    if not one.min_tokens:
        return one
    ends, allowed = set(one.stop_ids or ()), one.allowed_token_ids
    if len(ends) == vocabulary or (allowed is not None and ends.issuperset(allowed)):
        raise ValueError(
            f"min_tokens {one.min_tokens} leaves nothing to draw: all "
            "allowed_token_ids are among the stop_ids"
        )
    return one


def sampling_of(
    config: ModelConfig, requests: Sequence[Settings], ends: np.ndarray
) -> Sampling:
    """How requests draw, as arrays of the host; with rules, whether they have any.

    Args:
      config: what the model is.
      requests: settings of each, checked.
      ends: int32[b, e], tokens that end each, filled up with -1.
    """
    rules = make_rules(config, requests, ends)
    return dataclasses.replace(plain_sampling_of(config, requests), rules=rules)


def plain_sampling_of(config: ModelConfig, requests: Sequence[Settings]) -> Sampling:
    """The same without rules.

    Args:
      config: what the model is.
      requests: settings of each, checked.
    """
    v = config.vocab_size

    def numbers(values: list, dtype: Any) -> Any:
        return np.array(values, dtype)

    return Sampling(
        numbers([one.temperature for one in requests], np.float32),
        numbers([min(one.top_k or v, v) for one in requests], np.int32),
        numbers([one.top_p for one in requests], np.float32),
        numbers([one.min_p for one in requests], np.float32),
        numbers([one.seed for one in requests], np.uint32),
        numbers([one.sample for one in requests], np.uint32),
    )


def variant_of(requests: Sequence[Settings]) -> Variant:
    """The least that draws for all of some requests.

    Args:
      requests: settings of each, checked.
    """
    if any(one.has_rules for one in requests):
        return Variant.FULL
    if any(one.has_filters for one in requests):
        return Variant.FILTERED
    drawn = any(one.temperature > 0 for one in requests)
    return Variant.SAMPLED if drawn else Variant.GREEDY


def stop_table(requests: Sequence[Settings], width: int | None = None) -> np.ndarray:
    """The token ids that end each request.

    Args:
      requests: settings of each, checked.
      width: ids that there is room for; None for as many as there are, up to 8, to 16,
        and so on.

    Returns:
      int32[b, e], filled up with -1, which no token is.
    """
    ends = [one.stop_ids or () for one in requests]
    width = width or bucket(max(map(len, ends)), 8)
    table = np.full((len(ends), width), -1, np.int32)
    for row, ids in zip(table, ends, strict=True):
        row[: len(ids)] = ids
    return table
