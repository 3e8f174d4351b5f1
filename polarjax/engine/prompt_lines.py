"""Prompts in a file of JSON lines: what a line may say, and what all of them need."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine.checks import Settings, encode_prompt, settings_of, variant_of
from polarjax.engine.sampling import Variant
from polarjax.engine.templates import choose
from polarjax.engine.tokenizer import Tokenizer
from polarjax.storage.files import LARGEST_TABLE, FileError, check_file, parse_json

_PROMPTS = ("prompt", "messages")
# Which sample a request is says its place among the line's `n`.
FIELDS = tuple(x.name for x in dataclasses.fields(Settings) if x.name != "sample")
_FLAGS = ("ignore_eos", "echo")
_TOKEN_IDS = ("stop_ids", "allowed_token_ids")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")  # as JSON has it where it is a key


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
      path: of a regular file, UTF-8; a line, and so a file, may begin with its mark.

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
                text = line.decode("utf-8-sig")
            except ValueError as reason:
                raise FileError(f"{name} is not UTF-8 text: {reason}") from None
            if text.strip():
                yield _parse(index, name, parse_json(text, name), file.tell())
                index += 1


def _parse(index: int, name: str, record: dict[str, Any], end: int) -> Line:
    known = ("id", *_PROMPTS, *FIELDS)
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
    settings = {
        key: _shaped(f"{name}: {key}", key, record[key])
        for key in FIELDS
        if key in record
    }
    return Line(index, name, own, prompt, messages, settings, end)


def _shaped(what: str, key: str, value: Any) -> Any:
    """A setting of one request, where the checks would take one for each of several.

    Args:
      what: it is, for messages.
      key: its name.
      value: as JSON has it.

    Raises:
      FileError: if it has not the shape of one; its range is checked later.
    """
    many = isinstance(value, list | dict)
    if key in _TOKEN_IDS:
        ids = isinstance(value, list) and all(type(x) is int for x in value)
        if value is not None and not ids:
            raise FileError(f"{what} must be a list of token ids")
    elif key == "stop":
        if many and not (isinstance(value, list) and all(map(_is_text, value))):
            raise FileError(f"{what} must be a text or a list of texts")
    elif key == "logit_bias":
        if value is None:
            return None
        if not isinstance(value, dict):
            raise FileError(f"{what} must be an object from token ids to numbers")
        if wrong := [x for x in value if not _TOKEN_ID.fullmatch(x)]:
            raise FileError(f"{what} has the key {wrong[0]!r}, which is no token id")
        return {int(x): bias for x, bias in value.items()}
    elif many:
        kind = "true or false" if key in _FLAGS else "a number"
        raise FileError(f"{what} must be {kind}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


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
        """How a line's prompt is continued, all `n` samples of it.

        Raises:
          TypeError: if a setting is of no kind that it could be.
          ValueError: if one is out of range; it is named.
        """
        seed = (self.defaults.seed + line.index) % 2**32
        asked = {**vars(self.defaults), "seed": seed, **line.settings}
        [one] = settings_of(self.config, self.tokenizer, 1, asked)
        return one

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
      requests: samples of them, as many as the engine could continue at once; at
        least 1.
      tokens: most of a request, prompt and answer together; at least 1.
      mean: positions in the cache of a request, half-way through its answer.
      densities: whether a line asks for a density.
      variants: of drawing that lines need; at least one.
      logprobs: whether a line asks for the most probable tokens at each step.
      prompt_logprobs: whether one asks for those of its prompt.
    """

    sha256: str
    count: int
    requests: int
    tokens: int
    mean: int
    densities: bool
    variants: tuple[Variant, ...]
    logprobs: bool
    prompt_logprobs: bool


def survey(
    path: str | Path,
    reader: Reader,
    context: int,
    tell: Callable[[int], None] = lambda read: None,
) -> Survey:
    """Read a file once, from end to end, before the work.

    A prompt that the engine will refuse is no reason to stop, but a line that is no
    request is. What a refused prompt asks for is looked at all the same, so that the
    engine refuses it for what is wrong with it.

    Args:
      path: of the file.
      reader: of its lines.
      context: most tokens of a request.
      tell: of the bytes that have been read, after each line.

    Raises:
      FileError: if it is no regular file, has no prompt, a line is no request, or two
        have one id; the line is named by its number.
      ValueError: if there is a conversation, and no template for one.
    """
    path = Path(path)
    check_file(path)
    count = requests = most = 0
    middles, densities = 0.0, reader.defaults.density is not None
    variants, logprobs, of_prompts = set(), False, False
    hashes = array("q")  # of the ids, which might not all fit into the memory
    for line in read_lines(path):
        count += 1
        tell(line.end)
        reader.check_chat(line)
        if line.id is not None:
            hashes.append(hash(line.id))
        densities |= line.settings.get("density") is not None
        try:
            asked = reader.settings(line)
        except (TypeError, ValueError):
            continue
        variants.add(variant_of([asked]))
        logprobs |= asked.logprobs is not None
        of_prompts |= asked.told_of_prompt is not None
        try:
            length = len(reader.encode(line))
        except (TypeError, ValueError):
            continue
        if length >= context:
            continue
        limit = min(asked.max_new_tokens, context - length)
        most = max(most, length + limit)
        middles += asked.n * (length + limit / 2)
        requests += asked.n
    if not count:
        raise FileError(f"{path} has no prompts: write one JSON object a line")
    _check_ids(path, hashes)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Survey(
        sha256=digest,
        count=count,
        requests=max(requests, 1),
        tokens=max(most, 1),
        mean=max(1, round(middles / max(requests, 1))),
        densities=densities,
        variants=tuple(v for v in Variant if v in variants) or (Variant.GREEDY,),
        logprobs=logprobs,
        prompt_logprobs=of_prompts,
    )


def _check_ids(path: Path, hashes: array[int]) -> None:
    """Raise if two lines have one id: who looks results up by it would lose one.

    Args:
      path: of the file, which is read again where the hashes do not tell.
      hashes: of the ids.

    Raises:
      FileError: naming both.
    """
    found, times = np.unique(np.array(hashes), return_counts=True)
    suspects = set(found[times > 1].tolist())
    if not suspects:
        return
    seen: dict[str | int, str] = {}
    for line in read_lines(path):
        if line.id is None or hash(line.id) not in suspects:
            continue
        if line.id in seen:
            raise FileError(
                f"{line.name} has the id {line.id!r} of {seen[line.id]}: give each "
                "line an id of its own, or none"
            )
        seen[line.id] = line.name
