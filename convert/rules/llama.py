"""LLaMA: RMSNorm, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from typing import Any

from convert.rules.rule import Rule, flag, number, one_of, size
from convert.source import ConversionError
from polarjax.config import ModelConfig, Rope

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
_QKV = ("heads", "kv_heads", "kv_heads")

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
    """The table; the same for every LLaMA."""
    del config
    return RULES


def model_config(config: dict[str, Any]) -> ModelConfig:
    """Read a LLaMA's config.json, written by transformers 4 or 5.

    Args:
      config: what the file holds.

    Raises:
      ConversionError: naming what is not supported, or missing.
    """
    if flag(config, "mlp_bias", False):
        raise ConversionError(
            "configuration: mlp_bias true is not supported: the gated MLP has no biases"
        )
    dim, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    bias = flag(config, "attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=size(config, "vocab_size"),
        dim=dim,
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim", max(dim // heads, 1)),
        neurons=size(config, "intermediate_size"),
        context=size(config, "max_position_embeddings", 2048),
        norm="rms",
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=one_of(config, "hidden_act", ("silu",), "silu"),  # pyright: ignore[reportArgumentType]
        gated_mlp=True,
        rope=_rope(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=False,
        tied_embeddings=flag(config, "tie_word_embeddings", False),
        embed_dim=dim,
    )


def _rope(config: dict[str, Any]) -> Rope:
    # transformers 5 keeps the base inside the record, 4 beside it, and the oldest 4
    # call the kind `type`.
    record = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(record, dict):
        raise ConversionError(
            f"configuration: rope parameters {record!r} are no record"
        )
    outside = number(config, "rope_theta", 10000.0)
    theta = number(record, "rope_theta", outside)
    if number(record, "partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError("configuration: partial_rotary_factor is not supported")
    divisors = tuple(config.get("rope_divisors", ()))
    kinds = {"rope_type": record.get("rope_type") or record.get("type")}
    if one_of(kinds, "rope_type", ("default", "llama3"), "default") == "default":
        return Rope(theta=theta, divisors=divisors)
    low, high = number(record, "low_freq_factor"), number(record, "high_freq_factor")
    if low >= high:
        raise ConversionError(
            f"configuration: low_freq_factor {low} must be below "
            f"high_freq_factor {high}"
        )
    return Rope(
        theta=theta,
        kind="llama3",
        factor=number(record, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=size(record, "original_max_position_embeddings"),
        divisors=divisors,
    )
