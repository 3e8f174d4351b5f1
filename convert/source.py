"""What a reader hands over: named tensors still in their file, and what they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message is one clear sentence.

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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a checkpoint's name before the errors that do not tell it.

    Args:
      path: of the checkpoint.

    Raises:
      ConversionError: as raised within, with `path` in the message.
    """
    try:
        yield
    except ConversionError as error:
        if str(path) in str(error):
            raise
        raise ConversionError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint, mapped from its file and not yet read.

    Attributes:
      name: as Hugging Face's model class calls it.
      stored_name: as the file calls it.
      kind: dtype or quantisation as the file calls it, such as "BF16" or "Q4_K".
      shape: of what `read` returns.
      raw: uint8[n], the bytes as stored; a memory map.
      decode: from the stored bytes to floats of `shape`.
    """

    name: str
    stored_name: str
    kind: str
    shape: tuple[int, ...]
    raw: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]

    def read(self) -> np.ndarray:
        """The tensor as floats, outputs first (row o holds the weights of output o)."""
        with np.errstate(all="ignore"):  # damaged scales; the caller checks for NaN
            return self.decode(self.raw)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, opened.

    Attributes:
      config: in the words of Hugging Face's config.json.
      tensors: by `SourceTensor.name`.
      files: further text files of the destination by name: tokenizer, chat template.
      eos_ids: tokens that end a text.
      bos_ids: tokens that start one.
      notes: one-line remarks for the user.
    """

    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    files: dict[str, str]
    eos_ids: tuple[int, ...]
    bos_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
