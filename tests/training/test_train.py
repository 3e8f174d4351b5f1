import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.evaluation import router_recall
from polarjax.mesh.cut import make_mesh, shard, whole_routers
from polarjax.model import Decoder, Prefix, extend, make_decoder
from polarjax.model.attention import head_norms
from polarjax.policies import load_adapter, save_adapter
from polarjax.training import Resume, RouterTraining, train_routers
from polarjax.training.collect import observe_heads, observe_layers
from polarjax.training.neuron_budgets import measure_unions
from polarjax.training.neurons import active_neurons, neuron_scores
from polarjax.training.thresholds import sorted_scores
from tests.models import LLAMA, MHA, OPT, empty_cache, random_params
from tests.training.unions import union_recall

SMALL = dataclasses.replace(MHA, layers=3)
# Three devices have 2 query heads each, and parts of 2 KV groups.
LLAMA_3 = dataclasses.replace(SMALL, kv_heads=2, neurons=72)


def text(config, blocks, length=3, seed=0, words=5):
    """So few words that a linear router can tell them apart."""
    rng = np.random.default_rng(seed)
    return rng.integers(words or config.vocab_size, size=(blocks, length))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, atol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), one, other
    )


class _Spy(polarjax.Policy):
    """Sees the true norms where another policy chooses."""

    def __init__(self, bound, norms):
        self.wants = dataclasses.replace(bound.wants, norms=True)
        self.bound, self.norms = bound, norms

    def groups(self, layer, seen, pick):
        self.norms[layer] = seen.norms
        return self.bound.groups(layer, seen, pick)


def decoded(params, tokens, policy):
    """By step and layer, norms of head outputs when each token is decoded."""
    config, (b, t) = params.config, tokens.shape
    weights, bound = policy.bind(params)
    model = Decoder(config, score_rows=bound.wants.scores)
    cache = empty_cache(config, b, 16)
    live, found = jnp.ones(b, bool), []
    for i in range(t):
        seen = {}
        token, spy = tokens[:, i], _Spy(bound, seen)
        cache = extend(model, weights, token, live, cache, policy=spy).cache
        found.append([seen[layer] for layer in range(1, config.layers)])
    return found


@pytest.mark.parametrize("config", [LLAMA, MHA, OPT], ids=["llama", "mha", "opt"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_collected_norms_are_what_decoding_has(config, sparse):
    """Labels from whole sequences equal norms of the decode step at each position."""
    n = 2 if sparse else config.kv_heads
    budgets = (config.kv_heads, n, n)
    config = dataclasses.replace(config, layers=3)
    params = random_params(config, routers=True, budgets=budgets)
    tokens = jnp.asarray(text(config, 2, 4, words=None))
    policy = polarjax.Polar()
    learn = lambda layer, inputs, norms, after: norms  # noqa: E731
    prefix = Prefix(jnp.zeros(2, jnp.int32)) if sparse else None
    model = make_decoder(config, params.weights)
    collected = observe_layers(model, params, tokens, learn, policy, prefix)
    expected = np.array(decoded(params, tokens, policy))  # [t, layers - 1, b, k]
    ours = np.array(collected).reshape(-1, 2, 4, config.kv_heads)
    np.testing.assert_allclose(ours, expected.transpose(1, 2, 0, 3), rtol=5e-4)
    dense = observe_heads(model, params.weights, tokens, lambda *seen: seen[2])
    assert np.allclose(collected, dense, rtol=1e-2) == (not sparse)


def test_norm_of_a_group_spans_its_heads():
    o = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    expected = np.linalg.norm(o.reshape(3, 2, 15), axis=-1)
    np.testing.assert_allclose(head_norms(jnp.asarray(o), 2), expected, rtol=1e-6)


@pytest.mark.parametrize(("loss", "rank"), [("bce", 0), ("ranking", 0), ("bce", 32)])
def test_training_beats_chance(loss, rank):
    params = random_params(MHA)
    training = RouterTraining(0.5, steps=60, batch=32, loss=loss, head_rank=rank)
    told = []
    blocks = text(MHA, 1920)
    trained = train_routers(params, blocks, training, progress=told.append)
    recall = router_recall(trained, [text(MHA, 128, seed=9)])
    assert recall.routers.shape == recall.chance.shape == (MHA.layers - 1,)
    assert abs(recall.chance.mean() - 0.5) < 0.05
    assert recall.mean > recall.chance.mean() + (0.41 if rank else 0.2)
    assert (recall.kept > recall.routers / 2).all()
    first, last = (told[i].metrics for i in (0, -1))
    assert set(first) == {"loss", "recall", "kept"}
    assert last["loss"] < first["loss"] and last["recall"] > 0.7
    assert trained.policy.learned.budgets == (6, 3, 3, 3)
    # What was trained is used as it is: shapes are checked where it is bound.
    out = polarjax.generate(trained, [[1, 2, 3]], max_new_tokens=4)
    assert out.stats.policy == "Polar"
    assert out.stats.density == (1.0, 0.5, 0.5, 0.5)
    assert not params.routers


TRAINING = RouterTraining(density=0.5, steps=6, batch=4, sparse=0.5, seed=1)


@functools.cache
def trained_small(tp=None, dp=None, config=SMALL, **changes):
    """Routers of a short training, by its settings."""
    training = dataclasses.replace(TRAINING, **changes)
    blocks, params = text(config, 20, 8), random_params(config)
    params = shard(params, make_mesh(tp, dp)) if tp else params
    return whole_routers(train_routers(params, blocks, training))


def test_the_seed_decides():
    blocks = text(SMALL, 20, 8)
    again = train_routers(random_params(SMALL), blocks, TRAINING).routers
    assert_equal(again, trained_small())
    changes = {"seed": 2}, {"sparse": 0.0}, {"loss": "ranking"}, {"head_rank": 4}
    for change in changes:
        changed = trained_small(**change)["layers_2"]["heads"]["weight"]
        assert not np.allclose(changed, again["layers_2"]["heads"]["weight"])
    # A share so small that none is read sparsely.
    assert_close(trained_small(sparse=1e-9), trained_small(sparse=0.0))


def test_each_step_reads_from_other_positions():
    kept = {}
    for sparse in (0.0, 1.0):
        still = dataclasses.replace(TRAINING, sparse=sparse, learning_rate=0.0)
        told = []
        blocks = np.repeat(text(SMALL, 1, 8), 4, axis=0)
        train_routers(random_params(SMALL), blocks, still, progress=told.append)
        kept[sparse] = {round(now.metrics["kept"], 6) for now in told}
    assert len(kept[0.0]) == 1 and len(kept[1.0]) > 3


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_training_ends_as_an_unbroken_one(tmp_path, at):
    params, blocks = random_params(SMALL), text(SMALL, 20, 8)
    resume, told = Resume(tmp_path / "work", every=2), []

    def progress(now):
        told.append(now.step)
        if now.step == at and len(told) == at:
            raise KeyboardInterrupt

    def run():
        return train_routers(params, blocks, TRAINING, resume=resume, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert_equal(run().routers, trained_small())
    assert told[at:] == list(range((at - 1) // 2 * 2 + 1, 7))


NEURONS = {"config": dataclasses.replace(OPT, layers=3), "neuron_rank": 4}


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 2), {}),
        ((2, 2), NEURONS),
        pytest.param((2, 2), {"head_rank": 4}, marks=pytest.mark.slow),
        pytest.param((1, 4), NEURONS, marks=pytest.mark.slow),
        pytest.param((2, 2), {"loss": "ranking"}, marks=pytest.mark.slow),
        pytest.param((3, 1), {"config": LLAMA_3}, marks=pytest.mark.slow),
    ],
)
def test_devices_share_a_training(shape, changes):
    """Two that share each batch, and two that share the model."""
    assert_close(trained_small(*shape, **changes), trained_small(**changes))


@pytest.mark.devices(4)
def test_a_training_serves_where_it_was_and_elsewhere(tmp_path):
    """On a mesh and, by way of an adapter, on one device; interrupted in between."""
    config = dataclasses.replace(OPT, layers=3, model_hash="abc")
    blocks, single = text(config, 20, 8), random_params(config)
    training = dataclasses.replace(TRAINING, neuron_rank=4)
    params = shard(single, make_mesh(2, 2))
    resume, asked = Resume(tmp_path / "work", every=2), []

    def interrupt(now):
        if now.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_routers(single, blocks, training, resume=resume, progress=interrupt)

    def stop(model, step):
        asked.append(router_recall(model, [blocks]).mean)
        return False

    trained = train_routers(params, blocks, training, resume=resume, stop=stop)
    assert trained.weights is params.weights and len(asked) == 5
    there = router_recall(trained, [blocks])
    assert asked[-1] == there.mean
    save_adapter(tmp_path / "adapter", trained)
    loaded = load_adapter(single, tmp_path / "adapter")
    here = router_recall(loaded, [blocks])
    np.testing.assert_allclose(there.routers, here.routers, atol=0.01)
    scores = (sorted_scores(x, blocks[:4]) for x in (loaded, trained))
    np.testing.assert_allclose(*scores, atol=1e-4)
    unions = [measure_unions(x, blocks, (1, 4)) for x in (loaded, trained)]
    np.testing.assert_allclose(unions[0].union, unions[1].union)
    np.testing.assert_allclose(
        *(found.recall["noisy_or"] for found in unions), atol=0.05
    )
    tokens = [
        polarjax.generate(x, [[1, 2, 3]], max_new_tokens=4).tokens
        for x in (loaded, trained)
    ]
    assert tokens[0] == tokens[1]


def test_neuron_routers_are_trained_along():
    """Recall of the union of a batch of 4, with a third of the neurons."""
    config = dataclasses.replace(OPT, layers=3, neurons=96)
    params = random_params(config)
    for i in (1, 2):  # most neurons are off
        params.weights[f"layers_{i}"]["mlp"]["up_bias"] -= 1.5
    training = RouterTraining(
        density=0.5,
        steps=60,
        batch=32,
        sparse=0.5,
        neuron_rank=12,
        neuron_learning_rate=2e-2,
    )
    told = []
    blocks = text(config, 1920)
    trained = train_routers(params, blocks, training, progress=told.append)
    assert told[-1].metrics["neuron_loss"] < 0.8 * told[0].metrics["neuron_loss"]
    assert trained.policy.learned.budgets == (6, 3, 3)

    def learn(layer, inputs, norms, after):
        name = f"layers_{layer}"
        active = active_neurons(params.weights[name]["mlp"], after)
        found = neuron_scores(trained.routers[name]["neurons"], inputs)
        chance = jax.random.normal(jax.random.key(layer), found.shape)
        shape = (-1, 4, config.neurons)
        active = active.reshape(shape)
        recalls = [union_recall(s.reshape(shape), active, 32) for s in (found, chance)]
        return [*recalls, active.mean()]

    held = jnp.asarray(text(config, 64, seed=9))
    model = make_decoder(config, params.weights)
    for found, chance, share in observe_layers(
        model, params, held, learn, polarjax.Dense(), None
    ):
        assert share < 0.3 and found > chance + 0.2


def test_errors():
    params, blocks = random_params(LLAMA), text(LLAMA, 4, 8)

    def refused(match, blocks=blocks, params=params, density: Any = 0.5, **settings):
        with pytest.raises(ValueError, match=match):
            train_routers(params, blocks, RouterTraining(density, **settings))

    refused("nothing for a router to choose", density=1.0, steps=1)
    single = random_params(dataclasses.replace(LLAMA, layers=1))
    refused("nothing for a router to choose", params=single)
    refused("neuron routers are for ReLU MLPs, the model's is silu", neuron_rank=4)
    refused("there is no text to train on", blocks[:0])
    refused("from 0 to 330, those of the text from 0 to 331", blocks // 4 * 331)
    refused("from 0 to 330, those of the text from -4 to 0", -blocks)
    refused("blocks of 129 tokens: .* from 2 to 128", text(LLAMA, 4, 129))
    refused("blocks of 1 tokens: .* from 2 to 128", blocks[:, :1])
    refused(r"blocks must be .n, t., got shape \(8,\)", blocks[0])
    for density in (0, -1, 1.5, float("nan"), "half"):
        refused("density must be a number above 0", density=density)
    refused("steps must be a positive integer, got 0", steps=0)
    refused("batch must be a positive integer, got 0", steps=3, batch=0)
    refused("no loss 'hinge': there are bce and ranking", loss="hinge")
    refused("sparse must be from 0 to 1, got -0.1", sparse=-0.1)
    refused("sparse must be from 0 to 1, got 1.1", sparse=1.1)
    for name in ("head_rank", "neuron_rank", "seed"):
        refused(f"{name} must be an integer of at least 0, got -1", **{name: -1})
    refused("heads has rank 9999: it must be between 1 and 1024", head_rank=9999)
    rates = "learning_rate", "quadratic_learning_rate", "neuron_learning_rate"
    for name in (*rates, "weight_decay"):
        for wrong in (float("nan"), float("inf"), -1e-3):
            refused(f"{name} must be a number from 0 on", **{name: wrong})
    with pytest.raises(ValueError, match="no routers"):
        router_recall(params, [blocks])
