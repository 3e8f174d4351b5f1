"""Small text files of a checkpoint."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from convert.source import ConversionError

# The largest tokenizer.json is about half of it. Python's objects take up to thirty
# times the bytes of their JSON, so what becomes such is kept smaller.
LARGEST_TEXT = 64 << 20  # bytes
LARGEST_TABLE = 12 << 20  # of 100,000 tensors, or 400,000 tokens
LARGEST_CONFIG = 3 << 20


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
      ConversionError: if it is a link that leads nowhere: of the hub's cache, whose
        files have been deleted.
    """
    # os.path, as a name may be longer than Path accepts
    if os.path.islink(path) and not os.path.exists(path):
        raise ConversionError(
            f"{path} is a link to {os.readlink(path)}, which is not there: download it "
            "again"
        )
    return os.path.exists(path)


def check_file(path: Path, largest: int | None = None) -> int:
    """Raise unless there is a file; a pipe would be waited for.

    Args:
      path: of the file; a link to one will do.
      largest: bytes that it may have; None for any.

    Returns:
      Its bytes.

    Raises:
      ConversionError: if it is something else, cannot be read or is larger.
    """
    is_there(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError for a name that cannot be
        raise ConversionError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConversionError(f"{path} is not a file")
    if largest is not None and found.st_size > largest:
        raise ConversionError(
            f"{path} has {found.st_size} bytes; it may have {largest} at most"
        )
    return found.st_size


def parse_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice, and no half of a character.

    Readers do not agree on which one of two counts; halves cannot be written again.

    Args:
      text: JSON.
      what: it is, for messages.

    Raises:
      ConversionError: if it is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ConversionError(f"{what} has the key {twice!r} twice")
        return record

    try:
        content = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{what} must hold a JSON object")
    return content


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """A text file, its line ends as they are.

    Args:
      path: of the file.
      largest: bytes that it may have.

    Raises:
      ConversionError: if it is not UTF-8, or larger.
    """
    check_file(path, largest)
    try:
        return path.read_bytes().decode()
    except ValueError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """A file that holds a JSON object.

    Args:
      path: of the file.
      largest: bytes that it may have.

    Raises:
      ConversionError: if it does not, or is larger.
    """
    return parse_json(read_text(path, largest), str(path))


def read_json_if_there(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path, largest) if is_there(path) else {}
