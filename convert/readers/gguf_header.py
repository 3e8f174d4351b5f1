"""The header of a GGUF file, read with every length checked against the file.

The `gguf` package's own reader trusts the counts it finds: a damaged one makes it
loop or allocate without bound. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.source import ConversionError

MAGIC = b"GGUF"

_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f"},
    **{7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
      name: of the tensor.
      kind: how it is stored.
      shape: outputs first; the file has them the other way round.
      begin: first byte in the file.
      nbytes: length in bytes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class _Cursor:
    """A position in the file that refuses to leave it."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path} is truncated or damaged: {what}")

    def take(self, count: int) -> np.ndarray:
        end = self.at + count
        if end > self.data.size:
            raise self.fail(f"{count} bytes at byte {self.at} reach beyond its end")
        part = self.data[self.at : end]
        self.at = end
        return part

    def scalar(self, kind: str) -> Any:
        part = self.take(struct.calcsize(kind)).tobytes()
        return struct.unpack(kind, part)[0]

    def string(self) -> str:
        at, part = self.at, self.take(self.scalar("<Q")).tobytes()
        try:
            return part.decode()
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {at} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"value type {kind} at byte {self.at - 4}")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            # Ends at the file's end at the latest, as the other loops here.
            return [self.string() for _ in range(count)]
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return self.take(count * dtype.itemsize).view(dtype).tolist()
        raise self.fail(f"array type {kind} at byte {self.at - 12}")


def read_header(data: np.ndarray, path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Read metadata and the list of tensors.

    Args:
      data: uint8, the file, mapped.
      path: for messages.

    Returns:
      Metadata by key, and the tensors in the order of their bytes.

    Raises:
      ConversionError: if the file is truncated, damaged or of another version.
    """
    cursor = _Cursor(data, path)
    cursor.take(len(MAGIC))
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ConversionError(
            f"{path} is GGUF version {version}; versions 2 and 3 are supported, in "
            "little-endian byte order"
        )
    tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise cursor.fail(f"the key {key!r} occurs twice")
        fields[key] = cursor.value()
    listed = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment {alignment!r} is not a power of two")
    start = _align(cursor.at, alignment)
    entries = [
        dataclasses.replace(entry, begin=start + entry.begin)
        for entry in sorted(listed, key=lambda entry: entry.begin)
    ]
    _check_layout(cursor, entries, start, alignment)
    return fields, entries


def _tensor(cursor: _Cursor) -> Entry:
    name, rank = cursor.string(), cursor.scalar("<I")
    if not 1 <= rank <= 4:
        raise cursor.fail(f"{name!r} has {rank} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
    if 0 in shape:
        raise cursor.fail(f"{name!r} has shape {list(shape)}")
    number, begin = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(f"{name!r} has unknown type {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.fail(
            f"{name!r} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    return Entry(name, kind, shape, begin, nbytes)


def _check_layout(
    cursor: _Cursor, entries: list[Entry], start: int, alignment: int
) -> None:
    """The format leaves no gaps but for alignment; a damaged header does."""
    names = set()
    end = start
    for entry in entries:
        if entry.name in names:
            raise cursor.fail(f"the tensor {entry.name!r} occurs twice")
        names.add(entry.name)
        if entry.begin != _align(end - start, alignment) + start:
            raise cursor.fail(
                f"the tensor {entry.name!r} begins at byte {entry.begin}, but what is "
                f"before it ends at {end}"
            )
        end = entry.begin + entry.nbytes
        if end > cursor.data.size:
            raise cursor.fail(
                f"the tensor {entry.name!r} ends at byte {end}, the file at "
                f"{cursor.data.size}"
            )
    if cursor.data.size > _align(end - start, alignment) + start:
        raise cursor.fail(f"bytes from {end} on belong to no tensor")


def _align(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
