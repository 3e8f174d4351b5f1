"""Neuron budgets: found on one text, held on another, beside numpy in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.policies import of_learned, with_learned
from polarjax.policies.budgets import check_neuron_budgets
from polarjax.policy import Learned
from polarjax.training.neuron_budgets import measure_unions, neuron_budgets
from polarjax.training.unions import UnionRecall
from tests.models import LLAMA, OPT, random_params
from tests.policies.reference import Model

CONFIG = dataclasses.replace(OPT, layers=3, neurons=640)
F, RANK = CONFIG.neurons, 8
BATCHES = (1, 3, 8)


def planted(seed=0, exact=True):
    """A model whose state depends on the newest token alone, and its neuron routers.

    Attention adds nothing and there are no positions. Both norms are the same, so the
    attention's input is the MLP's, and `up` has rank 8: a router of that rank that is
    made of its factors knows every neuron.
    """
    rng = np.random.default_rng(seed)
    params = random_params(CONFIG, seed, routers=True, neuron_rank=RANK)
    weights, routers = jax.tree.map(np.array, (params.weights, params.routers))
    weights["embed"]["positions"][:] = 0
    for i in range(CONFIG.layers):
        layer = weights[f"layers_{i}"]
        layer["attention"]["out"][:] = layer["attention"]["out_bias"][:] = 0
        norm = layer["attention_norm"]
        norm["scale"][:], norm["bias"][:] = 1, 4 * np.eye(CONFIG.dim)[0]
        layer["mlp_norm"] = norm
        down = rng.normal(size=(RANK, CONFIG.dim)) / np.sqrt(CONFIG.dim)
        down[0] = np.eye(CONFIG.dim)[0] / 4  # the norm's bias yields 1 here
        up = rng.normal(size=(F, RANK))
        up[:, 0] = -4  # most neurons are off
        layer["mlp"]["up"] = (up @ down).astype(np.float32)
        layer["mlp"]["up_bias"][:] = 0
        if exact and i:
            factors = {"down": down.astype(np.float32), "up": up.astype(np.float32)}
            routers[f"layers_{i}"]["neurons"] = factors
    policy = of_learned(Learned(routers))
    return jax.tree.map(jnp.asarray, polarjax.Params(weights, policy, CONFIG))


def constant_text(tokens, length=5):
    """Sequences of one repeated token: every position has the same state."""
    return np.repeat(np.asarray(tokens)[:, None], length, axis=1)


def states(params, tokens):
    """float64: scores and active neurons of tokens, both [layers - 1, n, f]."""
    model: Any = Model(params)
    scores, active = [], []
    for token in tokens:
        x, rows = model.embed(int(token), 0), []
        for layer in range(CONFIG.layers):
            u = model.layer_input(layer, x)
            if layer:
                router = model.routers[f"layers_{layer}"]["neurons"]
                up = model.weights[f"layers_{layer}"]["mlp"]["up"]
                rows.append((router["up"] @ (router["down"] @ u), up @ u > 0))
            x = model.after_mlp(layer, x)
        scores.append([z for z, _ in rows])
        active.append([a for _, a in rows])
    return np.array(scores).swapaxes(0, 1), np.array(active).swapaxes(0, 1)


NUMPY_RULES = {
    "sum": lambda z: np.maximum(z, 0).sum(0),
    "max": lambda z: z.max(0),
    "noisy_or": lambda z: np.log1p(np.exp(z)).sum(0),
}


def numpy_curve(z, active, rule):
    """Recall of the union by the best 1, 2, ... f; z and active are [b, f]."""
    union = active.any(axis=0)
    order = np.argsort(-NUMPY_RULES[rule](z), kind="stable")
    return np.cumsum(union[order]) / union.sum()


@pytest.mark.parametrize("exact", [True, False])
def test_recall_equals_numpy_where_nothing_is_left_to_chance(exact):
    """A batch of a whole part holds all its tokens; batches of one are each alone."""
    params = planted(exact=exact)
    tokens = np.random.default_rng(4).choice(CONFIG.vocab_size, 16, replace=False)
    found = measure_unions(
        params,
        constant_text(tokens),
        (1, 8),
        rules=tuple(NUMPY_RULES),
        samples=2,
        step=1,
    )
    z, active = states(params, tokens)
    assert 0.02 < active.mean() < 0.2
    np.testing.assert_array_equal(found.counts, np.arange(1, F + 1))
    for layer in range(CONFIG.layers - 1):
        parts = [slice(0, 8), slice(8, 16)]
        unions = [active[layer, part].any(0).sum() for part in parts]
        alone = active[layer].sum(axis=1).mean()
        np.testing.assert_allclose(found.union[:, layer], [alone, np.mean(unions)])
        for rule in NUMPY_RULES:
            for i, part in enumerate(parts):
                curves = found.recall[rule][i, :, layer]
                whole = numpy_curve(z[layer, part], active[layer, part], rule)
                single = np.mean(
                    [
                        numpy_curve(z[layer, j : j + 1], active[layer, j : j + 1], rule)
                        for j in range(part.start, part.stop)
                    ],
                    axis=0,
                )
                np.testing.assert_allclose(curves[0], single, atol=2e-3)
                np.testing.assert_allclose(curves[1], whole, atol=2e-3)
        if exact:  # the true size is enough for a router that knows all
            for i, size in enumerate(unions):
                assert found.recall["sum"][i, 1, layer, size - 1] > 0.999


def test_batches_are_of_different_sequences_and_tokens_of_a_text():
    """Between one and all, the union's size is that of random sets without repeats."""
    params = planted()
    tokens = np.random.default_rng(5).choice(CONFIG.vocab_size, 8, replace=False)
    text = constant_text(np.concatenate([tokens, tokens]))
    found = measure_unions(params, text, BATCHES, samples=200)
    _, active = states(params, tokens)
    expected = np.mean(
        [
            active[:, [i, j, k]].any(axis=1).sum(axis=-1)
            for i in range(8)
            for j in range(i)
            for k in range(j)
        ],
        axis=0,
    )
    np.testing.assert_allclose(found.union[1], expected, rtol=0.02)
    again = measure_unions(params, text, BATCHES, samples=200)
    np.testing.assert_array_equal(again.recall["noisy_or"], found.recall["noisy_or"])


def test_the_first_position_is_never_drawn():
    params = planted()
    text = constant_text(np.arange(16))
    text[:, 0] = 300  # the same state everywhere, if it were seen
    whole = measure_unions(params, text, (8,), samples=50)
    rest = measure_unions(params, text[:, 1:], (8,), samples=50, seed=9)
    np.testing.assert_allclose(whole.union, rest.union)


def test_budgets_hold_on_other_text():
    """99 % of the true union on text that the budgets were not made from."""
    params = planted()
    rng = np.random.default_rng(6)
    blocks, held_out = (rng.integers(CONFIG.vocab_size, size=(64, 9)) for _ in "ab")
    budgets, found = neuron_budgets(params, blocks, BATCHES, held_out=held_out)
    assert [b for b, _ in budgets] == list(BATCHES)
    check_neuron_budgets(CONFIG, Learned(neuron_budgets=budgets))
    kept = np.array([counts for _, counts in budgets])
    assert (kept[:, 0] == F).all() and (kept[:, 1:] % 128 == 0).all()
    assert (found.reached(budgets) >= 0.99).all()
    # No more than it takes: a step less misses, up to the margin.
    less = tuple((b, tuple(n - 128 for n in counts)) for b, counts in budgets)
    assert (found.reached(less) < 0.998).all() and kept[:, 1:].max() < F
    assert (np.diff(found.union, axis=0) > 0).all()
    # A router that knows nothing needs next to all.
    blind = planted(exact=False)
    worse, _ = neuron_budgets(blind, blocks, BATCHES, held_out=held_out)
    assert (np.array([c for _, c in worse])[:, 1:] >= kept[:, 1:] + 128).all()


def test_updates_of_a_recovery_count():
    params = planted()
    text = constant_text(np.arange(16))
    plain = measure_unions(params, text, (8,))
    routers = dict(params.routers)
    # The delta of a bias turns every neuron of layer 1 on.
    updates = {"mlp": {"up_bias": {"delta": jnp.full(F, 1e3)}}}
    routers["layers_1"] = {**routers["layers_1"], "updates": updates}
    changed = measure_unions(with_learned(params, routers=routers), text, (8,))
    assert changed.union[0, 0] == F and plain.union[0, 0] < F / 2


def recalls(*parts, rule="noisy_or"):
    """One batch size, one layer, counts 128, 256, 300."""
    values = np.array(parts)[:, None, None]
    return UnionRecall((4,), np.array([128, 256, 300]), {rule: values}, np.ones((1, 1)))


def test_the_margin_by_hand():
    # Means 0.97, 0.992, 1; the second's deviation is 0.002 sqrt(2), and sqrt(1 + 1 / 2)
    # as much for one more part.
    found = recalls([0.97, 0.990, 1], [0.97, 0.994, 1])
    assert found.budgets(0.97) == ((4, (300, 128)),)
    assert found.budgets(0.99, 0.5) == ((4, (300, 256)),)
    # Student's quantile with one degree of freedom: 1 / sqrt(3) at two thirds.
    assert found.budgets(0.99, 0.66) == ((4, (300, 256)),)
    assert found.budgets(0.99, 0.67) == ((4, (300, 300)),)
    assert found.budgets(1.0) == ((4, (300, 300)),)
    for bad in ((0.0, 0.9), (1.1, 0.9), (0.9, 0.4), (0.9, 1.0), (float("nan"), 0.9)):
        with pytest.raises(ValueError, match="recall"):
            found.budgets(*bad)


def test_reached_recall_by_hand():
    found = recalls([0.9, 0.98, 1], [0.7, 0.96, 1])
    for kept, expected in ((128, 0.8), (255, 0.8), (256, 0.97), (300, 1), (100, 0)):
        np.testing.assert_allclose(found.reached(((4, (300, kept)),)), [[expected]])


def test_errors():
    text = np.zeros((16, 4), np.int32)
    params = planted()

    def refused(match, *args, **settings):
        with pytest.raises(ValueError, match=match):
            measure_unions(*args, **settings)

    refused("ReLU", random_params(LLAMA, routers=True), text, (8,))
    refused("no neuron router for layer 1", random_params(CONFIG), text, (8,))
    refused("at least 18 sequences", params, text, (9,))
    refused("shape .16, 1.", params, text[:, :1], (8,))
    for batches in ((), (0, 8), (8, 1), (2, 2)):
        refused("ascending", params, text, batches)
    refused("no rules .'mean'.", params, text, (8,), rules=("mean",))
    refused("samples .0.", params, text, (8,), samples=0)
    single = dataclasses.replace(CONFIG, layers=1)
    refused("one layer", random_params(single), text, (8,))
