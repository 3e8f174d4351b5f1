"""Checksums of a folder's files: against accidents, at the speed of a disk."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

from polarjax.storage.files import FileError, check_file, read_json

CHECKSUMS_FILE = "checksums.json"
# Bytes to read for the reason why a folder does not load: a second's.
REASON_BYTES = 1 << 30


def checksum(content: bytes) -> str:
    """CRC-32 in hexadecimal, which finds every flipped bit."""
    return f"{zlib.crc32(content):08x}"


def file_checksum(file: Path) -> str:
    """As `checksum`, of a regular file.

    Raises:
      FileError: if it is none.
    """
    left, value = check_file(file), 0
    with file.open("rb") as stream:
        # Not to the end: the kernel's own files have none.
        while block := stream.read(min(left, 2**22)):
            value = zlib.crc32(block, value)
            left -= len(block)
    return f"{value:08x}"


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write them beside the files.

    Args:
      folder: of ours.
      sums: by the name of the file.
    """
    text = json.dumps(dict(sums), indent=2) + "\n"
    (folder / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """What `write_checksums` wrote.

    Raises:
      FileError: if it is missing or damaged.
    """
    try:
        found = read_json(folder / CHECKSUMS_FILE)
    except FileError as error:
        raise FileError(
            f"{folder / CHECKSUMS_FILE} is missing or damaged: {error}"
        ) from None
    return {name: str(value) for name, value in found.items()}


def check_text(folder: Path, name: str, text: str, sums: Mapping[str, str]) -> None:
    """Raise unless a text file, which people may change, is what was written.

    Args:
      folder: of the file.
      name: of the file.
      text: what it holds.
      sums: of the folder; where they lack the file, nothing is known of it.

    Raises:
      FileError: naming it.
    """
    if name in sums and checksum(text.encode()) != sums[name]:
        raise FileError(
            f"{folder} is damaged: {name} is not what was written; if you changed it "
            f"on purpose, take its line out of {CHECKSUMS_FILE}"
        )


def check_files(folder: Path, names: Mapping[str, str], most: float = math.inf) -> None:
    """Raise unless files are, byte for byte, what was written.

    Args:
      folder: of the files.
      names: checksums by the names of the files.
      most: bytes to read of them all; files beyond are left out.

    Raises:
      FileError: naming the first that is missing, or that is not.
    """
    for name, right in names.items():
        if not (folder / name).exists():
            raise FileError(f"{folder} is damaged: {name} is missing")
        most -= check_file(folder / name)
        if most >= 0 and file_checksum(folder / name) != right:
            raise FileError(f"{folder} is damaged: {name} is not what was written")
