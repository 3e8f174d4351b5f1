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

# The metadata of the largest vocabularies, and the list of tensors, take half of it.
_LARGEST_HEADER = 32 << 20  # bytes
_LARGEST_COUNT = 2**16  # of tensors
# In arrays, scores and types of a million tokens: as Python's they take twenty times
# the bytes that they have in the file.
_LARGEST_NUMBERS = 2**21
_LARGEST_ALIGNMENT = 2**16  # bytes
_STRING, _ARRAY = 8, 9
# A value may be any bytes, a token above all: those that are not UTF-8 become halves of
# characters, for who wants the value to judge.
_ANY_BYTES = "surrogateescape"
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
      name: of the tensor.
      kind: how it is stored.
      shape: outputs first; the file has them the other way round.
      path: of the file.
      begin: first byte in the file.
      nbytes: length in bytes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int


class _Cursor:
    """A position in the file that refuses to leave it."""

    def __init__(self, data: np.ndarray, path: Path):
        # Slices of a memory map take twenty times as long as those of a view.
        self.data, self.path, self.at = data.data, path, 0
        self.numbers = 0  # of arrays, so far

    def fail(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path} is truncated or damaged: {what}")

    def check(self, count: int) -> int:
        end = self.at + count
        if end > self.data.nbytes:
            raise self.fail(f"{count} bytes at byte {self.at} reach beyond its end")
        if end > _LARGEST_HEADER:
            raise self.fail(f"{count} bytes at byte {self.at} of metadata are too many")
        return end

    def take(self, count: int) -> memoryview:
        begin, self.at = self.at, self.check(count)
        return self.data[begin : self.at]

    def scalar(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def string(self, errors: str = "strict") -> str:
        at, part = self.at, self.take(self.scalar("<Q"))
        try:
            return str(part, "utf-8", errors)
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {at} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string(_ANY_BYTES)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"value type {kind} at byte {self.at - 4}")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            self.check(8 * count)  # and more: each begins with its length
            return [self.string(_ANY_BYTES) for _ in range(count)]
        if kind in _SCALARS:
            self.numbers += count
            if self.numbers > _LARGEST_NUMBERS:
                raise self.fail(f"{count} numbers at byte {self.at} are too many")
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
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
    if tensor_count > _LARGEST_COUNT:
        raise cursor.fail(f"{tensor_count} tensors (at byte 8) are too many")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise cursor.fail(f"the key {key!r} occurs twice")
        fields[key] = cursor.value()
    listed = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    powers = [2**i for i in range(_LARGEST_ALIGNMENT.bit_length())]
    if type(alignment) is not int or alignment not in powers:
        raise cursor.fail(
            f"general.alignment {alignment!r} is not a power of two up to {powers[-1]}"
        )
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
        raise cursor.fail(f"the tensor {name!r} has {rank} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
    if 0 in shape:
        raise cursor.fail(f"the tensor {name!r} has shape {list(shape)}")
    number, begin = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(f"the tensor {name!r} has unknown type {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.fail(
            f"the tensor {name!r} has rows of {shape[-1]}, not a multiple of "
            f"{kind.name}'s {block}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    return Entry(name, kind, shape, cursor.path, begin, nbytes)


def _check_layout(
    cursor: _Cursor, entries: list[Entry], start: int, alignment: int
) -> None:
    """The format leaves no gaps but for alignment; a damaged header does."""
    _check_padding(cursor, cursor.at, start)
    names, size = set(), cursor.data.nbytes
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
        _check_padding(cursor, end, entry.begin)
        end = entry.begin + entry.nbytes
        if end > size:
            raise cursor.fail(
                f"the tensor {entry.name!r} ends at byte {end}, the file at {size}"
            )
    if size > _align(end - start, alignment) + start:
        raise cursor.fail(f"bytes from {end} on belong to no tensor")
    _check_padding(cursor, end, size)


def _check_padding(cursor: _Cursor, begin: int, end: int) -> None:
    # Bytes that got lost or were added shift others to here.
    if any(cursor.data[begin:end]):
        raise cursor.fail(f"the padding from byte {begin} to {end} is not zero")


def _align(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
