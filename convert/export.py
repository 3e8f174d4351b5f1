"""The way back: weights of ours as a folder that `transformers` loads.

Names, layout and configuration come from the rules that conversion goes by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer

from convert.core import DTYPES, check_range
from convert.places import Place, find_places
from convert.rules import describe
from convert.source import ConversionError
from polarjax.config import ModelConfig
from polarjax.model import check_weights
from polarjax.params import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Params,
    Tree,
    check_finite,
    text_files,
)
from polarjax.policies.updates import merge_updates
from polarjax.storage.folder import check_room, new_folder, write_tensors

SHARD_BYTES = 4 << 30
_HEADER = 256  # bytes of a shard's header that a tensor takes, at most


def export(
    params: Params, destination: str | Path, *, dtype: str | None = None
) -> ModelConfig:
    """Write a model as a Hugging Face folder.

    The folder appears whole or not at all.

    Args:
      params: a model, whose weights take in the updates of its adapter, as the sparse
        policy reads them.
      destination: the folder to make.
      dtype: of the tensors: "bfloat16", "float16" or "float32"; None for the model's.

    Returns:
      What the model is.

    Raises:
      ConversionError: if transformers has no words for the model, or a number is too
        large for the dtype.
      FileExistsError: if there is something at `destination`.
    """
    check_destination(destination, dtype)
    describe(params.config)  # before the work
    write(
        destination,
        params.config,
        merge_updates(params).weights,
        dtype=dtype or str(params.dtype),
        files=text_files(params.config),
    )
    return params.config


def check_destination(destination: str | Path, dtype: str | None) -> None:
    """Raise unless `export` may write there, before a model is loaded.

    Args:
      destination: the folder to make.
      dtype: of its tensors, None for the model's.

    Raises:
      ConversionError: if there is no such dtype.
      FileExistsError: if there is something at `destination`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if Path(destination).exists():
        raise FileExistsError(
            f"{destination} exists: choose another place, or remove it yourself"
        )


def shards(config: ModelConfig, dtype: str, limit: int) -> list[dict[str, Place]]:
    """Deal the tensors out to files.

    Args:
      config: of the model.
      dtype: of the tensors: "bfloat16", "float16" or "float32".
      limit: most bytes of a file.

    Returns:
      What is in each file, by Hugging Face's name.

    Raises:
      ConversionError: if transformers has no words for the model.
      ValueError: if a tensor alone is larger.
    """
    groups: list[dict[str, Place]] = []
    room = 0
    _, rules = describe(config)
    for name, place in find_places(config, rules)[0].items():
        size = math.prod(place.shape) * np.dtype(DTYPES[dtype]).itemsize + _HEADER
        if size > limit:
            raise ValueError(
                f"{name} takes {size:,} bytes in {dtype}, but a shard may have "
                f"{limit:,}: raise the limit, or take a smaller dtype"
            )
        if size > room:
            groups.append({})
            room = limit
        groups[-1][name] = place
        room -= size
    return groups


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
      OSError: if the disk is too small or cannot be written.
      ValueError: if a weight holds NaN, is too large for a shard, or not of this model.
    """
    files = dict(files or {})
    groups = shards(config, dtype, shard_bytes)
    contents = {"config.json": {**describe(config)[0], "torch_dtype": dtype}}
    roles = files.pop(TOKENIZER_CONFIG_FILE, None)
    if TOKENIZER_FILE in files:
        contents["tokenizer_config.json"] = _tokenizer_config(
            Tokenizer.from_str(files[TOKENIZER_FILE]), config, roles
        )
        named = contents["tokenizer_config.json"].get("chat_template")
        if named and CHAT_TEMPLATE_FILE in files:
            # transformers reads no further ones where the default is a file
            text = files.pop(CHAT_TEMPLATE_FILE)
            named.insert(0, {"name": "default", "template": text})
    check_weights(weights, config)
    leaves: dict[str, Any] = flatten_dict(weights, sep="/")
    index: dict[str, str] = {}
    total = 0
    sizes = (math.prod(place.shape) for group in groups for place in group.values())
    nbytes = sum(sizes) * np.dtype(DTYPES[dtype]).itemsize
    with new_folder(path) as folder:
        check_room(path, folder, nbytes)
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05}-of-{len(groups):05}.safetensors"
            part = {
                name: _tensor(name, place, leaves, DTYPES[dtype])
                for name, place in group.items()
            }
            write_tensors(folder / file, part, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
            total += sum(tensor.nbytes for tensor in part.values())
        contents["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": index,
        }
        files |= {name: json.dumps(c, indent=2) + "\n" for name, c in contents.items()}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def _tensor(
    name: str, place: Place, weights: Mapping[str, Any], dtype: Any
) -> np.ndarray:
    values = np.asarray(weights[place.target])[place.rows]
    check_finite(name, values)
    with np.errstate(over="ignore"):
        narrowed = np.ascontiguousarray(values.T if place.transpose else values, dtype)
    check_range(name, narrowed)
    return narrowed


def _tokenizer_config(
    tokenizer: Tokenizer, config: ModelConfig, roles: str | None
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    if roles is not None:
        return record | json.loads(roles)
    ids = {"bos_token": config.bos_ids, "eos_token": config.eos_ids}
    ids["pad_token"] = config.eos_ids
    for name, found in ids.items():
        token = tokenizer.id_to_token(found[0]) if found else None
        if token is not None:
            record[name] = token
    return record
