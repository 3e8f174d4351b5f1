"""What can be converted out of a repository of the Hugging Face hub."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from convert.files import read_json
from convert.readers import PICKLES
from convert.readers.gguf_parts import part_names
from convert.readers.huggingface import (
    ADAPTER_FILE,
    adapter_refusal,
    pickle_refusal,
)
from convert.rules import understand
from convert.source import ConversionError
from convert.special_tokens import TEMPLATES_FOLDER
from polarjax.storage.folder import CONFIG_FILE
from polarjax.storage.repository import Repository

_TEXTS = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "tiktoken.model")
_TEMPLATES = f"{TEMPLATES_FOLDER}/*.jinja"
# Other formats are in folders; Mistral's own holds the same weights again.
_OTHERS = ("*/*", "consolidated*")


def locate(source: str | Path) -> Path:
    """Folder or file of a source: a path wins over an id of the hub.

    Args:
      source: a path, or "org/name" or "org/name/file.gguf", which may end in
        "@revision"; a `Path` is never an id.

    Raises:
      ConversionError: if what the hub has cannot be converted.
      FileNotFoundError: if a str is neither, or the repository cannot be had.
    """
    if isinstance(source, Path) or Path(source).exists():
        return Path(source)
    return download(Repository.parse(source, f"no such file or folder: {source}"))


def download(repository: Repository) -> Path:
    """Bring a checkpoint into the hub's cache; what cannot be converted stays there.

    Args:
      repository: with safetensors, or that names a GGUF file.

    Returns:
      The folder, or the file.

    Raises:
      ConversionError: if there is nothing to convert, or the architecture is not
        supported.
      FileNotFoundError: if the repository cannot be had.
    """
    name, files = repository.name, repository.files()
    ggufs = [file for file in files if file.endswith(".gguf")]
    if repository.file:
        if repository.file not in ggufs:
            raise ConversionError(
                f"{name} has no {repository.file}; it has {', '.join(ggufs) or 'none'}"
            )
        parts = part_names(repository.file)  # of which any may be named
        if missing := [part for part in parts if part not in ggufs]:
            raise ConversionError(f"{name} has {repository.file}, but no {missing[0]}")
        return repository.download(*parts) / repository.file
    if repository.is_checkpoint():
        raise ConversionError(f"{name} is a polarjax checkpoint already: load it")
    if CONFIG_FILE not in files and ADAPTER_FILE in files:
        raise ConversionError(adapter_refusal(repository.download(ADAPTER_FILE), name))
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        if ggufs:
            raise ConversionError(
                f"{name} has GGUF files alone: name one, such as {name}/{ggufs[0]}"
            )
        if pickles := [file for file in files if file.endswith(PICKLES)]:
            raise ConversionError(pickle_refusal(Path(name) / pickles[0]))
    if CONFIG_FILE in files:  # refuse before the download
        understand(read_json(repository.download(CONFIG_FILE) / CONFIG_FILE))
    folder = repository.download("*.safetensors", *_TEXTS, ignore=_OTHERS)
    if any(fnmatchcase(file, _TEMPLATES) for file in files):
        repository.download(_TEMPLATES)
    return folder


def texts(repository: Repository) -> list[str]:
    """Names of the files beside the weights that `download` brings, or has brought.

    Args:
      repository: with safetensors.

    Raises:
      FileNotFoundError: if the repository cannot be had.
    """

    def among(patterns: tuple[str, ...], file: str) -> bool:
        return any(fnmatchcase(file, pattern) for pattern in patterns)

    files = repository.files()
    return [
        f
        for f in files
        if (among(_TEXTS, f) and not among(_OTHERS, f)) or among((_TEMPLATES,), f)
    ]
