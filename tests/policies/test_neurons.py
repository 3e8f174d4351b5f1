"""Neuron sparsity: one set of neurons for the live rows of the batch."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import polarjax
from polarjax.policies import with_learned
from polarjax.policies.budgets import neuron_counts
from polarjax.policy import Learned
from tests.models import LLAMA, OPT, random_params
from tests.policies.reference import assert_same, decode, random_prompts, uniform

CONFIG = dataclasses.replace(OPT, layers=3)
GATED = dataclasses.replace(LLAMA, layers=3, activation="relu")
LENGTHS = (3, 11, 1, 7)
NEW = 18
SEED = 3
HALF = (0.5,) * 4
RANK = 8


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, SEED, routers=True, neuron_rank=RANK)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS, SEED)


def selection(neurons, densities=HALF, config=CONFIG):
    return uniform(config, densities, neurons=[None, neurons, neurons])


def generate(
    params, prompts, density: Any = HALF, neuron_density: Any = 0.25, **settings
):
    """With the policy that is asked for; densities of each request are data."""
    settings = {"max_new_tokens": NEW, **settings}
    if not isinstance(density, tuple):
        policy = polarjax.Polar(density, neuron_density)
        return polarjax.generate(params, prompts, policy=policy, **settings)
    learned = params.policy.learned
    policy = polarjax.Polar(neuron_density=neuron_density, learned=learned)
    params = dataclasses.replace(params, policy=policy)
    return polarjax.generate(params, prompts, density=density, **settings)


@pytest.mark.parametrize(
    "config",
    [CONFIG, GATED, dataclasses.replace(GATED, mlp_bias=True)],
    ids=["plain", "gated", "gated-biases"],
)
def test_heads_and_neurons_equal_masked_dense(config):
    params = random_params(config, SEED, routers=True, neuron_rank=RANK)
    prompts = random_prompts(config, LENGTHS, SEED)
    expected = decode(params, prompts, [NEW] * 4, selection(20, config=config))
    out = generate(params, prompts)
    assert_same(out, expected, config)
    assert out.stats.neuron_density == (1.0, 0.25, 0.25)
    assert any("batch shares one set of neurons" in note for note in out.stats.notes)
    # Sparsity of the neurons changes the text, and so do batch-mates.
    heads_only = decode(params, prompts, [NEW] * 4, selection(None, config=config))
    assert heads_only.tokens != expected.tokens
    alone = decode(params, prompts[:1], [NEW], selection(20, config=config))
    assert alone.tokens[0] != expected.tokens[0]


def test_finished_rows_leave_the_union(params, prompts):
    whole = decode(params, prompts, [NEW] * 4, selection(20))
    # A stop token ends one request early; the rest must decode as if it were gone.
    for stop in whole.tokens[0][2:8]:
        expected = decode(params, prompts, [NEW] * 4, selection(20), stop_ids=(stop,))
        changed = [
            i
            for i in range(1, 4)
            if len(expected.tokens[i]) == NEW and expected.tokens[i] != whole.tokens[i]
        ]
        if changed and expected.margin > 1e-3 and expected.choice_margin > 1e-5:
            break
    else:
        raise AssertionError("no stop token shows the difference")
    out = generate(params, prompts, stop_ids=[stop])
    assert_same(out, expected, CONFIG)


def test_rows_at_the_end_of_the_context_leave_the_union(prompts):
    config = dataclasses.replace(CONFIG, context=20)
    short = random_params(config, SEED + 1, routers=True, neuron_rank=RANK)
    limits = [min(NEW, 20 - n) for n in LENGTHS]
    assert limits == [17, 9, 18, 13]
    expected = decode(short, prompts, limits, selection(20))
    assert_same(generate(short, prompts), expected, config)


def test_a_dense_request_makes_the_batchs_mlp_dense(params, prompts):
    densities = (0.5, 1.0, 0.25, 0.5)
    expected = decode(params, prompts, [NEW] * 4, selection(None, densities))
    out = generate(params, prompts, densities)
    assert_same(out, expected, CONFIG)
    assert out.stats.neuron_density == (1.0,) * 3
    dense = decode(params, prompts, [NEW] * 4)
    assert out.tokens[1] == dense.tokens[1]
    assert not out.stats.notes


def test_the_second_bias_of_the_mlp_survives_sparse_steps(params, prompts):
    # With an output bias that dwarfs everything else, losing it would show.
    rng = np.random.default_rng(0)
    bias = 3 * rng.normal(size=CONFIG.dim).astype(np.float32)
    weights = dict(params.weights)
    for i in range(CONFIG.layers):
        layer = weights[f"layers_{i}"]
        mlp = {**layer["mlp"], "down_bias": layer["mlp"]["down_bias"] + bias}
        weights[f"layers_{i}"] = {**layer, "mlp": mlp}
    biased = dataclasses.replace(params, weights=weights)
    expected = decode(biased, prompts, [NEW] * 4, selection(20))
    assert_same(generate(biased, prompts), expected, CONFIG)


@pytest.mark.parametrize(("density", "neurons"), [(0.01, 1), (0.5, 40), (0.99, 79)])
def test_the_budget_of_neurons(params, prompts, density, neurons):
    _, bound = polarjax.Polar(0.5, neuron_density=density).bind(params)
    assert bound.neuron_counts == (0, neurons, neurons)


def test_neuron_density_1_is_dense(params, prompts):
    _, bound = polarjax.Polar(0.5, neuron_density=1.0).bind(params)
    assert bound.neuron_counts == (0, 0, 0) and not bound.neuron_routers


def test_weight_bytes_count_the_neurons_that_are_read(params, prompts):
    sparse = generate(params, prompts).stats.weight_bytes
    dense = generate(params, prompts, neuron_density=None).stats.weight_bytes
    f, m, r, float32 = CONFIG.neurons, CONFIG.dim, RANK, 4
    # Per sparse layer: a quarter of both matrices and the first bias is read, but
    # also the neuron router: [r, m] and its zero bias in the QKV matrix, and [f, r].
    saved = 0.75 * f * (2 * m + 1) - (r * (m + 1) + f * r)
    assert dense - sparse == 2 * float32 * saved


NEURON_BUDGETS = ((2, (80, 12, 24)), (4, (80, 20, 80)), (16, (80, 30, 80)))


@pytest.fixture(scope="module")
def budgeted(params):
    """The same model, whose adapter brings neuron budgets."""
    return with_learned(params, budgets=(6, 3, 3), neuron_budgets=NEURON_BUDGETS)


def test_the_adapters_own_budgets_equal_masked_dense(budgeted, prompts):
    # Layer 2 reads all neurons but not all heads.
    chosen = uniform(CONFIG, HALF, neurons=[None, 20, None])
    expected = decode(budgeted, prompts, [NEW] * 4, chosen)
    out = polarjax.generate(budgeted, prompts, max_new_tokens=NEW)
    assert_same(out, expected, CONFIG)
    assert out.stats.neuron_density == (1.0, 0.25, 1.0)
    # The batch's size decides, and a density of the heads leaves it so.
    chosen = uniform(CONFIG, HALF[:2], neurons=[None, 12, 24])
    expected = decode(budgeted, prompts[:2], [NEW] * 2, chosen)
    out = generate(budgeted, prompts[:2], HALF[:2], neuron_density=None)
    assert_same(out, expected, CONFIG)
    assert out.stats.neuron_density == (1.0, 0.15, 0.3)


def test_finished_rows_leave_the_union_of_the_adapters_budget(budgeted, prompts):
    chosen = uniform(CONFIG, HALF, neurons=[None, 20, None])
    whole = decode(budgeted, prompts, [NEW] * 4, chosen)
    stop = whole.tokens[0][2]
    expected = decode(budgeted, prompts, [NEW] * 4, chosen, stop_ids=(stop,))
    assert len(expected.tokens[0]) < NEW
    out = generate(budgeted, prompts, None, None, stop_ids=[stop])
    assert_same(out, expected, CONFIG)


def test_density_1_overrules_the_adapters_budgets(budgeted, prompts):
    out = generate(budgeted, prompts, (0.5, 1.0, 0.25, 0.5), neuron_density=None)
    assert out.stats.neuron_density == (1.0,) * 3
    assert out.tokens[1] == decode(budgeted, prompts, [NEW] * 4).tokens[1]
    _, bound = polarjax.Polar(0.5, neuron_density=1.0).bind(budgeted)
    assert bound.neuron_counts == (0, 0, 0) and not bound.neuron_routers
    assert bound.wants.scores == (0, 6, 6)


def test_an_adapter_for_neurons_alone(budgeted, prompts):
    # It leaves all heads to all requests, none of whom asked for density 1.
    alone = with_learned(budgeted, budgets=(6, 6, 6))
    chosen = uniform(CONFIG, (1.0,) * 4, neurons=[None, 20, None])
    expected = decode(alone, prompts, [NEW] * 4, chosen)
    assert_same(generate(alone, prompts, None, None), expected, CONFIG)


def test_bytes_of_layers_that_read_all_neurons(budgeted):
    weights, bound = polarjax.Polar().sized(4).bind(budgeted)
    assert bound.neuron_counts == (0, 20, 0) and list(bound.neuron_routers) == [1]
    # No neuron router rides in layer 2's matrix.
    assert bound.wants.scores == (0, 6 + RANK, 6)
    rows = [weights[f"layers_{i}"]["attention"]["qkv"].shape[0] for i in range(3)]
    assert rows == [144, 144 + 6 + RANK, 144 + 6]


def test_counts_between_batch_sizes():
    wide = dataclasses.replace(CONFIG, neurons=16384)
    learned = Learned(
        neuron_budgets=(
            (2, (16384, 1024, 300)),
            (8, (16384, 2048, 300)),
            (64, (16384, 8192, 16384)),
        )
    )

    def counts(batch):
        return neuron_counts(wide, learned, batch)[1:]

    # Measured ones as they are, and none below the smallest.
    assert counts(1) == counts(2) == (1024, 300)
    assert counts(8) == (2048, 300) and counts(64) == (8192, 16384)
    # Half way from 2 to 8 by logarithm is 4; a third of the way from 8 to 64 is 16.
    assert counts(4) == (1536, 384)
    assert counts(16) == (4096, -(-(300 + 16084 / 3) // 128) * 128)
    # log(12 / 8) / log(8) of the way, rounded up to 128.
    assert counts(12)[0] == -(-(2048 + 6144 * np.log(1.5) / np.log(8)) // 128) * 128
    # Beyond what was measured nothing is known.
    assert counts(65) == counts(1000) == (16384, 16384)
    assert neuron_counts(CONFIG, Learned(), 4) == (80, 80, 80)
    # Rounded up, but never above all.
    few = Learned(neuron_budgets=NEURON_BUDGETS)
    assert neuron_counts(CONFIG, few, 3) == (80, 80, 80)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (((4, (80, 20)),), "3 numbers from 1 to 80"),
        (((4, (40, 20, 20)),), "layer 0 is dense"),
        (((4, (80, 0, 20)),), "3 numbers from 1 to 80"),
        (((4, (80, 81, 20)),), "3 numbers from 1 to 80"),
        (((4, (80, 20.0, 20)),), "3 numbers from 1 to 80"),
        (((0, (80, 20, 20)),), "batch 0 after 0"),
        (((4, (80, 20, 20)), (4, (80, 20, 20))), "batch 4 after 4"),
        (((4, (80, 20, 20)), (2, (80, 20, 20))), "batch 2 after 4"),
        ((("4", (80, 20, 20)),), "batch '4' after 0"),
    ],
)
def test_neuron_budgets_that_do_not_fit_are_refused(budgeted, budgets, message):
    wrong = with_learned(budgeted, neuron_budgets=budgets)
    with pytest.raises(ValueError, match=message):
        polarjax.Polar().sized(4).bind(wrong)
    with pytest.raises(ValueError, match=message):
        polarjax.generate(wrong, [[1, 2, 3]])


def test_neuron_budgets_need_relu_and_routers(budgeted):
    config = dataclasses.replace(CONFIG, activation="gelu")
    with pytest.raises(ValueError, match="need a ReLU MLP, the model's is gelu"):
        neuron_counts(config, budgeted.policy.learned, 4)
    numbers = budgeted.policy.learned
    bare = random_params(
        CONFIG,
        routers=True,
        budgets=numbers.budgets,
        neuron_budgets=numbers.neuron_budgets,
    )
    with pytest.raises(ValueError, match="no neuron router for layer 1"):
        polarjax.Polar().sized(4).bind(bare)


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan"), True, "0.5", [0.5, 0.5]])
@pytest.mark.parametrize("heads", [0.5, 1.0])
def test_neuron_densities_out_of_range_are_refused(params, prompts, heads, density):
    with pytest.raises(ValueError, match="density must be a number above 0 and at"):
        generate(params, prompts, heads, neuron_density=density)


def test_neuron_sparsity_needs_relu_and_neuron_routers(prompts):
    config = dataclasses.replace(LLAMA, layers=3)
    with pytest.raises(ValueError, match="needs a ReLU MLP, the model's is silu"):
        generate(random_params(config, routers=True), prompts)
    with pytest.raises(ValueError, match="no neuron router for layer 1"):
        generate(random_params(CONFIG, routers=True), prompts)
