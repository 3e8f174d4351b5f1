"""Text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from polarjax.config import ModelConfig
from polarjax.engine.coverage import coverage_of
from polarjax.engine.detokenize import Pieces
from polarjax.engine.templates import DEFAULT, check_text, choose, render
from polarjax.params import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from polarjax.storage.files import is_there, read_json, read_text


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` tokenizer, and what came with it for conversations.

    Attributes:
      backend: does the work.
      chat_template: jinja text, or several by name, or None.
      special: texts of the special tokens that have a role, by the names that templates
        know: "bos_token", "eos_token", "pad_token", "unk_token" and others.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | Mapping[str, str] | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, config: ModelConfig) -> Tokenizer | None:
        """Read the tokenizer in a checkpoint's folder; None where it has none.

        Args:
          config: of the model.

        Raises:
          ValueError: if a file is damaged, or none.
        """
        path = Path(config.folder) / TOKENIZER_FILE
        if not config.folder or not is_there(path):
            return None
        stamp = path.stat()
        backend = _read(str(path), stamp.st_mtime_ns, stamp.st_size)
        special, templates = _read_roles(path.with_name(TOKENIZER_CONFIG_FILE))
        if special is None:  # a checkpoint of before that file
            pairs = (("bos_token", config.bos_ids), ("eos_token", config.eos_ids))
            found = {name: backend.id_to_token(ids[0]) for name, ids in pairs if ids}
            special = {name: text for name, text in found.items() if text is not None}
        template = path.with_name(CHAT_TEMPLATE_FILE)
        if is_there(template):
            text = read_text(template)
            templates = {**templates, DEFAULT: text} if templates else text
        return cls(backend, templates or None, special)

    @classmethod
    def require(cls, config: ModelConfig, what: str) -> Tokenizer:
        """As `load`, for work that cannot do without.

        Args:
          config: of the model.
          what: the work, for the message.

        Raises:
          ValueError: if the checkpoint has no tokenizer, or a damaged one.
        """
        tokenizer = cls.load(config)
        if tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, this checkpoint has none")
        return tokenizer

    @functools.cached_property
    def pieces(self) -> Pieces:
        """What the tokens stand for."""
        return Pieces(self.backend)

    @property
    def bos(self) -> str:
        """Text of the token that starts texts; may be empty."""
        return self.special.get("bos_token", "")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts texts, if there is one."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends texts, if there is one."""
        return self._id("eos_token")

    def _id(self, role: str) -> int | None:
        text = self.special.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def encode(
        self, text: str, special: bool = True, name: str = "the text"
    ) -> list[int]:
        """Token ids of a text.

        Args:
          text: any.
          special: whether to add the tokens that the tokenizer starts texts with.
          name: of the text, for the message.

        Raises:
          ValueError: if it holds lone surrogates: it is no text then.
        """
        check_text(text, name)
        # Of one text alone: `encode` would hold up all threads of Python meanwhile.
        [found] = self.backend.encode_batch_fast([text], add_special_tokens=special)
        return found.ids

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at least, found without making any.

        Args:
          text: any.

        Returns:
          0 where nothing can be said of such a tokenizer.
        """
        return coverage_of(self.backend).least_tokens(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens, on all cores.

        Raises:
          ValueError: if one holds lone surrogates.
        """
        for i, text in enumerate(texts):
            check_text(text, f"text {i}")
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoded.ids for encoded in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out.

        Bytes that are no UTF-8 become U+FFFD, characters beside them stay.
        """
        return self.continuation((), tokens)

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text that new tokens add after a prompt's tokens.

        Some tokenizers drop a space at the start of a text, so that the new tokens'
        text alone may lack it. A character that the prompt begins and the new tokens
        complete is part of it.
        """
        reader, special = self.pieces.after(prompt), self.pieces.special
        texts = [reader.add(token) for token in tokens if token not in special]
        return "".join(texts) + reader.end()

    def beginning(self, prompt: Sequence[int]) -> str:
        """Text of a prompt's tokens, to stand before a `continuation`.

        It lacks a character that its last tokens begin, and the next may complete.
        """
        reader, special = self.pieces.after(()), self.pieces.special
        return "".join(reader.add(token) for token in prompt if token not in special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation with the model's template, the answer to be written.

        It is what `transformers`' `apply_chat_template` renders.

        Args:
          messages: each with "role" and "content".
          tools: JSON schemas of functions that the model may call.
          documents: what the model may cite.
          add_generation_prompt: whether the answer's beginning is to be written.
          continue_final_message: whether the last message is the answer's beginning;
            not together with `add_generation_prompt`.
          **variables: further ones that the template reads, such as `enable_thinking`.

        Raises:
          ValueError: if the checkpoint has no template, or it fails.
        """
        return render(
            choose(self.chat_template, tools is not None),
            messages,
            {**self.special, **variables},
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )


def start_token(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """The token that stands for "a text begins here".

    The tokenizer's end-of-text token, else its beginning-of-text one, else that which
    ends the model's answers.

    Args:
      tokenizer: of the model.
      config: of the model.
    """
    known = (tokenizer.backend.token_to_id("<|endoftext|>"), tokenizer.bos_id)
    found = [token for token in known if token is not None]
    return [*found, *config.bos_ids, *config.eos_ids, 0][0]


def _read_roles(path: Path) -> tuple[dict[str, str] | None, dict[str, str]]:
    """The special tokens that have a role, and the chat templates that have a name.

    Args:
      path: of the file; the tokens are None if it is not there.

    Raises:
      ValueError: if it is damaged.
    """
    if not is_there(path):
        return None, {}
    record = read_json(path)
    listed = record.pop("chat_template", [])
    try:
        templates = {entry["name"]: entry["template"] for entry in listed}
    except (TypeError, KeyError):
        raise ValueError(
            f"{path} is damaged: chat_template must be a list of named texts"
        ) from None
    for name, text in (*record.items(), *templates.items()):
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{path} is damaged: {name} must be text, not {text!r:.99}"
            )
    return record, templates


@functools.lru_cache(maxsize=4)
def _read(path: str, modified: int, size: int) -> tokenizers.Tokenizer:
    """Read a tokenizer once: it takes a tenth of a second, and each call needs it."""
    del modified, size  # with the path, they tell one file from the next
    text = read_text(Path(path))
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend
