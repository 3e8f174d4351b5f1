"""Text of any size and kind as equally long blocks of token ids."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from polarjax.engine import Tokenizer

_PIECE = 1 << 18  # characters held at a time
_PIECES = 16  # that are tokenized together, on all cores


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
      path: a UTF-8 file, plain or gzipped (.gz); JSON lines (.jsonl, .jsonl.gz), of
        which the field "text" is read; a folder that `datasets` saved, likewise; or
        "self", what the dense model writes.
      weight: its share of the tokens, beside those of other sources.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"{self.path}: its weight must be positive: {self.weight}")

    @classmethod
    def parse(cls, text: str) -> Source:
        """From "PATH" or "PATH=WEIGHT".

        Raises:
          ValueError: if the weight is no positive number.
        """
        path, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            return cls(Path(text))
        try:
            if not path:
                raise ValueError
            return cls(Path(path), float(weight))
        except ValueError:
            raise ValueError(f"{text!r} is no PATH=WEIGHT, such as a.txt=2") from None

    @property
    def itself(self) -> bool:
        """Whether the dense model is the source."""
        return self.path == Path("self")

    @property
    def name(self) -> str:
        """Of the domain: the file's name without its endings."""
        return self.path.name.split(".")[0] or str(self.path)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Blocks to learn from, and others of the same domains to measure on.

    Attributes:
      blocks: int32[n, t], in the order of the sources.
      held_out: by source name, int32[n, t], text that follows the source's blocks.
    """

    blocks: np.ndarray
    held_out: dict[str, np.ndarray]


def read_corpus(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    length: int,
    blocks: int,
    held_out: int = 0,
    write: Callable[[int], np.ndarray] | None = None,
) -> Corpus:
    """Read as much of each source as its weight says, and no further.

    What is held in memory is 4 bytes a token, and a few MB of text.

    Args:
      sources: files or folders.
      tokenizer: of the model; its start-of-text tokens are not added.
      length: tokens per block.
      blocks: to learn from, over all sources.
      held_out: blocks of each source to measure on.
      write: gives so many blocks, int32[n, t], of what the model writes.

    Raises:
      FileNotFoundError: if a source does not exist.
      ValueError: if one is no text, too short for its share, or one token repeated.
    """
    if not sources:
        raise ValueError("no text to read")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two texts are named {name!r}: rename one of them")
    total = sum(source.weight for source in sources)
    # Shares are rounded so that they add up.
    ends = np.cumsum([source.weight / total * blocks for source in sources]).round()
    shares = np.diff(ends.astype(int), prepend=0).tolist()
    parts, held = [], {}
    for source, share in zip(sources, shares, strict=True):
        want = share + held_out
        if source.itself and write:
            found = list(write(want))
        else:
            found = list(token_blocks(source.path, tokenizer, length, want))
        if len(found) < want:
            raise ValueError(
                f"{source.path} has {len(found) * length:,} tokens in blocks of "
                f"{length}, its share is {want * length:,}: lower the number of tokens "
                "or its weight, or add text"
            )
        rows = np.array(found, np.int32).reshape(want, length)
        if rows.size and (rows == rows.flat[0]).all():
            raise ValueError(f"{source.path} is one token repeated: nothing to learn")
        parts.append(rows[:share])
        held[source.name] = rows[share:]
    return Corpus(np.concatenate(parts), held)


def token_blocks(
    path: str | Path, tokenizer: Tokenizer, length: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Cut a text into blocks, reading as far as asked.

    Args:
      path: a UTF-8 file, plain or gzipped; JSON lines with a field "text"; or a folder
        that `datasets` saved.
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
    pieces = _pieces(Path(path))
    while limit is None or count < limit:
        few = 1 if limit is not None and (limit - count) * length < _PIECE else _PIECES
        batch = list(itertools.islice(pieces, few))
        if not batch:
            break
        ids += itertools.chain.from_iterable(tokenizer.encode_many(batch))
        start = 0
        while start + length <= len(ids) and (limit is None or count < limit):
            yield np.array(ids[start : start + length], np.int32)
            start, count = start + length, count + 1
        ids = ids[start:]
    if not count and limit != 0:
        raise ValueError(f"{path} has {len(ids)} tokens, less than {length}")


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
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    """Pieces that end where a paragraph does, so that no word is cut."""
    rest = ""
    for new in _parts(path):
        rest += new
        while len(rest) > _PIECE:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(text: str) -> int:
    """Where a piece ends: after a paragraph, else a line, else before a space."""
    for mark, after in (("\n\n", 2), ("\n", 1), (" ", 0)):
        found = text.rfind(mark, 1, _PIECE)
        if found > 0:
            return found + after
    return _PIECE


def _parts(path: Path) -> Iterator[str]:
    if path.is_dir():
        for row in _dataset(path):
            yield _field(row, str(path)) + "\n\n"
        return
    with open_text(path) as file:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield _field(_json(line, where), where) + "\n\n"
            return
        while new := file.read(_PIECE):
            yield new


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: it must be an object with a string "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON may hold
        raise ValueError(f"{where}: its text is no Unicode: {error}") from None
    return text


def _dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path} is a folder: to read one that `datasets` saved, install that "
            "package (pip install datasets), or pass a text or JSONL file"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of many types
        raise ValueError(f"{path} is no saved data set: {error}") from error
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"{path} holds several splits: pass the folder of one")
    return found
