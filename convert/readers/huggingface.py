"""A folder as Hugging Face lays it out: config.json and safetensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.files import (
    LARGEST_TABLE,
    check_file,
    is_there,
    parse_json,
    read_json,
    read_json_if_there,
)
from convert.readers.names import unwrap
from convert.source import ConversionError, Source, SourceTensor
from convert.tokenizer import from_folder
from polarjax.storage.tensors import TENSORS

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"  # of PEFT's
_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# 30,000 tensors take about 4 MB; parsed, thirty times as much.
_LARGEST_HEADER = 4 << 20  # bytes
_LARGEST_RANK = 8


def read(folder: Path) -> Source:
    """Open a folder.

    Args:
      folder: with config.json and model.safetensors, or shards and their index.

    Raises:
      ConversionError: if a file is missing, damaged or not supported.
    """
    if not is_there(folder / "config.json"):
        raise ConversionError(no_config(folder))
    config = read_json(folder / "config.json")
    if (folder / TENSORS.format("00001")).exists():
        raise ConversionError(f"{folder} is a polarjax checkpoint already")
    config.pop("rope_divisors", None)  # a word between the GGUF reader and the rules
    generation = read_json_if_there(folder / "generation_config.json")
    files, notes = from_folder(folder)
    tensors, more = _tensors(folder)
    tensors, wrappers = unwrap(tensors)
    if wrappers:
        more.append(f"left out of the tensors' names: {wrappers}")
    if is_there(folder / ADAPTER_FILE):
        more.append(
            f"{folder} has an adapter too, which is not merged ({ADAPTER_FILE})"
        )
    return Source(
        config=config,
        tensors=tensors,
        files=files,
        eos_ids=_ids("eos_token_id", generation, config),
        bos_ids=_ids("bos_token_id", generation, config),
        notes=(*notes, *more),
        ours_alone=f"transformers does not load tensors whose names have {wrappers}"
        if wrappers
        else "",
    )


def no_config(folder: Path) -> str:
    """Why a folder without config.json is not read, and what to do."""
    if is_there(folder / ADAPTER_FILE):
        return adapter_refusal(folder)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; convert {folder / ggufs[0]} itself" if ggufs else ""
    return f"{folder} has no config.json{hint}"


def adapter_refusal(folder: Path, name: str | None = None) -> str:
    """Why an adapter of PEFT's is not read, and what to do.

    Args:
      folder: with its adapter_config.json.
      name: of the folder, for the message; None for its path.
    """
    name, record = name or str(folder), read_json(folder / ADAPTER_FILE)
    base = record.get("base_model_name_or_path") or "BASE"
    kind = record.get("peft_type")
    what = "a LoRA adapter" if kind == "LORA" else f"an adapter of PEFT's ({kind})"
    return (
        f"{name} is {what} of {base}, not a model: merge it with peft, "
        f"`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        f"{name!r}).merge_and_unload().save_pretrained(DST)`, and convert DST"
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


def _tensors(folder: Path) -> tuple[dict[str, SourceTensor], list[str]]:
    """By name, and notes."""
    if is_there(folder / _SINGLE):
        return {tensor.name: tensor for tensor in _open(folder / _SINGLE)}, []
    if is_there(folder / _INDEX):
        return _sharded(folder)
    if is_there(folder / ADAPTER_FILE):
        raise ConversionError(adapter_refusal(folder))
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise ConversionError(pickle_refusal(pickles[0]))
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    found = f"; it has {', '.join(others[:3])}" if others else ""
    raise ConversionError(f"{folder} has neither {_SINGLE} nor {_INDEX}{found}")


def _sharded(folder: Path) -> tuple[dict[str, SourceTensor], list[str]]:
    """As transformers reads them: the shards that the index names, and all in them.

    Of two tensors of a name that of the last file counts, wherever the index has it.
    """
    index = read_json(folder / _INDEX, LARGEST_TABLE).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{folder / _INDEX} has no weight_map")
    tensors: dict[str, SourceTensor] = {}
    for name, shard in index.items():
        # An index is data: it must not lead out of the folder. Links do, in Hugging
        # Face's cache, but those a user made, or their client.
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or shard in ("", ".."):
            raise ConversionError(
                f"{folder / _INDEX} places {name} in {shard!r}, not a file name"
            )
    for shard in sorted(set(index.values())):
        if not is_there(folder / shard):
            raise ConversionError(f"the shard {folder / shard} is missing")
        for tensor in _open(folder / shard):
            tensors[tensor.name] = tensor
    for name, shard in index.items():
        if name not in tensors:
            raise ConversionError(f"{_INDEX} places {name} in {shard}: it is not there")
    others = [name for name, x in tensors.items() if index.get(name) != x.path.name]
    if not others:
        return tensors, []
    name = others[0]
    note = (
        f"{len(others)} tensors are read from where {_INDEX} does not place them, as "
        f"transformers does, the last of its shards first: {name} from "
        f"{tensors[name].path.name}"
    )
    return tensors, [note]


def _open(path: Path) -> Iterable[SourceTensor]:
    size, start, header = _header(path)
    room = size - start
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, after = entry["data_offsets"]
        if kind not in _FLOATS:
            raise ConversionError(
                f"{name} in {path} is {kind}, not a float: quantised checkpoints are "
                "converted from their original or from GGUF"
            )
        nbytes = math.prod(shape) * np.dtype(_FLOATS[kind]).itemsize
        # Without gaps and overlaps, as the format is defined.
        if begin != end or after - begin != nbytes or after > room:
            raise ConversionError(
                f"{name} in {path} takes {nbytes} bytes of {kind} from byte {end} of "
                f"{room} on, but its data_offsets are {[begin, after]}: the file "
                "is truncated or damaged"
            )
        end = after
        yield SourceTensor(
            name=name,
            stored_name=name,
            kind=kind,
            shape=shape,
            path=path,
            begin=start + begin,
            nbytes=nbytes,
            decode=partial(_decode, _FLOATS[kind]),
        )
    if end != room:
        raise ConversionError(
            f"{path} is damaged: bytes from {end} of {room} on belong to no tensor"
        )


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """Size of a safetensors file, where its tensors begin, what it says of them."""
    size = check_file(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ConversionError(
                f"{path} is not a whole safetensors file: it has {size} bytes, its "
                f"header {length} (from 2 to {_LARGEST_HEADER} are possible)"
            )
        text = file.read(length)
    what = f"the header of {path}"
    try:
        header = parse_json(text.decode(), what)
    except UnicodeDecodeError as error:
        raise ConversionError(f"{what} is not UTF-8 text: {error}") from None
    return size, 8 + length, header


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The data_offsets of an entry whose fields have the types that they must."""
    match entry:
        case {"dtype": str(), "shape": list(shape), "data_offsets": [begin, end]}:
            numbers = [*shape[:_LARGEST_RANK], begin, end]
            whole = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            if whole and len(shape) <= _LARGEST_RANK:
                return begin, end
    raise ConversionError(
        f"{name} in {path} needs a dtype, a shape and two data_offsets, not {entry!r}"
    )


def _decode(dtype: Any, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return raw.view(dtype).reshape(shape)
