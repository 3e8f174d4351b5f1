"""What chat templates need beside their text: tokens by role, templates by name.

It becomes the checkpoint's tokenizer_config.json, in the words of Hugging Face's: texts
of tokens, and under "chat_template" the templates that are not the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files import is_there, read_text
from convert.source import ConversionError
from convert.tokenizing.gguf import as_bytes
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

TEMPLATES_FOLDER = "additional_chat_templates"
_DEFAULT = "default"

# GGUF's words for the roles.
_IN_GGUF = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


def from_folder(
    folder: Path, config: Mapping[str, Any], roles: dict[str, str] | None
) -> dict[str, str]:
    """Read the chat templates of a Hugging Face folder.

    Args:
      folder: of the checkpoint.
      config: what its tokenizer_config.json holds.
      roles: texts of its special tokens by role; None without a tokenizer.

    Returns:
      Text files by name: the templates, and the roles.

    Raises:
      ConversionError: if a file is damaged.
    """
    return _files(roles, _folder_templates(folder, config))


def from_gguf(
    fields: Mapping[str, Any], tokenizer: bool
) -> tuple[dict[str, str], list[str]]:
    """Read the roles of tokens and the chat templates of a GGUF file.

    Args:
      fields: the metadata.
      tokenizer: whether there is a tokenizer to serve.

    Returns:
      Text files by name, and notes for the user.
    """
    start = "tokenizer.chat_template"
    templates, notes = {}, []
    for key, text in fields.items():
        named = key == start or key.startswith(f"{start}.")
        if named and isinstance(text, str):
            if as_bytes(key + text) is None:
                templates[key[len(start) :].removeprefix(".") or _DEFAULT] = text
            else:
                notes.append("the file's chat template is not UTF-8: it is left out")
    if not tokenizer:
        return _files(None, templates), notes
    roles, tokens = {}, fields["tokenizer.ggml.tokens"]
    for role, word in _IN_GGUF.items():
        i = fields.get(f"tokenizer.ggml.{word}_token_id")
        if type(i) is int and 0 <= i < len(tokens) and as_bytes(tokens[i]) is None:
            roles[role] = tokens[i]
    return _files(roles, templates), notes


def _files(roles: dict[str, str] | None, templates: dict[str, str]) -> dict[str, str]:
    files = {}
    named = [
        {"name": name, "template": text}
        for name, text in templates.items()
        if name != _DEFAULT
    ]
    if roles is not None:
        record = {**roles, **({"chat_template": named} if named else {})}
        files[TOKENIZER_CONFIG_FILE] = json.dumps(record, indent=2) + "\n"
    if _DEFAULT in templates:
        files[CHAT_TEMPLATE_FILE] = templates[_DEFAULT]
    return files


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; files of their own win over the configuration's."""
    templates = {}
    if is_there(folder / CHAT_TEMPLATE_FILE):
        templates[_DEFAULT] = read_text(folder / CHAT_TEMPLATE_FILE)
    for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        templates[path.stem] = read_text(path)
    if templates:
        return templates
    given = config.get("chat_template")
    if isinstance(given, str):
        return {_DEFAULT: given} if given else {}
    named = given or []
    if not isinstance(named, list) or not all(map(_is_named_text, named)):
        raise ConversionError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a "
            "list of named texts"
        )
    return {entry["name"]: entry["template"] for entry in named}


def _is_named_text(entry: Any) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False
