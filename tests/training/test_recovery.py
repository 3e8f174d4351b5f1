"""Recovery: what it mends, and what it leaves as it is."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import polarjax
from polarjax.mesh.cut import make_mesh, shard, whole_routers
from polarjax.policies import with_learned
from polarjax.training import Recovery, Resume, train_updates
from polarjax.training.distance import divergence
from polarjax.training.recovery import parameters
from tests.training.mended import BIASED, GQA, in_numpy, model, text

SHORT = Recovery(steps=6, batch=4, rank=2, learning_rate=1e-2)
BLOCKS = text(20)


@functools.cache
def recovered(tp=None, dp=None, **changes):
    params = model(GQA, updates=False)
    params = shard(params, make_mesh(tp, dp)) if tp else params
    return train_updates(params, BLOCKS, dataclasses.replace(SHORT, **changes))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("rank", [4, None])
def test_recovery_brings_the_sparse_model_back(rank):
    params, held = model(GQA, updates=False), text(32, seed=9, words=7)
    before = divergence(params, held)
    recovery = Recovery(steps=80, batch=16, rank=rank, learning_rate=1e-2)
    told = []
    found = train_updates(params, text(640, words=7), recovery, progress=told.append)
    assert divergence(found, held) < before / 2
    assert told[-1].metrics["kl"] < told[0].metrics["kl"] / 2
    assert found.config == params.config and found.weights is params.weights
    assert found.policy.learned.numbers() == params.policy.learned.numbers()
    moved = found.routers["layers_1"]["heads"]["weight"]
    assert not np.allclose(moved, params.routers["layers_1"]["heads"]["weight"])
    kinds = set(found.routers["layers_0"]["updates"]["mlp"]["up"])
    assert kinds == ({"a", "b"} if rank else {"delta"})
    whole = sum(x.size for i in range(3) for x in jax.tree.leaves(
        params.weights[f"layers_{i}"]
    ))  # fmt: skip
    new = parameters(found.routers)
    assert new < whole / 3 if rank else new == whole


@pytest.mark.slow
def test_the_seed_decides_and_the_caller_keeps_the_model():
    params = model(GQA, updates=False)
    before = jax.tree.map(np.array, params)
    one = recovered()
    assert_equal(train_updates(params, BLOCKS, SHORT).routers, one.routers)
    assert_equal(jax.tree.map(np.array, params), before)
    for change in ({"seed": 1}, {"prompts": 0.0}):
        out = recovered(**change).routers["layers_1"]["updates"]["attention"]["out"]
        assert not np.allclose(out["b"], _update_of(one))
    for change in ({"router_learning_rate": 0.0}, {"routers": "nothing"}):
        kept = recovered(**change).routers
        assert_equal(kept["layers_1"]["heads"], params.routers["layers_1"]["heads"])
    sloped = recovered(routers="slopes").routers["layers_1"]["heads"]["weight"]
    for other in (one, params):
        assert not np.allclose(sloped, other.routers["layers_1"]["heads"]["weight"])


def _update_of(params):
    return params.routers["layers_1"]["updates"]["attention"]["out"]["b"]


def test_dense_is_the_original_model():
    params, found = model(GQA, updates=False), recovered()
    assert not np.allclose(_update_of(found), 0)
    prompts = [[1, 2, 3], [4]]
    options = {"max_new_tokens": 9, "policy": polarjax.Dense()}
    one, other = (polarjax.generate(x, prompts, **options) for x in (params, found))
    assert one.tokens == other.tokens and one.logprobs == other.logprobs
    np.testing.assert_array_equal(
        polarjax.logits(params, prompts[:1]), polarjax.logits(found, prompts[:1])
    )


@pytest.mark.parametrize("config", [GQA, BIASED], ids=["gqa", "opt"])
def test_generation_is_numpys(config):
    """The prompt by the original weights, every further token by the merged ones."""
    params, prompt = model(config), [5, 6, 7]
    found = polarjax.generate(params, [prompt], max_new_tokens=9)
    tokens = [*prompt, *found.tokens[0]]
    logits = in_numpy(params, tokens, len(prompt))[len(prompt) - 1 : -1]
    order = np.sort(logits, axis=-1)
    assert (order[:, -1] - order[:, -2]).min() > 1e-3
    assert found.tokens[0] == logits.argmax(axis=-1).tolist()
    logprobs = logits.max(axis=-1) - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(found.logprobs[0], logprobs, atol=1e-3)
    # The updates have their say.
    plain = in_numpy(model(config, updates=False), tokens, len(prompt))
    assert np.abs(plain[-1] - logits[-1]).max() > 0.1


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_recovery_ends_as_an_unbroken_one(tmp_path, at):
    resume = Resume(tmp_path / "work", every=2)

    def progress(now):
        if now.step == at:
            raise KeyboardInterrupt

    params = model(GQA, updates=False)
    with pytest.raises(KeyboardInterrupt):
        train_updates(params, BLOCKS, SHORT, resume=resume, progress=progress)
    found = train_updates(params, BLOCKS, SHORT, resume=resume)
    assert_equal(found.routers, recovered().routers)


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 2), {}),
        pytest.param((1, 2), {}, marks=pytest.mark.slow),
        pytest.param((2, 2), {"routers": "slopes"}, marks=pytest.mark.slow),
        # More devices than the KV groups, of which each then has a part.
        pytest.param((4, 1), {"rank": None}, marks=pytest.mark.slow),
        pytest.param((2, 2), {"routers": "ranking"}, marks=pytest.mark.slow),
        pytest.param((2, 2), {"remat": True}, marks=pytest.mark.slow),
    ],
)
def test_devices_share_a_recovery(shape, changes):
    changes = {"learning_rate": 1e-3} | changes
    one, many = recovered(**changes), recovered(*shape, **changes)
    routers = whole_routers(many)
    assert_close(one.routers, routers, 1e-4)
    before = model(GQA, updates=False).routers["layers_1"]["heads"]["weight"]
    assert np.abs(one.routers["layers_1"]["heads"]["weight"] - before).max() > 1e-3
    # And is measured there as on one device.
    held = text(8, seed=9)
    there, here = divergence(many, held), divergence(one, held)
    np.testing.assert_allclose(there, here, rtol=1e-4)
    if shape == (2, 2):  # 3 blocks, which two copies cannot share
        there, here = divergence(many, held, 3), divergence(one, held, 3)
        np.testing.assert_allclose(there, here, rtol=1e-4)


def assert_close(one, other, atol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), one, other)


def test_errors():
    params = model(GQA, updates=False)

    def refused(match, params=params, blocks=BLOCKS, **settings):
        with pytest.raises(ValueError, match=match):
            train_updates(params, blocks, Recovery(**settings))

    bare = with_learned(params, routers={})
    refused("recovery needs routers: train them first", bare)
    bare = dataclasses.replace(params, policy=polarjax.Dense())
    refused("recovery needs routers: train them first", bare)
    refused("recovery needs routers", with_learned(params, budgets=()))
    refused("rank of the updates must be at least 1, got 0", rank=0)
    refused("rank is 1000: it may be from 1 to", rank=1000)
    refused("prompts must be from 0 to 1, got 1.5", prompts=1.5)
    refused("routers cannot learn 'all': it is bce, ranking, slopes", routers="all")
    refused("steps must be a positive integer, got 0", steps=0)
    refused("seed must be an integer of at least 0, got -1", seed=-1)
    for name in ("learning_rate", "router_learning_rate"):
        refused(f"{name} must be a number from 0 on, got nan", **{name: np.nan})
    refused("there is no text to train on", blocks=BLOCKS[:0])
    refused("the model's token ids go from 0 to 60", blocks=BLOCKS + 60)
    with pytest.raises(ValueError, match="no text to measure the divergence on"):
        divergence(params, BLOCKS[:0])
