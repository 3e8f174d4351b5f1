"""Byte-level BPE: GPT-2's tokenizer, and how others split text before its merges."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from convert.source import ConversionError

# LLaMA-3 and Qwen: contractions, words, up to three digits or each alone,
# punctuation, line breaks, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tekken: a word ends where a small letter is followed by a capital one.
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Splitting:
    """What happens to a text before the merges.

    Attributes:
      pattern: regular expression of the parts; empty for GPT-2's own.
      digits: each digit is a part, before anything else.
      composed: letters and their accents are composed first (NFC).
      whole: a part that is a token is not put together by merges.
    """

    pattern: str = ""
    digits: bool = False
    composed: bool = False
    whole: bool = False


GPT2 = Splitting()
SMOLLM = Splitting(digits=True)
LLAMA3 = Splitting(_WORDS % "{1,3}", whole=True)
SMAUG = Splitting(_WORDS % "{1,3}")
TEKKEN = Splitting(_CASES, whole=True)
QWEN2 = Splitting(_WORDS % "", composed=True)


def byte_level(
    ids: dict[str, int],
    merges: Iterable[str],
    splitting: Splitting,
    prefix_space: bool = False,
) -> Tokenizer:
    """Build the tokenizer of a vocabulary.

    Args:
      ids: of tokens, which are written in GPT-2's characters for bytes.
      merges: "left right", the first one first.
      splitting: before the merges.
      prefix_space: whether a text is read as if a space stood before it.

    Raises:
      ConversionError: if a merge is not one.
    """
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left and right):
            raise ConversionError(f"the tokenizer's merge {merge!r} is no pair")
        pairs.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=pairs, ignore_merges=splitting.whole)
    )
    whole = pre_tokenizers.ByteLevel(prefix_space, use_regex=not splitting.pattern)
    parts = [whole]
    if splitting.pattern:
        split = pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated")
        parts = [split, *parts]
    if splitting.digits:
        parts = [pre_tokenizers.Digits(individual_digits=True), *parts]
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def characters() -> list[str]:
    """GPT-2's character for each of the 256 bytes.

    Printable ones stand for themselves, the others for those from U+0100 on.
    """
    itself = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


def parse_ranks(raw: bytes) -> dict[bytes, int] | None:
    """The ranks in a file of tiktoken's format; None if it is of another.

    Args:
      raw: the file, a token in base64 and its rank on each line.
    """
    ranks = {}
    for line in raw.splitlines():
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            return None
    return ranks or None


def from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    """LLaMA-3's tokenizer of a file of tiktoken's format.

    The file has no merges: every way to cut a token into two tokens is one, with the
    token's rank.

    Args:
      ranks: of tokens; their ids, too.
    """
    written = characters()
    ranked = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]], token, cut)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )

    def text(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    merges = [f"{text(token[:cut])} {text(token[cut:])}" for *_, token, cut in ranked]
    ids = {text(token): rank for token, rank in ranks.items()}
    return byte_level(ids, merges, LLAMA3)
