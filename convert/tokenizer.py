"""Carry a tokenizer and its chat template over, or rebuild it from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.files import is_there, read_json_if_there, read_text
from convert.source import ConversionError
from convert.tokenizing import folder as folders
from convert.tokenizing import gguf
from convert.tokenizing.no_text import NoTextError
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_FILE

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
    files, notes = {}, []
    try:
        model = read_json_if_there(folder / "config.json")
        files[TOKENIZER_FILE], notes = folders.read(folder, model, config)
    except NoTextError as error:
        notes = [f"{error}: {_IDS_ALONE}"]
    template = _folder_template(folder, config)
    if template:
        files[CHAT_TEMPLATE_FILE] = template
    return files, notes


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    if is_there(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    try:
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
    except (KeyError, TypeError):
        template = False
    if not isinstance(template, str | None):
        raise ConversionError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a "
            "list of named texts"
        )
    return template


def from_gguf(fields: dict[str, Any]) -> tuple[Files, list[str]]:
    """Rebuild the tokenizer that a GGUF file's metadata describe.

    Args:
      fields: the metadata.

    Returns:
      Text files by name, and notes for the user.

    Raises:
      ConversionError: if the description contradicts itself.
    """
    files, notes = {}, []
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        if gguf.as_bytes(template) is None:
            files[CHAT_TEMPLATE_FILE] = template
        else:
            notes.append("the file's chat template is not UTF-8: it is left out")
    try:
        files[TOKENIZER_FILE] = gguf.read(fields)
    except NoTextError as error:
        notes.append(f"{error}: {_IDS_ALONE}")
    return files, notes
