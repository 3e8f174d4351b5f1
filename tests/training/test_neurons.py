"""Neuron labels, scores and loss, beside plain numpy in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.model import Decoder, whole
from polarjax.training.neurons import (
    active_neurons,
    init_low_rank,
    neuron_loss,
    neuron_scores,
)
from tests.models import LLAMA, OPT, random_params
from tests.policies.reference import Model
from tests.training.unions import union_recall

GATED = dataclasses.replace(LLAMA, activation="relu")
TOKENS = np.random.default_rng(5).integers(OPT.vocab_size, size=(3, 7))


def observed(params):
    """What a layer is shown: (u, o, v) by layer."""
    model = Decoder(params.config)
    tokens = jnp.asarray(TOKENS)
    return whole(model, params.weights, tokens, observe=lambda i, *seen: seen).observed


@pytest.mark.parametrize(
    "config",
    [OPT, GATED, dataclasses.replace(GATED, mlp_bias=True)],
    ids=["plain", "gated", "gated-biases"],
)
def test_labels_are_the_neurons_that_the_reference_computes(config):
    """A neuron is active where the dense model's own arithmetic is above zero."""
    params = random_params(config)
    reference: Any = Model(params)
    seen = observed(params)
    caches = [[] for _ in range(config.layers)]
    share = []
    for t, token in enumerate(TOKENS[0]):
        x = reference.embed(int(token), t)
        for layer in range(config.layers):
            u, _, v = (part[0, t] for part in seen[layer])
            expected = reference.layer_input(layer, x)
            np.testing.assert_allclose(u, expected, atol=2e-3)
            heads = reference.head_outputs(layer, expected, caches[layer])
            y = reference.after_attention(layer, x, heads)
            weights = reference.weights[f"layers_{layer}"]
            z = reference._norm(y, weights["mlp_norm"])
            np.testing.assert_allclose(v, z, atol=2e-3)
            mlp = weights["mlp"]
            rows = mlp["gate" if config.gated_mlp else "up"]
            bias = "gate_bias" if config.gated_mlp else "up_bias"
            hidden = rows @ z + mlp.get(bias, 0)
            ours = active_neurons(params.weights[f"layers_{layer}"]["mlp"], v[None])[0]
            clear = np.abs(hidden) > 1e-2  # else float32 may decide otherwise
            np.testing.assert_array_equal(ours[clear], hidden[clear] > 0)
            share.append(ours.mean())
            x = reference.after_mlp(layer, y)
    assert 0.2 < np.mean(share) < 0.8


def test_labels_are_in_the_models_own_dtype():
    mlp = random_params(OPT).weights["layers_1"]["mlp"]
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mlp)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(9, OPT.dim)), jnp.bfloat16)
    ours = active_neurons(low, v.astype(jnp.float32))
    np.testing.assert_array_equal(ours, active_neurons(low, v))
    assert ours.dtype == bool and ours.shape == (9, OPT.neurons)


def test_scores_and_loss_are_the_papers():
    rng = np.random.default_rng(1)
    down, up, u = (rng.normal(size=s) for s in ((5, 16), (40, 5), (30, 16)))
    active = rng.random((30, 40)) < 0.1
    z = u @ down.T @ up.T
    router = {
        "down": jnp.asarray(down, jnp.float32),
        "up": jnp.asarray(up, jnp.float32),
    }
    inputs = jnp.asarray(u, jnp.float32)
    np.testing.assert_allclose(neuron_scores(router, inputs), z, rtol=1e-4, atol=1e-4)
    w = active.mean() + 0.005
    y = active.astype(float)
    entropy = y * np.log1p(np.exp(-z)) + (1 - y) * np.log1p(np.exp(z))
    expected = ((y * (1 - w) + w) * entropy).mean()
    loss = neuron_loss(router, inputs, jnp.asarray(active))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_fresh_router_scores_nothing_and_learns():
    router = init_low_rank(jax.random.key(0), 6, 300, 40)
    assert router["down"].shape == (6, 300) and router["up"].shape == (40, 6)
    rng = np.random.default_rng(2)
    u = jnp.asarray(rng.normal(size=(50, 300)), jnp.float32)
    assert not neuron_scores(router, u).any()
    hidden = u @ router["down"].T
    assert 0.8 < hidden.std() < 1.25
    active = jnp.asarray(rng.random((50, 40)) < 0.3)
    grads = jax.grad(neuron_loss)(router, u, active)
    assert jnp.abs(grads["up"]).max() > 0


def test_union_recall_by_hand():
    # Two batches of two tokens and five neurons.
    scores = [
        [[3.0, -9.0, 1.0, 0.0, -1.0], [-5.0, 2.0, 1.5, 0.0, -1.0]],  # 3, 2, 2.5, 0, 0
        [[0.0, 0.0, 0.0, 0.0, 4.0], [1.0, 0.0, 0.0, 0.0, -8.0]],  # 1, 0, 0, 0, 4
    ]
    active = [
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]],  # union 0, 1, 4
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],  # union 4
    ]
    # Ranked 0, 2, 1, 3, 4 and 4, 0, 1, 2, 3: negative scores take nothing away.
    args = jnp.array(scores), jnp.array(active, bool)
    first = [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]
    for n, recall in enumerate(first, 1):
        np.testing.assert_allclose(union_recall(*args, n), (recall + 1) / 2, rtol=1e-6)
    # A batch in which nothing is active misses nothing.
    assert union_recall(jnp.zeros((1, 2, 5)), jnp.zeros((1, 2, 5), bool), 1) == 1


def test_union_recall_beside_the_selection_of_the_decode_step():
    from pallas_kernels import union_neurons

    rng = np.random.default_rng(3)
    scores = rng.normal(size=(6, 4, 30)).astype(np.float32)
    active = rng.random((6, 4, 30)) < 0.2
    for n in (1, 7, 29):
        expected = []
        for z, a in zip(scores, active, strict=True):
            kept = union_neurons(jnp.asarray(z), jnp.ones(4, bool), n)
            expected.append(a.any(0)[np.asarray(kept)].sum() / a.any(0).sum())
        ours = union_recall(jnp.asarray(scores), jnp.asarray(active), n)
        np.testing.assert_allclose(ours, np.mean(expected), rtol=1e-6)
