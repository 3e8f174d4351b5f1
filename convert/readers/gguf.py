"""A GGUF file, in the words of Hugging Face."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from convert.readers.gguf_header import MAGIC, Entry
from convert.readers.gguf_parts import read_parts
from convert.rules.rule import number, size
from convert.source import ConversionError, Decode, Source, SourceTensor
from convert.tokenizer import from_gguf

__all__ = ["MAGIC", "read"]

# Those that `gguf.quants` reads and that hold weights.
_KINDS = frozenset(
    """
    F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_M IQ1_S IQ2_S
    IQ2_XS IQ2_XXS IQ3_S IQ3_XXS IQ4_NL IQ4_XS MXFP4 NVFP4 TQ1_0 TQ2_0
    """.split()
)

_LAYER = "model.layers.{i}."
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": f"{_LAYER}input_layernorm",
    "blk.{i}.attn_q": f"{_LAYER}self_attn.q_proj",
    "blk.{i}.attn_k": f"{_LAYER}self_attn.k_proj",
    "blk.{i}.attn_v": f"{_LAYER}self_attn.v_proj",
    "blk.{i}.attn_q_norm": f"{_LAYER}self_attn.q_norm",
    "blk.{i}.attn_k_norm": f"{_LAYER}self_attn.k_norm",
    "blk.{i}.attn_output": f"{_LAYER}self_attn.o_proj",
    "blk.{i}.ffn_norm": f"{_LAYER}post_attention_layernorm",
    "blk.{i}.ffn_gate": f"{_LAYER}mlp.gate_proj",
    "blk.{i}.ffn_up": f"{_LAYER}mlp.up_proj",
    "blk.{i}.ffn_down": f"{_LAYER}mlp.down_proj",
}
# metadata key without the architecture -> field of config.json
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta", "vocab_size")
_DIVISORS = "rope_freqs.weight"
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Of the architecture `llama`, tensors with interleaved heads, and how many these are.
_INTERLEAVED = {
    "blk.{i}.attn_q": "num_attention_heads",
    "blk.{i}.attn_k": "num_key_value_heads",
}

# Control tokens that end a text whatever the metadata say: instruction-tuned files
# name one end of turn there, and the model may still write its end of text.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>")
_CONTROL = 3


def read(path: Path) -> Source:
    """Open a file of one of the architectures `llama`, `qwen2` and `qwen3`.

    Args:
      path: of the file; of one in parts, any of them.

    Raises:
      ConversionError: if it is truncated, damaged or not supported.
    """
    fields, entries = read_parts(path)
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConversionError(
            f"{path}: general.architecture {architecture!r} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    for entry in entries:
        if entry.kind.name not in _KINDS:
            raise ConversionError(
                f"{entry.path}: {entry.name} has type {entry.kind.name}, which is not "
                f"supported; supported: {', '.join(sorted(_KINDS))}"
            )
    config = _config(fields, entries)
    files, notes = from_gguf(fields)
    interleaved = _INTERLEAVED if architecture == "llama" else {}
    tensors = [_tensor(entry, config, interleaved) for entry in entries]
    return Source(
        config=config,
        tensors={tensor.name: tensor for tensor in tensors},
        files=files,
        eos_ids=_eos_ids(fields),
        bos_ids=_ids(fields, "bos"),
        notes=tuple(notes),
        ours_alone=""
        if fields.get("split.count", 1) == 1
        else "transformers reads no GGUF file in parts: join them first with "
        "`llama-gguf-split --merge`",
    )


def _config(fields: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """The metadata as a config.json, in transformers 4's words."""
    family = fields["general.architecture"]
    config: dict[str, Any] = {"model_type": family}
    for key, name in _FIELDS.items():
        key = f"{family}.{key}"
        if isinstance(fields.get(key), list):
            raise ConversionError(f"{key} differs from layer to layer: not supported")
        if key in fields or name not in _OPTIONAL:
            read = number if name in ("rms_norm_eps", "rope_theta") else size
            config[name] = read(fields, key)
    shapes = {entry.name: entry.shape for entry in entries}
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if "vocab_size" not in config and "token_embd.weight" in shapes:
        config["vocab_size"] = shapes["token_embd.weight"][0]
    heads = config["num_attention_heads"]
    config.setdefault("head_dim", max(config["hidden_size"] // heads, 1))
    config.setdefault("num_key_value_heads", heads)
    _refuse_variants(fields, config)
    config["rope_scaling"] = _rope_scaling(fields, config)
    config |= _windows(fields, config)
    for entry in entries:
        if entry.name == _DIVISORS:
            config["rope_divisors"] = _divisors(_tensor(entry, config, {}), config)
    return config


def _refuse(fields: dict[str, Any], key: str, *plain: Any, why: str = "") -> None:
    """Raise unless the metadata lack the key or have a value without effect."""
    if key in fields and fields[key] not in plain:
        raise ConversionError(f"{key} = {fields[key]!r} is not supported{why}")


def _refuse_variants(fields: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise for what would change the computation and is not built."""
    family = config["model_type"]
    for key, *plain in (
        ("rope.dimension_count", config["head_dim"]),
        ("attention.value_length", config["head_dim"]),
        ("expert_count", 0),
        ("attention.causal", True),
        *((f"attention.{name}", 0.0) for name in ("clamp_kqv", "max_alibi_bias")),
        *((f"{name}_logit_softcapping", 0.0) for name in ("attn", "final")),
        *((f"{name}_scale", 0.0, 1.0) for name in ("logit", "embedding", "residual")),
        ("attention.scale", 0.0, float(np.float32(config["head_dim"] ** -0.5))),
    ):
        _refuse(fields, f"{family}.{key}", *plain)


def _rope_scaling(
    fields: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any] | None:
    """Interpolated positions as `rope_scaling` of config.json.

    The keys mean what llama.cpp makes of them: a factor without a type is linear,
    and YaRN multiplies queries and keys with `attn_factor` times 0.1 ln(factor) + 1,
    where transformers' `attention_factor` is the whole product.
    """
    scaling = f"{config['model_type']}.rope.scaling."

    kind = fields.get(f"{scaling}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        _refuse(fields, f"{scaling}type", why="; supported: none, linear, yarn")
    _refuse(fields, f"{scaling}alpha", 0.0, 1.0)
    _refuse(fields, f"{scaling}yarn_log_multiplier", 0.0)
    # Below 0 stands for the default.
    yarn = kind == "yarn"
    _refuse(fields, f"{scaling}yarn_ext_factor", -1.0, 1.0 if yarn else 0.0)
    key = f"{scaling}factor"
    if key not in fields:  # its old name
        key = f"{config['model_type']}.rope.scale_linear"
    factor = 1.0 if fields.get(key) == 0 else number(fields, key, 1.0)
    if not yarn:
        for name in ("attn_factor", "yarn_attn_factor"):
            _refuse(fields, f"{scaling}{name}", 1.0)
        if kind == "none" or factor == 1.0:
            return None
        return {"rope_type": "linear", "factor": factor}
    magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    # Converters write transformers' number here, and llama.cpp does not read it: no
    # matter where they agree.
    key = f"{scaling}yarn_attn_factor"
    if not math.isclose(number(fields, key, magnitude), magnitude, rel_tol=1e-6):
        why = f": YaRN of this factor multiplies with {magnitude:.6g}"
        _refuse(fields, key, why=why)
    original = fields.get(f"{scaling}original_context_length")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or None,
        "beta_fast": number(fields, f"{scaling}yarn_beta_fast", 32.0),
        "beta_slow": number(fields, f"{scaling}yarn_beta_slow", 1.0),
        "attention_factor": magnitude * number(fields, f"{scaling}attn_factor", 1.0),
    }


def _windows(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Sliding windows in config.json's words; none that the context does not cross.

    A Mistral's file says llama, and all its layers have the window.
    """
    family, context = config["model_type"], config["max_position_embeddings"]
    key = f"{family}.attention.sliding_window"
    width, pattern = fields.get(key, 0), fields.get(f"{key}_pattern")
    if type(width) is not int or width < 0:
        raise ConversionError(f"{key} must be a number of tokens, not {width!r}")
    if not 0 < width < context:
        return {}
    layers = config["num_hidden_layers"]
    if pattern is not None and not (
        isinstance(pattern, list)
        and len(pattern) == layers
        and all(type(slides) is bool for slides in pattern)
    ):
        why = f": it must say true or false for each of {layers} layers"
        _refuse(fields, f"{key}_pattern", why=why)
    if family == "llama":
        if pattern is not None and not all(pattern):
            why = ": a Mistral has its window in every layer"
            _refuse(fields, f"{key}_pattern", why=why)
        return {"model_type": "mistral", "sliding_window": width}
    if pattern is None:
        why = f": {key}_pattern must say which layers have the window"
        _refuse(fields, key, why=why)
    kinds = ("full_attention", "sliding_attention")
    return {
        "use_sliding_window": True,
        "sliding_window": width,
        "layer_types": [kinds[slides] for slides in pattern or ()],
    }


def _divisors(tensor: SourceTensor, config: dict[str, Any]) -> tuple[float, ...]:
    values = tensor.read().ravel()
    if values.size != config["head_dim"] // 2:
        raise ConversionError(
            f"{_DIVISORS} has {values.size} numbers; a head of {config['head_dim']} "
            f"needs {config['head_dim'] // 2}"
        )
    if not ((values > 1e-6) & (values < 1e6)).all():
        raise ConversionError(f"{_DIVISORS} must be between 1e-06 and 1e+06")
    return tuple(values.tolist())


def _tensor(
    entry: Entry, config: dict[str, Any], interleaved: dict[str, str]
) -> SourceTensor:
    layer = re.match(r"blk\.(\d+)\.", entry.name)
    i = layer.group(1) if layer else ""
    stem, _, suffix = entry.name.rpartition(".")
    generic = stem.replace(f"blk.{i}.", "blk.{i}.", 1)
    name = entry.name
    if generic in _NAMES:
        name = f"{_NAMES[generic].replace('{i}', i)}.{suffix}"
    decode, unit = partial(_dequantize, entry.kind), 1
    if generic in interleaved:
        unit = max(entry.shape[0] // config[interleaved[generic]], 1)  # of one head
        decode = partial(_split_rotary, unit, decode)
    return SourceTensor(
        name=name,
        stored_name=entry.name,
        kind=entry.kind.name,
        shape=entry.shape,
        path=entry.path,
        begin=entry.begin,
        nbytes=entry.nbytes,
        decode=decode,
        unit=unit,
    )


def _dequantize(
    kind: GGMLQuantizationType, raw: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    return dequantize(raw.reshape(*shape[:-1], -1), kind).reshape(shape)


def _split_rotary(
    head_rows: int, decode: Decode, raw: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Rows of q and k as the model has them: i and i + d / 2 rotate together.

    GGUF files of the architecture `llama` store each head's rows interleaved, for a
    rotation that pairs 2 i with 2 i + 1.
    """
    stored = decode(raw, shape)
    pairs = stored.reshape(-1, head_rows // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)


def _ids(fields: dict[str, Any], *names: str) -> tuple[int, ...]:
    keys = [f"tokenizer.ggml.{name}_token_id" for name in names]
    found = [fields[key] for key in keys if key in fields]
    if not all(type(token) is int for token in found):
        raise ConversionError(f"{', '.join(keys)} must be token ids, not {found}")
    return tuple(dict.fromkeys(found))


def _eos_ids(fields: dict[str, Any]) -> tuple[int, ...]:
    declared = _ids(fields, "eos", "eot", "eom")
    tokens = fields.get("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return declared
    named = [
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    return tuple(dict.fromkeys((*declared, *named)))
