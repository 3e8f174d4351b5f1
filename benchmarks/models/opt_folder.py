"""Write an OPT as Hugging Face lays it out: what `python -m convert` reads, backwards.

The names and the layout of the tensors come from the conversion's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save
from tokenizers import Tokenizer

from convert.core import DTYPES
from convert.rules.opt import RULES
from polarjax.config import ModelConfig
from polarjax.model import weight_shapes
from polarjax.params import TOKENIZER_FILE, Tree, check_finite, new_folder

_HEADER = 256  # bytes of a shard's header that a tensor takes, at most


def to_tensors(config: ModelConfig, weights: Tree) -> dict[str, np.ndarray]:
    """Weights by Hugging Face's names, outputs first.

    Args:
      config: of an OPT.
      weights: numpy arrays, as in `polarjax.Params`.

    Returns:
      Contiguous arrays of the weights' dtypes.

    Raises:
      ValueError: if there is no rule for a weight.
    """
    leaves: dict[str, Any] = flatten_dict(weights, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for rule in RULES:
        for i in range(config.layers) if "{i}" in rule.target else (0,):
            leaf = leaves.pop(rule.target.replace("{i}", str(i)), None)
            if leaf is None:
                continue
            heads = [getattr(config, name) for name in rule.heads]
            ends = np.cumsum(heads[:-1], dtype=int) * config.head_dim
            for name, part in zip(rule.sources, np.split(leaf, ends), strict=True):
                part = part.T if rule.transpose else part
                tensors[name.replace("{i}", str(i))] = np.ascontiguousarray(part)
    if leaves:
        raise ValueError(f"no rule names {', '.join(sorted(leaves))}")
    return tensors


def configuration(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of OPT's config.json.

    Args:
      config: of the model.
      dtype: of the file's tensors.
    """
    end = config.eos_ids[0]
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "word_embed_proj_dim": config.embed_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.neurons,
        "max_position_embeddings": config.context,
        "activation_function": config.activation,
        "do_layer_norm_before": True,
        "enable_bias": config.mlp_bias,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tied_embeddings,
        "dropout": 0.0,
        "bos_token_id": config.bos_ids[0],
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": dtype,
    }


def shards(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    """Group tensors, in order, into files.

    Args:
      tensors: by name.
      limit: most bytes of a file.

    Returns:
      The names in each file.

    Raises:
      ValueError: if a tensor alone is larger.
    """
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.nbytes + _HEADER
        if size > limit:
            raise ValueError(
                f"{name} takes {size:,} bytes in {tensor.dtype}, but a shard may have "
                f"{limit:,}: raise the limit, or take a smaller dtype"
            )
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def check_shards(config: ModelConfig, dtype: str, limit: int) -> None:
    """Raise ValueError unless the model can be written so; arguments as `write`."""
    empty = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, DTYPES[dtype]), weight_shapes(config)
    )
    shards(to_tensors(config, empty), limit)


def write(
    path: str | Path,
    config: ModelConfig,
    weights: Tree,
    tokenizer: Tokenizer,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
      path: the folder to make.
      config: what the model is, with the ids that start and end a text.
      weights: nested dict of arrays.
      tokenizer: of the model.
      dtype: of the tensors: "bfloat16", "float16" or "float32".
      shard_bytes: most bytes of a file of tensors.
      files: further text files by name.

    Raises:
      FileExistsError: if there is something at `path`.
      ValueError: if a weight holds NaN, or is too large for a shard.
    """
    stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(DTYPES[dtype]), weights)
    tensors = to_tensors(config, stored)
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    groups = shards(tensors, shard_bytes)
    end = tokenizer.id_to_token(config.eos_ids[0])
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    places: dict[str, str] = {}
    with new_folder(path) as folder:
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05}-of-{len(groups):05}.safetensors"
            part = {name: tensors[name] for name in group}
            (folder / file).write_bytes(save(part, metadata={"format": "pt"}))
            places |= dict.fromkeys(group, file)
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": places,
        }
        contents = {
            "config.json": configuration(config, dtype),
            "model.safetensors.index.json": index,
            "tokenizer_config.json": names,
        }
        texts = {name: json.dumps(c, indent=2) + "\n" for name, c in contents.items()}
        texts |= {TOKENIZER_FILE: tokenizer.to_str(pretty=True), **(files or {})}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
