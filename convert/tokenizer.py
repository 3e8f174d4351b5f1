"""Carry a tokenizer and its chat template over, or rebuild it from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert import special_tokens
from convert.files import read_json_if_there
from convert.tokenizing import folder as folders
from convert.tokenizing import gguf
from convert.tokenizing.no_text import NoTextError
from polarjax.params import TOKENIZER_FILE

Files = dict[str, str]

_IDS_ALONE = "the checkpoint will serve token ids, not text"


def from_folder(folder: Path) -> tuple[Files, list[str]]:
    """Read the tokenizer and the chat template of a Hugging Face folder.

    Args:
      folder: of the checkpoint.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if a file is damaged.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    tokenizer: Files = {}
    roles = None
    try:
        model = read_json_if_there(folder / "config.json")
        tokenizer[TOKENIZER_FILE], notes = folders.read(folder, model, config)
        roles = folders.read_roles(folder, model, config)
    except NoTextError as error:
        notes = [f"{error}: {_IDS_ALONE}"]
    return special_tokens.from_folder(folder, config, roles) | tokenizer, notes


def from_gguf(fields: dict[str, Any]) -> tuple[Files, list[str]]:
    """Rebuild the tokenizer that a GGUF file's metadata describe.

    Args:
      fields: the metadata.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if the description contradicts itself.
    """
    tokenizer: Files = {}
    told: list[str] = []
    try:
        tokenizer[TOKENIZER_FILE] = gguf.read(fields)
    except NoTextError as error:
        told.append(f"{error}: {_IDS_ALONE}")
    files, notes = special_tokens.from_gguf(fields, bool(tokenizer))
    return files | tokenizer, notes + told
