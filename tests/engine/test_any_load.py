"""The same answer under any load, and nothing lost."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.plans import SWAP_PAGES
from polarjax.mesh.cut import make_mesh
from polarjax.planning.memory import cache_bytes
from tests.models import GREEDY, LLAMA, MHA, OPT, random_params

CONTEXT, PAGE = 128, 16
# What all engines of this file have, so that they share their programs: four slots, and
# pages for less than two of them.
SHAPE = {"slots": 4, "context": CONTEXT, "page": PAGE, "pages": 10}
RECORDED = Path(__file__).with_name("recorded_tokens.json")


@pytest.fixture(scope="module")
def params():
    return random_params(dataclasses.replace(LLAMA, context=CONTEXT), routers=True)


def make_engine(params, **options):
    return Engine(params, **{**SHAPE, "prefill_tokens": 32, **options})


@pytest.fixture(scope="module")
def alone(params):
    return by_itself(make_engine(params, prefix_cache=False))


def by_itself(engine):
    """What a request gets of an engine that has no other."""
    known = {}

    def ask(prompt, settings):
        key = tuple(prompt), repr(settings)
        if key not in known:
            request = engine.add(prompt, settings)
            while request.going:
                engine.step()
            known[key] = result(request)
        return known[key]

    return ask


def result(request):
    told = (
        request.logprobs,
        request.alternatives,
        request.prompt_logprobs,
        request.prompt_alternatives,
    )
    return request.tokens, told, request.finish_reason


@pytest.fixture
def compiled():
    """Programs that are compiled from here on."""
    names = []

    def note(name, _, **kwargs):
        if name == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@functools.partial(jax.jit, donate_argnums=0)
def spoil(cache, pages):
    keys, values = (
        tuple(x.at[pages].set(jnp.nan) for x in parts)
        for parts in (cache.keys, cache.values)
    )
    return dataclasses.replace(cache, keys=keys, values=values)


def poison(engine):
    """NaN in the trash page, and in all that nobody has and nothing is known of."""
    batch, pages = engine._runner.batch, np.zeros(SHAPE["pages"], np.int32)
    free = engine._runner.scheduler.pools[0]._free
    pages[: len(free)] = free
    cache = spoil(batch.slots.cache, pages)
    batch.slots = dataclasses.replace(batch.slots, cache=cache)


def random_request(rng, shared):
    """A prompt, which may begin as others do, and settings of any kind."""
    known = shared[: int(rng.integers(0, 40))] if rng.random() < 0.6 else []
    prompt = [*known, *rng.integers(1, 300, int(rng.integers(1, 40))).tolist()]
    most = CONTEXT - len(prompt)
    settings = {"max_new_tokens": int(rng.integers(most // 4, most))}
    if rng.random() < 0.6:
        settings["density"] = float(rng.choice([0.25, 0.5, 1.0]))
    kind = int(rng.integers(0, 5))
    if kind in (1, 2):
        settings |= {"temperature": 0.9, "seed": int(rng.integers(0, 99))}
    if kind == 2:
        settings |= {"top_k": 5, "top_p": 0.9}
    if kind == 3:
        settings |= {"repetition_penalty": 1.2, "min_tokens": 1}
    if rng.random() < 0.2:
        settings["stop_ids"] = tuple(rng.integers(0, 300, 20).tolist())
    if rng.random() < 0.4:
        settings["logprobs"] = int(rng.integers(0, 21))
    if rng.random() < 0.2:
        settings["prompt_logprobs"] = int(rng.integers(0, 21))
    return prompt, polarjax.Settings(**settings)


def ruled_request(rng, shared, densities):
    """The same with rules of every kind."""
    prompt, settings = random_request(rng, shared)
    ids = tuple(sorted({*rng.integers(0, 331, 40).tolist()}))
    rules = (
        {"logit_bias": {i: 2.5 - i % 5 for i in ids[:5]}, "frequency_penalty": 0.7},
        {"allowed_token_ids": ids, "min_p": 0.05, "temperature": 1.3, "seed": 7},
        {"min_tokens": 5, "stop_ids": ids, "presence_penalty": -0.3},
        {},
    )[int(rng.integers(4))]
    if not densities:
        rules = {**rules, "density": None}
    return prompt, dataclasses.replace(settings, **rules)


def play(engine, seed, alone, request_of=random_request):
    """A trace of arrivals, steps and cancels; how many requests it had."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(1, 300, 40).tolist()
    left, asked = int(rng.integers(4, 10)), []
    spoils = seed % 3 == 0
    while left or any(request.going for *_, request in asked):
        while left and rng.random() < 0.4:
            prompt, settings = request_of(rng, shared)
            for j in range(int(rng.choice([1, 1, 1, 3]))):  # samples share pages
                one = dataclasses.replace(settings, sample=j)
                asked.append((prompt, one, engine.add(prompt, one)))
            left -= 1
        engine.step()
        engine._runner.scheduler.check()
        if spoils:
            poison(engine)
        if asked and rng.random() < 0.03:
            engine.cancel(asked[int(rng.integers(len(asked)))][2])
    while not engine.idle:
        engine.step()
    for prompt, settings, request in asked:
        tokens, told, reason = alone(prompt, settings)
        if request.finish_reason == "cancelled":
            had, got, _ = result(request)
            assert had == tokens[: len(had)]
            for mine, whole in zip(got, told, strict=True):
                assert mine == whole[: len(mine)]
        else:
            assert result(request) == (tokens, told, reason), (seed, settings)
    return len(asked)


def note_restarts(engine):
    """A list that fills with who begins anew in an engine."""
    noted, plan = [], engine._runner.scheduler.plan

    def noting():
        made = plan()
        noted.extend(made.restarts)
        return made

    engine._runner.scheduler.plan = noting
    return noted


# XLA fuses otherwise than without its optimizations, and rounds otherwise.
@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 300), marks=pytest.mark.slow)]
)
def test_a_request_is_the_request_alone_in_any_load(params, alone, compiled, seeds):
    # One's host has room for one group of pages: others begin anew.
    group = cache_bytes(params.config, 1, PAGE, params.dtype) * SWAP_PAGES
    rooms = [None, group, None]
    engines = [
        make_engine(params, ahead=ahead, swap_bytes=room)
        for ahead, room in enumerate(rooms)
    ]
    again = note_restarts(engines[1])
    alone([1], polarjax.Settings(max_new_tokens=2))
    [poison(engine) for engine in engines]
    compiled.clear()
    asked = sum(play(engines[seed % 3], seed, alone) for seed in seeds)
    assert not compiled
    pools = [engine._runner.scheduler.pools[0] for engine in engines]
    assert sum(engine._runner.scheduler.preemptions for engine in engines) > 0.2 * asked
    assert again and all(engine._runner.batch.swaps.bytes for engine in engines)
    assert sum(pool.hits for pool in pools) > 0.1 * sum(pool.queries for pool in pools)
    for engine in engines:
        assert len(engine._runner.scheduler) == 0
        assert not engine._runner.kept and not engine._runner.anew


CUTS = {"budgets": (4, 2, 2, 2), "thresholds": (0.0,) * 4}
MANY = pytest.mark.slow  # as each has programs of its own


@pytest.mark.usefixtures("as_users_do")
@pytest.mark.parametrize(
    ("model", "policy", "densities"),
    [
        ({"config": LLAMA, **CUTS}, polarjax.Adaptive(), False),
        ({"config": LLAMA}, polarjax.Polar(0.5, balanced=2), True),
        pytest.param({"config": LLAMA, "dtype": "bfloat16"}, None, True, marks=MANY),
        pytest.param({"config": LLAMA, "head_rank": 8}, None, True, marks=MANY),
        pytest.param({"config": LLAMA}, polarjax.Oracle(0.5), True, marks=MANY),
        pytest.param({"config": LLAMA}, polarjax.Random(0.5), False, marks=MANY),
        pytest.param({"config": OPT}, None, True, marks=MANY),
        pytest.param({"config": MHA}, polarjax.Polar(0.25), True, marks=MANY),
    ],
)
def test_so_it_is_of_every_policy_and_rule(model, policy, densities):
    made = dict(model)
    config = dataclasses.replace(made.pop("config"), context=CONTEXT)
    dtype = jnp.dtype(made.pop("dtype", "float32"))
    cut = random_params(config, routers=True, **made)
    cut = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, cut)
    options = {"policy": policy, "densities": densities}
    asked = by_itself(make_engine(cut, prefix_cache=False, **options))
    engine = make_engine(cut, ahead=2, **options)
    request_of = functools.partial(ruled_request, densities=densities)
    count = sum(play(engine, seed, asked, request_of) for seed in range(1, 8))
    assert engine._runner.scheduler.preemptions > 0.1 * count


def test_tokens_are_those_that_were_recorded():
    for case in json.loads(RECORDED.read_text()):
        base = {"llama": LLAMA, "opt": OPT, "mha": MHA}[case["model"]]
        model = random_params(dataclasses.replace(base, context=128), routers=True)
        options = dict(case["options"])
        if options.pop("dense", False):
            options["policy"] = polarjax.Dense()
        policy = options.pop("policy", None)
        out = polarjax.generate(model, case["prompts"], policy=policy, **options)
        assert out.tokens == case["tokens"]


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_devices_share_a_batch(params, alone, tp, dp):
    engine = make_engine(params, mesh=make_mesh(tp, dp), pages=20, ahead=2)
    rng = np.random.default_rng(tp + dp)
    asked = [random_request(rng, [5] * 40) for _ in range(10)]
    requests = [engine.add(*one) for one in asked]
    while not engine.idle:
        engine.step()
        engine._runner.scheduler.check()
    for (prompt, settings), request in zip(asked, requests, strict=True):
        tokens, (logprobs, tops, scores, _), reason = alone(prompt, settings)
        assert (request.tokens, request.finish_reason) == (tokens, reason)
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-4)
        np.testing.assert_allclose(request.prompt_logprobs[1:], scores[1:], atol=1e-4)
        assert len(request.alternatives) == len(tops)
        for mine, top in zip(request.alternatives, tops, strict=True):
            np.testing.assert_allclose(mine.logprobs, top.logprobs, atol=1e-4)


def test_what_chance_picks_depends_on_a_requests_seed_alone(params):
    policy = polarjax.Random(0.5)
    prompts = [[i + 1, 5, 9] for i in range(6)]
    few = make_engine(params, policy=policy, slots=2, **GREEDY)
    out = few.generate(prompts, max_new_tokens=8)
    mesh = make_mesh(1, 2)
    many = make_engine(params, policy=policy, slots=6, pages=40, mesh=mesh, **GREEDY)
    assert many.generate(prompts, max_new_tokens=8).tokens == out.tokens


def test_a_request_of_nan_fails_alone():
    config = dataclasses.replace(LLAMA, context=CONTEXT, tied_embeddings=False)
    model = random_params(config)
    weights = dict(model.weights)
    tokens = weights["embed"]["tokens"].at[7].set(jnp.nan)
    weights["embed"] = {**weights["embed"], "tokens": tokens}
    model = dataclasses.replace(model, weights=weights)
    engine = make_engine(model, policy=polarjax.Dense(), **GREEDY)
    plain = polarjax.Settings(stop_ids=())
    good, bad = (engine.add(ids, plain) for ids in ([3, 4, 5], [7, 5]))
    with pytest.raises(RequestFailed, match="NaN for prompt 1"):
        while not engine.idle:
            engine.step()
    while not engine.idle:
        engine.step()
    assert bad.finish_reason == "error" and bad.tokens == []
    assert good.finish_reason == "length" and len(good.tokens) == 64


def test_what_could_never_run_is_refused(params):
    engine = make_engine(params, pages=4, **GREEDY)
    with pytest.raises(
        ValueError, match="needs 5 pages of 16 positions, and there are"
    ):
        engine.add([1] * 40, polarjax.Settings(max_new_tokens=40))
    with pytest.raises(
        ValueError, match="stop_ids must be 64 token ids at most, got 65"
    ):
        engine.add([1], polarjax.Settings(stop_ids=tuple(range(65))))
    assert engine.idle
