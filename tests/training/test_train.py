import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.evaluation import router_recall
from polarjax.model.attention import head_norms
from polarjax.training import RouterTraining, train_routers
from polarjax.training.collect import observe_heads, top_labels
from polarjax.training.losses import recall, weighted_bce
from tests.models import LLAMA, MHA, OPT, random_params


def batches(config, count, shape=(2, 32), seed=0, ids=None):
    rng = np.random.default_rng(seed)
    return [rng.integers(ids or config.vocab_size, size=shape) for _ in range(count)]


def test_loss_is_the_papers():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 4))
    labels = (rng.random((50, 4)) < 0.3).astype(float)
    w = labels.mean()
    p = 1 / (1 + np.exp(-scores))
    entropy = -labels * np.log(p) - (1 - labels) * np.log(1 - p)
    expected = ((labels * (1 - w) + w) * entropy).mean()
    ours = weighted_bce(
        jnp.asarray(scores, jnp.float32), jnp.asarray(labels, jnp.float32)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_labels_and_recall():
    ranking = jnp.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    np.testing.assert_array_equal(top_labels(ranking, 2), [[1, 0, 1], [0, 1, 1]])
    other = jnp.array([[0.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    assert recall(other, top_labels(ranking, 2), 2) == 0.75
    assert recall(ranking, top_labels(ranking, 2), 2) == 1


@pytest.mark.parametrize("config", [LLAMA, MHA, OPT], ids=["llama", "mha", "opt"])
def test_collected_norms_are_what_the_oracle_sees_when_decoding(config):
    """Labels from whole sequences equal norms of the decode step at each position."""
    params = random_params(config)
    tokens = batches(config, 1, (2, 9))[0]
    collected = observe_heads(
        params.weights, jnp.asarray(tokens), lambda i, u, norms: norms, config=config
    )
    model = polarjax.model.Decoder(config)
    variables = {"params": params.weights}
    _, cache = model.apply(
        variables, tokens[:, :1], jnp.ones(2, jnp.int32), 16, method="prefill"
    )

    @dataclasses.dataclass(frozen=True)
    class Spy(polarjax.Dense):
        wants_norms = True

        def heads(self, layer, scores, norms, implementation=None):
            seen.append(norms)

    for t in range(1, 9):
        seen = []
        _, cache, _ = model.apply(
            variables, tokens[:, t], cache, Spy(), method="decode"
        )
        for layer in range(1, config.layers):
            expected = collected[layer - 1].reshape(2, 9, -1)[:, t]
            np.testing.assert_allclose(seen[layer], expected, rtol=2e-4)


def test_norm_of_a_group_spans_its_heads():
    o = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    expected = np.linalg.norm(o.reshape(3, 2, 15), axis=-1)
    np.testing.assert_allclose(head_norms(jnp.asarray(o), 2), expected, rtol=1e-6)


def test_training_beats_chance_and_is_deterministic():
    params = random_params(MHA)
    training = RouterTraining(density=0.5, steps=80)

    def few_words(count, seed=0):  # so few that a linear router can tell them apart
        return batches(MHA, count, (32, 3), seed, ids=5)

    steps = []
    trained = train_routers(params, few_words(80), training, steps.append)
    assert [p.step for p in steps] == list(range(1, 81))
    found, chance = router_recall(trained, few_words(4, seed=9))
    assert found.shape == chance.shape == (MHA.layers - 1,)
    assert abs(chance.mean() - 0.5) < 0.05
    assert found.mean() > chance.mean() + 0.25
    assert steps[-1].loss < steps[0].loss
    again = train_routers(params, few_words(80), training)
    jax.tree.map(np.testing.assert_array_equal, trained.routers, again.routers)
    assert trained.config.budgets == (6, 3, 3, 3)
    # What was trained is used as it is: shapes are checked where it is bound.
    out = polarjax.generate(trained, [[1, 2, 3]], max_new_tokens=4)
    assert out.stats.policy == "Polar"
    assert out.stats.density == (1.0, 0.5, 0.5, 0.5)


def test_errors():
    params = random_params(LLAMA)
    with pytest.raises(ValueError, match="nothing for a router to choose"):
        train_routers(params, [], RouterTraining(density=1.0, steps=1))
    with pytest.raises(ValueError, match="ended after 2 of 3"):
        train_routers(params, batches(LLAMA, 2), RouterTraining(density=0.5, steps=3))
    for density in (0, -1, 1.5, float("nan"), "half"):
        with pytest.raises(ValueError, match="density must be a number above 0"):
            RouterTraining(density=density, steps=1)
    with pytest.raises(ValueError, match="steps must be"):
        RouterTraining(density=0.5, steps=0)
    with pytest.raises(ValueError, match="no routers"):
        router_recall(params, batches(LLAMA, 1))
