"""What a model is, from its configuration alone: its weights need not be there."""

from __future__ import annotations

from pathlib import Path

from convert.files import is_there, read_json, read_text
from convert.readers import open_source
from convert.readers.huggingface import no_config
from convert.rules import understand
from convert.source import ConversionError, naming
from polarjax.config import ModelConfig
from polarjax.storage.folder import CONFIG_FILE
from polarjax.storage.repository import Repository


def read_config(source: str | Path) -> ModelConfig:
    """Read what a model is.

    Args:
      source: a folder whose config.json is Hugging Face's or polarjax's, or that file,
        a GGUF file (its header is read), or an id of the hub (its config.json alone is
        downloaded).

    Raises:
      ConversionError: if it is none of these, damaged or not supported.
      FileNotFoundError: if an id is none, or cannot be had.
    """
    path = Path(source)
    if isinstance(source, str) and not path.exists():
        repository = Repository.parse(source, f"no such file or folder: {source}")
        if repository.file:
            raise ConversionError(
                f"{source} would be downloaded whole for its header: name a repository "
                "with a config.json, or a file that is here"
            )
        path = repository.download(CONFIG_FILE)
    if path.name == CONFIG_FILE and path.is_file():
        path = path.parent
    with naming(path):
        if not path.is_dir():
            return understand(open_source(path).config)[0]
        file = path / CONFIG_FILE
        if not is_there(file):
            raise ConversionError(no_config(path))
        config = read_json(file)
        if "format_version" not in config:
            return understand(config)[0]
        try:
            return ModelConfig.from_json(read_text(file), folder=str(path.absolute()))
        except ValueError as error:
            raise ConversionError(str(error)) from None
