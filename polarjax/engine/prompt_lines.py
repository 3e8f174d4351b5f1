"""Prompts in a file of JSON lines: what a line may say, and what all of them need."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polarjax.config import ModelConfig
from polarjax.engine.checks import Settings, encode_prompt
from polarjax.engine.templates import choose
from polarjax.engine.tokenizer import Tokenizer
from polarjax.storage.files import LARGEST_TABLE, FileError, check_file, parse_json

_PROMPTS = ("prompt", "messages")
_SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
_LISTS = ("stop", "stop_ids")  # the settings that are not one number


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the file.

    Attributes:
      index: of the prompt, from 0; empty lines count for none.
      name: of the line, for messages.
      id: that the user gave it, or None.
      prompt: a text, or token ids; None if there are messages.
      messages: a conversation, or None.
      settings: that the line names, by the fields of `Settings`; not yet checked.
      end: bytes of the file up to the line's end.
    """

    index: int
    name: str
    id: str | int | None
    prompt: str | list[int] | None
    messages: list[Any] | None
    settings: dict[str, Any]
    end: int

    @property
    def label(self) -> dict[str, Any]:
        """What tells the line's result from others: its id, or its index."""
        return {"index": self.index} if self.id is None else {"id": self.id}


def read_lines(path: str | Path) -> Iterator[Line]:
    """The lines of a file, read as they are asked for.

    Args:
      path: of a regular file, UTF-8.

    Raises:
      FileError: if a line is no request; it is named by its number.
    """
    index = 0
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LARGEST_TABLE + 1):
            number += 1
            name = f"{path} line {number}"
            if len(line) > LARGEST_TABLE:
                raise FileError(f"{name} has more than {LARGEST_TABLE} bytes")
            try:
                text = line.decode()
            except ValueError as reason:
                raise FileError(f"{name} is not UTF-8 text: {reason}") from None
            if text.strip():
                yield _parse(index, name, parse_json(text, name), file.tell())
                index += 1


def _parse(index: int, name: str, record: dict[str, Any], end: int) -> Line:
    known = ("id", *_PROMPTS, *_SETTINGS)
    if unknown := [key for key in record if key not in known]:
        raise FileError(f"{name} has no field {unknown[0]!r}: {', '.join(known)}")
    if len([key for key in _PROMPTS if key in record]) != 1:
        raise FileError(f'{name} needs "prompt" or "messages", and one of them alone')
    prompt, messages = record.get("prompt"), record.get("messages")
    if messages is None and not isinstance(prompt, str | list):
        raise FileError(f"{name}: prompt must be a text or a list of token ids")
    if prompt is None and not isinstance(messages, list):
        raise FileError(f"{name}: messages must be a list")
    own = record.get("id")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise FileError(f"{name}: id must be a text or a whole number")
    settings = {key: record[key] for key in _SETTINGS if key in record}
    for key, value in settings.items():
        if isinstance(value, list | dict) and key not in _LISTS:
            raise FileError(f"{name}: {key} must be a number")
    return Line(index, name, own, prompt, messages, settings, end)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes requests of lines.

    Attributes:
      config: of the model.
      tokenizer: of the checkpoint, or None.
      defaults: settings of lines that do not name their own. Line i has the seed i
        above theirs.
      chat: whether a prompt is what a user says to a chat model.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    defaults: Settings = dataclasses.field(default_factory=Settings)
    chat: bool = False

    def encode(self, line: Line) -> list[int]:
        """Token ids of a line's prompt.

        Raises:
          TypeError: if it is none.
          ValueError: if it is out of range, or the chat template fails.
        """
        messages = line.messages
        if messages is None and self.chat:
            if not isinstance(line.prompt, str):
                raise TypeError(f"prompt {line.index} must be a text with --chat")
            messages = [{"role": "user", "content": line.prompt}]
        if messages is None or self.tokenizer is None:
            prompt = line.prompt
        else:
            # The template writes the special tokens itself.
            text = self.tokenizer.chat(messages)
            name = f"prompt {line.index}"
            prompt = self.tokenizer.encode(text, special=False, name=name)
        return encode_prompt(line.index, prompt, self.tokenizer, self.config)

    def settings(self, line: Line) -> Settings:
        """How a line's prompt is continued; not yet checked."""
        seed = (self.defaults.seed + line.index) % 2**32
        own = {"seed": seed, **line.settings}
        return dataclasses.replace(self.defaults, **own)

    def check_chat(self, line: Line) -> None:
        """Raise if a line is a conversation, and there is no template for one.

        Raises:
          ValueError: naming what is missing.
        """
        if line.messages is not None or self.chat:
            if self.tokenizer is None:
                raise ValueError(
                    f"{line.name} is a conversation, which needs a tokenizer: this "
                    "checkpoint has none"
                )
            choose(self.tokenizer.chat_template, tools=False)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the prompts of a file need of an engine.

    Attributes:
      sha256: of the file.
      count: prompts.
      tokens: most of a request, prompt and answer together; at least 1.
      mean: positions in the cache of a request, half-way through its answer.
      densities: whether a line asks for a density.
    """

    sha256: str
    count: int
    tokens: int
    mean: int
    densities: bool


def survey(
    path: str | Path,
    reader: Reader,
    context: int,
    tell: Callable[[int], None] = lambda read: None,
) -> Survey:
    """Read a file once, from end to end, before the work.

    A prompt that the engine will refuse is no reason to stop, but a line that is no
    request is.

    Args:
      path: of the file.
      reader: of its lines.
      context: most tokens of a request.
      tell: of the bytes that have been read, after each line.

    Raises:
      FileError: if it is no regular file, has no prompt, or a line is no request; that
        is named by its number.
      ValueError: if there is a conversation, and no template for one.
    """
    path = Path(path)
    check_file(path)
    count = most = 0
    middles, good, densities = 0.0, 0, False
    for line in read_lines(path):
        count += 1
        tell(line.end)
        reader.check_chat(line)
        try:
            length = len(reader.encode(line))
        except (TypeError, ValueError):
            continue
        if length >= context:
            continue
        asked = reader.settings(line)
        densities |= asked.density is not None
        limit = asked.max_new_tokens
        limit = limit if type(limit) is int and limit > 0 else 1
        limit = min(limit, context - length)
        most = max(most, length + limit)
        middles, good = middles + length + limit / 2, good + 1
    if not count:
        raise FileError(f"{path} has no prompts: write one JSON object a line")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    mean = max(1, round(middles / max(good, 1)))
    return Survey(digest, count, max(most, 1), mean, densities)
