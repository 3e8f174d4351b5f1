"""Small text files of a checkpoint, refused with conversion's own error."""

from __future__ import annotations

import functools

from convert.source import ConversionError
from polarjax.storage import files
from polarjax.storage.files import LARGEST_CONFIG, LARGEST_TABLE, LARGEST_TEXT

__all__ = [
    "LARGEST_CONFIG",
    "LARGEST_TABLE",
    "LARGEST_TEXT",
    "check_file",
    "is_there",
    "parse_json",
    "read_json",
    "read_json_if_there",
    "read_text",
]

is_there = functools.partial(files.is_there, error=ConversionError)
check_file = functools.partial(files.check_file, error=ConversionError)
read_text = functools.partial(files.read_text, error=ConversionError)
parse_json = functools.partial(files.parse_json, error=ConversionError)
read_json = functools.partial(files.read_json, error=ConversionError)
read_json_if_there = functools.partial(files.read_json_if_there, error=ConversionError)
