"""Recovery's updates: merged for the sparse policy, saved, refused where they end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import polarjax
from polarjax.policies import load_adapter, save_adapter, with_learned
from polarjax.policies.updates import init_updates, merge_updates
from tests.models import random_params
from tests.seal import seal
from tests.training.mended import (
    BIASED,
    GQA,
    budgets_of,
    merged,
    model,
    with_updates,
)

CONFIGS = pytest.mark.parametrize(
    "config",
    [GQA, BIASED, dataclasses.replace(GQA, mlp_bias=True)],
    ids=["gqa", "opt", "mlp-bias"],
)


@CONFIGS
def test_merging_is_numpys(config):
    params = model(config)
    found = merge_updates(params)
    assert found.routers == random_params_routers(params)
    expected = merged(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        found.weights,
        expected,
    )
    for name in ("embed", "final_norm"):
        assert found.weights[name] is params.weights[name]
    plain = traverse_util.flatten_dict(params.weights["layers_0"])
    changed = traverse_util.flatten_dict(found.weights["layers_0"])
    for path, leaf in plain.items():
        assert np.abs(changed[path] - leaf).max() > 1e-3, path


def random_params_routers(params):
    """The routers alone."""
    return {
        name: {"heads": parts["heads"]}
        for name, parts in params.routers.items()
        if "heads" in parts
    }


def test_weights_keep_their_dtype_and_are_rounded_once():
    params = model(GQA)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights)
    found = merge_updates(dataclasses.replace(params, weights=low)).weights
    exact = merged(dataclasses.replace(params, weights=low))["layers_1"]
    ours = found["layers_1"]["mlp"]["up"]
    assert ours.dtype == jnp.bfloat16
    right = np.asarray(exact["mlp"]["up"], np.float32).astype(jnp.bfloat16)
    assert (np.asarray(ours) == right).mean() > 0.999


@pytest.mark.parametrize("rank", [2, None])
def test_fresh_updates_change_nothing(rank):
    params = model(GQA, updates=False)
    fresh = init_updates(jax.random.key(0), params.weights, 3, rank)
    routers = {
        name: {**params.routers.get(name, {}), "updates": updates}
        for name, updates in fresh.items()
    }
    found = merge_updates(with_learned(params, routers=routers))
    jax.tree.map(np.testing.assert_array_equal, found.weights, params.weights)
    if rank:
        a = fresh["layers_2"]["mlp"]["down"]["a"]
        assert a.shape == (2, 48) and 0.5 < a.std() * 48**0.5 < 1.5


@pytest.fixture
def saved(tmp_path):
    """A folder with updates of rank 3, the model it came from, and that without."""
    config = dataclasses.replace(GQA, model_hash="ab" * 32)
    budgets = budgets_of(config)
    params = with_updates(random_params(config, 1, routers=True, budgets=budgets))
    save_adapter(tmp_path / "adapter", params)
    bare = polarjax.Params(params.weights, polarjax.Dense(), config)
    return tmp_path / "adapter", params, bare


def test_a_round_trip_is_in_16_bit(saved):
    folder, params, bare = saved
    loaded = load_adapter(bare, folder)
    assert loaded.config == params.config and loaded.weights is bare.weights
    assert loaded.policy.learned.numbers() == params.policy.learned.numbers()
    assert set(loaded.routers["layers_0"]) == {"updates"}
    for name, parts in params.routers.items():
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parts["updates"])
        jax.tree.map(
            np.testing.assert_array_equal, loaded.routers[name]["updates"], low
        )
    np.testing.assert_array_equal(
        loaded.routers["layers_1"]["heads"]["weight"],
        params.routers["layers_1"]["heads"]["weight"],
    )
    rounded = with_learned(params, routers=loaded.routers)
    prompts = [[1, 2, 3], [7]]
    ours, theirs = (
        polarjax.generate(x, prompts, max_new_tokens=9) for x in (loaded, rounded)
    )
    assert ours.tokens == theirs.tokens and ours.logprobs == theirs.logprobs
    dense = {"policy": polarjax.Dense(), "max_new_tokens": 9}
    one, other = (polarjax.generate(x, prompts, **dense) for x in (loaded, bare))
    assert one.tokens == other.tokens and one.logprobs == other.logprobs


QKV = "layers_1/updates/attention/qkv"


def resized(name, *shape):
    return lambda tensors: {**tensors, name: np.zeros(shape, np.float32)}


def ranked(rank):
    both = resized(QKV + "/a", rank, 48), resized(QKV + "/b", 256, rank)
    return lambda tensors: both[1](both[0](tensors))


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (resized(QKV + "/a", 3, 47), r"qkv/a has shape \[3, 47\]: it must be a delta"),
        (resized(QKV + "/b", 255, 3), r"a \[rank, 48\] beside b \[256, rank\]"),
        (resized(QKV + "/b", 256, 2), r"qkv/[ab] has shape"),
        (resized(QKV + "/a", 3), r"qkv/[ab] has shape"),
        (ranked(0), r"qkv/[ab] has shape"),
        (ranked(257), r"qkv/[ab] has shape"),
        (without(QKV + "/a"), r"qkv/b has shape \[256, 3\]"),
        (without(QKV + "/b"), r"qkv/a has shape \[3, 48\]"),
        (resized(QKV + "/delta", 256, 48), r"qkv/delta has shape"),
        (resized(QKV + "/c", 3, 48), r"qkv/c has shape"),
        (
            resized("layers_1/updates/mlp_norm/scale/delta", 47),
            r"scale/delta has shape \[47\]: it must be a delta of shape \[48\]",
        ),
        (resized("layers_1/updates/attention/qkw/delta", 3), "no such weight"),
        (resized("layers_1/updates/mlp/up_bias/delta", 80), "no such weight"),
        (resized("layers_3/updates/mlp/up/delta", 80, 48), "router layers_3: the mod"),
        (resized("layers_0/heads/bias", 4), "router layers_0"),
        (lambda tensors: only_a_tensor(tensors, "layers_1/updates"), "layers_1"),
        (lambda tensors: only_a_tensor(tensors, "layers_1"), "layers_1"),
    ],
)
def test_updates_that_do_not_fit_are_refused(saved, edit, message):
    folder, _, bare = saved
    tensors = load_file(folder / "routers.safetensors")
    save_file(edit(tensors), folder / "routers.safetensors")
    seal(folder)
    with pytest.raises(ValueError, match=message):
        load_adapter(bare, folder)


def only_a_tensor(tensors, place):
    """A tensor where a folder of tensors should be."""
    kept = {n: t for n, t in tensors.items() if not n.startswith(place + "/")}
    return {**kept, place: np.zeros(3, np.float32)}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(saved, tmp_path, poison):
    folder, params, bare = saved
    tensors = load_file(folder / "routers.safetensors")
    tensors[QKV + "/a"][1, 2] = poison
    save_file(tensors, folder / "routers.safetensors")
    seal(folder)
    with pytest.raises(ValueError, match="qkv/a holds NaN or infinity"):
        load_adapter(bare, folder)
    # Nor is it saved: a training may have come to that.
    bad = jax.tree.map(lambda x: x, params)
    qkv = bad.routers["layers_1"]["updates"]["attention"]["qkv"]
    qkv["b"] = qkv["b"].at[0, 0].set(poison)
    with pytest.raises(ValueError, match="router layers_1/updates/attention/qkv/b hol"):
        save_adapter(tmp_path / "other", bad)
    assert not (tmp_path / "other").exists()
