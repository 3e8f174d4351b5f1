"""Budgets that adapt to each token: as many groups as pass a threshold."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.calibration.calibrate import Texts
from polarjax.calibration.recover import recover
from polarjax.evaluation import Scorer, router_recall, window_items
from polarjax.policies import load_adapter, save_adapter
from polarjax.policies.budgets import HeadBudget, with_density
from polarjax.training import Recovery
from polarjax.training.thresholds import score_thresholds, sorted_scores
from tests.models import MHA, random_params


@pytest.fixture(scope="module")
def params():
    found = random_params(MHA, routers=True)
    config = dataclasses.replace(found.config, budgets=(6, 3, 6, 4), model_hash="x")
    return dataclasses.replace(found, config=config)


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(MHA.vocab_size, size=(6, 32))


@pytest.fixture(scope="module")
def adaptive(params, blocks):
    return with_budgets(params, blocks, params.config.budgets)


@pytest.fixture(scope="module")
def means(params, blocks):
    """Budgets that are means over tokens."""
    return with_budgets(params, blocks, (6, 2.5, 6, 4.75), adaptive=True)


def with_budgets(params, blocks, budgets, adaptive=False):
    scores = sorted_scores(params, blocks)
    thresholds = score_thresholds(scores, budgets, MHA.kv_heads)
    config = dataclasses.replace(
        params.config, budgets=budgets, adaptive=adaptive, thresholds=thresholds
    )
    return dataclasses.replace(params, config=config)


def test_a_sequence_reads_the_groups_above_the_threshold():
    scores = jnp.array([[0.5, 3.0, 1.0], [0.1, 0.0, 0.2], [1.0, 2.0, 9.0]])
    counts = (jnp.zeros(3, jnp.int32),) * 2
    budget = HeadBudget(counts, (None, 3), jnp.array([0.0, 1.0]))
    found = budget.choose(1, scores, "xla")
    assert found is not None
    indices, n_active = found
    # One at the least, where none passes.
    np.testing.assert_array_equal(n_active, [2, 1, 3])
    np.testing.assert_array_equal(indices[:, 0], [1, 2, 2])
    assert budget.choose(0, scores) is None


def test_over_the_text_the_density_is_that_of_the_budgets(adaptive, blocks):
    """On the very text, from the first token: states differ a little from dense."""
    use = groups_read(adaptive, polarjax.Polar(adaptive=True), blocks)
    assert use[0] == use[2] == 6  # dense, and a budget of all
    np.testing.assert_allclose(use[[1, 3]], [3, 4], rtol=0.15)


def groups_read(params, policy, blocks):
    """Mean over tokens, by layer."""
    scorer = Scorer(params, {"a": policy}, mode="mask")
    work = scorer.plan(window_items(blocks.ravel(), 32, 1))
    scorer.compile(work)
    scores = [scorer.score(batch)["a"] for batch in work]
    positions = sum(score.positions for score in scores)
    return sum(score.use.sum(axis=1) for score in scores) / positions


def test_budgets_that_are_means_are_kept_by_thresholds(means, blocks):
    use = groups_read(means, polarjax.Polar(), blocks)
    assert use[0] == use[2] == 6
    np.testing.assert_allclose(use[[1, 3]], [2.5, 4.75], rtol=0.15)
    many = np.random.default_rng(1).integers(MHA.vocab_size, size=(96, 32))
    by_chance = groups_read(means, polarjax.Random(), many)
    assert by_chance[0] == by_chance[2] == 6
    np.testing.assert_allclose(by_chance[[1, 3]], [2.5, 4.75], rtol=0.25)
    exact = polarjax.Polar(2 / 3).bind(means, 2)[1].budget
    assert exact.thresholds is None  # a density is a density
    with pytest.raises(ValueError, match="are means over tokens: pass a density"):
        polarjax.Oracle().bind(means, 1)
    assert router_recall(means, blocks[:2, None]).mean > 0  # at 2 and 4 groups


def test_decoding_is_the_masked_model(adaptive, blocks):
    found = {}
    for mode in ("mask", "kernel"):
        policy = {"a": polarjax.Polar(adaptive=True)}
        scorer = Scorer(adaptive, policy, mode=mode, batch=2)
        work = scorer.plan(window_items(blocks[:2].ravel(), 32, 1))
        scorer.compile(work)
        found[mode] = np.concatenate(scorer.score(work[0])["a"].nll)
    np.testing.assert_allclose(found["mask"], found["kernel"], atol=1e-4)


def test_requests_read_what_each_of_them_needs(adaptive):
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11]]
    policy = polarjax.Polar(adaptive=True)
    both = polarjax.generate(adaptive, prompts, max_new_tokens=12, policy=policy)
    for prompt, tokens in zip(prompts, both.tokens, strict=True):
        alone = polarjax.generate(adaptive, [prompt], max_new_tokens=12, policy=policy)
        assert alone.tokens[0] == tokens
    assert both.stats.density[0] == both.stats.density[2] == 1
    assert 1 / 6 <= both.stats.density[1] < 1


def test_an_adapter_brings_them(adaptive, means, tmp_path):
    save_adapter(tmp_path / "a", adaptive)
    plain = dataclasses.replace(adaptive.config, budgets=(), thresholds=())
    model = polarjax.Params(adaptive.weights, {}, plain)
    loaded = load_adapter(model, tmp_path / "a")
    assert loaded.config.thresholds == adaptive.config.thresholds
    save_adapter(tmp_path / "m", means)
    loaded = load_adapter(model, tmp_path / "m").config
    assert loaded.budgets == means.config.budgets and loaded.adaptive
    config = dataclasses.replace(means.config, thresholds=())
    with pytest.raises(ValueError, match="means over tokens, which need thresholds"):
        save_adapter(tmp_path / "b", dataclasses.replace(means, config=config))
    config = dataclasses.replace(means.config, adaptive=False)
    with pytest.raises(ValueError, match="no whole number must be a mean"):
        save_adapter(tmp_path / "b", dataclasses.replace(means, config=config))
    # Whole numbers may be means too.
    whole = dataclasses.replace(means.config, budgets=(6, 3, 6, 4))
    save_adapter(tmp_path / "w", dataclasses.replace(means, config=whole))
    bound = polarjax.Polar().bind(load_adapter(model, tmp_path / "w"), 1)[1]
    assert bound.budget.thresholds is not None
    assert not with_density(means, 0.5).config.thresholds
    for wrong in ((1.0,), (float("nan"),) * 4):
        config = dataclasses.replace(adaptive.config, thresholds=wrong)
        with pytest.raises(ValueError, match="must be 4 finite numbers"):
            save_adapter(tmp_path / "b", dataclasses.replace(adaptive, config=config))


def test_errors(params, adaptive, means):
    with pytest.raises(ValueError, match="needs the thresholds"):
        polarjax.Polar(adaptive=True).bind(params, 1)
    with pytest.raises(ValueError, match="needs whole ones, pass a density"):
        recover(means, Texts([]), Recovery())  # before any text is read
    with pytest.raises(ValueError, match="not both"):
        polarjax.Polar(0.5, adaptive=True).bind(adaptive, 1)
    with pytest.raises(ValueError, match="no text"):
        sorted_scores(params, np.zeros((0, 8), np.int32))
    with pytest.raises(ValueError, match="2 budgets for 4 layers"):
        score_thresholds(np.zeros((3, 8)), (6, 3), 6)
