"""How much of a text one token can stand for: a bound for texts that are too long."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import tokenizers
from tokenizers import models

# No character is composed of more than 4 (Unicode, annex 15), and what a compatibility
# form takes apart has a character of each part; the others only take apart.
_COMPOSED = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1}


@functools.lru_cache(maxsize=4)
def most_characters(backend: tokenizers.Tokenizer) -> float:
    """Characters of a text that one token stands for at most.

    It is the longest piece of the vocabulary, where every character becomes part of a
    piece: in byte-pair encoding that knows all bytes. Not where a normalizer or a
    pre-tokenizer may drop something, or an added token takes the spaces beside it.

    Args:
      backend: the tokenizer.

    Returns:
      At least 1; inf where nothing can be said.
    """
    shrunk = _shrunk(_record(backend.normalizer))
    steps = _steps(_record(backend.pre_tokenizer), "pretokenizers")
    added = backend.get_added_tokens_decoder().values()
    drops = any(one.lstrip or one.rstrip for one in added)
    known = backend.get_vocab(with_added_tokens=True)
    if drops or not all(map(_keeps, steps)) or not _knows_bytes(backend, steps, known):
        return math.inf
    longest = max(map(len, known))
    if backend.normalizer is not None:  # which may lengthen what it is looked for in
        texts = [backend.normalizer.normalize_str(one.content) for one in added]
        longest = max(longest, *map(len, texts), 1)
    return shrunk * longest


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


def _knows_bytes(
    backend: tokenizers.Tokenizer, steps: list[dict[str, Any]], known: dict[str, int]
) -> bool:
    """Whether no character is unknown, which might be dropped, or joined to others."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if any(step["type"] == "ByteLevel" for step in steps):
        return known.keys() >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return model.byte_fallback and all(f"<0x{i:02X}>" in known for i in range(256))
