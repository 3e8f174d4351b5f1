"""The host's side of one request: its text, stop strings and what to stream."""

from __future__ import annotations

import dataclasses

from polarjax.generation.tokenizer import Tokenizer


@dataclasses.dataclass
class Request:
    """One prompt and what has been drawn for it.

    Attributes:
      prompt: token ids.
      limit: most tokens to draw.
      tokenizer: or None.
      stops: strings that end the text.
      tokens: new token ids.
      logprobs: of each.
      going: whether more may come.
      finish_reason: "stop" or "length", once it has ended.
    """

    prompt: list[int]
    limit: int
    tokenizer: Tokenizer | None = None
    stops: tuple[str, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    going: bool = True
    finish_reason: str = ""
    _text: str | None = ""
    _streamed_text: int = 0
    _streamed_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the tokens, cut before a stop string; "" without a tokenizer."""
        if self._text is None:  # decoded when it is asked for: that takes time
            self._text = self._decode(self.tokens) if self.tokenizer else ""
        return self._text

    def add(self, tokens: list[int], logprobs: list[float], ended: bool) -> None:
        """Take in a chunk.

        Args:
          tokens: new ids, stop tokens left out.
          logprobs: of each.
          ended: whether the device has ended the request.
        """
        seen = len(self.tokens)
        self.tokens += tokens
        self.logprobs += logprobs
        if ended:
            self.going = False
            self.finish_reason = "length" if len(self.tokens) == self.limit else "stop"
        self._text = None
        if self.stops and any(stop in self.text for stop in self.stops):
            # A chunk may run past the string, or hold another before it: the one
            # that is complete first counts.
            n = next(
                n
                for n in range(seen, len(self.tokens) + 1)
                if any(stop in self._decode(self.tokens[:n]) for stop in self.stops)
            )
            text = self._decode(self.tokens[:n])
            end = min(text.find(stop) for stop in self.stops if stop in text)
            self._text = text[:end]
            kept = self._tokens_within(self._text, n)
            del self.tokens[kept:], self.logprobs[kept:]
            self.going, self.finish_reason = False, "stop"

    def news(self) -> tuple[str, list[int]]:
        """Text and tokens since the last call, as far as they can no longer change."""
        text, count = self.text, len(self.tokens)
        if self.going and self.tokenizer is not None:
            text = text[: self._settled(text)]
            count = self._tokens_within(text, count)
        news = text[self._streamed_text :], self.tokens[self._streamed_tokens : count]
        self._streamed_text = max(self._streamed_text, len(text))
        self._streamed_tokens = max(self._streamed_tokens, count)
        return news

    def _decode(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.continuation(self.prompt, tokens)

    def _settled(self, text: str) -> int:
        """How much of a growing text is final.

        A character may still lack bytes, and the end may begin a stop string.
        """
        end = len(text.rstrip("\ufffd"))
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        held = max((len(s) for s in starts if text[:end].endswith(s)), default=0)
        return end - held

    def _tokens_within(self, text: str, n: int) -> int:
        """The most tokens, at most n, whose text does not go beyond `text`."""
        while n and not text.startswith(self._decode(self.tokens[:n])):
            n -= 1
        return n
