"""OPT: LayerNorm, learned positions, multi-head attention, plain MLP, biases.

That of 350M normalises after each half of a layer, and has no final norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.rules.rule import LARGEST_DEPTH, Rule, flag, one_of, size
from convert.source import ConversionError
from polarjax.config import ModelConfig

_DECODER = "model.decoder."
_LAYER = "model.decoder.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_QKV = ("heads", "kv_heads", "kv_heads")

# Of config.json, by model_type: those that are read below.
FIELDS = {
    "opt": frozenset(
        """
        _remove_final_layer_norm activation_function do_layer_norm_before enable_bias
        ffn_dim hidden_size layer_norm_elementwise_affine max_position_embeddings
        num_attention_heads num_hidden_layers tie_word_embeddings vocab_size
        word_embed_proj_dim
        """.split()
    )
}

RULES = (
    Rule("embed/tokens", (f"{_DECODER}embed_tokens.weight",)),
    Rule("embed/head", ("lm_head.weight",)),
    Rule("embed/positions", (f"{_DECODER}embed_positions.weight",)),
    Rule("embed/project_in", (f"{_DECODER}project_in.weight",)),
    Rule("embed/project_out", (f"{_DECODER}project_out.weight",)),
    Rule("final_norm/scale", (f"{_DECODER}final_layer_norm.weight",)),
    Rule("final_norm/bias", (f"{_DECODER}final_layer_norm.bias",)),
    Rule("layers_{i}/attention_norm/scale", (f"{_LAYER}self_attn_layer_norm.weight",)),
    Rule("layers_{i}/attention_norm/bias", (f"{_LAYER}self_attn_layer_norm.bias",)),
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
    Rule("layers_{i}/attention/out", (f"{_ATTENTION}out_proj.weight",), transpose=True),
    Rule("layers_{i}/attention/out_bias", (f"{_ATTENTION}out_proj.bias",)),
    Rule("layers_{i}/mlp_norm/scale", (f"{_LAYER}final_layer_norm.weight",)),
    Rule("layers_{i}/mlp_norm/bias", (f"{_LAYER}final_layer_norm.bias",)),
    Rule("layers_{i}/mlp/up", (f"{_LAYER}fc1.weight",)),
    Rule("layers_{i}/mlp/up_bias", (f"{_LAYER}fc1.bias",)),
    Rule("layers_{i}/mlp/down", (f"{_LAYER}fc2.weight",), transpose=True),
    Rule("layers_{i}/mlp/down_bias", (f"{_LAYER}fc2.bias",)),
)


def rules(config: dict[str, Any]) -> tuple[Rule, ...]:
    """The table; norms without parameters scale by one and add nothing."""
    if flag(config, "layer_norm_elementwise_affine", True):
        return RULES
    fills = {"scale": 1.0, "bias": 0.0}
    return tuple(
        dataclasses.replace(rule, sources=(), fill=fills[rule.target.split("/")[-1]])
        if "norm/" in rule.target
        else rule
        for rule in RULES
    )


def model_config(config: dict[str, Any]) -> ModelConfig:
    """Read an OPT's config.json.

    Args:
      config: what the file holds.

    Raises:
      ConversionError: naming what is not supported, or missing.
    """
    before = flag(config, "do_layer_norm_before", True)
    removed = flag(config, "_remove_final_layer_norm", False)
    dim, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if dim % heads:
        raise ConversionError(
            f"configuration: hidden_size {dim} is not a multiple of "
            f"num_attention_heads {heads}"
        )
    bias = flag(config, "enable_bias", True)
    return ModelConfig(
        family="opt",
        vocab_size=size(config, "vocab_size"),
        dim=dim,
        layers=size(config, "num_hidden_layers", largest=LARGEST_DEPTH),
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        neurons=size(config, "ffn_dim"),
        context=size(config, "max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,  # the class has no field for it
        activation=one_of(config, "activation_function", ("relu", "gelu"), "relu"),  # pyright: ignore[reportArgumentType]
        gated_mlp=False,
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=flag(config, "tie_word_embeddings", True),
        embed_dim=size(config, "word_embed_proj_dim", dim),
        norm_after=not before,
        final_norm=before and not removed,
    )


def configuration(config: ModelConfig) -> dict[str, Any]:
    """What `model_config` has read, in the words of transformers.

    Args:
      config: of an OPT.

    Raises:
      ConversionError: if transformers has no words for it.
    """
    if config.norm_after and config.final_norm:
        raise ConversionError(
            "transformers has no OPT with norms after each half-layer and a final one"
        )
    return {
        "hidden_size": config.dim,
        "word_embed_proj_dim": config.embed_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.neurons,
        "activation_function": config.activation,
        "do_layer_norm_before": not config.norm_after,
        "_remove_final_layer_norm": not (config.final_norm or config.norm_after),
        "enable_bias": config.mlp_bias,
        "layer_norm_elementwise_affine": True,
    }
