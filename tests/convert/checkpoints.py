"""Tiny checkpoints with random weights, written without torch or transformers."""

import itertools
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
}
Tensors = dict[str, np.ndarray]


def llama_tensors(config=LLAMA, seed=0) -> Tensors:
    """Random tensors of a LLaMA by Hugging Face's names, float32."""
    return _random(llama_shapes(config), seed)


def llama_shapes(config=LLAMA) -> dict[str, tuple[int, ...]]:
    """What these tensors are."""
    c = config
    m, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    h, k = c["num_attention_heads"], c["num_key_value_heads"]
    d = c.get("head_dim") or m // h
    shapes = {"model.embed_tokens.weight": (v, m), "model.norm.weight": (m,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, m)
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm": (m,),
            "self_attn.q_proj": (h * d, m),
            "self_attn.k_proj": (k * d, m),
            "self_attn.v_proj": (k * d, m),
            "self_attn.o_proj": (m, h * d),
            "post_attention_layernorm": (m,),
            "mlp.gate_proj": (f, m),
            "mlp.up_proj": (f, m),
            "mlp.down_proj": (m, f),
        }
        shapes |= {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
        kind = c["model_type"]
        biased = "qkv" if kind == "qwen2" else "qkvo" if c.get("attention_bias") else ""
        shapes |= {
            f"model.layers.{i}.self_attn.{n}_proj.bias": (rows,)
            for n, rows in zip("qkvo", (h * d, k * d, k * d, m), strict=True)
            if n in biased
        }
        if c.get("mlp_bias"):
            shapes |= {
                f"model.layers.{i}.mlp.{n}_proj.bias": (rows,)
                for n, rows in (("gate", f), ("up", f), ("down", m))
            }
        if kind == "qwen3":
            shapes |= {
                f"model.layers.{i}.self_attn.{n}_norm.weight": (d,) for n in "qk"
            }
    return shapes


def opt_tensors(config=OPT, seed=0) -> Tensors:
    """Random tensors of an OPT with every bias, by Hugging Face's names, float32."""
    c = config
    m, f, v = c["hidden_size"], c["ffn_dim"], c["vocab_size"]
    e = c["word_embed_proj_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (v, e),
        "embed_positions.weight": (c["max_position_embeddings"] + 2, m),
        "project_in.weight": (m, e),
        "project_out.weight": (e, m),
        "final_layer_norm.weight": (m,),
        "final_layer_norm.bias": (m,),
    }
    for i in range(c["num_hidden_layers"]):
        matrices = {f"self_attn.{n}_proj": (m, m) for n in ("q", "k", "v", "out")}
        matrices |= {"fc1": (f, m), "fc2": (m, f)}
        matrices |= {"self_attn_layer_norm": (m,), "final_layer_norm": (m,)}
        for name, shape in matrices.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            shapes[f"layers.{i}.{name}.bias"] = shape[:1]
    return _random({f"model.decoder.{n}": s for n, s in shapes.items()}, seed)


def _random(shapes, seed) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_hf(folder: Path, config=LLAMA, tensors: Tensors | None = None) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        llama_tensors(config) if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def write_sharded(folder: Path, config, tensors: Tensors, shards=3) -> Path:
    """The same, dealt out over several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def expected_llama(config, tensors: Tensors) -> Tensors:
    """Weights by path, as written out in the documentation, not by the rules."""
    t = {name.removeprefix("model."): array for name, array in tensors.items()}
    out = {
        "embed/tokens": t["embed_tokens.weight"],
        "final_norm/scale": t["norm.weight"],
    }
    if "lm_head.weight" in t:
        out["embed/head"] = t["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        out |= {
            f"layers_{i}/attention_norm/scale": t[f"layers.{i}.input_layernorm.weight"],
            f"layers_{i}/mlp_norm/scale": t[
                f"layers.{i}.post_attention_layernorm.weight"
            ],
            f"layers_{i}/attention/qkv": np.concatenate(
                [t[f"{attention}{n}_proj.weight"] for n in "qkv"]
            ),
            f"layers_{i}/attention/out": t[f"{attention}o_proj.weight"].T,
            f"layers_{i}/mlp/up": t[f"{mlp}up_proj.weight"],
            f"layers_{i}/mlp/gate": t[f"{mlp}gate_proj.weight"],
            f"layers_{i}/mlp/down": t[f"{mlp}down_proj.weight"].T,
        }
        if f"{attention}q_proj.bias" in t:
            out[f"layers_{i}/attention/qkv_bias"] = np.concatenate(
                [t[f"{attention}{n}_proj.bias"] for n in "qkv"]
            )
        if f"{attention}o_proj.bias" in t:
            out[f"layers_{i}/attention/out_bias"] = t[f"{attention}o_proj.bias"]
    return out


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them: i and i + d / 2 side by side."""
    d = rows.shape[0] // heads
    order = [
        head * d + pair + half * (d // 2)
        for head in range(heads)
        for pair in range(d // 2)
        for half in (0, 1)
    ]
    return rows[order]


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(config, tensors: Tensors) -> Tensors:
    """The same tensors by GGUF's names; q and k of a LLaMA are interleaved."""
    out = {}
    for name, array in tensors.items():
        stem, _, suffix = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, i, stem = stem.split(".", 3)
            layer = f"blk.{i}."
        rotated = config["model_type"] == "llama"
        if stem.endswith("q_proj") and rotated:
            array = interleave(array, config["num_attention_heads"])
        if stem.endswith("k_proj") and rotated:
            array = interleave(array, config["num_key_value_heads"])
        out[f"{layer}{GGUF_NAMES[stem]}.{suffix}"] = array
    return out


# Where each kind keeps its float16 scales; elsewhere any byte is a value.
_SCALES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)},
    **{"Q6_K": (208,), "IQ1_M": (), "NVFP4": ()},
    **dict.fromkeys(("IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ3_XXS", "IQ4_NL", "IQ4_XS"), (0,)),
}


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of one tensor; those that the package cannot write are random."""
    quantization = GGMLQuantizationType[kind]
    at = _SCALES.get(kind)
    if at is None:
        return gguf.quants.quantize(array, quantization)
    block, nbytes = gguf.GGML_QUANT_SIZES[quantization]
    rng = np.random.default_rng(array.size)
    blocks = rng.integers(0, 256, (array.size // block, nbytes), dtype=np.uint8)
    for begin in at:
        scale = rng.uniform(0.01, 0.02, (len(blocks), 1)).astype(np.float16)
        blocks[:, begin : begin + 2] = scale.view(np.uint8)
    if kind == "IQ1_M":  # a quarter of its scale is in each of the last 16-bit words
        scale = rng.uniform(0.01, 0.02, len(blocks)).astype(np.float16).view(np.uint16)
        words = blocks[:, -8:].view(np.uint16)
        for i in range(4):
            words[:, i] = (words[:, i] & 0xFFF) | ((scale >> (4 * i) & 0xF) << 12)
    return blocks.reshape(array.shape[0], -1)


def byte_level_fields() -> list[tuple]:
    """A byte-level tokenizer and a chat template, as `fields` of `write_gguf`."""
    letters = "tuvwxyz"
    tokens = [*letters, *(a + b for a in letters for b in letters)]
    tokens += [f"<{i}>" for i in range(LLAMA["vocab_size"] - len(tokens))]
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "smollm"),
        ("add_token_list", tokens),
        ("add_token_types", [1] * len(tokens)),
        ("add_token_merges", [" ".join(token) for token in tokens[7:56]]),
        ("add_eos_token_id", 2),
        ("add_chat_template", "{{ messages }}"),
    ]


def write_gguf(
    path: Path,
    config=LLAMA,
    tensors: Tensors | None = None,
    kind="F32",
    fields=(),
    part_tensors=0,
) -> dict[str, np.ndarray]:
    """A GGUF file of the architecture that the config names.

    Args:
      path: of the file.
      config: as config.json has it.
      tensors: by GGUF's names; None for those of `llama_tensors`.
      kind: of every matrix, or several that take turns; vectors are float32.
      fields: (method of `gguf.GGUFWriter`, arguments) for more metadata.
      part_tensors: in each of several files, whose names come of `path`; 0 for one.

    Returns:
      What each tensor's values are after quantisation.
    """
    if tensors is None:
        tensors = gguf_tensors(config, llama_tensors(config))
    c = config
    writer = gguf.GGUFWriter(path, config["model_type"], split_max_tensors=part_tensors)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(c["vocab_size"])
    for method, *arguments in fields:
        getattr(writer, method)(*arguments)
    stored = {}
    kinds = itertools.cycle([kind] if isinstance(kind, str) else kind)
    for name, array in tensors.items():
        used = GGMLQuantizationType[next(kinds) if array.ndim == 2 else "F32"]
        raw = quantize(array, used.name)
        writer.add_tensor(name, raw, raw_dtype=used)
        stored[name] = gguf.quants.dequantize(raw, used).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to a dtype that numpy may not know."""
    return array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
