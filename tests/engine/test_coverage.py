"""Texts that no tokenizer could make fit are refused before they are tokenized."""

import math

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre

from polarjax.config import ModelConfig
from polarjax.engine.checks import encode_prompt
from polarjax.engine.coverage import coverage_of
from polarjax.engine.tokenizer import Tokenizer as Ours
from tests.engine.tiny_tokenizers import BYTE_KINDS, KINDS
from tests.models import LLAMA, byte_tokenizer

COMPOSED = "α\u0313\u0300\u0345"  # one character in NFC, three bytes


def halves(text):
    """Merges that make a text of its characters, those of short pieces first."""
    if len(text) < 2:
        return []
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    return [*halves(first), *halves(second), (first, second)]


def merging(text, normalizer=None):
    """A byte-level tokenizer that makes one token of a text."""
    alphabet = sorted(pre.ByteLevel.alphabet())
    [(spelled, _)] = pre.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    merges = list(dict.fromkeys(halves(spelled)))
    names = [*alphabet, *(first + second for first, second in merges)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def changed(pre_tokenizer=None, normalizer=None, added=()):
    tokenizer = byte_tokenizer()
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def without(text, normalizer=None):
    """A byte-level tokenizer that lacks some bytes, as SmolLM2's does."""
    [(spelled, _)] = pre.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    kept = sorted(set(pre.ByteLevel.alphabet()) - set(spelled))
    tokenizer = merging("a" * 8)
    vocabulary = {name: i for i, name in enumerate([*kept, "aa", "aaaa"])}
    merges = [("a", "a"), ("aa", "aa")]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


KNOWN = {
    **BYTE_KINDS,
    "spaces": lambda: merging(" " * 32),
    "NFC": lambda: merging("\u1f82", normalizers.NFC()),
    "NFKC": lambda: merging("\u1f82", normalizers.NFKC()),
    "shorter": lambda: merging("-" * 8, normalizers.Replace("spaces", "-")),
    "digits": lambda: changed(pre.Sequence([pre.Digits(), pre.ByteLevel()])),
    "without controls": lambda: without("\t\x04"),
    "longer": lambda: changed(
        normalizer=normalizers.Replace("x", "x" * 9), added=[AddedToken("xx")]
    ),
}
TEXTS = [
    "\x04",
    "a\x04",
    "\U000f0000",
    "a b",
    " ",
    "spaces",
    "x",
    "xx",
    "😀é日",
    COMPOSED,
    "\u1f82",
    "ffi",
    "<|im_start|>",
    "\t\n",
    "12",
    "가",
]


@pytest.mark.parametrize("kind", KNOWN)
def test_no_text_has_fewer_tokens(kind):
    tokenizer, rng = KNOWN[kind](), np.random.default_rng(0)
    coverage = coverage_of(tokenizer)
    assert 1 <= coverage.most < math.inf
    texts = [text * 500 for text in TEXTS]
    texts += ["".join(rng.choice(TEXTS, size=30)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert coverage.least_tokens(text) <= len(ids), text[:20]


def test_the_bound_is_reached():
    for text, tokenizer in (
        (" " * 32, merging(" " * 32)),
        ("spaces" * 8, merging("-" * 8, normalizers.Replace("spaces", "-"))),
    ):
        ids = tokenizer.encode(text * 10, add_special_tokens=False).ids
        assert coverage_of(tokenizer).least_tokens(text * 10) == len(ids)
    # What NFC composes is longer than the longest piece.
    composing = merging("\u1f82", normalizers.NFC())
    [_] = composing.encode(COMPOSED).ids
    assert len(COMPOSED) > max(map(len, composing.get_vocab()))


@pytest.mark.parametrize(
    "tokenizer",
    [
        *(KINDS[kind]() for kind in KINDS if kind not in BYTE_KINDS),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace(" ", "")),
        changed(normalizer=normalizers.Sequence([normalizers.StripAccents()])),
        changed(pre.Sequence([pre.WhitespaceSplit(), pre.ByteLevel()])),
        changed(pre.Sequence([pre.Split(" ", "removed"), pre.ByteLevel()])),
        changed(added=[AddedToken("<x>", lstrip=True)]),
        changed(added=[AddedToken("<x>", rstrip=True)]),
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])),  # drops all but "a"
        without("\t", normalizers.Prepend("x")),
        without("é"),  # whose second byte others need
    ],
)
def test_nothing_is_said_of_a_tokenizer_that_may_drop_something(tokenizer):
    assert coverage_of(tokenizer).most == math.inf
    assert Ours(tokenizer).least_tokens("a" * 10**6) == 0


class Counting:
    """A tokenizer that notes what it is asked to encode."""

    def __init__(self, backend):
        self._backend, self.texts = Ours(backend), []

    def least_tokens(self, text):
        return self._backend.least_tokens(text)

    def encode(self, text, special=True, name=""):
        self.texts.append(len(text))
        return self._backend.encode(text, special, name)


def test_a_text_that_cannot_fit_is_not_encoded():
    config: ModelConfig = LLAMA
    tokenizer = Counting(byte_tokenizer())  # whose longest piece is "<end>"
    for context in (None, 8):
        room = context or config.context
        for characters in (5 * room, 5 * (room - 1) + 1):
            with pytest.raises(
                ValueError,
                match=f"^prompt 3 has {characters} characters, which are {room} tokens "
                f"at least, and there is room for {room} with the answer",
            ):
                encode_prompt(3, "x" * characters, tokenizer, config, context)
    assert not tokenizer.texts
    assert encode_prompt(3, "<end>" * 7, tokenizer, config, 8) == [256] * 7
    assert tokenizer.texts == [35]
