"""Sparse decoding through `generate` equals a masked dense model, token for token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.policies.random import draw
from tests.models import LLAMA, MHA, OPT, OPT_AFTER, random_params
from tests.policies.reference import (
    Selection,
    assert_same,
    decode,
    random_prompts,
    uniform,
)

MODELS = {
    "gqa": dataclasses.replace(LLAMA, layers=3),
    "mha": dataclasses.replace(MHA, layers=3),
    "opt": dataclasses.replace(OPT, layers=3),
    "opt-norm-after": dataclasses.replace(OPT_AFTER, layers=3),
    # Layer 1 sees it all, and knows no positions.
    "windows": dataclasses.replace(
        LLAMA, layers=3, windows=(6, 0, 4), rotary=(True, False, True)
    ),
    "qwen3": dataclasses.replace(LLAMA, layers=3, qk_norm=True, qkv_bias=True),
}
LENGTHS = (3, 11, 1, 7)
DENSITIES = (1.0, 0.5, 0.25, 0.75)
NEW = 18
# One whose margins are wide enough, see `assert_same`; so are all seeds below.
SEED = 3


def compare(
    config, seed, densities=DENSITIES, new=NEW, implementation="xla", head_rank=0
):
    params = random_params(config, seed, routers=True, head_rank=head_rank)
    prompts = random_prompts(config, LENGTHS[: len(densities)], seed)
    selection = uniform(config, densities)
    expected = decode(params, prompts, [new] * len(prompts), selection)
    out = polarjax.generate(
        params,
        prompts,
        max_new_tokens=new,
        density=densities,
        implementation=implementation,
    )
    assert_same(out, expected, config)
    return params, prompts, out, expected


@pytest.mark.parametrize(
    ("name", "seed", "head_rank"),
    [
        *[("gqa", 2, 0), ("gqa", 3, 4), ("mha", 3, 0), ("mha", 4, 4)],
        *[("opt", 3, 0), ("opt", 6, 4), ("qwen3", 0, 0), ("qwen3", 0, 4)],
        *[("windows", 0, 0), ("windows", 1, 4), ("opt-norm-after", 3, 0)],
    ],
)
def test_polar_equals_masked_dense(name, seed, head_rank):
    params, prompts, out, expected = compare(MODELS[name], seed, head_rank=head_rank)
    # The routers change their minds, and sparsity changes the text: else this test
    # would pass with any selection.
    sparse = [groups for (_, i), groups in expected.groups_used.items() if i == 2]
    assert any(len(groups) > 1 for groups in sparse)
    dense = decode(params, prompts, [NEW] * 4)
    assert dense.tokens[0] == out.tokens[0]
    assert all(dense.tokens[i] != out.tokens[i] for i in (1, 2))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs JAX_PLATFORMS=cpu")
@pytest.mark.parametrize(("name", "seed"), [("gqa", 0), ("opt", 0), ("windows", 0)])
def test_interpreted_triton_equals_masked_dense(name, seed):
    model = MODELS[name]
    last = {"windows": model.windows[-2:], "rotary": model.rotary[-2:]}
    config = dataclasses.replace(model, layers=2, **last)
    compare(config, seed, (1.0, 0.5), 6, implementation="triton_interpret")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_polar_equals_masked_dense_in_many_batches(name):
    config, compared = MODELS[name], 0
    for seed in range(100, 140):
        rng = np.random.default_rng(seed)
        densities = rng.uniform(0.01, 1, size=4).tolist()
        try:
            compare(config, seed, densities)
        except AssertionError:
            params = random_params(config, seed, routers=True)
            prompts = random_prompts(config, LENGTHS, seed)
            found = decode(params, prompts, [NEW] * 4, uniform(config, densities))
            if found.margin > 1e-3 and found.choice_margin > 1e-5:
                raise
        else:
            compared += 1
    assert compared > 20


def continued(params, prompts, policy):
    """By an engine whose requests ask for the densities."""
    with polarjax.Engine(params, policy=policy, slots=4, context=32) as engine:
        return engine.generate(prompts, max_new_tokens=NEW, density=DENSITIES)


@pytest.mark.parametrize("name", MODELS)
def test_oracle_picks_the_true_norms(name):
    config = MODELS[name]
    params = random_params(config, SEED)
    prompts = random_prompts(config, LENGTHS, SEED)
    selection = uniform(config, DENSITIES, by="norms")
    expected = decode(params, prompts, [NEW] * 4, selection)
    out = continued(params, prompts, polarjax.Oracle(0.5))
    assert_same(out, expected, config)
    assert out.stats.policy == "Oracle" and "dense attention" in out.stats.notes[0]


def test_random_reads_what_its_draw_ranks_first():
    config = MODELS["gqa"]
    params = random_params(config, SEED)
    prompts = random_prompts(config, LENGTHS, SEED)
    slots = jnp.arange(4)
    ranking = np.asarray(draw(4, slots, config.layers, config.kv_heads))
    ranking = ranking.swapaxes(0, 1)
    selection = uniform(config, DENSITIES, by="ranking", ranking=ranking)
    expected = decode(params, prompts, [NEW] * 4, selection)
    out = continued(params, prompts, polarjax.Random(0.5, seed=4))
    assert_same(out, expected, config)
    other = continued(params, prompts, polarjax.Random(0.5, seed=8))
    assert other.tokens != out.tokens


def test_the_adapters_budgets_are_used_layer_by_layer():
    config, budgets = MODELS["gqa"], (4, 1, 3)
    params = random_params(config, SEED, routers=True, budgets=budgets)
    prompts = random_prompts(config, LENGTHS, SEED)
    selection = Selection([[n] * 4 for n in budgets])
    expected = decode(params, prompts, [NEW] * 4, selection)
    out = polarjax.generate(params, prompts, max_new_tokens=NEW)
    assert_same(out, expected, config)
    assert out.stats.density == (1.0, 0.25, 0.75)


def test_requests_that_end_early_change_nothing_for_the_others():
    config = MODELS["gqa"]
    params = random_params(config, SEED, routers=True)
    prompts = random_prompts(config, LENGTHS, SEED)
    selection = uniform(config, DENSITIES)
    limits = [NEW] * 4
    whole = decode(params, prompts, limits, selection)
    # A token that some request draws in the middle, another perhaps never.
    stop = whole.tokens[1][5]
    expected = decode(params, prompts, limits, selection, stop_ids=(stop,))
    assert len({len(tokens) for tokens in expected.tokens}) > 1
    out = polarjax.generate(
        params,
        prompts,
        max_new_tokens=NEW,
        density=DENSITIES,
        stop_ids=[stop],
    )
    assert_same(out, expected, config)
    ended = [len(tokens) < NEW for tokens in expected.tokens]
    assert out.finish_reasons == ["stop" if e else "length" for e in ended]


def test_prefill_and_layer_0_are_dense():
    config = MODELS["gqa"]
    params = random_params(config, SEED, routers=True)
    prompts = random_prompts(config, LENGTHS, SEED)
    dense = decode(params, prompts, [1] * 4)
    sparse = polarjax.generate(params, prompts, max_new_tokens=NEW, density=0.25)
    # The first token comes from the prompt alone.
    assert [tokens[:1] for tokens in sparse.tokens] == dense.tokens
    first = [logprobs[:1] for logprobs in sparse.logprobs]
    np.testing.assert_allclose(first, dense.logprobs, atol=1e-5)
    # A model of one layer has nothing to be sparse in, and needs no router.
    one = random_params(dataclasses.replace(config, layers=1), 0)
    dense = decode(one, prompts, [NEW] * 4)
    sparse = polarjax.generate(one, prompts, max_new_tokens=NEW, density=0.25)
    assert_same(sparse, dense, one.config)
    assert sparse.stats.density == (1.0,)
