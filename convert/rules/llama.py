"""LLaMA and its kin: RMSNorm, rotary positions, grouped queries, gated MLP.

Mistral's layers may see a window of the text alone, and so may Qwen's. Qwen2 and 2.5
have biases of queries, keys and values; Qwen3 normalises queries and keys; some layers
of SmolLM3 have no positions (NoPE, arXiv 2305.19466).
"""

from __future__ import annotations

from typing import Any

from convert.rules.rope import read_context, read_rope, rope_record, within
from convert.rules.rule import LARGEST_DEPTH, Rule, flag, one_of, size
from convert.source import ConversionError
from polarjax.config import ModelConfig

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
_QKV = ("heads", "kv_heads", "kv_heads")

# Of config.json, by model_type: those that are read below.
_SHARED = frozenset(
    """
    attention_bias head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads
    original_max_position_embeddings partial_rotary_factor rms_norm_eps rope_divisors
    rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
    """.split()
)
_SLIDING = _SHARED | {"max_window_layers", "sliding_window", "use_sliding_window"}
FIELDS = {
    "llama": _SHARED | {"mlp_bias"},
    "mistral": _SHARED | {"sliding_window"},
    "qwen2": _SLIDING,
    "qwen3": _SLIDING,
    "smollm3": _SLIDING | {"mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
}
# Where attention_bias, mlp_bias and use_sliding_window mean something.
_BIASED = ("llama", "qwen3", "smollm3")
_MLP_BIASED = ("llama", "smollm3")
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
    Rule("layers_{i}/mlp/gate_bias", (f"{_MLP}gate_proj.bias",)),
    Rule("layers_{i}/mlp/up", (f"{_MLP}up_proj.weight",)),
    Rule("layers_{i}/mlp/up_bias", (f"{_MLP}up_proj.bias",)),
    Rule("layers_{i}/mlp/down", (f"{_MLP}down_proj.weight",), transpose=True),
    Rule("layers_{i}/mlp/down_bias", (f"{_MLP}down_proj.bias",)),
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
    layers = size(config, "num_hidden_layers", largest=LARGEST_DEPTH)
    dim, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    rotary = _rotary(config, layers)
    bias = family in _BIASED and flag(config, "attention_bias", False)
    head_dim = 128 if family == "qwen3" else max(dim // heads, 1)
    head_dim = size(config, "head_dim", head_dim)
    rope = read_rope(config, head_dim)
    return ModelConfig(
        family=family,
        vocab_size=size(config, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        neurons=size(config, "intermediate_size"),
        context=read_context(config, rope),
        norm="rms",
        norm_eps=within(config, "rms_norm_eps", 1e-6, (1e-30, 1)),
        activation=one_of(config, "hidden_act", ("silu", "relu"), "silu"),  # pyright: ignore[reportArgumentType]
        gated_mlp=True,
        rope=rope,
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family in _MLP_BIASED and flag(config, "mlp_bias", False),
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
        **rope_record(config),
        **_window_record(config),
    }
    if config.family in _BIASED:
        record["attention_bias"] = config.qkv_bias
    if config.family in _MLP_BIASED:
        record["mlp_bias"] = config.mlp_bias
    if config.family == "smollm3":
        rotates = config.rotary or (True,) * config.layers
        record["no_rope_layers"] = list(map(int, rotates))
        record["pad_token_id"] = None  # the class's own may be beyond the vocabulary
    return record


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
