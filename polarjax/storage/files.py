"""Files that others wrote: regular ones of a bounded size alone are opened.

A pipe would be waited for, a link to an endless device would fill the memory. A link to
a file will do: the hub's cache consists of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

# The largest tokenizer.json is about half of it. Python's objects take up to thirty
# times the bytes of their JSON, so what becomes such is kept smaller.
LARGEST_TEXT = 64 << 20  # bytes
LARGEST_TABLE = 12 << 20  # of 100,000 tensors, or 400,000 tokens
LARGEST_CONFIG = 3 << 20


class FileError(ValueError):
    """A file that is refused; the message is one clear sentence.

    Of whatever a file put into it: one line, and not longer than a reader bears.
    """

    def __init__(self, message: str):
        line = "".join(
            c if c.isprintable() else ascii(c)[1:-1] for c in _cut(message, 2000)
        )
        super().__init__(_cut(line, 900))


def _cut(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def is_there(path: Path, error: type[FileError] = FileError) -> bool:
    """Whether there is such a file or folder.

    Args:
      path: of it.
      error: to raise.

    Raises:
      FileError: if it is a link that leads nowhere: of the hub's cache, whose files
        have been deleted.
    """
    # os.path, as a name may be longer than Path accepts
    if os.path.islink(path) and not os.path.exists(path):
        raise error(
            f"{path} is a link to {os.readlink(path)}, which is not there: download it "
            "again"
        )
    return os.path.exists(path)


def check_file(
    path: Path, largest: int | None = None, error: type[FileError] = FileError
) -> int:
    """Raise unless there is a regular file.

    Args:
      path: of the file; a link to one will do.
      largest: bytes that it may have; None for any.
      error: to raise.

    Returns:
      Its bytes.

    Raises:
      FileError: if it is something else, cannot be read or is larger.
    """
    is_there(path, error)
    try:
        found = path.stat()
    except (OSError, ValueError) as reason:  # ValueError for a name that cannot be
        raise error(f"{path} cannot be read: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a file")
    if largest is not None and found.st_size > largest:
        raise error(f"{path} has {found.st_size} bytes; it may have {largest} at most")
    return found.st_size


def read_text(
    path: Path, largest: int = LARGEST_TEXT, error: type[FileError] = FileError
) -> str:
    """A text file, its line ends as they are.

    Args:
      path: of the file.
      largest: bytes that it may have.
      error: to raise.

    Raises:
      FileError: if it is no regular file, cannot be read, is not UTF-8, or larger.
    """
    size = check_file(path, largest, error)
    try:
        with path.open("rb") as stream:
            return stream.read(size).decode()  # the kernel's own files have no end
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason}") from None
    except ValueError as reason:
        raise error(f"{path} is not UTF-8 text: {reason}") from None


def parse_json(
    text: str, what: str, error: type[FileError] = FileError
) -> dict[str, Any]:
    """A JSON object in which no key occurs twice, and no half of a character.

    Readers do not agree on which one of two counts; halves cannot be written again.

    Args:
      text: JSON.
      what: it is, for messages.
      error: to raise.

    Raises:
      FileError: if it is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise error(f"{what} has the key {twice!r} twice")
        return record

    try:
        content = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except FileError:
        raise
    except (ValueError, RecursionError) as reason:
        raise error(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{what} must hold a JSON object")
    return content


def read_json(
    path: Path, largest: int = LARGEST_CONFIG, error: type[FileError] = FileError
) -> dict[str, Any]:
    """A file that holds a JSON object.

    Args:
      path: of the file.
      largest: bytes that it may have.
      error: to raise.

    Raises:
      FileError: if it does not, is no regular file, or is larger.
    """
    return parse_json(read_text(path, largest, error), str(path), error)


def read_json_if_there(
    path: Path, largest: int = LARGEST_CONFIG, error: type[FileError] = FileError
) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path, largest, error) if is_there(path, error) else {}
