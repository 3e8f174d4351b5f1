"""Token ids to text, one after the other: each token costs the same, however long.

A token of a byte-level tokenizer, or of SentencePiece with bytes as a fallback, is a
few bytes, and a character belongs to the token that completes it. What the decoder of
`tokenizers` makes of these is the same, but for bytes that are no UTF-8: there it loses
whole characters beside them, and here each broken sequence is one U+FFFD.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

_UTF8 = codecs.getincrementaldecoder("utf-8")
_LONGEST = 4  # tokens that a character may be cut into, and bytes that it may have


class Detokenizer(Protocol):
    """Reads one text's tokens, special ones left out.

    Attributes:
      waiting: whether the end of what was read is no whole character yet.
    """

    waiting: bool

    def add(self, token: int) -> str:
        """Read a token; returns the characters that it completes."""
        ...

    def end(self) -> str:
        """What still waits, as U+FFFD."""
        ...


class Pieces:
    """What the tokens of a tokenizer stand for.

    Args:
      backend: the tokenizer.

    Attributes:
      special: texts of the special tokens, which are not shown, by id.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        added = backend.get_added_tokens_decoder()
        self.special = {i: str(t.content) for i, t in added.items() if t.special}
        self._added = added.keys() - self.special.keys()
        self._backend = backend
        self._rule = _find_rule(backend.decoder)
        self._known: dict[int, bytes] = {}

    def after(self, prompt: Sequence[int]) -> Detokenizer:
        """A reader of the tokens that follow a prompt.

        Args:
          prompt: token ids. A character that they begin and the next tokens complete
            is the next tokens'; one that nothing completes is nobody's.
        """
        if self._rule is None:
            return _Windows(
                self._backend.decode, self._last_shown(prompt, 2 * _LONGEST)
            )
        # A character has four bytes at most: three of them may be waiting.
        tail = b"".join(map(self.bytes, self._last_shown(prompt, _LONGEST)))
        return _Bytes(self.bytes, tail, self._rule.strip)

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text; nothing if it is special or unknown."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._make(token)
        return found

    def _make(self, token: int) -> bytes:
        assert self._rule is not None
        text = self._backend.id_to_token(token)
        if text is None or token in self.special:
            return b""
        found = self._rule.encode(text)
        if token in self._added and "\ufffd" in found.decode(errors="replace"):
            return text.encode()  # letters that happen to be of the bytes' alphabet
        return found

    def _last_shown(self, tokens: Sequence[int], count: int) -> list[int]:
        """The last tokens that add something to the text, the first of them first."""
        found: list[int] = []
        for token in reversed(tokens):
            if len(found) == count:
                break
            known = self.bytes if self._rule else self._backend.id_to_token
            if token not in self.special and known(token):
                found.append(token)
        return found[::-1]


class _Bytes:
    """Tokens that are bytes of UTF-8.

    Args:
      pieces: what a token stands for.
      before: the end of the bytes that came before; empty at the start of a text.
      strip: a character that is dropped where it starts a text; may be empty.
    """

    def __init__(self, pieces: Callable[[int], bytes], before: bytes, strip: str):
        self._pieces = pieces
        self._strip = "" if before else strip
        self._decoder = _UTF8("replace")
        self._decoder.decode(before)
        self._before = self._decoder.getstate()[0]  # begins a character
        self.waiting = False

    def add(self, token: int) -> str:
        piece = self._pieces(token)
        if not piece:
            return ""
        if self._before:
            if not _goes_on(self._before, piece):
                self._decoder.reset()
            self._before = b""
        text = self._decoder.decode(piece)
        self.waiting = bool(self._decoder.getstate()[0])
        if self._strip and (text or self.waiting):
            text, self._strip = text.removeprefix(self._strip), ""
        return text

    def end(self) -> str:
        self.waiting = False
        return "" if self._before else self._decoder.decode(b"", True)


def _goes_on(before: bytes, piece: bytes) -> bool:
    """Whether bytes belong to the character that others began."""
    try:
        _UTF8().decode(before + piece[:1])
    except UnicodeDecodeError:
        return False
    return True


class _Windows:
    """Tokens of which `tokenizers` alone knows what they stand for.

    They are decoded behind those that came just before them, whose text is then cut
    off: a token may read otherwise at the start of a text.

    Args:
      decode: from token ids to text.
      before: tokens that came before, none of them special.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: list[int]):
        self._decode = decode
        self._before, self._new = before, []
        self.waiting = False

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._fresh()
        self.waiting = text.endswith("\ufffd") and len(self._new) < _LONGEST
        if self.waiting:
            return ""
        if text:
            self._before, self._new = self._new, []
        else:  # it may still matter to the next one, as the end of a word does
            del self._new[:-_LONGEST]
        return text

    def end(self) -> str:
        text = self._fresh() if self.waiting else ""
        self.waiting = False
        return text

    def _fresh(self) -> str:
        before = self._decode(self._before)
        whole = self._decode([*self._before, *self._new])
        while not whole.startswith(before):  # a broken character may be whole by now
            before = before[:-1]
        return whole[len(before) :]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a decoder reads tokens.

    Attributes:
      encode: from a token's text to its bytes.
      strip: a character that is dropped where it starts a text; may be empty.
    """

    encode: Callable[[str], bytes]
    strip: str = ""


def _find_rule(decoder: tokenizers.decoders.Decoder | None) -> _Rule | None:
    """The rule of a decoder, if a token is the same bytes wherever it stands."""
    if decoder is None:
        return None
    record = json.loads(decoder.__getstate__())
    steps = record["decoders"] if record["type"] == "Sequence" else [record]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()

        def spelled(text: str) -> bytes:
            if any(character not in alphabet for character in text):
                return text.encode()  # was added to the vocabulary: its own text
            return bytes(alphabet[character] for character in text)

        return _Rule(spelled)
    swaps = [
        (step["pattern"].get("String"), step["content"])
        for step in steps
        if step["type"] == "Replace"
    ]
    order = ["Replace"] * len(swaps) + ["ByteFallback", "Fuse"]
    if kinds[: len(order)] != order or any(old is None for old, _ in swaps):
        return None
    strip = ""
    match steps[len(order) :]:
        case []:
            pass
        case [{"type": "Strip", "content": str(strip), "start": 1, "stop": 0}]:
            pass
        case _:
            return None

    def fallen_back(text: str) -> bytes:
        for old, new in swaps:
            text = text.replace(old, new)
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
        return bytes.fromhex(byte[1]) if byte else text.encode()

    return _Rule(fallen_back, strip)


def byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's vocabulary writes bytes in.

    Those that can be printed are Latin-1's; the others follow from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
