"""Small text files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.source import ConversionError


def read_text(path: Path) -> str:
    """A text file, its line ends as they are.

    Raises:
      ConversionError: if it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except ValueError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
      ConversionError: if it does not.
    """
    try:
        content = json.loads(read_text(path))
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path) if path.exists() else {}
