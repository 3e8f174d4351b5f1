"""What a reader hands over: named tensors still in their file, and what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.storage.files import FileError


class ConversionError(FileError):
    """A checkpoint that cannot be converted; the message is one clear sentence."""


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


Decode = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""Stored bytes of some rows, and the shape of these -> floats."""

# Of a tensor, read at once.
BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint, still in its file.

    Attributes:
      name: as Hugging Face's model class calls it.
      stored_name: as the file calls it.
      kind: dtype or quantisation as the file calls it, such as "BF16" or "Q4_K".
      shape: of what `read` returns.
      path: of the file.
      begin: its first byte there.
      nbytes: how many there are.
      decode: from stored bytes to floats.
      unit: rows that can only be decoded together.
    """

    name: str
    stored_name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int
    decode: Decode
    unit: int = 1

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows, and their bytes as stored, in blocks of about `BLOCK_BYTES`.

        Of less where a value takes less than a byte, and more once it is decoded.

        Read, not mapped: what is mapped counts as memory in use for long, and a file
        that is cut off meanwhile kills the process.

        Raises:
          ConversionError: if the file is shorter than it was.
        """
        rows = self.shape[0] if len(self.shape) > 1 else 1
        row = self.nbytes // max(rows, 1)
        weight = max(1, row, math.prod(self.shape[1:]))
        step = self.unit * max(1, BLOCK_BYTES // (self.unit * weight))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            at = self.begin + first * row
            raw = np.fromfile(self.path, np.uint8, count * row, offset=at)
            if raw.size < count * row:
                raise ConversionError(f"{self.path} was cut off while it was read")
            yield slice(first, first + count) if rows > 1 else slice(None), raw

    def floats(self, raw: np.ndarray, rows: slice) -> np.ndarray:
        """Rows of the tensor, outputs first (row o holds the weights of output o).

        Args:
          raw: their bytes as stored.
          rows: which they are.
        """
        count = len(range(*rows.indices(self.shape[0]))) if self.shape else 0
        with np.errstate(all="ignore"):  # damaged scales; the caller checks for NaN
            return self.decode(raw, (count, *self.shape[1:]) if self.shape else ())

    def read(self) -> np.ndarray:
        """The whole tensor as floats."""
        parts = [self.floats(raw, rows) for rows, raw in self.blocks()]
        return np.concatenate(parts) if self.shape else parts[0]


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
      ours_alone: why transformers does not load it as it is; empty if it does.
    """

    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    files: dict[str, str]
    eos_ids: tuple[int, ...]
    bos_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    ours_alone: str = ""
