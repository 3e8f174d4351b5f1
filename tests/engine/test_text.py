"""Texts, stop strings and streaming, on a model whose text is known beforehand.

Its logits depend on the last token alone and spell one sentence over and over, with
characters of one to four bytes, each byte a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.engine.request import Request
from polarjax.engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import (
    BYTE_KINDS,
    KINDS,
    byte_fallback,
    byte_level,
    some_tokens,
)
from tests.models import LLAMA, byte_tokenizer, random_params, write_checkpoint

SENTENCE = "abc€def😀gh é_STOP"
BYTES = byte_tokenizer().encode(SENTENCE).ids
assert len(set(BYTES)) == len(BYTES)  # so the last token decides what comes next
NEW = 40
CONFIG = dataclasses.replace(
    *(LLAMA,),
    layers=1,
    vocab_size=257,
    dim=257,
    embed_dim=257,
    neurons=2,
    heads=2,
    kv_heads=1,
    tied_embeddings=False,
    eos_ids=(256,),
)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A chain: token by token through the sentence, and again."""
    weights = jax.tree.map(np.zeros_like, random_params(CONFIG).weights)
    for name in ("attention_norm", "mlp_norm"):
        weights["layers_0"][name]["scale"] += 1
    weights["final_norm"]["scale"] += 1
    weights["embed"]["tokens"] = np.eye(257, dtype=np.float32)
    for here, there in zip(BYTES, BYTES[1:] + BYTES[:1], strict=True):
        weights["embed"]["head"][there, here] = 1
    weights = jax.tree.map(jnp.asarray, weights)
    params = polarjax.Params(weights, polarjax.Dense(), CONFIG)
    return write_checkpoint(tmp_path_factory.mktemp("chain") / "model", params)


PROMPTS = ["a", "xyz: abc€d", "P", "c"]


def expected_bytes(prompt, count=NEW):
    at = BYTES.index(byte_tokenizer().encode(prompt).ids[-1])
    return [BYTES[(at + 1 + i) % len(BYTES)] for i in range(count)]


def cut(prompt, stops):
    """Text and tokens up to the stop string that is complete first."""
    tokenizer, ids = byte_tokenizer(), expected_bytes(prompt)
    for n in range(1, NEW + 1):
        text = tokenizer.decode(ids[:n])
        if any(stop in text for stop in stops):
            text = text[: min(text.index(stop) for stop in stops if stop in text)]
            return text, tokenizer.encode(text).ids, "stop"
    return tokenizer.decode(ids), ids, "length"


def generate(params, prompts=PROMPTS, **settings):
    """The output, and what was streamed to each request."""
    events = [[] for _ in prompts]

    def stream(request, text, tokens):
        assert text or tokens
        events[request].append((text, tokens))

    out = polarjax.generate(
        params, prompts, max_new_tokens=NEW, stream=stream, **settings
    )
    for i in range(len(prompts)):
        assert "".join(text for text, _ in events[i]) == out.texts[i]
        assert [token for _, new in events[i] for token in new] == out.tokens[i]
        assert len(out.tokens[i]) == len(out.logprobs[i])
    return out, events


def test_texts_are_those_of_the_tokens(params):
    out, events = generate(params)
    assert out.tokens == [expected_bytes(prompt) for prompt in PROMPTS]
    assert out.texts == [byte_tokenizer().decode(tokens) for tokens in out.tokens]
    # Characters are streamed whole: only the limit may have cut one in the middle.
    assert out.texts[2].endswith("gh \ufffd")
    for pieces in events:
        assert len(pieces) > 2
        assert not any("\ufffd" in text for text, _ in pieces[:-1])


@pytest.mark.parametrize(
    "stop",
    [
        "STOP",
        "€",
        "é_",
        "😀gh",
        "a",
        "Pabc",  # across the sentence's end
        "never",
        ("def", "€d"),  # one begins first, another is complete first
        ("€def😀", "def"),
        ("STOP", "TOP", "OP"),
        ("bc", "abc", "abcd"),
    ],
)
def test_stop_strings_cut_text_and_tokens_alike(params, stop):
    stops = (stop,) if isinstance(stop, str) else stop
    out, events = generate(params, stop=stop)
    for i, prompt in enumerate(PROMPTS):
        text, tokens, reason = cut(prompt, stops)
        assert out.texts[i] == text
        assert out.tokens[i] == tokens
        assert out.finish_reasons[i] == reason
        # Nothing of a stop string is ever shown.
        shown = ""
        for piece, _ in events[i]:
            shown += piece
            assert not any(stop in shown for stop in stops)


def test_the_prompt_may_end_in_the_middle_of_a_stop_string(params):
    # Only new text counts: "STO" in the prompt, "P" is new.
    out, _ = generate(params, ["a STO", "a", "b", "c"], stop="STOP")
    assert out.texts[0].startswith("Pabc€")
    assert out.texts[0].endswith("_")


def test_stop_ids_and_stop_strings_together(params):
    (g,) = byte_tokenizer().encode("g").ids
    out, _ = generate(params, stop="STOP", stop_ids=[g])
    assert out.texts == ["bc€def😀", "ef😀", "abc€def😀", "€def😀"]
    assert out.finish_reasons == ["stop"] * 4
    out, _ = generate(params, stop="def", stop_ids=[g])
    assert out.texts == ["bc€", "ef😀", "abc€", "€"]


def test_a_stop_string_frees_the_batch(params):
    # "d" is the sixth token, and the host looks one step late.
    out, _ = generate(params, ["a"] * 4, stop="d")
    assert out.texts == ["bc€"] * 4 and out.stats.steps <= 7 < NEW - 1


def test_prompts_may_be_texts_or_ids(params):
    ids = [byte_tokenizer().encode(prompt).ids for prompt in PROMPTS]
    assert generate(params, ids)[0].texts == generate(params)[0].texts
    mixed = [PROMPTS[0], ids[1], tuple(ids[2]), np.array(ids[3])]
    assert generate(params, mixed)[0].texts == generate(params)[0].texts


def test_without_a_tokenizer_tokens_are_streamed(params):
    bare = dataclasses.replace(params, config=dataclasses.replace(CONFIG, folder=""))
    events = []
    ids = [byte_tokenizer().encode(prompt).ids for prompt in PROMPTS]
    out = polarjax.generate(
        *(bare, ids),
        max_new_tokens=NEW,
        stream=lambda *event: events.append(event),
    )
    assert out.texts is None
    assert out.tokens == [expected_bytes(prompt) for prompt in PROMPTS]
    assert {text for _, text, _ in events} == {""}
    for i in range(4):
        mine = [t for request, _, tokens in events if request == i for t in tokens]
        assert mine == out.tokens[i]


# The host's side alone, over many cases.


def in_chunks(tokenizer, tokens, stops, chunk, limit, prompt=()):
    """One request fed chunk by chunk, as the device would; and what it streams."""
    request = Request(list(prompt), limit, tokenizer, stops)
    tokens, texts, ids, given = tokens[:limit], "", [], 0
    size = 1  # prefill brings one token
    while request.going:
        assert given < len(tokens), "it should have stopped by now"
        part = tokens[given : given + size]
        given, size = given + len(part), chunk
        request.add(part, [0.0] * len(part), ended=given >= limit)
        text, new = request.news()
        texts, ids = texts + text, ids + new
    return request, texts, ids


def slow_answer(tokenizer, prompt, tokens, stops):
    """Text and finish reason, with everything read anew for each token.

    Two texts are searched: without special tokens, and with them.
    """
    special = tokenizer.pieces.special

    def read(count, ended, broken=False):
        """Characters, and whether they are shown."""
        reader, found = tokenizer.pieces.after(prompt), []
        for n, token in enumerate(tokens[:count], 1):
            shown = token not in special
            text = reader.add(token) if shown else special[token]
            if broken and n == count:
                found += [(c, True) for c in reader.end()]
            found += [(character, shown) for character in text]
        return found + [(c, True) for c in (reader.end() if ended else "")]

    def search(whole):
        starts = []
        for places in (range(len(whole)), [i for i, c in enumerate(whole) if c[1]]):
            text = "".join(whole[i][0] for i in places)
            starts += [places[text.find(stop)] for stop in stops if stop in text]
        return starts

    steps = [(n, False) for n in range(len(tokens) + 1)] + [(len(tokens), True)]
    for count, ended in steps:
        whole = read(count, ended)
        starts = search(whole)
        if starts and count and tokens[count - 1] in special and not ended:
            # The token begins what ends the text: what waits before it is broken.
            if min(starts) >= len(read(count - 1, False)):
                whole = read(count, ended, broken=True)
                starts = search(whole)
        if starts:
            break
    text = "".join(c for c, shown in whole[: min(starts, default=None)] if shown)
    return text, "stop" if starts else "length"


def check_many(kind, seed, cases):
    rng, backend = np.random.default_rng(seed), KINDS[kind]()
    tokenizer, stopped = Tokenizer(backend), 0
    for _ in range(cases):
        prompt, tokens = some_tokens(rng, backend, 6), some_tokens(rng, backend)
        limit = int(rng.integers(1, len(tokens) + 1))
        shown = tokenizer.continuation(prompt, tokens)
        stops = tuple(
            some_stop(rng, shown, tokenizer) for _ in range(rng.integers(0, 4))
        )
        results = []
        for chunk in (1, 2, 3, 7, 100):
            request, texts, ids = in_chunks(
                tokenizer, tokens, stops, chunk, limit, prompt
            )
            assert texts == request.text and ids == request.tokens
            assert len(request.logprobs) == len(request.tokens)
            assert not any(stop in request.text for stop in stops)
            results.append((request.text, request.tokens, request.finish_reason))
        assert all(result == results[0] for result in results), (tokens, stops)
        text, kept, reason = results[0]
        expected = slow_answer(tokenizer, prompt, tokens[:limit], stops)
        assert (text, reason) == expected, (prompt, tokens, stops)
        whole = tokenizer.continuation(prompt, tokens[:limit])
        assert whole.startswith(text) or text.endswith("\ufffd")
        assert kept == tokens[: len(kept)]
        assert reason == "stop" or (text == whole and kept == tokens[:limit])
        # The tokens are the most that do not go beyond the text.
        assert text.startswith(tokenizer.continuation(prompt, kept))
        stopped += reason == "stop"
    assert cases / 5 < stopped < cases


def some_stop(rng, text, tokenizer):
    """Of the text that will come, of special tokens, or something else."""
    special = sorted(tokenizer.pieces.special.values())
    at = rng.integers(len(text) + 1)
    piece = text[at : at + rng.integers(1, 4)]
    name = str(rng.choice(special))
    kind = rng.random()
    if kind < 0.5 and piece:
        return piece
    if kind < 0.7:
        return name
    if kind < 0.8:
        return piece + name if rng.random() < 0.5 else name + piece
    if kind < 0.9:
        return name[: rng.integers(1, len(name))]
    return str(rng.choice(["a", "ab", "€", "\n", "日本", "\ufffd"]))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_chunks_agree_in_random_cases(kind):
    check_many(kind, 0, 500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_chunks_agree_in_many_random_cases(kind):
    check_many(kind, 1, 3000)


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_a_stop_by_name_or_by_id_leaves_the_same_text(kind):
    tokenizer = Tokenizer(KINDS[kind]())
    end = tokenizer.backend.token_to_id("<|im_end|>")
    tokens = tokenizer.encode("ab😀", special=False)[:-1]
    by_id = Request([], 99, tokenizer)
    by_id.add(tokens, [0.0] * len(tokens), ended=True)
    for chunk in (1, 2, 16):
        by_name, texts, ids = in_chunks(
            tokenizer, [*tokens, end, *tokens], ("<|im_end|>",), chunk, 99
        )
        assert by_name.text == by_id.text == texts == "ab\ufffd"
        assert by_name.tokens == by_id.tokens == ids == tokens


def test_a_special_token_ends_a_text_by_its_name():
    tokenizer = Tokenizer(byte_level())
    end = tokenizer.backend.token_to_id("<|im_end|>")
    hello, more = (tokenizer.encode(text, special=False) for text in ("hello", " you"))
    tokens = [*hello, end, *more]
    for chunk in (1, 2, 16):
        cases = {
            ("<|im_end|>",): ("hello", hello),
            ("never", "<|im_end|>"): ("hello", hello),
            # across its ends, and in its midst
            ("lo<|im_end|>",): ("hel", hello[:3]),
            ("<|im_end|> y",): ("hello", hello),
            ("im_",): ("hello", hello),
            # The text does not show it: what stands around it is adjacent.
            ("o y",): ("hell", hello[:4]),
            ("ou",): ("hello y", tokens[:8]),
        }
        for stops, (text, kept) in cases.items():
            request, texts, ids = in_chunks(tokenizer, tokens, stops, chunk, 99)
            assert (request.text, request.tokens) == (text, kept), (stops, chunk)
            assert (texts, ids) == (text, kept)
            assert request.finish_reason == "stop"
        request, *_ = in_chunks(tokenizer, tokens, (), chunk, len(tokens))
        assert (request.text, request.tokens) == ("hello you", tokens)


# Tokenizers.


def test_a_continuation_keeps_the_space_that_its_own_text_would_lose():
    tokenizer = Tokenizer(byte_fallback(prefix=True))
    the, end, stop = map(tokenizer.backend.token_to_id, ("▁The", "▁end", "."))
    assert tokenizer.decode([end]) == "end"
    assert tokenizer.continuation([the], [end, stop]) == " end."
    start = tokenizer.backend.token_to_id("<|im_start|>")
    assert tokenizer.continuation([start], [end, stop]) == "end."


def test_bytes_of_a_fallback_become_characters_when_whole():
    tokenizer = Tokenizer(byte_fallback(prefix=True))
    end, stop = map(tokenizer.backend.token_to_id, ("▁end", "."))
    half, whole = "😀".encode()[:2], "ß😀".encode()
    ids = {b: tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    tokens = [end, *(ids[b] for b in whole), end, *(ids[b] for b in half), stop]
    for chunk in (1, 2, 3, 4):
        request, text, new = in_chunks(tokenizer, tokens, (), chunk, len(tokens))
        assert text == request.text == "endß😀 end\ufffd."
        assert new == request.tokens == tokens
        request, text, _ = in_chunks(tokenizer, tokens, ("😀",), chunk, len(tokens))
        assert text == request.text == "endß"
        # The limit comes amid a character: the others stay.
        request, text, _ = in_chunks(tokenizer, tokens, (), chunk, 6)
        assert text == request.text == "endß\ufffd"


def test_chat(params, tmp_path):
    tokenizer = Tokenizer.load(params.config)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == "<user>hi<answer>"
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(byte_tokenizer()).chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for %}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_chat_template_that_fails_or_reaches_out_is_one_error(template):
    tokenizer = Tokenizer(byte_tokenizer(), template)
    with pytest.raises(ValueError, match="the chat template failed"):
        tokenizer.chat([{"role": "user", "content": "hi"}])
