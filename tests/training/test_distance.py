"""Recovery's loss beside numpy and real decoding, and its gradients."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.model import Decoder, run
from polarjax.policy import groups_read
from polarjax.sparsity import Polar
from polarjax.training import divergence
from polarjax.training.recover import _gradients, straight_through
from tests.models import random_params
from tests.training.mended import BIASED, GQA, in_numpy, model, text, with_updates

# Not the function of the same name.
module = importlib.import_module("polarjax.training.recover")
distance = jax.jit(module.distance)
CONFIGS = pytest.mark.parametrize("config", [GQA, BIASED], ids=["gqa", "opt"])


def kl(teacher, student):
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in
            (np.asarray(teacher, float), np.asarray(student, float)))  # fmt: skip
    return (np.exp(p) * (p - q)).sum(axis=-1)


@CONFIGS
@pytest.mark.parametrize("starts", [[0, 0], [0, 3], [7, 1]])
def test_distance_is_what_numpy_finds(config, starts):
    params, tokens = model(config), text(2)
    found = np.concatenate(
        [
            kl(in_numpy(params, row, 8), in_numpy(params, row, start))[start:]
            for row, start in zip(tokens, starts, strict=True)
        ]
    )
    ours = distance(params, jnp.asarray(tokens), jnp.array(starts))
    assert found.mean() > 0.01
    np.testing.assert_allclose(ours, found.mean(), rtol=1e-3)
    if not any(starts):
        measured = divergence(params, np.concatenate([tokens, tokens]), batch=2)
        np.testing.assert_allclose(measured, found.mean(), rtol=1e-3)


@CONFIGS
def test_distance_is_that_of_decoding(config):
    """Prompts by `prefill` with the original weights, then decode steps, sparse."""
    params, tokens, starts = model(config), text(3, seed=4), np.array([2, 5, 1])
    weights, bound = Polar().bind(params, 3)
    reader = Decoder(config)
    writer = Decoder(config, score_rows=bound.score_rows)
    args = jnp.asarray(tokens), jnp.asarray(starts), 16
    _, cache = run(reader, params.weights, "prefill", *args)
    step = jax.jit(lambda *args: run(writer, weights, "decode", *args))
    teacher, found = np.asarray(polarjax.logits(params, tokens)), []
    for i in range(8 - starts.min()):
        at = np.minimum(starts + i, 7)
        live = starts + i < 8
        logits, cache, _ = step(
            jnp.asarray(tokens[range(3), at]), cache, bound, jnp.asarray(live)
        )
        found.extend(kl(teacher[range(3), at], logits)[live])
    assert len(found) == 24 - starts.sum()
    ours = distance(params, jnp.asarray(tokens), jnp.asarray(starts))
    np.testing.assert_allclose(ours, np.mean(found), rtol=1e-4)


@CONFIGS
def test_distance_is_nothing_where_nothing_is_left_out(config):
    budgets = (config.kv_heads,) * config.layers
    params = random_params(dataclasses.replace(config, budgets=budgets), routers=True)
    tokens = jnp.asarray(text(2))
    assert abs(distance(params, tokens, jnp.array([0, 3]))) < 1e-5
    changed = with_updates(params, scale=0.1)
    assert distance(changed, tokens, jnp.array([0, 3])) > 0.01


def test_distance_is_the_same_in_parts(monkeypatch):
    params, tokens = model(GQA), jnp.asarray(text(2))
    starts = jnp.array([0, 3])
    whole = distance(params, tokens, starts)
    for positions in (1, 6):  # of which 2 and 4 divide the text
        monkeypatch.setattr(module, "_POSITIONS", positions)
        found = jax.jit(lambda *args: module.distance(*args))(params, tokens, starts)
        np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_gradients_are_finite_differences():
    params, tokens = model(GQA), jnp.asarray(text(2))
    starts = jnp.array([0, 3])

    @jax.jit
    def loss(routers):
        return distance(dataclasses.replace(params, routers=routers), tokens, starts)

    grads = jax.grad(loss)(params.routers)
    for layer, part, name, kind in (
        ("layers_0", "attention", "qkv", "b"),
        ("layers_1", "attention", "out", "a"),
        ("layers_2", "mlp", "down", "b"),
        ("layers_2", "mlp_norm", "scale", "delta"),
    ):
        grad = np.asarray(grads[layer]["updates"][part][name][kind])
        place = np.unravel_index(np.abs(grad).argmax(), grad.shape)

        def moved(by, at=(layer, part, name, kind), place=place):
            def edit(path, leaf):
                keys = tuple(key.key for key in path)
                here = keys == (at[0], "updates", *at[1:])
                return leaf.at[place].add(by) if here else leaf

            return float(loss(jax.tree_util.tree_map_with_path(edit, params.routers)))

        slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
        np.testing.assert_allclose(slope, grad[place], rtol=2e-2)


def test_gates_are_the_choice_with_the_slope_of_a_sigmoid():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(3 * rng.normal(size=(2, 50, 7)), jnp.float32)  # 4 of heads
    counts = jnp.full(2, 2)
    read = jax.vmap(
        lambda s: groups_read((jax.lax.top_k(s[:, :4], 2)[1], counts), 2, 4), 1, 1
    )(scores)
    read = read.at[0, :5].set(True)  # of a prompt
    weight = jnp.asarray(rng.normal(size=read.shape), jnp.float32)
    gates = straight_through((4, 2))
    np.testing.assert_array_equal(gates(1, scores, read), read)
    slopes = jax.grad(lambda s: (weight * gates(1, s, read)).sum())(scores)
    order = np.sort(scores[..., :4], axis=-1)
    distances = scores[..., :4] - (order[..., 1:2] + order[..., 2:3]) / 2
    soft = 1 / (1 + np.exp(-distances))
    expected = weight * soft * (1 - soft)
    np.testing.assert_allclose(slopes[..., :4], expected, atol=1e-5)
    assert not slopes[..., 4:].any()
    # All groups, or no router: nothing to learn.
    slopes = jax.grad(lambda s: (weight * gates(0, s, read)).sum())(scores)
    assert not slopes.any()
    np.testing.assert_array_equal(gates(1, None, read), read)


def gradients(params, **changes):
    options = {"prompts": 0.5, "straight": True, "remat": False, **changes}
    return _gradients(
        *(params.weights, params.routers, jnp.asarray(text(4)), jax.random.key(0)),
        config=params.config,
        **options,
    )


def test_routers_learn_where_they_choose():
    params = model(dataclasses.replace(GQA, budgets=(4, 2, 4)))
    loss, grads = gradients(params)
    for leaf in jax.tree.leaves(grads["layers_1"]["heads"]):
        assert jnp.abs(leaf).max() > 1e-6
    assert not any(x.any() for x in jax.tree.leaves(grads["layers_2"]["heads"]))
    same, kept = gradients(params, straight=False)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    assert not any(x.any() for x in jax.tree.leaves(kept["layers_1"]["heads"]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        *(kept["layers_2"]["updates"], grads["layers_2"]["updates"]),
    )
    again, remade = gradients(params, remat=True)
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, remade
    )


def test_a_share_of_the_sequences_has_a_prompt(monkeypatch):
    seen = []
    monkeypatch.setattr(
        *(module, "distance"),
        lambda params, tokens, starts, *_: seen.append(starts) or jnp.zeros(()),
    )
    options = {"config": GQA, "straight": False, "remat": False}
    for prompts in (0.0, 0.5, 1.0):
        tokens, key = jnp.zeros((400, 16)), jax.random.key(0)
        with jax.disable_jit():
            _gradients({}, {"x": jnp.zeros(1)}, tokens, key, prompts=prompts, **options)
        starts = np.asarray(seen.pop())
        assert abs((starts > 0).mean() - prompts) < 0.1
        if prompts:
            assert set(range(1, 14)) == set(starts[starts > 0])
