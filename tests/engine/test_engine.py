"""`Engine`: requests come and go, and none of them notices."""

import dataclasses
import functools
import gc
import time

import jax
import numpy as np
import pytest

import polarjax
from polarjax import Settings
from polarjax.engine import steps
from polarjax.engine.flight import Flight
from polarjax.engine.sampling import Variant
from polarjax.policy import Load
from tests.models import GREEDY, LLAMA, OPT, random_params
from tests.policies.reference import decode, uniform

CONFIG = dataclasses.replace(LLAMA, context=64, vocab_size=211)
LENGTHS = (3, 21, 1, 9, 30, 2, 17, 5, 12)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 5, routers=True)


def requests():
    rng = np.random.default_rng(1)
    for i, n in enumerate(LENGTHS):
        ids = rng.integers(0, CONFIG.vocab_size, n).tolist()
        density = (None, 0.25, 0.5, 1.0)[i % 4]
        temperature = 0.9 if i % 3 == 2 else 0.0
        yield (
            ids,
            Settings(
                max_new_tokens=3 + 5 * i % 17,
                density=density,
                temperature=temperature,
                seed=i,
                stop_ids=(),
            ),
        )


def test_each_prompt_has_a_limit_of_its_own(params):
    prompts, limits = [[1, 2, 3], [4, 5], [6]], [3, 9, 1]
    settings = {"density": 0.5, "stop_ids": []}
    out = polarjax.generate(params, prompts, max_new_tokens=limits, **settings)
    assert [len(tokens) for tokens in out.tokens] == limits
    for ids, limit, tokens in zip(prompts, limits, out.tokens, strict=True):
        alone = polarjax.generate(params, [ids], max_new_tokens=limit, **settings)
        assert alone.tokens == [tokens]


def test_a_request_alone_is_the_request_in_any_load(params):
    policy = polarjax.Polar(0.5)
    drawn = {**GREEDY, "variants": [Variant.SAMPLED]}
    alone = []
    for ids, one in requests():
        with polarjax.Engine(
            params, policy=policy, slots=1, context=64, **drawn
        ) as engine:
            request = engine.add(ids, one)
            while not engine.idle:
                engine.step()
        alone.append(request)
    with polarjax.Engine(params, policy=policy, slots=3, context=64, **drawn) as engine:
        # Some wait from the start, some come later, in any state of the others.
        several = [engine.add(ids, one) for ids, one in list(requests())[:5]]
        engine.step()
        engine.step()
        several += [engine.add(ids, one) for ids, one in list(requests())[5:]]
        while not engine.idle:
            engine.step()
    for one, other in zip(alone, several, strict=True):
        assert other.tokens == one.tokens and other.finish_reason == one.finish_reason
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
    assert [len(r.tokens) for r in alone] == [3 + 5 * i % 17 for i in range(9)]


def test_it_is_what_the_reference_decodes(params):
    prompts = [ids for ids, _ in requests()][:4]
    densities = (0.25, 0.5, 1.0, 0.75)
    expected = decode(params, prompts, [6] * 4, uniform(CONFIG, densities))
    with polarjax.Engine(
        params, policy=polarjax.Polar(), slots=2, context=64, **GREEDY
    ) as engine:
        pairs = zip(prompts, densities, strict=True)
        found = [
            engine.add(ids, Settings(max_new_tokens=6, density=d, stop_ids=()))
            for ids, d in pairs
        ]
        while not engine.idle:
            engine.step()
    assert [request.tokens for request in found] == expected.tokens


def test_a_cancelled_request_gives_its_row_to_the_next(params):
    policy, long = polarjax.Polar(0.5), Settings(max_new_tokens=30, stop_ids=())
    with polarjax.Engine(
        params, policy=policy, slots=1, context=64, **GREEDY
    ) as engine:
        first, second = engine.add([1, 2, 3], long), engine.add([4, 5], long)
        third = engine.add([6], long)
        while not first.tokens:
            engine.step()
        engine.cancel(first)
        engine.cancel(third)
        while not engine.idle:
            engine.step()
        alone = engine.generate([[4, 5]], max_new_tokens=30, stop_ids=[])
    assert first.finish_reason == third.finish_reason == "cancelled"
    assert 0 < len(first.tokens) < 30 and third.tokens == []
    assert second.tokens == alone.tokens[0] and second.finish_reason == "length"


def test_more_prompts_than_slots_are_what_generate_says(params):
    prompts = [ids for ids, _ in requests()]
    settings = {"max_new_tokens": 7, "stop_ids": [], "density": 0.5}
    expected = polarjax.generate(params, prompts, **settings)
    streamed = {}

    def stream(i, text, tokens):
        streamed.setdefault(i, []).extend(tokens)

    with polarjax.Engine(
        params, policy=polarjax.Polar(), slots=4, context=64, **GREEDY
    ) as engine:
        found = engine.generate(prompts, stream=stream, **settings)
    assert found.tokens == expected.tokens == [streamed[i] for i in range(len(prompts))]
    assert found.stats.new_tokens == expected.stats.new_tokens


def test_later_calls_of_ragged_prompts_compile_nothing(params):
    rng = np.random.default_rng(2)

    def call():
        # Of every width up to the context's, in another order and number each time.
        lengths = [*rng.integers(1, 17, 5), *rng.integers(17, 33, 2), 33, 30]
        rng.shuffle(lengths)
        prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
        densities = rng.uniform(0.1, 1, len(prompts)).tolist()
        return polarjax.generate(
            params,
            prompts,
            max_new_tokens=20,
            stop_ids=[],
            density=densities,
            prefill_tokens=128,
        )

    call()
    functions = steps.read_pieces, steps.decode, steps.begin, steps.draw_tokens
    before = [function._cache_size() for function in functions]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
    )
    for _ in range(3):
        call()
    assert [function._cache_size() for function in functions] == before
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.parametrize(
    ("policy", "prompt", "settings", "error"),
    [
        (polarjax.Dense(), [1], {"density": 0.5}, "density 0.5: this engine's policy"),
        (polarjax.Polar(0.5), [1] * 32, {}, "prompt 0 has 32 tokens, and a slot"),
        (polarjax.Polar(0.5), [999], {}, "prompt 0 has token id 999"),
        (polarjax.Polar(0.5), [1], {"top_p": 0.0}, "top_p must be above 0"),
        (polarjax.Polar(0.5), [1], {"stop": ("x",)}, "stop strings need a tokenizer"),
    ],
)
def test_requests_that_are_refused(policy, prompt, settings, error, params):
    with (
        polarjax.Engine(params, policy=policy, slots=1, context=32, **GREEDY) as engine,
        pytest.raises(ValueError, match=error),
    ):
        engine.add(prompt, Settings(**settings))


def test_density_1_is_refused_where_requests_share_neurons():
    config = dataclasses.replace(OPT, context=32)
    params = random_params(config, routers=True, neuron_rank=8)
    policy = polarjax.Polar(0.5, 0.5)
    with polarjax.Engine(
        params, policy=policy, slots=2, context=32, **GREEDY
    ) as engine:
        with pytest.raises(ValueError, match="promises a request its exact MLP"):
            engine.add([1, 2], Settings(density=1.0))
        engine.add([1, 2], Settings(density=0.9))


def test_a_models_own_policy_is_used_whatever_it_is(params):
    bare = polarjax.Params(params.weights, polarjax.Oracle(0.5), CONFIG)
    prompts = [[1, 2, 3], [4]]
    own = polarjax.generate(bare, prompts, max_new_tokens=9)
    asked = polarjax.generate(
        params, prompts, max_new_tokens=9, policy=polarjax.Oracle(0.5)
    )
    assert own.stats.policy == "Oracle" and own.stats.density[1] == 0.5
    assert own.tokens == asked.tokens


def test_nothing_is_kept_of_requests_that_have_ended(params):
    settings = Settings(max_new_tokens=2, stop_ids=())
    with polarjax.Engine(
        params, policy=polarjax.Dense(), slots=2, context=32, **GREEDY
    ) as one:
        held = []
        for _ in range(3):
            for _ in range(4):
                one.add([1, 2], settings)
            while not one.idle:
                one.step()
            gc.collect()
            kinds = (Flight, polarjax.Request)
            held.append(sum(type(x) in kinds for x in gc.get_objects()))
    assert held[0] == held[1] == held[2]


PLAIN = Settings(max_new_tokens=20, stop_ids=())


def run(engine, requests):
    while any(request.going for request in requests):
        engine.step()
    return [request.tokens for request in requests]


def test_an_interruption_half_way_ends_the_engine(params, monkeypatch):
    engine = polarjax.Engine(params, slots=1, context=32, **GREEDY)
    requests = [engine.add([1, 2, 3], PLAIN), engine.add([4], PLAIN)]
    engine.step()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner.batch, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [one.finish_reason for one in requests] == ["cancelled"] * 2
    for call in (engine.step, lambda: engine.add([1])):
        with pytest.raises(RuntimeError, match="interrupted in a step: make a new one"):
            call()
    assert engine.idle


def test_a_request_of_nan_ends_alone():
    params = random_params(dataclasses.replace(CONFIG, tied_embeddings=False), 5)
    weights = dict(params.weights)
    tokens = weights["embed"]["tokens"].at[77].set(np.nan)
    weights["embed"] = {**weights["embed"], "tokens": tokens}
    broken = dataclasses.replace(params, weights=weights)
    make = functools.partial(
        polarjax.Engine, policy=polarjax.Dense(), context=32, **GREEDY
    )
    with make(broken, slots=2) as engine:
        good, bad = engine.add([1, 2, 3], PLAIN), engine.add([77, 1], PLAIN)
        with pytest.raises(ValueError, match="NaN for prompt 1"):
            while not engine.idle:
                engine.step()
        assert run(engine, [good]) and engine.idle
    assert bad.finish_reason == "error" and not bad.tokens
    assert bad.error == "the model yields NaN for prompt 1: its weights are damaged"
    with make(params, slots=2) as engine:
        assert run(engine, [engine.add([1, 2, 3], PLAIN)]) == [good.tokens]


def test_a_stream_may_step_but_not_generate(params):
    with polarjax.Engine(params, slots=2, context=32, **GREEDY) as engine:
        expected = engine.generate([[1, 2, 3], [4]], max_new_tokens=20, stop_ids=())
        streamed = {0: [], 1: []}

        def stream(i, text, tokens):
            streamed[i] += tokens
            engine.step()
            with pytest.raises(RuntimeError, match="goes on already"):
                engine.generate([[5]])

        asked = {"max_new_tokens": 20, "stop_ids": ()}
        out = engine.generate([[1, 2, 3], [4]], stream=stream, **asked)
        assert out.tokens == expected.tokens == [streamed[0], streamed[1]]
        with pytest.raises(TypeError, match="stream must be a function, got 5"):
            engine.generate([[1]], stream=5)


def test_figures_are_of_one_call(params):
    with polarjax.Engine(params, slots=2, context=32, **GREEDY) as engine:
        asked = {"max_new_tokens": 20, "stop_ids": ()}
        expected = engine.generate([[1, 2, 3]], **asked).stats

        def stream(i, text, tokens):
            raise OSError

        with pytest.raises(OSError):
            engine.generate([[9, 8, 7, 6, 5]], stream=stream, **asked)
        found = engine.generate([[1, 2, 3]], **asked).stats
        assert (found.kv_bytes, found.steps) == (expected.kv_bytes, expected.steps)
        # Beside others, steps and bytes are of the same steps.
        engine.add([5], Settings(max_new_tokens=31, stop_ids=()))
        found = engine.generate([[1, 2, 3]], **asked | {"max_new_tokens": 3}).stats
        assert found.steps == engine._runner.tally.busy >= 2


def test_compiling_is_no_time_of_decoding(params):
    config = dataclasses.replace(CONFIG, neurons=88)  # a shape of its own
    with polarjax.Engine(random_params(config), slots=2, context=32) as engine:
        first = engine.generate([[1, 2, 3]] * 4, max_new_tokens=6).stats
        begin = time.perf_counter()
        mixed = [0.0, 0.0, 1.0, 1.0]  # the second half draws
        found = engine.generate([[1, 2, 3]] * 4, max_new_tokens=6, temperature=mixed)
        wall = time.perf_counter() - begin
    stats = found.stats
    assert first.compile_seconds > 0.1 and stats.compile_seconds == 0
    assert first.decode_seconds + first.prefill_seconds < first.compile_seconds
    assert stats.decode_seconds + stats.prefill_seconds <= wall


def test_an_engine_stays_where_its_model_is(params):
    asked = {"max_new_tokens": 5, "stop_ids": ()}
    half = {"policy": polarjax.Polar(0.5)}
    expected = polarjax.generate(params, [[1, 2]], **half, **asked).tokens
    here, other = jax.devices()[0], jax.devices()[-1]
    with jax.default_device(other):
        with polarjax.Engine(params, slots=1, context=32, **half, **GREEDY) as engine:
            assert engine.generate([[1, 2]], **asked).tokens == expected
            places = [x.devices() for x in jax.tree.leaves(engine._runner.batch.slots)]
    assert places == [{here}] * len(places)


def test_a_closed_engine_says_so(params):
    engine = polarjax.Engine(params, slots=1, context=32, **GREEDY)
    request = engine.add([1])
    engine.close()
    engine.close()
    assert engine.idle and request.finish_reason == "cancelled"
    for call in (engine.step, lambda: engine.add([1]), lambda: engine.generate([[1]])):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_closed_engine_gives_its_memory_back_at_once(params, busy):
    """Not when garbage is collected: the next engine may come before that."""
    engine = polarjax.Engine(params, slots=2, context=48, page=16, **GREEDY)
    engine.generate([[1, 2, 3]], max_new_tokens=3, stop_ids=())
    shape = engine._runner.batch.slots.cache.keys[0].shape
    if busy:
        engine.add([1] * 20)
        engine.step()
    gc.collect()
    gc.disable()
    try:
        engine.close()
        left = [x for x in jax.live_arrays() if x.shape == shape]
    finally:
        gc.enable()
    assert not left


def test_what_is_of_no_use_to_an_engine_is_named(params):
    with pytest.raises(TypeError, match=r"params must be polarjax\.Params, got None"):
        polarjax.Engine(None)  # pyright: ignore
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        polarjax.Engine(params, implementation="cuda")  # pyright: ignore
    if jax.default_backend() != "gpu":
        for call in (polarjax.generate, polarjax.logits):
            with pytest.raises(ValueError, match="implementation 'triton' needs a GPU"):
                call(params, [[1]], implementation="triton")
    with polarjax.Engine(params, slots=1, context=32, **GREEDY) as engine:
        with pytest.raises(TypeError, match=r"settings must be polarjax\.Settings"):
            engine.add([1], {"density": 0.5})  # pyright: ignore
        with pytest.raises(TypeError, match="cancel takes what add returned, got None"):
            engine.cancel(None)  # pyright: ignore
        with polarjax.Engine(params, slots=1, context=32, **GREEDY) as other:
            request = other.add([1])
            with pytest.raises(ValueError, match="this request is another engine's"):
                engine.cancel(request)
            assert request.going
    for wrong, name in (
        ({"densities": "no"}, "densities must be True or False"),
        ({"load": Load(0, 1)}, "load's batch must be a positive integer"),
        ({"load": Load(1, "a")}, "load's context must be a positive integer"),
        ({"memory_fraction": True}, "memory_fraction must be above 0"),
        ({"policy": polarjax.Polar(0.5, batch=0)}, "batch must be a positive integer"),
        ({"policy": polarjax.Polar(0.5, asks="groups")}, "asks must be a tuple"),
        ({"policy": polarjax.Random(0.5, seed=-1)}, "seed must be an integer from 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            polarjax.Engine(params, slots=1, context=32, **wrong)
    for call in (polarjax.generate, polarjax.logits):
        with pytest.raises(
            TypeError, match=r"params must be polarjax\.Params, got None"
        ):
            call(None, [[1]])


def test_the_smallest_density_reads_one_group(params):
    policy = polarjax.Polar(0.5)
    with polarjax.Engine(
        params, policy=policy, slots=1, context=32, **GREEDY
    ) as engine:
        found = engine.generate([[1, 2]], max_new_tokens=5, density=1e-46)
    assert found.stats.density[1:] == (1 / CONFIG.kv_heads,) * (CONFIG.layers - 1)
