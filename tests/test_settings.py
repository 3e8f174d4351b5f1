"""What JAX's settings, and where arrays come from, do not change."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.engine import stats
from polarjax.engine.checks import Settings, variant_of
from polarjax.engine.sampling import draw as draw_tokens
from polarjax.evaluation import Continuation, Scorer
from polarjax.policies.random import draw as draw_ranking
from polarjax.settings import draw_key
from polarjax.training.neurons import init_low_rank
from tests.models import LLAMA, OPT, make_sampling, random_params
from tests.policies.reference import random_prompts

CONFIG = dataclasses.replace(LLAMA, layers=2)
PROMPTS = random_prompts(CONFIG, (3, 11, 1, 7))
SETTINGS = {
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "x64": lambda: jax.enable_x64(True),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "no dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


def cast(params, dtype):
    weights = jax.tree.map(lambda x: x.astype(dtype), params.weights)
    return dataclasses.replace(params, weights=weights)


def generate(params, **settings):
    out = polarjax.generate(params, PROMPTS, max_new_tokens=4, **settings)
    return out.tokens, out.logprobs


@pytest.fixture(scope="module", autouse=True)
def _bandwidth():
    """To measure one takes seconds on each device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "read_bandwidth", lambda device: 1e9)
        yield


@pytest.fixture(scope="module")
def params():
    return cast(random_params(CONFIG, routers=True), jnp.bfloat16)


@pytest.fixture(scope="module")
def opt():
    config = dataclasses.replace(OPT, layers=2)
    return cast(random_params(config, routers=True, neuron_rank=4), jnp.bfloat16)


WAYS = {
    "dense": {"policy": polarjax.Dense()},
    "sparse": {"density": 0.5},
    "sampled": {"density": 0.5, "temperature": 1.0, "top_k": 50, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def expected(params, opt):
    neurons = polarjax.Polar(0.5, neuron_density=0.5)
    return {
        **{name: generate(params, **way) for name, way in WAYS.items()},
        "neurons": generate(opt, policy=neurons),
        "logits": np.asarray(polarjax.logits(params, [PROMPTS[1]])),
    }


@pytest.mark.parametrize("setting", [*SETTINGS, "older bits"])
def test_jaxs_settings_change_nothing(setting, params, opt, expected, tmp_path):
    older = {"older bits": lambda: jax.threefry_partitionable(False)}
    polarjax.save(params, tmp_path / "model")
    neurons = polarjax.Polar(0.5, neuron_density=0.5)
    with (SETTINGS | older)[setting]():
        loaded = polarjax.load(tmp_path / "model")
        assert loaded.dtype == jnp.bfloat16
        for name, way in WAYS.items():
            assert generate(loaded, **way) == expected[name], name
        assert generate(opt, policy=neurons) == expected["neurons"]
        logits = polarjax.logits(loaded, [PROMPTS[1]])
    np.testing.assert_array_equal(logits, expected["logits"])
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_a_seed_draws_what_it_always_drew(setting):
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
    config = dataclasses.replace(CONFIG, vocab_size=12)

    def draw(batch):
        requests = [Settings(temperature=1.0, seed=i) for i in range(batch)]
        sampling = make_sampling(config, requests)
        rows = jnp.broadcast_to(logits, (batch, 12))
        position = jnp.full(batch, 5, jnp.int32)
        # JAX keeps what it traced under another implementation of keys.
        variant = variant_of(requests)
        traced_anew = jax.jit(lambda *given: draw_tokens(*given, variant=variant))
        return traced_anew(rows, None, sampling, position)[0].tolist()

    with SETTINGS[setting]() if setting else contextlib.nullcontext():
        # Recorded before keys and dtypes were fixed, under JAX's defaults.
        drawn = [6, 5, 2, 6, 7, 5, 6, 6, 2, 6, 6, 6, 6, 2, 6, 2, 6, 6, 7, 7, 6, 6, 2, 6]
        assert draw(24) == drawn
        assert draw(3) == drawn[:3]
        ranking = draw_ranking(7, jnp.arange(2), CONFIG.layers, CONFIG.kv_heads)
        router = init_low_rank(draw_key(3), 2, 4, 5)
    assert ranking.dtype == jnp.float32
    first = [0.8673704862594604, 0.5563143491744995, 0.3006770610809326]
    assert np.asarray(ranking)[0, 0, :3].tolist() == first
    assert {leaf.dtype for leaf in jax.tree.leaves(router)} == {jnp.dtype("float32")}


def test_large_and_negative_seeds_are_their_lowest_bits():
    def bits(seed):
        return jax.random.key_data(draw_key(seed)).tolist()

    assert bits(2**32 + 7) == bits(7) == [0, 7]
    assert bits(-1) == bits(np.int64(-1)) == [0, 2**32 - 1]
    assert bits(jnp.uint32(7)) == [0, 7]


@pytest.mark.devices(4)
@pytest.mark.parametrize("how", ["context", "loaded"])
def test_a_model_lies_on_the_default_device(params, expected, tmp_path, how):
    polarjax.save(params, tmp_path / "model")
    device = jax.devices()[3]
    with jax.default_device(device):
        loaded = polarjax.load(tmp_path / "model")
        leaves = jax.tree.leaves((loaded.weights, loaded.routers))
        assert {d for leaf in leaves for d in leaf.devices()} == {device}
        if how == "context":
            assert generate(loaded, density=0.5) == expected["sparse"]
    if how == "loaded":  # it goes on there, whatever the default is by then
        assert generate(loaded, density=0.5) == expected["sparse"]
        assert polarjax.logits(loaded, [[1, 2]]).devices() == {device}


def test_weights_may_be_the_hosts(params, expected):
    on_host = jax.device_get(params)
    assert isinstance(on_host.weights["embed"]["tokens"], np.ndarray)
    assert generate(on_host, density=0.5) == expected["sparse"]
    logits = polarjax.logits(on_host, [PROMPTS[1]])
    np.testing.assert_array_equal(logits, expected["logits"])


def test_prompts_and_settings_may_be_arrays_of_jax(params, expected):
    some = {"max_new_tokens": 3, "density": 0.5}
    whole = polarjax.generate(params, jnp.asarray([PROMPTS[1]] * 2), **some)
    assert whole.tokens == polarjax.generate(params, [PROMPTS[1]] * 2, **some).tokens
    prompts = [jnp.asarray(ids) for ids in PROMPTS]
    prompts[1] = list(prompts[1])
    out = polarjax.generate(
        params,
        prompts,
        max_new_tokens=4,
        density=0.5,
        temperature=jnp.ones(4),
        top_k=jnp.int32(50),
        top_p=0.9,
        seed=jnp.int32(0),
        stop_ids=jnp.asarray([], jnp.int32),
    )
    assert (out.tokens, out.logprobs) == expected["sampled"]
    for wrong in ([jnp.ones(2)], [jnp.ones((2, 2), jnp.int32)]):
        with pytest.raises(TypeError, match="prompt 0 must be a str or a list of"):
            polarjax.generate(params, wrong)
    with pytest.raises(TypeError, match=r"prompt 0 is being traced.*jax\.jit"):
        jax.jit(lambda ids: polarjax.generate(params, [ids]).logprobs)(jnp.arange(3))


def test_logits_may_be_traced(params, expected):
    tokens = jnp.asarray([PROMPTS[1]])

    @jax.jit
    def traced(params, tokens, lengths):
        return polarjax.logits(params, tokens, lengths)

    found = traced(params, tokens, jnp.array([11]))
    np.testing.assert_array_equal(found, expected["logits"])
    closed_over = jax.jit(lambda tokens: polarjax.logits(params, tokens))(tokens)
    np.testing.assert_array_equal(closed_over, expected["logits"])
    with pytest.raises(ValueError, match="tokens must be integers of shape"):
        jax.jit(lambda tokens: polarjax.logits(params, tokens))(tokens * 1.0)


@pytest.mark.parametrize(
    ("base", "policy"), [(LLAMA, polarjax.Polar(0.5)), (OPT, polarjax.Dense())]
)
def test_float16_works_as_the_others_do(base, policy):
    config = dataclasses.replace(base, layers=2, context=512)
    # Weights that float16 has, so that only activations are rounded.
    half = cast(random_params(config, routers=True, scale=0.1), jnp.float16)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, 12))
    exact = polarjax.logits(cast(half, jnp.float32), tokens)
    found = polarjax.logits(half, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.02)
    expected = np.asarray(jax.nn.log_softmax(exact[0]))

    prompt = tokens[0].tolist()
    out = polarjax.generate(half, [prompt], max_new_tokens=3, policy=policy)
    [first, *others] = out.logprobs[0]
    assert first == pytest.approx(expected[-1].max(), abs=0.02)
    assert len(others) == 2 and np.isfinite(others).all()

    scorer = Scorer(half, {"Whole": polarjax.Polar(1.0)}, mode="mask", batch=1)
    [batch] = scorer.plan([Continuation(tuple(prompt[:9]), 4)])
    scorer.compile([batch])
    nll = scorer.score(batch)["Whole"].nll[0]
    want = [-expected[i, prompt[i + 1]] for i in range(4, 8)]
    np.testing.assert_allclose(nll, want, atol=0.02)


@pytest.mark.parametrize("dtype", ["int8", "float64", "foo", bool])
def test_dtypes_that_weights_have_not_are_refused(dtype, params, tmp_path):
    polarjax.save(params, tmp_path / "model")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, flo"):
        polarjax.load(tmp_path / "model", dtype=dtype)


def test_what_a_dtype_does_not_hold_is_refused_by_name(tmp_path):
    params = random_params(CONFIG)
    up = params.weights["layers_1"]["mlp"]["up"]
    params.weights["layers_1"]["mlp"]["up"] = up.at[0, 0].set(-7e4)
    polarjax.save(params, tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        polarjax.load(tmp_path / "model", dtype="float16")
    message = str(caught.value)
    assert "layers_1/mlp/up" in message and "70000" in message
    assert "float16" in message and "bfloat16" in message and "\n" not in message
    assert polarjax.load(tmp_path / "model", dtype="bfloat16").dtype == jnp.bfloat16
