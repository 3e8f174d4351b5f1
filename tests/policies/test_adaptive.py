"""Budgets that adapt to each token: as many groups as pass a threshold."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.calibration.calibrate import Texts
from polarjax.calibration.recover import recover
from polarjax.evaluation import Scorer, router_recall, window_items
from polarjax.model import Pick, Share
from polarjax.policies import (
    Adaptive,
    load_adapter,
    named,
    save_adapter,
    with_density,
    with_learned,
)
from polarjax.policies.budgets import HeadBudget
from polarjax.training import Recovery
from polarjax.training.thresholds import score_thresholds, sorted_scores
from tests.models import MHA, random_params


@pytest.fixture(scope="module")
def params():
    config = dataclasses.replace(MHA, model_hash="x")
    return random_params(config, routers=True, budgets=(6, 3, 6, 4))


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(MHA.vocab_size, size=(6, 32))


@pytest.fixture(scope="module")
def adaptive(params, blocks):
    return with_budgets(params, blocks, params.policy.learned.budgets)


@pytest.fixture(scope="module")
def means(params, blocks):
    """Budgets that are means over tokens."""
    return with_budgets(params, blocks, (6, 2.5, 6, 4.75), adaptive=True)


def with_budgets(params, blocks, budgets, adaptive=False):
    scores = sorted_scores(params, blocks)
    thresholds = score_thresholds(scores, budgets, MHA.kv_heads)
    return with_learned(
        params, budgets=budgets, adaptive=adaptive, thresholds=thresholds
    )


def test_a_sequence_reads_the_groups_above_the_threshold():
    scores = jnp.array([[0.5, 3.0, 1.0], [0.1, 0.0, 0.2], [1.0, 2.0, 9.0]])
    budget = HeadBudget.of(3, (3, 2.5), (0.0, 1.0), flexible=False)
    assert budget.limits == (None, 3)
    pick, no_density = Pick(Share(MHA), "xla"), jnp.zeros(3)
    found = budget.choose(1, scores, no_density, pick)
    assert found is not None
    indices, n_active = found
    # One at the least, where none passes.
    np.testing.assert_array_equal(n_active, [2, 1, 3])
    np.testing.assert_array_equal(indices[:, 0], [1, 2, 2])
    assert budget.choose(0, scores, no_density, pick) is None
    # Who asks for a density gets that, whatever the scores, if it may ask.
    for flexible, counts in ((True, [3, 1, 1]), (False, [2, 1, 3])):
        asked = dataclasses.replace(budget, flexible=flexible)
        found = asked.choose(1, scores, jnp.array([1.0, 0.0, 1 / 3]), pick)
        assert found is not None
        np.testing.assert_array_equal(found.count, counts)


def test_over_the_text_the_density_is_that_of_the_budgets(adaptive, blocks):
    """On the very text, from the first token: states differ a little from dense."""
    use = groups_read(adaptive, polarjax.Adaptive(), blocks)
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
    exact = polarjax.Polar(2 / 3).bind(means)[1].budget
    assert not exact.thresholds  # a density is a density
    with pytest.raises(ValueError, match="are means over tokens: pass a density"):
        polarjax.Oracle().bind(means)
    assert router_recall(means, blocks[:2, None]).mean > 0  # at 2 and 4 groups


def test_decoding_is_the_masked_model(adaptive, blocks):
    found = {}
    for mode in ("mask", "kernel"):
        policy = {"a": polarjax.Adaptive()}
        scorer = Scorer(adaptive, policy, mode=mode, batch=2)
        work = scorer.plan(window_items(blocks[:2].ravel(), 32, 1))
        scorer.compile(work)
        found[mode] = np.concatenate(scorer.score(work[0])["a"].nll)
    np.testing.assert_allclose(found["mask"], found["kernel"], atol=1e-4)


def test_requests_read_what_each_of_them_needs(adaptive):
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11]]
    policy = polarjax.Adaptive()
    both = polarjax.generate(adaptive, prompts, max_new_tokens=12, policy=policy)
    for prompt, tokens in zip(prompts, both.tokens, strict=True):
        alone = polarjax.generate(adaptive, [prompt], max_new_tokens=12, policy=policy)
        assert alone.tokens[0] == tokens
    assert both.stats.density[0] == both.stats.density[2] == 1
    assert 1 / 6 <= both.stats.density[1] < 1


def test_an_adapter_brings_them(adaptive, means, tmp_path):
    save_adapter(tmp_path / "a", adaptive)
    model = polarjax.Params(adaptive.weights, polarjax.Dense(), adaptive.config)
    loaded = load_adapter(model, tmp_path / "a").policy
    assert loaded.learned.thresholds == adaptive.policy.learned.thresholds
    assert isinstance(loaded, polarjax.Polar)  # its budgets are fixed
    save_adapter(tmp_path / "m", means)
    loaded = load_adapter(model, tmp_path / "m").policy
    assert loaded.learned.budgets == means.policy.learned.budgets
    assert loaded.learned.adaptive and isinstance(loaded, Adaptive)
    with pytest.raises(ValueError, match="means over tokens, which need thresholds"):
        save_adapter(tmp_path / "b", with_learned(means, thresholds=()))
    with pytest.raises(ValueError, match="no whole number must be a mean"):
        save_adapter(tmp_path / "b", with_learned(means, adaptive=False))
    # Whole numbers may be means too.
    save_adapter(tmp_path / "w", with_learned(means, budgets=(6, 3, 6, 4)))
    bound = polarjax.Polar().bind(load_adapter(model, tmp_path / "w"))[1]
    assert bound.budget.thresholds
    assert not with_density(means, 0.5).policy.learned.thresholds
    for wrong in ((1.0,), (float("nan"),) * 4):
        with pytest.raises(ValueError, match="must be 4 finite numbers"):
            save_adapter(tmp_path / "b", with_learned(adaptive, thresholds=wrong))


def test_errors(params, adaptive, means):
    with pytest.raises(ValueError, match="needs the thresholds"):
        polarjax.Adaptive().bind(params)
    with pytest.raises(ValueError, match="needs whole ones, pass a density"):
        recover(means, Texts([]), Recovery())  # before any text is read
    with pytest.raises(ValueError, match="adaptive takes no density: it goes by thre"):
        named("adaptive", 0.5)
    with pytest.raises(ValueError, match="no text"):
        sorted_scores(params, np.zeros((0, 8), np.int32))
    with pytest.raises(ValueError, match="2 budgets for 4 layers"):
        score_thresholds(np.zeros((3, 8)), (6, 3), 6)
