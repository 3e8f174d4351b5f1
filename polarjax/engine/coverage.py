"""How much of a text one token can stand for: a bound for texts that are too long."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import tokenizers
from tokenizers import models

from polarjax.engine.detokenize import byte_alphabet

# No character is composed of more than 4 (Unicode, annex 15), and what a compatibility
# form takes apart has a character of each part; the others only take apart.
_COMPOSED = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What the tokens of a tokenizer stand for at most.

    Attributes:
      most: characters that one token stands for, at least 1; inf where nothing can be
        said.
      dropped: characters that are not in the vocabulary, and become no token at all.
    """

    most: float
    dropped: str = ""

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at least; 0 where nothing can be said."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return math.ceil(kept / self.most)


@functools.lru_cache(maxsize=4)
def coverage_of(backend: tokenizers.Tokenizer) -> Coverage:
    """What one token stands for at most.

    It is the longest piece of the vocabulary, where every character becomes part of a
    piece: in byte-pair encoding that knows all bytes. A few control characters may be
    missing. Nothing is said where a normalizer or a pre-tokenizer may drop something,
    or an added token takes the spaces beside it.

    Args:
      backend: the tokenizer.
    """
    shrunk = _shrunk(_record(backend.normalizer))
    steps = _steps(_record(backend.pre_tokenizer), "pretokenizers")
    added = backend.get_added_tokens_decoder().values()
    drops = any(one.lstrip or one.rstrip for one in added)
    known = backend.get_vocab(with_added_tokens=True)
    dropped = _unknown(backend, steps, known)
    if drops or dropped is None or not all(map(_keeps, steps)):
        return Coverage(math.inf)
    longest = max(map(len, known))
    if backend.normalizer is not None:  # which may lengthen what it is looked for in
        texts = [backend.normalizer.normalize_str(one.content) for one in added]
        longest = max(longest, *map(len, texts), 1)
    return Coverage(shrunk * longest, dropped)


def _record(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _steps(record: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    if record is None:
        return []
    if record["type"] != "Sequence":
        return [record]
    return [step for one in record[of] for step in _steps(one, of)]


def _shrunk(record: dict[str, Any] | None) -> float:
    """How many times shorter a normalizer may make a text; inf if nothing says."""
    found = 1.0
    for step in _steps(record, "normalizers"):
        if step["type"] == "Replace":
            old, new = step["pattern"].get("String"), step["content"]
            found *= max(1.0, len(old) / len(new)) if old and new else math.inf
        else:
            found *= _COMPOSED.get(step["type"], math.inf)
    return found


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer keeps every character."""
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return step["type"] in ("ByteLevel", "Digits", "Metaspace")


def _unknown(
    backend: tokenizers.Tokenizer, steps: list[dict[str, Any]], known: dict[str, int]
) -> str | None:
    """Characters that become no token; None where nothing can be said of them."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not any(step["type"] == "ByteLevel" for step in steps):
        all_bytes = all(f"<0x{i:02X}>" in known for i in range(256))
        return "" if model.byte_fallback and all_bytes else None
    missing = [byte for sign, byte in byte_alphabet().items() if sign not in known]
    # Of what begins with another byte, there are bytes from 0x80 to 0xBF that stay.
    dropped = "".join(chr(byte) for byte in missing if byte < 0x80)
    stay = not any(0x80 <= byte < 0xC0 for byte in missing)
    plain = model.unk_token is None and backend.normalizer is None
    return dropped if not missing or (stay and plain) else None
