"""Recovery's loss beside numpy and real decoding, and its gradients."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.model import Decoder, Prefix, extend, make_decoder
from polarjax.policies import Polar, with_learned
from polarjax.policies.updates import merge_updates
from polarjax.training import distance as module
from polarjax.training.collect import observe_layers
from polarjax.training.distance import divergence
from polarjax.training.losses import head_loss, router_scores
from polarjax.training.recovery import _gradients, straight_through
from tests.models import empty_cache, random_params, read_prompts
from tests.training.mended import (
    BIASED,
    GQA,
    budgets_of,
    in_numpy,
    model,
    text,
    with_updates,
)


def unjitted(params, *args):
    """The divergence alone, of a model on one device."""
    reader = make_decoder(params.config, params.weights)
    return module.distance(reader, params, *args)[0]


distance = jax.jit(unjitted)
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
    """Prompts are read with the original weights, then come decode steps, sparse."""
    params, tokens, starts = model(config), text(3, seed=4), np.array([2, 5, 1])
    weights, bound = Polar().bind(params)
    reader = Decoder(config)
    writer = Decoder(config, score_rows=bound.wants.scores)
    cache = empty_cache(config, 3, 16)
    prompts = jnp.asarray(tokens), jnp.asarray(starts)
    cache = read_prompts(reader, params.weights, *prompts, cache).cache
    step = jax.jit(
        lambda token, live, cache, policy: extend(
            writer, weights, token, live, cache, policy=policy
        )
    )
    teacher, found = np.asarray(polarjax.logits(params, tokens)), []
    for i in range(8 - starts.min()):
        at = np.minimum(starts + i, 7)
        live = starts + i < 8
        token = jnp.asarray(tokens[range(3), at])
        logits, cache, _ = step(token, jnp.asarray(live), cache, bound)
        found.extend(kl(teacher[range(3), at], logits)[live])
    assert len(found) == 24 - starts.sum()
    ours = distance(params, jnp.asarray(tokens), jnp.asarray(starts))
    np.testing.assert_allclose(ours, np.mean(found), rtol=1e-4)


@CONFIGS
def test_distance_is_nothing_where_nothing_is_left_out(config):
    budgets = (config.kv_heads,) * config.layers
    params = random_params(config, routers=True, budgets=budgets)
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
        found = jax.jit(lambda *args: unjitted(*args))(params, tokens, starts)
        np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_gradients_are_finite_differences():
    params, tokens = model(GQA), jnp.asarray(text(2))
    starts = jnp.array([0, 3])

    @jax.jit
    def loss(routers):
        return distance(with_learned(params, routers=routers), tokens, starts)

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
    params, rng = model(GQA), np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(2, 50, 48)), jnp.float32)
    router = params.routers["layers_1"]["heads"]
    scores = np.asarray(u) @ np.asarray(router["weight"]).T + np.asarray(router["bias"])
    order = np.sort(scores, axis=-1)  # 2 of 4 are read
    read = jnp.asarray(scores >= order[..., 2:3])
    read = read.at[0, :5].set(True)  # of a prompt
    weight = rng.normal(size=read.shape)

    def total(routers, u, layer=1):
        gates = straight_through(routers, GQA, budgets_of(GQA))(layer, u, read)
        return (jnp.asarray(weight, jnp.float32) * gates).sum()

    gates = straight_through(params.routers, GQA, budgets_of(GQA))
    np.testing.assert_array_equal(gates(1, u, read), read)
    routers, inputs = jax.grad(total, (0, 1))(params.routers, u)
    distances = scores - (order[..., 1:2] + order[..., 2:3]) / 2
    soft = 1 / (1 + np.exp(-distances))
    slopes = weight * soft * (1 - soft)
    ours = routers["layers_1"]["heads"]
    np.testing.assert_allclose(ours["bias"], slopes.sum((0, 1)), atol=1e-3)
    expected = np.einsum("btk,btm->km", slopes, u)
    np.testing.assert_allclose(ours["weight"], expected, atol=1e-3)
    # The model does not feel it; nor is there anything to feel at layer 0.
    assert not inputs.any()
    np.testing.assert_array_equal(gates(0, u, read), read)
    dense = jax.grad(functools.partial(total, layer=0))(params.routers, u)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dense))


def gradients(params, **changes):
    options = {"prompts": 0.5, "routers": "slopes", "remat": False, **changes}
    return _gradients(
        params.weights,
        params.routers,
        jnp.asarray(text(4)),
        jax.random.key(0),
        model=make_decoder(params.config, params.weights),
        budgets=params.policy.learned.budgets,
        **options,
    )


def assert_close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)


def updates_of(grads):
    return {name: parts["updates"] for name, parts in grads.items()}


def test_routers_learn_where_they_choose():
    params = model(GQA, budgets=(4, 2, 4))
    plain, kept = gradients(params, routers="nothing")
    for layer in ("layers_1", "layers_2"):
        assert not any(x.any() for x in jax.tree.leaves(kept[layer]["heads"]))
    for learn in ("slopes", "bce"):
        found, grads = gradients(params, routers=learn)
        for leaf in jax.tree.leaves(grads["layers_1"]["heads"]):
            assert jnp.abs(leaf).max() > 1e-6
        assert not any(x.any() for x in jax.tree.leaves(grads["layers_2"]["heads"]))
        # What they learn is nothing to the model.
        np.testing.assert_allclose(found["kl"], plain["kl"], rtol=1e-6)
        assert_close(updates_of(grads), updates_of(kept))
    # Layers may be computed again.
    assert_close(gradients(params, routers="bce", remat=True), (found, grads))


@pytest.mark.parametrize("kind", ["bce", "ranking"])
def test_losses_are_those_of_the_routers_own_training(kind):
    params = model(GQA)
    found, grads = gradients(params, routers=kind, prompts=0.0)
    merged = merge_updates(params)
    n = dict(enumerate(budgets_of(GQA)))

    def learn(layer, inputs, norms, _):
        def loss(router):
            return head_loss(kind, router_scores(router, inputs), norms, n[layer])

        return jax.value_and_grad(loss)(merged.routers[f"layers_{layer}"]["heads"])

    start = Prefix(jnp.zeros(4, jnp.int32))
    reader, tokens = make_decoder(GQA, merged.weights), jnp.asarray(text(4))
    expected = observe_layers(reader, merged, tokens, learn, Polar(), start)
    total = sum(loss for loss, _ in expected)
    np.testing.assert_allclose(found["loss"], total / 3, rtol=1e-5)
    for layer, (_, grad) in enumerate(expected, 1):
        assert_close(grads[f"layers_{layer}"]["heads"], grad)


def test_a_share_of_the_sequences_has_a_prompt(monkeypatch):
    seen = []
    monkeypatch.setattr(
        # Not the function of the same name.
        importlib.import_module("polarjax.training.recovery"),
        "distance",
        lambda _, params, tokens, starts, *__: (
            seen.append(starts) or jnp.zeros(()),
            [],
        ),
    )
    options: dict[str, Any] = {"routers": "nothing", "remat": False}
    options |= {"model": Decoder(GQA), "budgets": budgets_of(GQA)}
    for prompts in (0.0, 0.5, 1.0):
        tokens, key = jnp.zeros((400, 16)), jax.random.key(0)
        with jax.disable_jit():
            _gradients({}, {"x": jnp.zeros(1)}, tokens, key, prompts=prompts, **options)
        starts = np.asarray(seen.pop())
        assert abs((starts > 0).mean() - prompts) < 0.1
        if prompts:
            assert set(range(1, 14)) == set(starts[starts > 0])
