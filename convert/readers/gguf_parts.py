"""GGUF files in parts, as `llama-gguf-split` makes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import check_file, is_there
from convert.readers.gguf_header import MAGIC, Entry, read_header
from convert.source import ConversionError

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)
_MOST = 2**12  # parts


def part_names(name: str) -> list[str]:
    """The names of all parts, in order, from that of any; else the name alone.

    Args:
      name: of a file; such as "model-00002-of-00003.gguf".
    """
    found = _PART.fullmatch(name)
    if not found or not 1 <= int(found[2]) <= int(found[3]) <= _MOST:
        return [name]
    start, _, count, end = found.groups()
    return [f"{start}-{i:05}-of-{count}{end}" for i in range(1, int(count) + 1)]


def read_parts(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Read metadata and the list of tensors of a file, and of all its other parts.

    The first part alone has the metadata.

    Args:
      path: of the file, or of any of its parts.

    Returns:
      As `read_header`; tensors by part.

    Raises:
      ConversionError: if a part is missing, or another file's.
    """
    fields, entries = _read(path)
    if "split.count" not in fields or fields["split.count"] == 1:
        return fields, entries
    number, count = (_whole(fields, f"split.{x}", path) for x in ("no", "count"))
    parts = [path.with_name(name) for name in part_names(path.name)]
    if len(parts) != count or not 0 <= number < count or parts[number] != path:
        raise ConversionError(
            f"{path} is one part of {count}, number {number + 1}: give it its name "
            f"back, which ends in -{number + 1:05}-of-{count:05}.gguf, so that the "
            "others are found beside it"
        )
    for part in parts:
        if not is_there(part):
            raise ConversionError(
                f"{path} is one of {count} parts, but {part} is missing"
            )
    first: dict[str, Any] = {}
    names: dict[str, Path] = {}
    found: list[Entry] = []
    for i, part in enumerate(parts):
        fields, entries = _read(part)
        first = first or fields
        its = [_whole(fields, f"split.{x}", part) for x in ("no", "count")]
        if its != [i, count]:
            raise ConversionError(
                f"{part} is part {its[0] + 1} of {its[1]}, not {i + 1} of {count}"
            )
        for entry in entries:
            if entry.name in names:
                raise ConversionError(
                    f"{part} has the tensor {entry.name!r}, and so has "
                    f"{names[entry.name]}"
                )
            names[entry.name] = part
        found += entries
    total = _whole(first, "split.tensors.count", parts[0])
    if len(found) != total:
        raise ConversionError(
            f"the {count} parts of {path} have {len(found)} tensors, not {total}: one "
            "is another model's"
        )
    return first, found


def _read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    check_file(path)
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ConversionError(f"{path} is not a GGUF file: it begins with {magic!r}")
    return read_header(np.memmap(path, mode="r"), path)


def _whole(fields: dict[str, Any], key: str, path: Path) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise ConversionError(f"{path}: {key} must be a number, not {value!r}")
    return value
