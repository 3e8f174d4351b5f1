"""What users do to an engine at any moment: cancel, stream, interrupt."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

import polarjax
from polarjax import Engine
from polarjax.engine import swaps
from polarjax.engine.batch import Batch, Flight
from polarjax.engine.errors import RequestFailed
from polarjax.engine.plans import SWAP_PAGES
from polarjax.engine.sampling import Variant
from polarjax.planning.memory import cache_bytes
from tests.models import GREEDY, LLAMA, random_params

CONTEXT = 128
WHOLE = {"max_new_tokens": 100, "stop_ids": ()}
PLAIN = polarjax.Settings(max_new_tokens=40, stop_ids=())


@pytest.fixture(scope="module")
def params():
    return random_params(dataclasses.replace(LLAMA, context=CONTEXT), routers=True)


def make_engine(params, **options):
    shape = {"slots": 2, "context": CONTEXT, "page": 16, "pages": 11}
    return Engine(params, **{**shape, "prefill_tokens": 32, **options})


def run(engine, most=500):
    for _ in range(most):
        if engine.idle:
            return
        engine.step()
        engine._runner.scheduler.check()
    pytest.fail("the engine never gets idle")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_stream_that_is_closed_leaves_its_slot(params, steps):
    engine = make_engine(params)
    for _ in range(3):  # more than there are slots
        stream = engine.stream([3, 4, 5], PLAIN)
        for _ in range(steps):
            next(stream)
        stream.close()
    engine.stream([3, 4, 5], PLAIN)  # which nobody holds
    engine.add([4], PLAIN).cancel()
    run(engine, most=3)
    assert len(engine._runner.scheduler) == 0
    assert engine.generate([[5, 6]] * 3).finish_reasons == ["length"] * 3


def test_what_can_never_run_fails_alone(params):
    engine = make_engine(params, pages=4, **GREEDY)
    prompts, more = [[1] * 40, [2]], {"max_new_tokens": 40, "stop_ids": ()}
    out = engine.generate(prompts, errors="keep", **more)
    assert out.finish_reasons == ["error", "length"]
    assert out.errors[0] and out.errors[0].startswith("prompt 0 ")
    engine.add([5], PLAIN)
    with pytest.raises(ValueError, match="prompt 1 of 40 tokens"):
        engine.generate([[2], [1] * 40], **more)
    run(engine)


def test_drawing_that_is_not_compiled_is_refused(params):
    engine = make_engine(params, variants=[Variant.GREEDY, Variant.SAMPLED])
    request = engine.add([5], PLAIN)
    with pytest.raises(ValueError, match="prompt 0 needs"):
        engine.add([5], dataclasses.replace(PLAIN, temperature=1.0, top_k=3))
    run(engine)
    assert request.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"variants": ()}, ValueError, "variants is empty"),
        ({"variants": ["greedy"]}, TypeError, "variants"),
        ({"load": 5}, TypeError, "load must be"),
        ({"densities": 1}, TypeError, "densities must be"),
        ({"prefix_cache": 1}, TypeError, "prefix_cache must be"),
        ({"pages": 1}, ValueError, "pages must be an integer of at least 2"),
        ({"pages": 0}, ValueError, "pages must be an integer of at least 2"),
        ({"swap_bytes": -1}, ValueError, "swap_bytes must be"),
        ({"page": 0}, ValueError, "page must be a positive"),
        ({"ahead": -1}, ValueError, "ahead must be"),
        ({"prefill_tokens": float("nan")}, ValueError, "prefill_tokens must be"),
    ],
)
def test_wrong_settings_are_named(params, options, error, match):
    with pytest.raises(error, match=match):
        make_engine(params, **options)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_one_comes_back_while_its_newest_tokens_are_on_their_way(params, ahead):
    # It gives way, and the next plan has room for it: it may have ended by then.
    full = {**GREEDY, "variants": [Variant.FULL]}
    drawn = {"temperature": 1.0, "repetition_penalty": 1.5, "max_new_tokens": 60}
    settings = dataclasses.replace(PLAIN, **drawn)
    tokens = make_engine(params).generate([[7, 8, 9]], stop_ids=(), **drawn).tokens[0]
    for last in [*range(24, 32), None]:
        ends = () if last is None else (tokens[last],)
        expected = tokens if last is None else tokens[: tokens.index(tokens[last])]
        engine = make_engine(
            params, pages=9, page=8, ahead=ahead, prefix_cache=False, **full
        )
        first = engine.add([3, 4, 5, 6], settings)
        second = engine.add([7, 8, 9], dataclasses.replace(settings, stop_ids=ends))
        while not engine.idle:
            engine.step()
            if engine._runner.kept:
                engine.cancel(first)
        assert engine._runner.scheduler.preemptions or len(expected) < 29
        assert second.tokens == expected


def test_first_tokens_are_not_kept_waiting(params):
    engine = make_engine(params, prefill_tokens=4, prefix_cache=False, **GREEDY)
    short = engine.add([3], dataclasses.replace(PLAIN, max_new_tokens=1))
    engine.add([3] * 90, dataclasses.replace(PLAIN, max_new_tokens=1))
    for _ in range(3):
        engine.step()
    assert short.finish_reason == "length"
    assert len(engine._runner.flights) <= 2
    run(engine)


@pytest.mark.parametrize("pinned", [True, False])
def test_who_gave_way_leaves_the_devices(params, monkeypatch, pinned):
    prompts = [[i + 1] * 20 for i in range(4)]
    expected = make_engine(params, pages=None).generate(prompts, **WHOLE).tokens
    if not pinned:  # as on a device that knows none
        monkeypatch.setattr(swaps, "_PINNED", "nowhere")
    engine = make_engine(params)
    settings = dataclasses.replace(PLAIN, max_new_tokens=100)
    requests = [engine.add(prompt, settings) for prompt in prompts]
    seen = 0
    while not engine.idle:
        before = set(engine._runner.kept)
        engine.step()
        for id in before & set(engine._runner.kept):
            seen += 1
            kept = engine._runner.kept[id]
            for array in jax.tree.leaves([[*x.values()] for x in kept.groups]):
                if pinned:
                    assert array.sharding.memory_kind == "pinned_host"
                else:
                    assert isinstance(array, np.ndarray)
    assert seen
    assert [one.tokens for one in requests] == expected


@pytest.mark.parametrize("ahead", [1, 3])
def test_an_interruption_loses_nothing_or_ends_all(params, monkeypatch, ahead):
    # Wherever it comes: either the requests go on, or the engine says what it is.
    prompts = [[3, 4, 5], [7, 8, 9], [2] * 30]
    whole = {"max_new_tokens": 90, "stop_ids": ()}
    expected = (
        make_engine(params, pages=None, **GREEDY).generate(prompts, **whole).tokens
    )
    places = [(Flight, "home"), (Batch, "restore"), (Batch, "change")]
    for where, name in places:
        for after in (0, 2, 30):
            engine = make_engine(params, ahead=ahead)
            settings = dataclasses.replace(PLAIN, max_new_tokens=90)
            requests = [engine.add(ids, settings) for ids in prompts]
            original, calls = getattr(where, name), iter(range(10**6))

            def interrupted(*args, o=original, c=calls, n=after):
                if next(c) == n:
                    raise KeyboardInterrupt
                return o(*args)

            with monkeypatch.context() as patch:
                patch.setattr(where, name, interrupted)
                try:
                    run(engine)
                except KeyboardInterrupt:
                    pass
            if engine._ended:
                assert not any(one.going for one in requests)
                assert name != "home", "while the host waits nothing is lost"
                with pytest.raises(RuntimeError, match="interrupted"):
                    engine.step()
            else:
                run(engine)
                assert engine._runner.scheduler.preemptions
                assert [one.tokens for one in requests] == expected


@pytest.mark.parametrize("where", [(Batch, "change"), (Batch, "decode")])
def test_ctrl_c_in_a_step_costs_no_engine(params, monkeypatch, where):
    """It is heard once what was begun is done."""
    original, calls = getattr(*where), iter(range(10**6))
    few = {**WHOLE, "max_new_tokens": 40}
    wanted = make_engine(params).generate([[3, 4, 5], [7]], **few).tokens
    engine = make_engine(params)
    requests = [engine.add(ids, PLAIN) for ids in ([3, 4, 5], [7])]
    heard = 0

    def interrupted(*args):
        if next(calls) % 3 == 0:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(*where, interrupted)
    while any(one.going for one in requests):
        try:
            engine.step()
        except KeyboardInterrupt:
            heard += 1
    assert heard > 1 and [one.tokens for one in requests] == wanted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    engine.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_who_finds_no_room_on_the_host_is_computed_again(params, ahead):
    drawn = {"temperature": 1.0, "repetition_penalty": 1.5, "logprobs": 2}
    whole = {"max_new_tokens": 90, "stop_ids": (), "prompt_logprobs": 1, **drawn}
    prompts = [[3, 4, 5], [7, 8, 9], [2] * 30, [6] * 20, [1]]
    roomy = make_engine(params, pages=None)
    expected = roomy.generate(prompts, density=0.5, **whole)
    engine = make_engine(params, swap_bytes=0, ahead=ahead)
    seen, restarts = "", []
    plan = engine._runner.scheduler.plan

    def noting():
        made = plan()
        restarts.extend(made.restarts)
        return made

    engine._runner.scheduler.plan = noting
    stream = engine.stream(prompts[0], polarjax.Settings(density=0.5, **whole))
    out = engine.generate(prompts, density=0.5, **whole)
    for piece in stream:
        seen += str(piece.tokens)
    assert restarts
    assert out.tokens == expected.tokens and out.logprobs == expected.logprobs
    assert out.alternatives == expected.alternatives
    assert out.prompt_logprobs == expected.prompt_logprobs
    assert stream.request.tokens == expected.tokens[0]
    assert seen.replace("][", ", ") == str(expected.tokens[0])
    assert not engine._runner.batch.swaps.bytes


def test_one_that_repeats_otherwise_fails_alone(params):
    engine = make_engine(params, swap_bytes=0)
    settings = dataclasses.replace(PLAIN, max_new_tokens=90)
    requests = [engine.add([i + 1], settings) for i in range(2)]
    while not engine._runner.anew:
        engine.step()
    [id] = engine._runner.anew
    requests[id].tokens[0] += 1
    with pytest.raises(RequestFailed, match="gave way where swap_bytes left no room"):
        run(engine)
    run(engine)
    assert [one.finish_reason for one in requests] == ["length", "error"]


def test_swaps_are_counted(params):
    out = make_engine(params).generate([[i + 1] * 20 for i in range(4)], **WHOLE)
    # To the host and back, in whole groups of pages.
    group = cache_bytes(params.config, 1, 16, params.dtype) * SWAP_PAGES
    assert out.stats.swapped_bytes and out.stats.swapped_bytes % (2 * group) == 0
    assert 0 < out.stats.swap_seconds < out.stats.decode_seconds
    roomy = make_engine(params, pages=None).generate([[1] * 20], **WHOLE)
    assert (roomy.stats.swapped_bytes, roomy.stats.swap_seconds) == (0, 0)


def test_an_interruption_amid_a_return_ends_all(params, monkeypatch):
    engine = make_engine(params, pages=9, page=8, ahead=2, prefix_cache=False, **GREEDY)
    first, second = engine.add([3, 4, 5, 6], PLAIN), engine.add([7, 8, 9], PLAIN)
    while not engine._runner.kept:
        engine.step()
    engine.cancel(first)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Batch, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(RuntimeError, match="interrupted in a step"):
        engine.step()
    assert second.finish_reason == "cancelled"


def test_chance_goes_with_the_request(params):
    # Which heads chance reads is the seed's affair, not the slot's.
    engine = make_engine(
        params, policy=polarjax.Random(0.5), slots=3, pages=None, **GREEDY
    )
    seeds = [4, 5, 4, 2**32 - 1, 5, 4]
    settings = [dataclasses.replace(PLAIN, seed=seed) for seed in seeds]
    requests = [engine.add([3, 4, 5], one) for one in settings]
    run(engine)
    by_seed = {}
    for seed, request in zip(seeds, requests, strict=True):
        got = request.tokens, request.logprobs
        assert by_seed.setdefault(seed, got) == got
    assert by_seed[4] != by_seed[5]


def test_a_closed_engine_has_nothing_left(params):
    engine = make_engine(params)
    requests = [engine.add([i + 1], PLAIN) for i in range(5)]
    for _ in range(3):
        engine.step()
    engine.close()
    engine.close()
    assert engine.idle and engine.waiting == 0
    assert {one.finish_reason for one in requests} == {"cancelled"}


def test_what_is_counted_ends_with_the_counting(params):
    engine = make_engine(params, ahead=3)
    engine.add([3], PLAIN)
    with engine.counting() as tally:
        for _ in range(10):
            engine.step()
    counted = tally.steps
    run(engine)
    assert tally.steps == counted


def test_a_first_token_waits_for_no_decode_step(params):
    engine = make_engine(params, ahead=1, **GREEDY)
    request = engine.add([3, 4, 5], PLAIN)
    seen = []
    for _ in range(4):
        engine.step()
        seen.append((len(request.tokens), engine._runner._under_way))
    # The second plan is under way before the first token is looked at; the third is
    # sent when the first plan's decode step has come home.
    assert seen == [(0, 1), (1, 2), (2, 1), (3, 1)]
    run(engine)
