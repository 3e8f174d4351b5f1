"""The way back: weights of ours as a folder that `transformers` loads.

Names, layout and configuration come from the rules that conversion goes by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer

from convert.core import DTYPES, check_range
from convert.rules import describe
from convert.rules.rule import Rule
from convert.source import ConversionError
from polarjax.config import ModelConfig
from polarjax.folder import new_folder, write_tensors
from polarjax.hub import load
from polarjax.model import weight_shapes
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, Tree, check_finite
from polarjax.sparsity.updates import merge_updates

SHARD_BYTES = 4 << 30
_HEADER = 256  # bytes of a shard's header that a tensor takes, at most


def export(
    source: str | Path,
    destination: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
) -> ModelConfig:
    """Write a polarjax checkpoint as a Hugging Face folder.

    The folder appears whole or not at all.

    Args:
      source: a folder of `convert` or `polarjax.save`.
      destination: the folder to make.
      adapter: whose updates the weights shall take in, as the sparse policy reads
        them; None for the original weights.
      dtype: of the tensors: "bfloat16", "float16" or "float32"; None for that of the
        checkpoint.

    Returns:
      What the model is.

    Raises:
      ConversionError: if transformers has no words for the model, or a number is too
        large for the dtype.
      FileExistsError: if there is something at `destination`.
      FileNotFoundError: if there is no checkpoint, or no adapter.
      ValueError: if they are damaged, or do not belong together.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    params = load(source, adapter=adapter)
    describe(params.config)  # before the work
    files = {}
    for name in (TOKENIZER_FILE, CHAT_TEMPLATE_FILE):
        path = Path(params.config.folder) / name
        if path.exists():
            files[name] = path.read_text(encoding="utf-8")
    write(
        *(destination, params.config, merge_updates(params).weights),
        dtype=dtype or str(params.dtype),
        files=files,
    )
    return params.config


def to_tensors(config: ModelConfig, weights: Tree) -> dict[str, np.ndarray]:
    """Weights by Hugging Face's names, outputs first.

    Args:
      config: of the model.
      weights: numpy arrays, as in `polarjax.Params`.

    Returns:
      Contiguous arrays of the weights' dtypes.

    Raises:
      ValueError: if there is no rule for a weight.
    """
    leaves: dict[str, Any] = flatten_dict(weights, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for rule in describe(config)[1]:
        for i in range(config.layers) if "{i}" in rule.target else (0,):
            leaf = leaves.pop(rule.target.replace("{i}", str(i)), None)
            if leaf is not None:
                tensors |= _sources(rule, i, leaf, config)
    if leaves:
        raise ValueError(f"no rule names {', '.join(sorted(leaves))}")
    return tensors


def _sources(
    rule: Rule, layer: int, leaf: np.ndarray, config: ModelConfig
) -> dict[str, np.ndarray]:
    heads = [getattr(config, name) for name in rule.heads]
    ends = np.cumsum(heads[:-1], dtype=int) * config.head_dim
    found = {}
    for name, part in zip(rule.sources, np.split(leaf, ends), strict=True):
        part = part.T if rule.transpose else part
        found[name.replace("{i}", str(layer))] = np.ascontiguousarray(part)
    return found


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
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
      path: the folder to make.
      config: what the model is, with the ids that start and end a text.
      weights: nested dict of arrays.
      dtype: of the tensors: "bfloat16", "float16" or "float32".
      shard_bytes: most bytes of a file of tensors.
      files: further text files by name, such as the tokenizer.

    Raises:
      ConversionError: if transformers has no words for the model, or a weight is beyond
        the dtype's range.
      FileExistsError: if there is something at `path`.
      ValueError: if a weight holds NaN, or is too large for a shard.
    """
    tensors = to_tensors(config, jax.tree.map(np.asarray, weights))
    for name, tensor in tensors.items():
        check_finite(name, tensor)
        with np.errstate(over="ignore"):
            tensors[name] = tensor.astype(DTYPES[dtype])
        check_range(name, tensors[name])
    files = dict(files or {})
    groups = shards(tensors, shard_bytes)
    contents = {"config.json": {**describe(config)[0], "torch_dtype": dtype}}
    if TOKENIZER_FILE in files:
        contents["tokenizer_config.json"] = _tokenizer_config(
            Tokenizer.from_str(files[TOKENIZER_FILE]), config
        )
    places: dict[str, str] = {}
    with new_folder(path) as folder:
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05}-of-{len(groups):05}.safetensors"
            part = {name: tensors[name] for name in group}
            write_tensors(folder / file, part, metadata={"format": "pt"})
            places |= dict.fromkeys(group, file)
        contents["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": places,
        }
        files |= {name: json.dumps(c, indent=2) + "\n" for name, c in contents.items()}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token": config.bos_ids, "eos_token": config.eos_ids}
    ids["pad_token"] = config.eos_ids
    for name, found in ids.items():
        token = tokenizer.id_to_token(found[0]) if found else None
        if token is not None:
            record[name] = token
    return record
