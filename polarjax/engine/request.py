"""The host's side of one request: its text, stop strings and what to stream."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Any

from polarjax.engine.alternatives import TopTokens
from polarjax.engine.detokenize import Detokenizer
from polarjax.engine.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request has got since it was last asked.

    Attributes:
      text: that can no longer change; "" without a tokenizer.
      tokens: ids of whole characters, the stop token excluded.
      logprobs: natural log-probability of each.
      finish_reason: as of `Request`: "" but for the last piece.
      alternatives: what is told beside each token, if its settings ask for it; else
        empty.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str = ""
    alternatives: list[TopTokens] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and what has been drawn for it; equal to itself alone.

    Attributes:
      prompt: token ids.
      limit: most tokens to draw.
      tokenizer: or None.
      stops: strings that end the text. They are looked for in the text as it is shown,
        and in the text with special tokens spelled out.
      tokens: new token ids.
      logprobs: of each.
      alternatives: what is told beside each, if `Settings.logprobs` asks for it; else
        empty.
      prompt_logprobs: of each token of the prompt, if its settings ask for them; None
        of the first, which nothing comes before. Else empty.
      prompt_alternatives: what is told beside each of them.
      going: whether more may come.
      finish_reason: "stop", "length", "cancelled" or "error", once it has ended.
      error: why the engine ended it, if it did: it failed, or the engine was closed.
      settings: how it is continued, `polarjax.engine.checks.Settings`.
      number: of its prompt among those that came with it, for messages.
      id: of it in its engine.
      repeats: tokens that are drawn again before new ones, as it had to begin anew.
      cached: tokens of the prompt that were in the cache.
      together: whether several processes go on with it, in which all of them must end
        it at the same step: to cancel it is a wish then, which process 0 grants.
      left_by: of its engine: this one is in it once it has been cancelled, by whoever
        holds it and on any thread, until the engine's next step.
      inbox: of who follows several requests: this one is in it once it has got tokens
        or ended, until the reader takes it out.
    """

    prompt: list[int]
    limit: int
    tokenizer: Tokenizer | None = None
    stops: tuple[str, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[TopTokens] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_alternatives: list[TopTokens | None] = dataclasses.field(
        default_factory=list
    )
    going: bool = True
    finish_reason: str = ""
    error: str = ""
    settings: Any = None
    number: int = 0
    id: int = -1
    cached: int = 0
    repeats: int = 0
    together: bool = False
    left_by: deque[Request] | None = dataclasses.field(default=None, repr=False)
    inbox: dict[Request, None] | None = dataclasses.field(default=None, repr=False)
    _written: _Written | None = None
    _streamed_text: int = 0
    _streamed_tokens: int = 0
    _echoed: bool = False

    @property
    def text(self) -> str:
        """Of the tokens, cut before a stop string; "" without a tokenizer.

        With the prompt's before it, if its settings say `echo`.
        """
        if self.tokenizer is None:
            return ""
        written = self._read(self.tokenizer)
        return self._echo() + written.shown(0, written.shown_at(written.end))

    def _echo(self) -> str:
        if self.tokenizer is None or not (self.settings and self.settings.echo):
            return ""
        return self.tokenizer.beginning(self.prompt)

    def add(
        self,
        tokens: list[int],
        logprobs: list[float],
        ended: bool,
        alternatives: Sequence[TopTokens] = (),
    ) -> None:
        """Take in what a program has drawn.

        Args:
          tokens: new ids, stop tokens left out.
          logprobs: of each.
          ended: whether the device has ended the request.
          alternatives: beside each, where they are told.
        """
        self.tokens += tokens
        self.logprobs += logprobs
        self.alternatives += alternatives
        if ended:
            self.going = False
            self.finish_reason = "length" if len(self.tokens) == self.limit else "stop"
        if self.tokenizer is not None and self.stops:
            written = self._read(self.tokenizer)
            if written.cut is not None:
                kept = written.tokens_at(written.cut)
                del self.tokens[kept:], self.logprobs[kept:]
                del self.alternatives[kept:]
                self.going, self.finish_reason = False, "stop"
        self._tell()

    def add_prompt(
        self, first: int, logprobs: Sequence[float], alternatives: Sequence[TopTokens]
    ) -> None:
        """Take in what is told of tokens of the prompt.

        Args:
          first: position of the token before them. Those after it may have been told
            before, if the prompt had to be read again.
          logprobs: of each.
          alternatives: beside each.
        """
        if not first:
            self.prompt_logprobs, self.prompt_alternatives = [None], [None]
        del self.prompt_logprobs[first + 1 :], self.prompt_alternatives[first + 1 :]
        self.prompt_logprobs += logprobs
        self.prompt_alternatives += alternatives

    def cancel(self, error: str = "") -> None:
        """End it with what it has.

        Args:
          error: why, if it was not the user's wish.
        """
        if self.together and self.going and not error and self.left_by is not None:
            self.left_by.append(self)
            return
        self._end("cancelled", error)

    def fail(self, error: str) -> None:
        """End it with what it has, as it cannot go on.

        Args:
          error: why.
        """
        self._end("error", error)

    def _end(self, reason: str, error: str) -> None:
        if self.going:
            self.going, self.finish_reason, self.error = False, reason, error
            if self.left_by is not None:
                self.left_by.append(self)
            self._tell()

    def _tell(self) -> None:
        if self.inbox is not None:
            self.inbox[self] = None

    def news(self) -> tuple[str, list[int]]:
        """Text and tokens since the last call, as far as they can no longer change."""
        text, count = "", len(self.tokens)
        if self.tokenizer is not None:
            written = self._read(self.tokenizer)
            position = written.settled() if self.going else written.end
            if self.going:
                count = written.tokens_at(position)
            end = written.shown_at(position)
            text = written.shown(self._streamed_text, end)
            self._streamed_text = end
            if not self._echoed:
                text, self._echoed = self._echo() + text, True
        tokens = self.tokens[self._streamed_tokens : count]
        self._streamed_tokens = count
        return text, tokens

    def piece(self) -> Piece | None:
        """What `news` says, and how it ended if it has; None if there is nothing new.

        The log-probabilities are taken at the same time. Once the request has ended,
        each call returns a piece.
        """
        start, reason = self._streamed_tokens, self.finish_reason
        text, tokens = self.news()
        if not (text or tokens or reason):
            return None
        new = slice(start, start + len(tokens))
        return Piece(text, tokens, self.logprobs[new], reason, self.alternatives[new])

    def _read(self, tokenizer: Tokenizer) -> _Written:
        """What is written, the newest tokens included."""
        if self._written is None:  # decoded when it is asked for: that takes time
            pieces = tokenizer.pieces
            reader = pieces.after(self.prompt)
            self._written = _Written(reader, pieces.special, self.stops)
        self._written.take(self.tokens, ended=not self.going)
        return self._written


class _Written:
    """A text that grows token by token, with what is known of each.

    There are two of it: the *shown* one, and the *whole* one in which special tokens
    are spelled out, as a stop string may have them. A position is a number of
    characters of the whole one. A special token amid a character's bytes stands before
    it, but where it ends the text: then the character is broken.

    Args:
      reader: of the tokens that are not special.
      special: texts of those that are, by id.
      stops: strings that end the text.

    Attributes:
      cut: the position where the first complete stop string begins, if there is one.
    """

    def __init__(
        self, reader: Detokenizer, special: dict[int, str], stops: Sequence[str]
    ):
        self._reader, self._special = reader, special
        self._searches = [_Search(stops), _Search(stops)] if stops else []
        self.cut: int | None = None
        # After each token, and before all of them: characters shown, and in the whole;
        # and whether the last character is complete.
        self._shown, self._whole, self._complete = [0], [0], [True]
        self._parts = [""]  # of the shown text
        self._count, self._ended = 0, False

    @property
    def end(self) -> int:
        """The position where the text ends."""
        return self._whole[-1] if self.cut is None else self.cut

    def take(self, tokens: Sequence[int], ended: bool) -> None:
        """Read on, until a stop string is complete.

        Args:
          tokens: all of them, those that were read already included.
          ended: whether none will come after them.
        """
        while self.cut is None and self._count < len(tokens):
            token = tokens[self._count]
            self._count += 1
            special = self._special.get(token)
            if special is None:
                text = self._reader.add(token)
                self._append(text, text)
            else:
                self._break_before(special)
                self._append("", special)
        if ended and self.cut is None and not self._ended:
            self._ended = True
            text = self._reader.end()
            self._append(text, text)

    def _append(self, shown: str, whole: str) -> None:
        self._parts.append(shown)
        self._shown.append(self._shown[-1] + len(shown))
        self._whole.append(self._whole[-1] + len(whole))
        self._complete.append(not self._reader.waiting)
        self._search(shown, whole)

    def _break_before(self, special: str) -> None:
        """End the character that waits, if a special token begins what ends the text.

        Args:
          special: the token's text.
        """
        if not self._searches or not self._reader.waiting:
            return
        start = self._searches[1].find(special)
        if start is not None and start >= self._whole[-1]:
            text = self._reader.end()
            self._parts[-1] += text
            self._shown[-1] += len(text)
            self._whole[-1] += len(text)
            self._complete[-1] = True
            self._search(text, text)

    def _search(self, shown: str, whole: str) -> None:
        if not self._searches or self.cut is not None:
            return
        at, position = (
            search.add(text)
            for search, text in zip(self._searches, (shown, whole), strict=True)
        )
        positions = [] if position is None else [position]
        if at is not None:
            positions.append(self._position(at))
        self.cut = min(positions, default=None)

    def settled(self) -> int:
        """The position up to which no stop string can begin any more."""
        if not self._searches:
            return self._whole[-1]
        shown, whole = (search.settled() for search in self._searches)
        return min(self._position(shown), whole)

    def shown(self, start: int, end: int) -> str:
        """Characters of the shown text.

        Args:
          start: number of the first.
          end: number behind the last.
        """
        first = bisect_right(self._shown, start)
        text = "".join(self._parts[first:])
        offset = start - self._shown[first - 1]
        return text[offset : offset + end - start]

    def shown_at(self, position: int) -> int:
        """Characters shown before a position."""
        i = bisect_right(self._whole, position)
        if i == len(self._whole) or self._shown[i] == self._shown[i - 1]:
            return self._shown[i - 1]  # at the end, or in a special token
        return self._shown[i - 1] + position - self._whole[i - 1]

    def tokens_at(self, position: int) -> int:
        """The most tokens that are all of whole characters before a position."""
        i = bisect_right(self._whole, position) - 1
        while not self._complete[i]:
            i -= 1
        return min(i, self._count)

    def _position(self, shown: int) -> int:
        """Where the character begins that so many are shown before."""
        i = bisect_right(self._shown, shown)
        if i == len(self._shown):
            return self._whole[-1]
        return self._whole[i - 1] + shown - self._shown[i - 1]


class _Search:
    """Looks for stop strings in a text that grows.

    Args:
      stops: the strings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = sorted(stops)
        self._most = max(map(len, stops)) - 1  # characters that one may yet begin in
        self._tail, self._length = "", 0

    def find(self, text: str) -> int | None:
        """Where the first stop string begins that is complete with more text."""
        if not text:
            return None
        read, start = len(self._tail), self._length - len(self._tail)
        text = self._tail + text
        # A stop string that ended before would have been found before.
        places = (text.find(s, max(0, read - len(s) + 1)) for s in self._stops)
        found = [at for at in places if at >= 0]
        return start + min(found) if found else None

    def add(self, text: str) -> int | None:
        """As `find`; then the text has been read."""
        found = self.find(text)
        self._length += len(text)
        text = self._tail + text
        self._tail = text[max(0, len(text) - self._most) :]
        return found

    def settled(self) -> int:
        """Characters up to the first that may begin a stop string."""
        for held in range(len(self._tail), 0, -1):
            end = self._tail[-held:]
            # In their order, what begins with something stands right behind it.
            i = bisect_left(self._stops, end)
            if i < len(self._stops) and self._stops[i].startswith(end):
                return self._length - held
        return self._length
