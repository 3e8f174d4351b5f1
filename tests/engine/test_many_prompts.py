"""`generate` over many prompts: each fails alone, and none costs more than another."""

import dataclasses
import io
import sys
import time

import numpy as np
import pytest

import polarjax
from polarjax import Settings
from polarjax.engine.follow import finish
from polarjax.engine.request import Request
from tests.models import GREEDY, LLAMA, random_params, write_checkpoint

CONFIG = dataclasses.replace(
    LLAMA, layers=1, vocab_size=257, context=32, tied_embeddings=False
)
# Ids verbatim, too long, of no such id, NaN, and good again.
PROMPTS = [[1, 2, 3], [2] * 40, [999], [14, 1], "ab", None, [4]]
ASKED = {"max_new_tokens": 5, "stop_ids": ()}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A model in which token 14, which it draws for none of these, is NaN."""
    params = random_params(CONFIG, 5)
    weights = dict(params.weights)
    tokens = weights["embed"]["tokens"].at[14].set(np.nan)
    weights["embed"] = {**weights["embed"], "tokens": tokens}
    broken = dataclasses.replace(params, weights=weights)
    return write_checkpoint(tmp_path_factory.mktemp("nan") / "model", broken)


@pytest.fixture(scope="module")
def engine(params):
    with polarjax.Engine(params, slots=2, context=24, **GREEDY) as engine:
        yield engine


def check_kept(out, engine):
    good = [0, 4, 6]
    alone = engine.generate([PROMPTS[i] for i in good], **ASKED)
    assert [out.tokens[i] for i in good] == alone.tokens
    assert [out.texts[i] for i in good] == alone.texts
    assert alone.errors == [None] * 3
    reasons = ["length", "error", "error", "error", "length", "error", "length"]
    assert out.finish_reasons == reasons
    errors = [
        error and error.partition(";")[0].partition(",")[0] for error in out.errors
    ]
    assert errors == [
        None,
        "prompt 1 has 40 tokens",
        "prompt 2 has token id 999",
        "the model yields NaN for prompt 3: its weights are damaged",
        None,
        "prompt 5 must be a str or a list of token ids",
        None,
    ]
    assert [out.tokens[i] for i in (1, 2, 3, 5)] == [[]] * 4
    assert [out.texts[i] for i in (1, 2, 3, 5)] == [""] * 4


def test_a_request_that_fails_fails_alone(params, engine):
    told = []
    out = engine.generate(
        PROMPTS, errors="keep", progress=lambda *now: told.append(now), **ASKED
    )
    check_kept(out, engine)
    assert told[0] == (3, 7, 0) and told[-1] == (7, 7, 15)
    assert told == sorted(told)
    check_kept(polarjax.generate(params, PROMPTS, errors="keep", **ASKED), engine)


def test_a_prompt_that_an_engine_has_no_room_for_fails_alone(engine):
    out = engine.generate([[1] * 24, [4]], errors="keep", **ASKED)
    assert "prompt 0 has 24 tokens, and a slot of this engine" in out.errors[0]
    assert out.finish_reasons == ["error", "length"] and out.stats.prompt_tokens == 1
    out = engine.generate([[4], [4]], errors="keep", density=1.0, **ASKED)
    assert "takes none of a request's own" in out.errors[1] and not any(out.tokens)


@pytest.mark.parametrize("wrong", [PROMPTS[1], PROMPTS[2], PROMPTS[3], PROMPTS[5]])
def test_by_default_it_ends_the_call(params, engine, wrong):
    with pytest.raises((ValueError, TypeError), match="prompt 1"):
        polarjax.generate(params, [[1], wrong], **ASKED)
    with pytest.raises((ValueError, TypeError), match="prompt 1"):
        engine.generate([[1], wrong], **ASKED)
    assert engine.generate([[1]], **ASKED).finish_reasons == ["length"]


def test_none_need_be_good(params):
    out = polarjax.generate(params, [[], [999]], errors="keep", **ASKED)
    assert out.finish_reasons == ["error"] * 2 and out.stats.new_tokens == 0


def test_what_is_wrong_with_all_is_an_error_still(params, engine):
    for call in (engine.generate, lambda p, **k: polarjax.generate(params, p, **k)):
        with pytest.raises(ValueError, match="errors must be 'raise' or 'keep', got 1"):
            call([[1]], errors=1)
        with pytest.raises(TypeError, match="progress must be True, False or a funct"):
            call([[1]], progress="yes")
        with pytest.raises(ValueError, match="top_p must be above 0"):
            call([[1]], errors="keep", top_p=0.0)
        with pytest.raises(TypeError, match="prompts must be a list"):
            call("ab", errors="keep")


def test_a_neighbours_nan_is_its_own(engine):
    neighbour = engine.add([14], Settings(max_new_tokens=3))
    assert engine.generate([[1, 2, 3]], **ASKED).finish_reasons == ["length"]
    assert neighbour.finish_reason == "error" and "NaN" in neighbour.error


def test_the_bar_is_shown_when_asked_for(engine, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    for asked, shown in ((False, False), (True, True)):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        engine.generate([[1]] * 3, progress=asked, **ASKED)
        said = screen.getvalue()
        assert ("3/3" in said and "tokens/s" in said) == shown and bool(said) == shown
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    engine.generate([[1]], progress=True, **ASKED)
    assert quiet.getvalue().strip() == ""  # no terminal


def test_a_full_queue_says_so(params):
    with polarjax.Engine(
        params, slots=1, context=16, max_waiting=2, **GREEDY
    ) as engine:
        first, second = engine.add([1]), engine.add([2])
        with pytest.raises(polarjax.QueueFull, match="2 requests wait for this engine"):
            engine.add([3])
        with pytest.raises(RuntimeError, match="larger max_waiting"):
            engine.stream([3])
        engine.cancel(first)
        third = engine.add([3])  # its place is free at once
        while not engine.idle:
            engine.step()
        assert first.tokens == [] and second.tokens and third.tokens
        # The prompts of one call are its own affair.
        assert len(engine.generate([[1]] * 9, **ASKED).tokens) == 9


def test_a_request_that_ended_itself_takes_no_slot(engine):
    waiting = [engine.add([i], Settings(max_new_tokens=3)) for i in range(4)]
    for one in waiting[:3]:
        one.cancel()
    engine.step()
    assert engine._runner.scheduler.live == 1
    while not engine.idle:
        engine.step()
    assert [len(one.tokens) for one in waiting] == [0, 0, 0, 3]
    one = engine.add([1])
    one.cancel()
    assert engine.step() == [] and engine.idle


def test_a_request_that_ends_while_another_is_streamed_counts_once():
    requests = [Request([1], 2, number=i) for i in range(2)]
    told, streamed = [], []

    def step():
        for one in requests:
            if one.going:
                one.add([5], [0.0], ended=len(one.tokens) == 1)

    def stream(number, text, tokens):
        streamed.append((number, tokens))
        step()  # both end

    finish(requests, step, stream, lambda *now: told.append(now), keep=False)
    assert streamed == [(0, [5]), (1, [5, 5]), (0, [5])]
    assert told[0] == (0, 2, 0) and told[-1] == (2, 2, 4)


def seconds(count):
    """Of the host's own work for so many requests, the model left out."""
    requests = [Request([1], 1, number=i) for i in range(count)]
    waiting = list(reversed(requests))

    def step():
        for _ in range(8):
            if waiting:
                waiting.pop().add([5], [0.0], ended=True)

    start = time.process_time()
    finish(requests, step, None, lambda *_: None, keep=False)
    return time.process_time() - start


def test_following_many_requests_takes_time_in_proportion():
    few, many = (min(seconds(n) for _ in range(3)) for n in (1_000, 16_000))
    assert many < 4 * 16 * few


def test_cancelling_many_requests_takes_time_in_proportion(params):
    def once(count):
        with polarjax.Engine(
            params, slots=1, context=16, max_waiting=count + 1, **GREEDY
        ) as engine:
            requests = [engine.add([1]) for _ in range(count)]
            start = time.process_time()
            for request in reversed(requests):  # the last first: no list's best case
                engine.cancel(request)
            assert engine.idle
            return time.process_time() - start

    few, many = (min(once(n) for _ in range(3)) for n in (500, 4_000))
    assert many < 4 * 8 * few


@pytest.mark.slow
def test_twenty_thousand_requests_cost_what_ten_times_two_thousand_do():
    config = dataclasses.replace(CONFIG, dim=16, heads=2, kv_heads=1, head_dim=8)
    params = random_params(dataclasses.replace(config, neurons=16, embed_dim=16))
    asked = {"max_new_tokens": 1, "stop_ids": ()}
    with polarjax.Engine(params, slots=64, context=8) as engine:
        engine.generate([[1]] * 64, **asked)

        def once(count):
            start = time.process_time()
            out = engine.generate([[i % 257] for i in range(count)], **asked)
            assert len(out.tokens) == count
            return time.process_time() - start

        few = min(once(2_000) for _ in range(2))
        assert once(20_000) < 1.3 * 10 * few
