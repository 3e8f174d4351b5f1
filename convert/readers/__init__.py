"""Open a checkpoint, whatever it is stored in."""

from __future__ import annotations

from pathlib import Path

from convert.files import check_file, is_there
from convert.readers import gguf, huggingface
from convert.source import ConversionError, Source, naming

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def open_source(path: Path) -> Source:
    """Open a Hugging Face folder or a GGUF file; reads headers, no tensors.

    Args:
      path: the folder or file.

    Raises:
      ConversionError: if it is neither, or damaged, or not supported.
    """
    with naming(path):
        return _open_source(path)


def _open_source(path: Path) -> Source:
    if path.is_dir():
        return huggingface.read(path)
    if not is_there(path):
        raise ConversionError(f"no such file or folder: {path}")
    if path.suffix.lower() in PICKLES:
        raise ConversionError(huggingface.pickle_refusal(path))
    check_file(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == gguf.MAGIC:
        return gguf.read(path)
    if path.suffix.lower() == ".safetensors":
        raise ConversionError(
            f"{path} is one file of a checkpoint: give its folder, which holds "
            "config.json too"
        )
    raise ConversionError(
        f"{path} is not a GGUF file: it begins with {magic!r}, not {gguf.MAGIC!r}. "
        "Supported: a Hugging Face folder with safetensors, or a GGUF file"
    )
