"""A folder as Hugging Face lays it out: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.files import read_json, read_json_if_there
from convert.source import ConversionError, Source, SourceTensor
from convert.tokenizer import from_folder

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def read(folder: Path) -> Source:
    """Open a folder.

    Args:
      folder: with config.json and model.safetensors, or shards and their index.

    Raises:
      ConversionError: if a file is missing, damaged or not supported.
    """
    if not (folder / "config.json").exists():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; convert {folder / ggufs[0]} itself" if ggufs else ""
        raise ConversionError(f"{folder} has no config.json{hint}")
    config = read_json(folder / "config.json")
    if "format_version" in config:
        raise ConversionError(f"{folder} is a polarjax checkpoint already")
    config.pop("rope_divisors", None)  # a word between the GGUF reader and the rules
    generation = read_json_if_there(folder / "generation_config.json")
    files, notes = from_folder(folder)
    return Source(
        config=config,
        tensors=_tensors(folder),
        files=files,
        eos_ids=_ids("eos_token_id", generation, config),
        bos_ids=_ids("bos_token_id", generation, config),
        notes=tuple(notes),
    )


def pickle_refusal(path: Path) -> str:
    """Why a pickle is not read, and what to do."""
    return (
        f"{path} is a pickle, and reading a pickle runs whatever code is in it: not "
        "read. Use the safetensors version of the checkpoint, or make one where you "
        "trust the file: `AutoModelForCausalLM.from_pretrained(SRC)"
        ".save_pretrained(DST)`"
    )


def _ids(name: str, *configs: dict[str, Any]) -> tuple[int, ...]:
    found: dict[int, None] = {}  # a set that keeps its order
    for config in configs:
        value = config.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int):
                raise ConversionError(f"{name} must be token ids, not {value!r}")
            found[token] = None
    return tuple(found)


def _tensors(folder: Path) -> dict[str, SourceTensor]:
    if (folder / _SINGLE).exists():
        return {tensor.name: tensor for tensor in _open(folder / _SINGLE)}
    if (folder / _INDEX).exists():
        return _sharded(folder)
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise ConversionError(pickle_refusal(pickles[0]))
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    found = f"; it has {', '.join(others[:3])}" if others else ""
    raise ConversionError(f"{folder} has neither {_SINGLE} nor {_INDEX}{found}")


def _sharded(folder: Path) -> dict[str, SourceTensor]:
    index = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{folder / _INDEX} has no weight_map")
    tensors: dict[str, SourceTensor] = {}
    for shard in sorted({str(shard) for shard in index.values()}):
        # An index is data: it must not lead out of the folder.
        if Path(shard).name != shard:
            raise ConversionError(f"{folder / _INDEX} names {shard!r}, not a file name")
        if not (folder / shard).exists():
            raise ConversionError(f"the shard {folder / shard} is missing")
        for tensor in _open(folder / shard):
            listed = index.get(tensor.name)
            if listed != shard:
                where = f"places in {listed}" if listed else "does not list"
                raise ConversionError(
                    f"{shard} holds {tensor.name}, which {_INDEX} {where}"
                )
            tensors[tensor.name] = tensor
    for name, shard in index.items():
        if name not in tensors:
            raise ConversionError(f"{_INDEX} places {name} in {shard}: it is not there")
    return tensors


def _open(path: Path) -> Iterable[SourceTensor]:
    try:
        # The reference implementation checks the header: sizes, gaps, overlaps.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is not a whole safetensors file: {error}"
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind not in _FLOATS:
            raise ConversionError(
                f"{name} in {path} is {kind}, not a float: quantised checkpoints are "
                "converted from their original or from GGUF"
            )
        begin, end = entry["data_offsets"]
        yield SourceTensor(
            name=name,
            stored_name=name,
            kind=kind,
            shape=shape,
            path=path,
            begin=8 + size + begin,
            nbytes=end - begin,
            decode=partial(_decode, _FLOATS[kind]),
        )


def _decode(dtype: Any, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return raw.view(dtype).reshape(shape)
