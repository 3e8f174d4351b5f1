"""Densities: what they promise each request, what is counted, what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.model import Pick, Share
from polarjax.policies import with_learned
from polarjax.policies.budgets import HeadBudget, uniform_budgets
from polarjax.policies.random import draw
from tests.models import LLAMA, OPT, random_params
from tests.policies.reference import decode, random_prompts, uniform

CONFIG = dataclasses.replace(LLAMA, layers=3)
LENGTHS = (3, 11, 1, 7)
NEW = 18
SEED = 3


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, SEED, routers=True)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS, SEED)


def generate(params, prompts, **settings):
    return polarjax.generate(params, prompts, max_new_tokens=NEW, **settings)


def assert_close(one, other):
    assert one.tokens == other.tokens
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(OPT, layers=3),
        dataclasses.replace(CONFIG, mlp_bias=True),
    ],
    ids=["gqa", "opt", "mlp-bias"],
)
def test_density_1_equals_dense(config):
    params = random_params(config, SEED, routers=True)
    prompts = random_prompts(config, LENGTHS, SEED)
    dense = generate(params, prompts, policy=polarjax.Dense())
    assert decode(params, prompts, [NEW] * 4).margin > 1e-3
    whole = generate(params, prompts, density=1.0)
    assert_close(whole, dense)
    assert whole.stats.density == (1.0,) * 3
    assert whole.stats.kv_bytes == whole.stats.kv_bytes_dense == dense.stats.kv_bytes
    # The dense opt-out of one request, through the sparse kernel.
    mixed = generate(params, prompts, density=[0.25, 1.0, 1.0, 0.5])
    for i in (1, 2):
        assert mixed.tokens[i] == dense.tokens[i]
        np.testing.assert_allclose(mixed.logprobs[i], dense.logprobs[i], atol=1e-4)
    assert mixed.tokens[0] != dense.tokens[0]
    assert mixed.stats.kv_bytes < mixed.stats.kv_bytes_dense == dense.stats.kv_bytes


def test_a_result_does_not_depend_on_batch_mates(params, prompts):
    densities = [1.0, 0.5, 0.25, 0.75]
    together = generate(params, prompts, density=densities)
    expected = decode(params, prompts, [NEW] * 4, uniform(CONFIG, densities))
    assert expected.margin > 1e-3
    for i in (1, 3):
        alone = generate(params, [prompts[i]], density=densities[i])
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-4)
    # Other mates, another order: the row that stays is what it was.
    order = [2, 0, 3, 1]
    shuffled = generate(
        params, [prompts[i] for i in order], density=[densities[i] for i in order]
    )
    assert shuffled.tokens == [together.tokens[i] for i in order]


def test_random_draws_depend_on_the_row_alone():
    four, one = (draw(1, jnp.arange(batch), 3, 4) for batch in (4, 1))
    np.testing.assert_array_equal(one, four[:1])
    assert len(np.unique(four)) == 3 * 4 * 4


@pytest.mark.parametrize(
    ("density", "groups"),
    # A hair below a whole number of groups counts as that number.
    [(0.01, 1), (0.25, 1), (0.49, 1), (0.5, 2), (0.749, 2), (0.74999, 3), (0.99, 3)],
)
def test_stats_show_the_density_asked(params, prompts, density, groups):
    out = generate(params, prompts, density=density)
    assert out.stats.density == (1.0, groups / 4, groups / 4)
    # Every token but the last is read back, and sees what is before it and itself.
    visible = sum(n + i + 1 for n in LENGTHS for i in range(NEW - 1))
    row = 2 * CONFIG.head_dim * 4
    assert out.stats.kv_bytes_dense == visible * row * 3 * 4
    assert out.stats.kv_bytes == visible * row * (4 + 2 * groups)
    assert out.stats.neuron_density == (1.0,) * 3
    assert out.stats.prompt_tokens == sum(LENGTHS)
    assert out.stats.new_tokens == 4 * NEW


def test_two_thirds_of_three_groups_are_two():
    config = dataclasses.replace(CONFIG, heads=6, kv_heads=3)
    budgets = uniform_budgets(config, 2 / 3)
    budget = HeadBudget.of(3, budgets, flexible=False)
    np.testing.assert_array_equal(budget.counts, [3, 2, 2])
    assert budget.limits == (None, 2, 2)
    # Nor are they more or less where requests ask for it.
    flexible = HeadBudget.of(3, budgets, flexible=True)
    assert flexible.limits == (None, 3, 3)
    asked, pick = jnp.array([2 / 3, 1 / 3]), Pick(Share(config))
    chosen = flexible.choose(1, jnp.zeros((2, 3)), asked, pick)
    assert chosen is not None
    np.testing.assert_array_equal(chosen.count, [2, 1])


def test_one_density_per_request_may_come_in_any_sequence(params, prompts):
    budget = HeadBudget.of(4, (4, 4, 4), flexible=True)
    asked = jnp.array([1.0, 0.5, 0.25, 0.75])
    pick = Pick(Share(CONFIG))
    expected = budget.choose(1, jnp.zeros((4, 4)), asked, pick)
    assert expected is not None
    np.testing.assert_array_equal(expected.count, [4, 2, 1, 3])
    for many in (np.array([1.0, 0.5, 0.25, 0.75]), jnp.array([1, 0.5, 0.25, 0.75])):
        out = generate(params, prompts, density=many)
        assert out.stats.density == (1.0, 10 / 16, 10 / 16)
    for one in (np.float32(0.5), np.array(0.5), jnp.array(0.5)):
        out = generate(params, prompts, density=one)
        assert out.stats.density == (1.0, 0.5, 0.5)
        out = generate(params, prompts, policy=polarjax.Polar(one))
        assert out.stats.density == (1.0, 0.5, 0.5)


WRONG = (0.0, -0.5, 1.5, float("nan"), float("inf"), True, "0.5", {}, 1j)
LISTS = [
    [0.5, 0.5, 0.5, 0],
    [True, 0.5, 0.5, 0.5],
    [None, 0.5, 0.5, 0.5],
    [[0.5]] * 4,
    ["0.5"] * 4,
]


@pytest.mark.parametrize("density", [*WRONG, *LISTS])
@pytest.mark.parametrize("policy", [None, "Polar", "Oracle", "Random"])
def test_densities_out_of_range_are_refused(params, prompts, density, policy):
    settings = {"density": density}
    if policy:
        settings = {"policy": getattr(polarjax, policy)(density)}
    with pytest.raises(ValueError, match="density must be a number above 0 and at"):
        generate(params, prompts, **settings)


@pytest.mark.parametrize("policy", [polarjax.Oracle, polarjax.Random, polarjax.Polar])
def test_an_engine_refuses_them_too(params, prompts, policy):
    with polarjax.Engine(params, policy=policy(0.5), slots=4, context=32) as engine:
        for density in (*WRONG, *LISTS):
            with pytest.raises(ValueError, match="density must be a number above 0"):
                engine.generate(prompts, density=density)


def test_the_number_of_densities_must_be_that_of_prompts(params, prompts):
    with pytest.raises(ValueError, match="density has 3 values for 4 prompts"):
        generate(params, prompts, density=[0.5] * 3)
    with pytest.raises(ValueError, match="density has 0 values for 4 prompts"):
        generate(params, prompts, density=[])


def test_policy_and_density_together_are_refused(params, prompts):
    with pytest.raises(ValueError, match="either policy or density"):
        generate(params, prompts, density=0.5, policy=polarjax.Dense())


@pytest.mark.parametrize("policy", ["dense", polarjax.Dense, 0.5])
def test_a_policy_must_be_one(params, prompts, policy):
    with pytest.raises(TypeError, match="policy must be a policy"):
        generate(params, prompts, policy=policy)


def test_sparsity_without_an_adapter_is_refused(prompts):
    params = random_params(CONFIG, SEED)
    with pytest.raises(ValueError, match=r"no router for layer 1: .*adapter="):
        generate(params, prompts, density=0.5)
    with pytest.raises(ValueError, match="no density given and no adapter"):
        generate(params, prompts, policy=polarjax.Polar())
    assert generate(params, prompts).stats.policy == "Dense"
    assert generate(params, prompts, density=1.0).stats.density == (1.0,) * 3


def test_routers_make_generate_sparse(params, prompts):
    with_budgets = with_learned(params, budgets=(4, 2, 2))
    out = generate(with_budgets, prompts)
    assert out.stats.policy == "Polar" and out.stats.density == (1.0, 0.5, 0.5)
    assert out.tokens == generate(params, prompts, density=0.5).tokens
