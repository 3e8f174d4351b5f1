"""Text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polarjax.config import ModelConfig
from polarjax.files import is_there, read_text
from polarjax.params import CHAT_TEMPLATE_FILE, TOKENIZER_FILE


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` tokenizer and the chat template that came with it.

    Attributes:
      backend: does the work.
      chat_template: jinja text, or None.
      bos: text of the token that starts a text, for the template; may be empty.
      eos: text of the token that ends one, likewise.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    bos: str = ""
    eos: str = ""

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
        template = path.with_name(CHAT_TEMPLATE_FILE)
        text = read_text(template) if is_there(template) else None
        bos, eos = (
            (backend.id_to_token(ids[0]) or "") if ids else ""
            for ids in (config.bos_ids, config.eos_ids)
        )
        return cls(backend, text, bos, eos)

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

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any.
          special: whether to add the tokens that the tokenizer starts texts with.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens, on all cores."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoded.ids for encoded in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text that new tokens add after a prompt's tokens.

        Some tokenizers drop a space at the start of a text, so that the new tokens'
        text alone may lack it.
        """
        return self.decode([*prompt, *tokens])[len(self.decode(prompt)) :]

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Render a conversation with the model's template, the answer to be written.

        Args:
          messages: each with "role" and "content".

        Raises:
          ValueError: if the checkpoint has no template, or it fails.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def complain(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = complain
        special: dict[str, Any] = {"bos_token": self.bos, "eos_token": self.eos}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=True, **special
            )
        except Exception as error:  # a template's code may raise anything
            raise ValueError(f"the chat template failed: {error}") from error


def start_token(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """The token that stands for "a text begins here".

    The tokenizer's end-of-text token, else its beginning-of-text one, else that which
    ends the model's answers.

    Args:
      tokenizer: of the model.
      config: of the model.
    """
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    return [*([] if end is None else [end]), *config.bos_ids, *config.eos_ids, 0][0]


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
