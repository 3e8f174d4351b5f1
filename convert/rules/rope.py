"""Rotary positions and the context that they reach, in config.json's words and ours."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

from convert.rules.rule import flag, number, one_of, size
from convert.source import ConversionError
from polarjax.config import LARGEST, ModelConfig, Rope, RopeKind
from polarjax.model.positions import base

# Of the record `rope_parameters` or `rope_scaling`: those that are read below.
ROPE_FIELDS = frozenset(
    """
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor
    low_freq_factor mscale mscale_all_dim original_max_position_embeddings
    partial_rotary_factor rope_theta rope_type short_factor truncate type
    """.split()
)
# Of the numbers that scale positions: float32 makes infinities of what is far beyond.
_MODERATE = (1e-6, 1e6)
_ORIGINAL = "original_max_position_embeddings"


def read_rope(config: dict[str, Any], head_dim: int) -> Rope:
    """The rotary positions of a config.json.

    transformers 5 keeps the base inside the record, 4 beside it, and the oldest 4 call
    the kind `type`.

    Args:
      config: what the file holds.
      head_dim: d.

    Raises:
      ConversionError: naming what is not supported, or missing.
    """
    records = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    record = records[0] or records[1]
    if not isinstance(record, dict):
        raise ConversionError(
            f"configuration: rope parameters {record!r} are no record"
        )
    if all(records) and records[0] != records[1]:
        raise ConversionError(
            "configuration: rope_parameters and rope_scaling differ: remove the one "
            "that is wrong"
        )
    record = dict(record)
    if nested := [key for key, value in record.items() if isinstance(value, dict)]:
        raise ConversionError(
            f"configuration: rope parameters of their own for {nested[0]!r} are not "
            "supported"
        )
    default = 2e6 if config["model_type"] == "smollm3" else 10000.0
    outside = number(config, "rope_theta", default)
    theta = within(record, "rope_theta", outside, (2, 1e30))
    for place in (record, config):
        if number(place, "partial_rotary_factor", 1.0) != 1.0:
            raise ConversionError(
                "configuration: partial_rotary_factor is not supported"
            )
    kinds = {"rope_type": record.get("rope_type") or record.get("type")}
    if kinds["rope_type"] == "su":  # as Phi-3's first files call it
        kinds["rope_type"] = "longrope"
    kind = one_of(kinds, "rope_type", get_args(RopeKind), "default")
    divisors = tuple(config.get("rope_divisors", ()))
    rope = Rope(theta=theta, kind=kind, divisors=divisors)  # pyright: ignore[reportArgumentType]
    if kind == "default":
        return rope
    before = config.get(_ORIGINAL)
    if before is not None and record.setdefault(_ORIGINAL, before) != before:
        raise ConversionError(
            f"configuration: {_ORIGINAL} is {before!r}, but {record[_ORIGINAL]!r} in "
            "the rope parameters"
        )
    context = size(config, "max_position_embeddings", 2048)
    if kind in ("yarn", "longrope") and record.get("factor") is None:
        record["factor"] = context / size(record, _ORIGINAL, context)
    rope = dataclasses.replace(rope, factor=within(record, "factor"))
    if kind == "dynamic":
        return dataclasses.replace(rope, original_context=context)
    if kind == "llama3":
        return _llama3(rope, record)
    if kind == "yarn":
        return _yarn(rope, record, context)
    if kind == "longrope":
        return _longrope(rope, record, context, head_dim // 2)
    return rope


def within(
    record: dict[str, Any],
    name: str,
    default: float | None = None,
    limits: tuple[float, float] = _MODERATE,
) -> float:
    """A number of config.json between limits; the others as those of `number`."""
    value = number(record, name, default)
    if not limits[0] <= value <= limits[1]:
        raise ConversionError(
            f"configuration: {name} must be between {limits[0]:g} and {limits[1]:g}, "
            f"not {value}"
        )
    return value


def _llama3(rope: Rope, record: dict[str, Any]) -> Rope:
    low, high = (within(record, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise ConversionError(
            f"configuration: low_freq_factor {low} must be below "
            f"high_freq_factor {high}"
        )
    return dataclasses.replace(
        rope,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=size(record, _ORIGINAL),
    )


def _yarn(rope: Rope, record: dict[str, Any], context: int) -> Rope:
    fast, slow = within(record, "beta_fast", 32.0), within(record, "beta_slow", 1.0)
    if fast <= slow:
        raise ConversionError(
            f"configuration: beta_slow {slow} must be below beta_fast {fast}"
        )
    return dataclasses.replace(
        rope,
        original_context=size(record, _ORIGINAL, context),
        beta_fast=fast,
        beta_slow=slow,
        # Null is for no, as transformers reads it.
        truncate=flag(record, "truncate", "truncate" not in record),
        scale=_yarn_scale(rope.factor, record),
    )


def _yarn_scale(factor: float, record: dict[str, Any]) -> float:
    """What queries and keys are multiplied with: sqrt(1 / t) of the paper."""
    if record.get("attention_factor") is not None:
        return within(record, "attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    # DeepSeek's: both or neither count.
    if record.get("mscale") and record.get("mscale_all_dim"):
        return scale(within(record, "mscale")) / scale(within(record, "mscale_all_dim"))
    return scale(1.0)


def _longrope(rope: Rope, record: dict[str, Any], context: int, pairs: int) -> Rope:
    short, long = (
        _factors(record, f"{name}_factor", pairs) for name in ("short", "long")
    )
    original = size(record, _ORIGINAL, context)
    if record.get("attention_factor") is not None:
        scale = within(record, "attention_factor")
    elif rope.factor <= 1:
        scale = 1.0
    elif original < 2:
        raise ConversionError(f"configuration: longrope with {_ORIGINAL} {original}")
    else:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(original))
    return dataclasses.replace(
        rope,
        factor=1.0,  # it is in the scale
        original_context=original,
        divisors=short,
        long_divisors=long,
        scale=scale,
    )


def _factors(record: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    values = record.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise ConversionError(
            f"configuration: {name} must be {count} numbers, one for each pair of a "
            f"head's dimensions, not {values!r}"
        )
    return tuple(within({name: value}, name) for value in values)


def read_context(config: dict[str, Any], rope: Rope) -> int:
    """Longest text in tokens.

    YaRN reaches its factor times the original context. The recipes that Qwen and others
    publish turn it on with max_position_embeddings left as it was, and vLLM and SGLang
    serve the product.

    Args:
      config: what the file holds.
      rope: that `read_rope` has read of it.

    Raises:
      ConversionError: if it is out of range.
    """
    given = size(config, "max_position_embeddings", 2048)
    if rope.kind != "yarn":
        return given
    reached = round(rope.factor * rope.original_context)
    if reached > LARGEST:
        raise ConversionError(
            f"configuration: YaRN's factor {rope.factor:g} times {_ORIGINAL} "
            f"{rope.original_context} is beyond {LARGEST} tokens"
        )
    return max(given, reached)


def context_notes(config: dict[str, Any], own: ModelConfig, context: int) -> list[str]:
    """What to tell of a model's context.

    Args:
      config: what config.json holds.
      own: what the model is by that.
      context: that it is converted for.

    Returns:
      Lines for the user.
    """
    rope, given = own.rope, size(config, "max_position_embeddings", 2048)
    if rope is None:
        return []
    notes, original = [], rope.original_context
    asked = "--context sets another"
    if context > own.context:
        notes.append(
            f"a context of {context:,} tokens: the model's own is {own.context:,}, and "
            "what it makes of longer texts is not known"
        )
    elif context == own.context > given:
        notes.append(
            f"the context is {context:,} tokens, YaRN's factor {rope.factor:g} times "
            f"{original:,}, beyond max_position_embeddings {given:,} ({asked})"
        )
    elif context == own.context and rope.kind == "linear" and rope.factor > 1:
        notes.append(
            f"positions are divided by {rope.factor:g}, and the context is "
            f"max_position_embeddings, {given:,} tokens ({asked})"
        )
    if rope.kind == "dynamic" and context <= original:
        notes.append(
            f"dynamic NTK scales positions beyond {original:,} tokens alone, which is "
            "the context: --context sets a longer one, and then scales those of texts "
            "of every length for it"
        )
    elif rope.kind == "dynamic":
        notes.append(
            f"dynamic NTK: positions are scaled for {context:,} tokens in texts of "
            "every length, where transformers' go by the length of each"
        )
    if rope.kind == "longrope" and context > original:
        notes.append(
            f"longrope: the context of {context:,} tokens takes the long factors for "
            f"texts of every length, where transformers has the short ones up to "
            f"{original:,}: so has --context {original}"
        )
    return notes


def rope_record(config: ModelConfig) -> dict[str, Any]:
    """The rotary positions in the words of transformers 4, which 5 knows too.

    Args:
      config: of a model that has them.

    Raises:
      ConversionError: if transformers has no words for it.
    """
    rope = config.rope
    assert rope is not None
    kind, theta = rope.kind, rope.theta
    if kind == "dynamic" and config.context > rope.original_context:
        kind, theta = "default", base(rope, config.head_dim, config.context)
    if rope.divisors and kind != "longrope":
        raise ConversionError(
            "the model's RoPE is scaled by numbers out of a GGUF file, for which "
            "transformers has no words: convert the original safetensors"
        )
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind == "longrope":
        scaling["short_factor"] = list(rope.divisors)
        scaling["long_factor"] = list(rope.long_divisors)
    else:
        scaling["factor"] = rope.factor
    if kind in ("llama3", "yarn", "longrope"):
        scaling[_ORIGINAL] = rope.original_context
    if kind in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.scale
    if kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if kind == "yarn":
        scaling["beta_fast"], scaling["beta_slow"] = rope.beta_fast, rope.beta_slow
        scaling["truncate"] = rope.truncate
    return {"rope_theta": theta, "rope_scaling": scaling}
