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


@pytest.mark.parametrize("n", [1, 3, 4])
def test_ranking_loss_is_of_norm_lost(n):
    scores, _ = draw()
    norms = np.random.default_rng(1).random(scores.shape)
    costs = 0.0
    for row, norm in zip(scores, norms, strict=True):
        order = np.argsort(-norm)
        costs += sum(
            (norm[i] - norm[j]) * np.log1p(np.exp(row[j] - row[i]))
            for i, j in itertools.product(order[:n], order[n:])
        ) / sum(norm)
    ours = ranking_loss(*as_jax(scores, norms), n)
    np.testing.assert_allclose(ours, costs / 50, rtol=1e-5)
    assert ranking_loss(*as_jax(scores, np.zeros_like(norms)), n) == 0


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


def test_a_router_is_a_linear_layer_and_a_quadratic_form():
    rng = np.random.default_rng(2)
    weight, bias, u = (rng.normal(size=s) for s in ((4, 9), (4,), (7, 9)))
    w, b, inputs = as_jax(weight, bias, u)
    ours = router_scores({"weight": w, "bias": b}, inputs)
    linear = u @ weight.T + bias
    np.testing.assert_allclose(ours, linear, rtol=1e-4, atol=1e-5)
    down, up = rng.normal(size=(5, 9)), rng.normal(size=(4, 5))
    router = dict(zip(("down", "up"), as_jax(down, up), strict=True))
    ours = router_scores({"weight": w, "bias": b, **router}, inputs)
    expected = linear + (u @ down.T) ** 2 @ up.T
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
