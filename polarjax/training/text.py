"""Text files as a stream of equally long blocks of token ids."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import numpy as np

from polarjax.generation import Tokenizer

_PIECE = 1 << 18  # characters held at a time


def token_blocks(
    path: str | Path, tokenizer: Tokenizer, length: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Cut a text into blocks, reading as far as asked.

    Args:
      path: UTF-8 text, plain or gzipped (.gz).
      tokenizer: of the model; its start-of-text tokens are not added.
      length: tokens per block. What remains at the end is dropped.
      limit: most blocks to yield; None for all.

    Yields:
      int32[length].

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a text, or has less than one block.
    """
    count, ids = 0, []
    for piece in _pieces(path):
        ids += tokenizer.encode(piece, special=False)
        start = 0
        while start + length <= len(ids):
            if limit is not None and count == limit:
                return
            yield np.array(ids[start : start + length], np.int32)
            start, count = start + length, count + 1
        ids = ids[start:]
    if not count:
        raise ValueError(f"{path} has less than {length} tokens")


@contextlib.contextmanager
def open_text(path: str | Path, kind: str = "text") -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, plain or gzipped (.gz).

    Args:
      path: the file.
      kind: of the file, for the message.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if what is read from it is no such text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file at {path}")
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield cast(TextIO, file)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def _pieces(path: str | Path) -> Iterator[str]:
    """Pieces that end where a paragraph does, so that no word is cut."""
    rest = ""
    with open_text(path) as file:
        while new := file.read(_PIECE):
            rest += new
            cut = rest.rfind("\n\n") + 2
            if cut > 2:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest
