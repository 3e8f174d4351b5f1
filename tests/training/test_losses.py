"""What head routers minimise and are judged by, beside numpy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.training.collect import top_labels
from polarjax.training.losses import (
    kept_norm,
    ranking_loss,
    recall,
    router_scores,
    weighted_bce,
)


def draw(n=50, k=4, share=0.3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, k)), (rng.random((n, k)) < share).astype(float)


def as_jax(*arrays):
    return (jnp.asarray(x, jnp.float32) for x in arrays)


def test_the_paper_loss():
    scores, labels = draw()
    w = labels.mean()
    p = 1 / (1 + np.exp(-scores))
    entropy = -labels * np.log(p) - (1 - labels) * np.log(1 - p)
    expected = ((labels * (1 - w) + w) * entropy).mean()
    ours = weighted_bce(*as_jax(scores, labels))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.0, 1.0])
def test_ranking_loss_is_over_pairs(share):
    scores, labels = draw(share=share)
    costs = [
        np.log1p(np.exp(row[j] - row[i]))
        for row, label in zip(scores, labels, strict=True)
        for i, j in itertools.product(range(4), repeat=2)
        if label[i] and not label[j]
    ]
    ours = ranking_loss(*as_jax(scores, labels))
    np.testing.assert_allclose(ours, np.mean(costs) if costs else 0, rtol=1e-5)


def test_labels_and_recall():
    ranking = jnp.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    np.testing.assert_array_equal(top_labels(ranking, 2), [[1, 0, 1], [0, 1, 1]])
    other = jnp.array([[0.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    assert recall(other, top_labels(ranking, 2), 2) == 0.75
    assert recall(ranking, top_labels(ranking, 2), 2) == 1


def test_the_norm_that_is_kept():
    scores, _ = draw(n=6)
    norms = np.random.default_rng(1).random((6, 4))
    for n in (1, 3, 4):
        best = np.argsort(-scores, axis=1)[:, :n]
        shares = np.take_along_axis(norms, best, 1).sum(1) / norms.sum(1)
        ours = kept_norm(*as_jax(scores, norms), n)
        np.testing.assert_allclose(ours, shares.mean(), rtol=1e-6)
    assert kept_norm(*as_jax(scores, np.zeros((6, 4))), 2) == 0


def test_a_router_is_one_linear_layer():
    rng = np.random.default_rng(2)
    weight, bias, u = (rng.normal(size=s) for s in ((4, 9), (4,), (7, 9)))
    w, b, inputs = as_jax(weight, bias, u)
    ours = router_scores({"weight": w, "bias": b}, inputs)
    np.testing.assert_allclose(ours, u @ weight.T + bias, rtol=1e-4, atol=1e-5)
