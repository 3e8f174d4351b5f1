"""What is told beside tokens, those of prompts too; and samples of one prompt."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import polarjax
from polarjax import Engine
from polarjax.engine import steps
from polarjax.engine.alternatives import TopTokens, alternatives
from polarjax.engine.detokenize import Pieces
from polarjax.engine.request import Request
from polarjax.engine.scoring import Asked
from polarjax.engine.tokenizer import Tokenizer
from polarjax.model import last_logits, make_decoder
from tests.engine.tiny_tokenizers import byte_level
from tests.models import LLAMA, random_params

pytestmark = pytest.mark.usefixtures("as_users_do")

CONTEXT = 64


@pytest.fixture(scope="module")
def params():
    return random_params(dataclasses.replace(LLAMA, context=CONTEXT))


@pytest.fixture(scope="module")
def engine(params):
    return Engine(
        params,
        policy=polarjax.Dense(),
        slots=4,
        page=16,
        prefill_tokens=32,
    )


def finish(engine, *asked):
    requests = [engine.add(prompt, one) for prompt, one in asked]
    while not engine.idle:
        engine.step()
        engine._runner.scheduler.check()
    return requests


def expected(params, tokens):
    """Of each token but the first: log-probabilities of all, as `logits` has them."""
    logits = np.asarray(polarjax.logits(params, [tokens]))[0, :-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_top(top, own, token, logprob, most):
    """What is told beside one token, against the log-probabilities of all."""
    assert len(top.ids) == len(top.logprobs) == most
    np.testing.assert_allclose(own[list(top.ids)], top.logprobs, atol=1e-4)
    np.testing.assert_allclose(top.logprobs, np.sort(own)[::-1][:most], atol=1e-4)
    assert own[token] == pytest.approx(logprob, abs=1e-4)
    # But for tokens that are as probable, to rounding.
    assert (own > logprob + 1e-4).sum() <= top.rank <= (own > logprob - 1e-4).sum()


def test_alternatives_are_of_the_models_own_logits(params, engine):
    prompt, most = [5, 7, 9, 11], [0, 3, 20, None]
    warm = {"max_new_tokens": 9, "stop_ids": (), "temperature": 2.0}
    asked = [polarjax.Settings(**warm, logprobs=k, seed=9) for k in most]
    ruled = polarjax.Settings(**warm, logprobs=5, logit_bias={3: 100.0})
    asked, most = [*asked, ruled], [*most, 5]
    for request, k in zip(
        finish(engine, *((prompt, one) for one in asked)), most, strict=True
    ):
        assert len(request.tokens) == 9
        if k is None:
            assert request.alternatives == []
            continue
        assert len(request.alternatives) == 9
        own = expected(params, [*prompt, *request.tokens])[len(prompt) - 1 :]
        for told in zip(
            request.alternatives, own, request.tokens, request.logprobs, strict=True
        ):
            check_top(*told, k)


def test_a_stop_string_cuts_alternatives_too():
    def letters(prompt):
        return SimpleNamespace(
            waiting=False, add=lambda token: "abcdef"[token], end=lambda: ""
        )

    words: Any = SimpleNamespace(pieces=SimpleNamespace(special={}, after=letters))
    request = Request([0], 9, words, ("cd",), settings=polarjax.Settings(logprobs=1))
    tops = [TopTokens(0, (i,), (-1.0,)) for i in range(5)]
    for i in range(5):
        if request.going:
            request.add([i], [-1.0], False, [tops[i]])
    assert (request.text, request.tokens) == ("ab", [0, 1])
    assert request.alternatives == tops[:2] and request.finish_reason == "stop"
    piece = request.piece()
    assert piece.tokens == [0, 1] and piece.alternatives == tops[:2]


def test_samples_are_those_of_requests_of_one_and_share_pages(params):
    engine = Engine(
        params, policy=polarjax.Dense(), slots=4, page=16, prefill_tokens=32
    )
    prompts = [list(range(3, 43)), [7, 8, 9]]
    warm: Any = dict(max_new_tokens=12, temperature=1.5, stop_ids=(), seed=[4, 5])
    streamed: dict[int, list[int]] = {}

    def take(entry, text, tokens):
        streamed.setdefault(entry, []).extend(tokens)

    out = engine.generate(prompts, n=[3, 2], sample=1, logprobs=2, stream=take, **warm)
    assert out.prompts == [0, 0, 0, 1, 1] and out.samples == [1, 2, 3, 1, 2]
    assert len({tuple(tokens) for tokens in out.tokens}) == 5
    assert [streamed[i] for i in range(5)] == out.tokens
    [pool] = engine._runner.scheduler.pools
    assert pool.hits > 0
    for i, (prompt, j) in enumerate(zip(out.prompts, out.samples, strict=True)):
        one = polarjax.Settings(
            **{**warm, "seed": warm["seed"][prompt]}, sample=j, logprobs=2
        )
        [alone] = finish(engine, (prompts[prompt], one))
        assert (alone.tokens, alone.logprobs) == (out.tokens[i], out.logprobs[i])
        assert alone.alternatives == out.alternatives[i]


def test_each_sample_of_a_wrong_prompt_says_why(engine):
    out = engine.generate([[1] * 70, [2]], n=2, max_new_tokens=2, errors="keep")
    assert out.prompts == [0, 0, 1, 1] and out.samples == [0, 1, 0, 1]
    assert all("prompt 0 has 70 tokens" in why for why in out.errors[:2])
    assert out.errors[2:] == [None, None] and out.alternatives == [None] * 4


def test_a_call_is_made_for_what_its_requests_ask(params):
    prompts: Any = [[3, 4, 5], [1] * 70, [6, 7]]
    out = polarjax.generate(
        params,
        prompts,
        n=[2, 2, 1],
        temperature=1.0,
        max_new_tokens=4,
        stop_ids=(),
        logprobs=[2, None, None],
        prompt_logprobs=[None, None, 0],
        errors="keep",
    )
    assert out.prompts == [0, 0, 1, 1, 2] and out.samples == [0, 1, 0, 1, 0]
    assert [error is None for error in out.errors] == [True] * 2 + [False] * 2 + [True]
    assert out.errors[3].startswith("prompt 1 has 70 tokens; the model's context")
    assert out.tokens[0] != out.tokens[1]
    assert [len(top.ids) for top in out.alternatives[1]] == [2] * 4
    assert out.alternatives[4] is None and out.prompt_logprobs[0] is None
    own = expected(params, prompts[2])[0, 7]
    np.testing.assert_allclose(out.prompt_logprobs[4][1], own, atol=1e-4)
    with pytest.raises(ValueError, match="echo needs a tokenizer"):
        polarjax.generate(params, [[1]], echo=True)


def test_one_request_is_one_sample(engine):
    settings = polarjax.Settings(n=3)
    with pytest.raises(ValueError, match=r"n must be 1 .* got 3: add each of settings"):
        engine.add([1], settings)
    requests = [engine.add([1], one) for one in settings.samples()]
    for request in requests:
        engine.cancel(request)
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 60])
def test_prompts_are_scored_as_logits_has_them(params, engine, length):
    prompt = np.random.default_rng(length).integers(1, 300, length).tolist()
    plain: Any = dict(max_new_tokens=2, stop_ids=())
    [pool] = engine._runner.scheduler.pools
    [first] = finish(engine, (prompt, polarjax.Settings(**plain)))
    before = pool.hits
    asked = [polarjax.Settings(**plain, prompt_logprobs=k) for k in (0, 4, 20)]
    *told, without = finish(
        engine,
        *((prompt, one) for one in asked),
        (prompt, polarjax.Settings(**plain)),
    )
    for request, k in zip(told, (0, 4, 20), strict=True):
        assert request.cached == 0
        # Nobody's bits depend on who asks.
        assert (request.tokens, request.logprobs) == (first.tokens, first.logprobs)
        assert len(request.prompt_logprobs) == length
        assert request.prompt_logprobs == told[0].prompt_logprobs
        assert request.prompt_logprobs[0] is request.prompt_alternatives[0] is None
        own = expected(params, prompt) if length > 1 else []
        for top, right, token, logprob in zip(
            request.prompt_alternatives[1:],
            own,
            prompt[1:],
            request.prompt_logprobs[1:],
            strict=True,
        ):
            check_top(top, right, token, logprob, k)
    assert without.prompt_logprobs == without.prompt_alternatives == []
    assert (without.tokens, without.logprobs) == (first.tokens, first.logprobs)
    assert (pool.hits > before) == (length > 16)  # of the last alone


def test_scores_are_of_blocks_as_many_as_are_asked_about(params, monkeypatch):
    monkeypatch.setattr(steps, "_SCORED", 16)
    model = make_decoder(params.config.architecture, params.weights)
    rng, n, c = np.random.default_rng(0), 40, params.config
    x = rng.normal(size=(n, c.dim)).astype(np.float32)
    o = rng.normal(size=(n, c.heads, c.head_dim)).astype(np.float32)
    rows = rng.permutation(n).astype(np.int32)
    tokens = rng.integers(c.vocab_size, size=n).astype(np.int32)

    def find(count):
        asked = Asked(rows, tokens, np.full(1, count, np.int32))
        return found(params.weights, x, o, asked)

    found = jax.jit(functools.partial(steps.score.__wrapped__, model=model))
    logits = last_logits(model, params.weights, x[rows], o[rows])
    right = alternatives(logits, jax.nn.logsumexp(logits, axis=-1), tokens)
    every = find(n)
    np.testing.assert_array_equal(every.ids, right.ids)
    np.testing.assert_array_equal(every.rank, right.rank)
    np.testing.assert_allclose(every.logprob, right.logprob, atol=1e-5)
    np.testing.assert_allclose(every.logprobs, right.logprobs, atol=1e-5)
    some = find(20)  # two blocks of three
    for mine, whole in zip(jax.tree.leaves(some), jax.tree.leaves(every), strict=True):
        np.testing.assert_array_equal(mine[:32], whole[:32])
        assert not np.asarray(mine[32:]).any()
    assert not any(np.asarray(each).any() for each in jax.tree.leaves(find(0)))


def test_generate_tells_of_prompts_that_ask(engine):
    out = engine.generate(
        [[3, 4, 5], [6, 7]], max_new_tokens=2, prompt_logprobs=[None, 3], logprobs=1
    )
    assert out.prompt_logprobs[0] is out.prompt_alternatives[0] is None
    none, top = out.prompt_alternatives[1]
    assert none is None and len(top.ids) == 3
    assert len(out.prompt_logprobs[1]) == 2
    assert [len(tops) for tops in out.alternatives] == [len(x) for x in out.tokens]


def test_an_engine_may_be_made_without_scores_of_prompts(params, engine):
    without = Engine(
        params,
        policy=polarjax.Dense(),
        slots=4,
        page=16,
        prefill_tokens=32,
        prompt_logprobs=False,
    )
    one = polarjax.Settings(prompt_logprobs=1)
    with pytest.raises(ValueError, match="make it with prompt_logprobs=True"):
        without.add([1, 2], one)
    plain = polarjax.Settings(max_new_tokens=3)
    [here], [there] = finish(without, ([1, 2], plain)), finish(engine, ([1, 2], plain))
    assert (here.tokens, here.logprobs) == (there.tokens, there.logprobs)
    with pytest.raises(ValueError, match="echo needs a tokenizer"):
        without.add([1, 2], polarjax.Settings(echo=True))


def test_an_echo_is_the_prompts_text_and_its_scores():
    tokenizer: Any = SimpleNamespace(pieces=Pieces(byte_level()))
    tokenizer.beginning = functools.partial(Tokenizer.beginning, tokenizer)
    encode = byte_level().encode
    prompt, new = encode("The ab").ids, encode("é end").ids
    first, rest = new[:1], new[1:]  # é is two tokens, the first of them the prompt's
    settings = polarjax.Settings(echo=True, logprobs=2)
    assert settings.told_of_prompt == 2
    request = Request([*prompt, *first], 9, tokenizer, settings=settings)
    assert request.news() == ("The ab", [])
    request.add(rest, [-1.0] * len(rest), True)
    assert request.text == "The abé end"
    assert request.news() == ("é end", rest)


def test_scores_that_come_again_take_the_place_of_the_first():
    request = Request([5, 6, 7, 8], 1)
    top = TopTokens(0, (), ())
    for first, logprobs in ((0, [-1.0, -2.0]), (0, [-3.0, -4.0]), (2, [-5.0])):
        request.add_prompt(first, logprobs, [top] * len(logprobs))
    assert request.prompt_logprobs == [None, -3.0, -4.0, -5.0]
    assert request.prompt_alternatives == [None, top, top, top]
