"""LLaMA and its kin: RMSNorm, rotary positions, grouped queries, gated MLP.

Mistral's layers may see a window of the text alone, and so may Qwen's. Qwen2 and 2.5
have biases of queries, keys and values; Qwen3 normalises queries and keys; some layers
of SmolLM3 have no positions (NoPE, arXiv 2305.19466).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

from convert.rules.rule import LARGEST_DEPTH, Rule, flag, number, one_of, size
from convert.source import ConversionError
from polarjax.config import ModelConfig, Rope, RopeKind

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
_QKV = ("heads", "kv_heads", "kv_heads")
# Of the numbers that scale positions: float32 makes infinities of what is far beyond.
_MODERATE = (1e-6, 1e6)

# Of config.json, by model_type: those that are read below.
_SHARED = frozenset(
    """
    attention_bias head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings mlp_bias num_attention_heads num_hidden_layers
    num_key_value_heads original_max_position_embeddings partial_rotary_factor
    rms_norm_eps rope_divisors rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
    """.split()
)
_SLIDING = _SHARED | {"max_window_layers", "sliding_window", "use_sliding_window"}
FIELDS = {
    "llama": _SHARED,
    "mistral": _SHARED | {"sliding_window"},
    "qwen2": _SLIDING,
    "qwen3": _SLIDING,
    "smollm3": _SLIDING | {"no_rope_layers", "no_rope_layer_interval"},
}
ROPE_FIELDS = frozenset(
    """
    attention_factor beta_fast beta_slow factor high_freq_factor low_freq_factor
    mscale mscale_all_dim original_max_position_embeddings partial_rotary_factor
    rope_theta rope_type truncate type
    """.split()
)

# Where attention_bias and use_sliding_window mean something.
_BIASED = ("llama", "qwen3", "smollm3")
_MAY_SLIDE = ("qwen2", "qwen3", "smollm3")

RULES = (
    Rule("embed/tokens", ("model.embed_tokens.weight",)),
    Rule("embed/head", ("lm_head.weight",)),
    Rule("final_norm/scale", ("model.norm.weight",)),
    Rule(
        "layers_{i}/attention_norm/scale", ("model.layers.{i}.input_layernorm.weight",)
    ),
    Rule(
        "layers_{i}/attention/qkv",
        tuple(f"{_ATTENTION}{part}_proj.weight" for part in "qkv"),
        heads=_QKV,
    ),
    Rule(
        "layers_{i}/attention/qkv_bias",
        tuple(f"{_ATTENTION}{part}_proj.bias" for part in "qkv"),
        heads=_QKV,
    ),
    Rule("layers_{i}/attention/q_norm/scale", (f"{_ATTENTION}q_norm.weight",)),
    Rule("layers_{i}/attention/k_norm/scale", (f"{_ATTENTION}k_norm.weight",)),
    Rule("layers_{i}/attention/out", (f"{_ATTENTION}o_proj.weight",), transpose=True),
    Rule("layers_{i}/attention/out_bias", (f"{_ATTENTION}o_proj.bias",)),
    Rule(
        "layers_{i}/mlp_norm/scale",
        ("model.layers.{i}.post_attention_layernorm.weight",),
    ),
    Rule("layers_{i}/mlp/gate", (f"{_MLP}gate_proj.weight",)),
    Rule("layers_{i}/mlp/up", (f"{_MLP}up_proj.weight",)),
    Rule("layers_{i}/mlp/down", (f"{_MLP}down_proj.weight",), transpose=True),
)


def rules(config: dict[str, Any]) -> tuple[Rule, ...]:
    """The table; the same for all of them."""
    del config
    return RULES


def model_config(config: dict[str, Any]) -> ModelConfig:
    """Read a config.json, written by transformers 4 or 5.

    Args:
      config: what the file holds.

    Raises:
      ConversionError: naming what is not supported, or missing.
    """
    family = config["model_type"]
    if flag(config, "mlp_bias", False):
        raise ConversionError(
            "configuration: mlp_bias true is not supported: the gated MLP has no biases"
        )
    layers = size(config, "num_hidden_layers", largest=LARGEST_DEPTH)
    dim, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    rotary = _rotary(config, layers)
    bias = family in _BIASED and flag(config, "attention_bias", False)
    head_dim = 128 if family == "qwen3" else max(dim // heads, 1)
    return ModelConfig(
        family=family,
        vocab_size=size(config, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim", head_dim),
        neurons=size(config, "intermediate_size"),
        context=size(config, "max_position_embeddings", 2048),
        norm="rms",
        norm_eps=_within(config, "rms_norm_eps", 1e-6, (1e-30, 1)),
        activation=one_of(config, "hidden_act", ("silu", "relu"), "silu"),  # pyright: ignore[reportArgumentType]
        gated_mlp=True,
        rope=_rope(config),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=False,
        tied_embeddings=flag(config, "tie_word_embeddings", family == "smollm3"),
        embed_dim=dim,
        qk_norm=family == "qwen3",
        windows=_windows(config, layers, rotary),
        rotary=rotary,
    )


def _rotary(config: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """`ModelConfig.rotary`: which layers of SmolLM3 rotate."""
    if config["model_type"] != "smollm3":
        return ()
    given = config.get("no_rope_layers")  # in spite of its name, 1 is for RoPE
    if given is None:
        interval = size(config, "no_rope_layer_interval", 4)
        given = [(i + 1) % interval != 0 for i in range(layers)]
    known = isinstance(given, list) and all(type(x) in (int, bool) for x in given)
    if not known or len(given) < layers or not {*given} <= {0, 1}:
        raise ConversionError(
            f"configuration: no_rope_layers must be {layers} numbers, each 1 for "
            f"rotary positions or 0 for none, not {given!r}"
        )
    rotary = tuple(map(bool, given[:layers]))
    return () if all(rotary) else rotary


def _windows(
    config: dict[str, Any], layers: int, rotary: tuple[bool, ...]
) -> tuple[int, ...]:
    """`ModelConfig.windows`: which layers see the newest tokens alone."""
    family = config["model_type"]
    used = family in _MAY_SLIDE and flag(config, "use_sliding_window", False)
    if family == "mistral":
        # Null is for none; without the field transformers takes 4096.
        width = config.get("sliding_window", 4096)
        config = {**config, "sliding_window": width}
        sliding = [width is not None] * layers
    elif family == "smollm3":
        sliding = [used and not rotates for rotates in rotary or (True,) * layers]
    else:  # Qwen names a window also where it does not use it.
        first = config.get("max_window_layers", 28)
        if used and (isinstance(first, bool) or not isinstance(first, int)):
            raise ConversionError(
                f"configuration: max_window_layers must be an integer, not {first!r}"
            )
        sliding = [used and i >= first for i in range(layers)]
    kinds = config.get("layer_types")
    if kinds is not None:
        names = {"full_attention": False, "sliding_attention": True}
        known = isinstance(kinds, list) and len(kinds) == layers
        if not known or not all(isinstance(x, str) and x in names for x in kinds):
            raise ConversionError(
                f"configuration: layer_types must name {layers} layers, each "
                f"{' or '.join(names)}, not {kinds!r}"
            )
        named = [names[kind] for kind in kinds]
        # Mistral's class does not go by them, nor LLaMA's.
        if named != sliding and not used:
            raise ConversionError(
                "configuration: layer_types do not agree with the model's sliding "
                f"window: {kinds!r}"
            )
        sliding = named
    if not any(sliding):
        return ()
    return tuple(size(config, "sliding_window") if x else 0 for x in sliding)


def _rope(config: dict[str, Any]) -> Rope:
    # transformers 5 keeps the base inside the record, 4 beside it, and the oldest 4
    # call the kind `type`.
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
    base = 2e6 if config["model_type"] == "smollm3" else 10000.0
    outside = number(config, "rope_theta", base)
    theta = _within(record, "rope_theta", outside, (2, 1e30))
    for place in (record, config):
        if number(place, "partial_rotary_factor", 1.0) != 1.0:
            raise ConversionError(
                "configuration: partial_rotary_factor is not supported"
            )
    divisors = tuple(config.get("rope_divisors", ()))
    kinds = {"rope_type": record.get("rope_type") or record.get("type")}
    kind = one_of(kinds, "rope_type", get_args(RopeKind), "default")
    rope = Rope(theta=theta, kind=kind, divisors=divisors)  # pyright: ignore[reportArgumentType]
    if kind == "default":
        return rope
    rope = dataclasses.replace(rope, factor=_within(record, "factor"))
    name = "original_max_position_embeddings"
    before = config.get(name)
    if before is not None and record.setdefault(name, before) != before:
        raise ConversionError(
            f"configuration: {name} is {before!r}, but {record[name]!r} in the rope "
            "parameters"
        )
    if kind == "llama3":
        return _llama3(rope, record)
    if kind == "yarn":
        return _yarn(rope, record, config)
    return rope


def _within(
    record: dict[str, Any],
    name: str,
    default: float | None = None,
    limits: tuple[float, float] = _MODERATE,
) -> float:
    value = number(record, name, default)
    if not limits[0] <= value <= limits[1]:
        raise ConversionError(
            f"configuration: {name} must be between {limits[0]:g} and {limits[1]:g}, "
            f"not {value}"
        )
    return value


def _llama3(rope: Rope, record: dict[str, Any]) -> Rope:
    low, high = (_within(record, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise ConversionError(
            f"configuration: low_freq_factor {low} must be below "
            f"high_freq_factor {high}"
        )
    return dataclasses.replace(
        rope,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=size(record, "original_max_position_embeddings"),
    )


def _yarn(rope: Rope, record: dict[str, Any], config: dict[str, Any]) -> Rope:
    fast, slow = _within(record, "beta_fast", 32.0), _within(record, "beta_slow", 1.0)
    if fast <= slow:
        raise ConversionError(
            f"configuration: beta_slow {slow} must be below beta_fast {fast}"
        )
    context = size(config, "max_position_embeddings", 2048)
    return dataclasses.replace(
        rope,
        original_context=size(record, "original_max_position_embeddings", context),
        beta_fast=fast,
        beta_slow=slow,
        truncate=flag(record, "truncate", True),
        scale=_yarn_scale(rope.factor, record),
    )


def _yarn_scale(factor: float, record: dict[str, Any]) -> float:
    """What queries and keys are multiplied with: sqrt(1 / t) of the paper."""
    if record.get("attention_factor") is not None:
        return _within(record, "attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    # DeepSeek's: both or neither count.
    if record.get("mscale") and record.get("mscale_all_dim"):
        return scale(_within(record, "mscale")) / scale(
            _within(record, "mscale_all_dim")
        )
    return scale(1.0)


def configuration(config: ModelConfig) -> dict[str, Any]:
    """What `model_config` has read, in the words of transformers 4, which 5 knows too.

    Args:
      config: of one of these families.

    Raises:
      ConversionError: if transformers has no words for it.
    """
    record: dict[str, Any] = {
        "hidden_size": config.dim,
        "intermediate_size": config.neurons,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        **_rope_record(config.rope),
        **_window_record(config),
    }
    if config.family in _BIASED:
        record["attention_bias"] = config.qkv_bias
    if config.family in ("llama", "smollm3"):
        record["mlp_bias"] = False
    if config.family == "smollm3":
        rotates = config.rotary or (True,) * config.layers
        record["no_rope_layers"] = list(map(int, rotates))
        record["pad_token_id"] = None  # the class's own may be beyond the vocabulary
    return record


def _rope_record(rope: Rope | None) -> dict[str, Any]:
    assert rope is not None  # all of them have it
    if rope.divisors:
        raise ConversionError(
            "the model's RoPE is scaled by numbers out of a GGUF file, for which "
            "transformers has no words: convert the original safetensors"
        )
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        scaling["beta_fast"], scaling["beta_slow"] = rope.beta_fast, rope.beta_slow
        scaling["truncate"], scaling["attention_factor"] = rope.truncate, rope.scale
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _window_record(config: ModelConfig) -> dict[str, Any]:
    width = max(config.windows, default=0)
    if config.family == "mistral":
        return {"sliding_window": width or None}
    if config.family not in _MAY_SLIDE:
        return {}
    if not width:
        return {"use_sliding_window": False}
    sliding = [window > 0 for window in config.windows]
    record: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": width,
        "layer_types": [
            "sliding_attention" if x else "full_attention" for x in sliding
        ],
    }
    if config.family != "smollm3":
        record["max_window_layers"] = sliding.index(True)
    return record
