"""Token ids become the text that `tokenizers` makes of them, and lose no character."""

import numpy as np
import pytest

from polarjax.engine.request import Request
from polarjax.engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import (
    BYTE_KINDS,
    KINDS,
    SPECIAL,
    byte_fallback,
    byte_level,
    some_tokens,
)


def spelled(backend, tokens):
    """The bytes of tokens, written down by hand; special tokens add none."""
    level = "ByteLevel" in repr(backend.decoder)
    parts = []
    for token in tokens:
        text = backend.id_to_token(token)
        if text in (*SPECIAL, "<unk>", "<end>"):
            continue
        if level and token < 256:  # the alphabet is sorted: the id knows the character
            parts.append(bytes([ALPHABET[text]]))
        elif not level and text.startswith("<0x"):
            parts.append(bytes([int(text[3:5], 16)]))
        else:
            parts.append(text.replace("▁", " ").encode())
    return b"".join(parts)


def _alphabet():
    """By GPT-2's own rule."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    found, more = {chr(b): b for b in plain}, 0
    for byte in range(256):
        if byte not in plain:
            found[chr(256 + more)] = byte
            more += 1
    return found


ALPHABET = _alphabet()


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_tokenizers(kind):
    backend = KINDS[kind]()
    tokenizer, rng, whole = Tokenizer(backend), np.random.default_rng(0), 0
    while whole < 500:
        tokens = some_tokens(rng, backend)
        cut = rng.integers(len(tokens) + 1)
        expected = backend.decode(tokens)
        if "\ufffd" in expected:
            continue
        whole += 1
        assert tokenizer.decode(tokens) == expected, tokens
        head = backend.decode(tokens[:cut])
        new = tokenizer.continuation(tokens[:cut], tokens[cut:])
        if kind in BYTE_KINDS:
            # A character that the prompt begins belongs to what completes it.
            head = head if "\ufffd" not in head else tokenizer.decode(tokens[:cut])
            assert head.rstrip("\ufffd") + new == expected, (tokens, cut)
        else:
            assert head + new == expected, (tokens, cut)


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_broken_bytes_cost_no_character_beside_them(kind):
    backend = KINDS[kind]()
    tokenizer, rng, broken = Tokenizer(backend), np.random.default_rng(1), 0
    for _ in range(500):
        tokens = some_tokens(rng, backend)
        text = spelled(backend, tokens).decode(errors="replace")
        if kind.endswith("prefix"):
            text = text.removeprefix(" ")
        broken += "\ufffd" in text
        assert tokenizer.decode(tokens) == text, tokens
    assert broken > 100


def test_an_incomplete_character_at_the_end_leaves_the_others():
    tokenizer = Tokenizer(byte_fallback(prefix=True))
    cut = tokenizer.encode("नम😀", special=False)[:-1]
    assert tokenizer.decode(cut) == "नम\ufffd"
    cut = tokenizer.encode("\n😀", special=False)[:-2]
    assert tokenizer.decode(cut) == "\n\ufffd"


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_a_prompt_that_ends_inside_a_character(kind):
    tokenizer = Tokenizer(KINDS[kind]())
    tokens = tokenizer.encode("ab😀end", special=False)
    head = tokenizer.encode("ab", special=False)
    for cut in (1, 2, 3):
        cut += len(head)
        # The one that completes a character has it, and no letter is lost.
        assert tokenizer.continuation(tokens[:cut], tokens[cut:]) == "😀end"
        # What is never completed is no part of the new text, unless by its own bytes.
        end = tokenizer.encode("end", special=False)
        assert tokenizer.continuation(tokens[:cut], end) == "end"
        assert tokenizer.continuation(tokens[:cut], []) == ""
        assert tokenizer.continuation(tokens[: cut - 1], tokens[cut - 1 : cut]) == (
            "\ufffd"
        )


class Counting:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, backend):
        self.backend, self.decoded, self.looked_up = backend, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def decode(self, tokens, **options):
        self.decoded += len(tokens)
        return self.backend.decode(tokens, **options)

    def id_to_token(self, token):
        self.looked_up += 1
        return self.backend.id_to_token(token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [(), ("never",)])
def test_the_work_does_not_grow_with_the_length(kind, stops):
    """Neither with the prompt's, nor with that of the answer so far."""
    rng, backend = np.random.default_rng(2), KINDS[kind]()
    answer = []
    while len(answer) < 2048:
        answer += some_tokens(rng, backend)
    for length in (16, 8192):
        counting = Counting(backend)
        request = Request(answer[:8] * (length // 8), 2048, Tokenizer(counting), stops)
        work, texts = [], ""
        for at in range(0, 2048, 16):
            before = counting.decoded + counting.looked_up
            part = answer[at : at + 16]
            request.add(part, [0.0] * len(part), ended=at + 16 == 2048)
            texts += request.news()[0]
            work.append(counting.decoded + counting.looked_up - before)
        assert texts == request.text
        # 16 tokens, each with few others about it
        assert max(work) < 16 * 20, (length, work)


def test_a_special_token_amid_a_characters_bytes():
    tokenizer = Tokenizer(byte_level())
    first, *rest = tokenizer.encode("€", special=False)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.decode([first, end, *rest]) == "€"
    request = Request([], 9, tokenizer, ("<|im_end|>€",))
    request.add([first, end, *rest], [0.0] * 4, ended=False)
    assert request.text == "" and request.tokens == []
