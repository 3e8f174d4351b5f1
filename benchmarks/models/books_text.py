"""A text with its documents as one stream of tokens, and batches of it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from polarjax.training.text import open_text

END = "<|endoftext|>"
"""Stands before and after each document; its id is 0."""
SEPARATOR = "\n\n\n"
"""Between two documents of a file."""

_PIECE = 1 << 18  # characters
_GROUP = 64  # pieces tokenised together, by all cores
_VOCABULARY_BYTES = 40_000_000  # of text that the merges are counted on

# Where byte-level BPE cuts anyway: the newline before a word is a word of its own.
_CUT = re.compile(r"\n(?=\n\S)")


def pieces(path: str | Path, size: int = _PIECE) -> Iterator[tuple[str, bool]]:
    """Read a text in pieces whose tokens are those of the whole.

    Args:
      path: UTF-8 text, plain or gzipped (.gz).
      size: characters read at a time; a piece ends between two paragraphs.

    Yields:
      Text, and whether a document ends with it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such text.
    """
    rest = ""
    with open_text(path) as file:
        while new := file.read(size):
            *ended, rest = (rest + new).split(SEPARATOR)
            for document in ended:
                yield document, True
            cuts = [match.end() for match in _CUT.finditer(rest)]
            if cuts:
                yield rest[: cuts[-1]], False
                rest = rest[cuts[-1] :]
    if rest:
        yield rest, True


def train_tokenizer(path: str | Path, vocab: int) -> Tokenizer:
    """Byte-level BPE, learned on pieces spread evenly over a text.

    It gives back every text exactly, and adds no token of its own to any.

    Args:
      path: as `pieces`.
      vocab: tokens, `END` and the 256 bytes included.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such text, or too short for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = math.ceil(Path(path).stat().st_size / _VOCABULARY_BYTES) or 1
    sample = itertools.islice(pieces(path), 0, None, every)
    tokenizer.train_from_iterator((text for text, _ in sample), trainer)
    size = tokenizer.get_vocab_size()
    if size > vocab:
        raise ValueError(f"a vocabulary has at least {size} tokens, not {vocab}")
    if size < vocab:
        raise ValueError(
            f"{path} gives {size} different tokens, not {vocab}: lower --vocab, or "
            "take more text"
        )
    return tokenizer


def read_tokens(path: str | Path, tokenizer: Tokenizer, least: int) -> np.ndarray:
    """Tokenise a text, on all cores.

    Args:
      path: as `pieces`.
      tokenizer: of at most 65,536 tokens.
      least: tokens that the caller needs.

    Returns:
      uint16[n]: `END`, then each document followed by it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such text, or too short.
    """
    end = [tokenizer.token_to_id(END)]
    stream, parts = pieces(path), [np.array(end, np.uint16)]
    while group := list(itertools.islice(stream, _GROUP)):
        texts = [text for text, _ in group]
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for tokens, (_, ends) in zip(encoded, group, strict=True):
            parts.append(np.array(tokens.ids + end * ends, np.uint16))
    tokens = np.concatenate(parts)
    if len(tokens) < least:
        raise ValueError(
            f"{path} has {len(tokens)} tokens, at least {least} are needed"
        )
    return tokens


def batches(
    tokens: np.ndarray, context: int, batch: int, seed: int
) -> Iterator[np.ndarray]:
    """Random blocks without end: every epoch cuts elsewhere, and shuffles anew.

    Args:
      tokens: uint16[n], with n > context * (batch + 1).
      context: t, tokens that a block predicts.
      batch: b, blocks of one batch.
      seed: of the order.

    Yields:
      uint16[b, t + 1].
    """
    window = np.arange(context + 1)
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        offset = rng.integers(context)
        count = (len(tokens) - 1 - offset) // context
        starts = offset + context * rng.permutation(count)
        for i in range(0, count - batch + 1, batch):
            yield tokens[starts[i : i + batch, None] + window]


def blocks(tokens: np.ndarray, context: int) -> np.ndarray:
    """All blocks in order, uint16[n, t + 1]; what remains at the end is dropped."""
    starts = np.arange(0, len(tokens) - context, context)
    return tokens[starts[:, None] + np.arange(context + 1)]
