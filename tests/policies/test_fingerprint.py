"""An adapter's model is known by its weights, within rounding, or taken by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import polarjax
from polarjax.loading import find_adapter
from polarjax.mesh.cut import make_mesh, shard
from polarjax.params import write_folder
from polarjax.policies import load_adapter, save_adapter
from polarjax.policies.fingerprint import SAMPLES, Fingerprint, entries
from tests.models import LLAMA, OPT, random_params

CONFIG = dataclasses.replace(
    LLAMA,
    layers=3,
    neurons=96,
    vocab_size=336,
    qk_norm=True,
    model_hash="ab" * 32,
)
BUDGETS = (4, 2, 2)


def cast(params, dtype):
    weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), params.weights)
    return dataclasses.replace(params, weights=weights)


def changed(params, change):
    """The same architecture from another file, a matrix of it changed."""
    weights = jax.tree.map(lambda x: x, params.weights)
    mlp = weights["layers_1"]["mlp"]
    mlp["down"] = change(mlp["down"])
    config = dataclasses.replace(params.config, model_hash="cd" * 32)
    return polarjax.Params(weights, polarjax.Dense(), config)


def same(params):
    return changed(params, lambda x: x)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, routers=True, budgets=BUDGETS)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """An adapter, learned on weights in bfloat16."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(folder, cast(params, "bfloat16"))
    return folder


@pytest.mark.parametrize("learned", ["float32", "bfloat16", "float16"])
def test_the_same_weights_of_another_file_and_dtype(params, tmp_path, learned):
    save_adapter(tmp_path / "adapter", cast(params, learned))
    for dtype in ("float32", "bfloat16", "float16"):
        model = cast(same(params), dtype)
        loaded = load_adapter(model, tmp_path / "adapter")
        assert loaded.policy.learned.budgets == BUDGETS
        assert loaded.config.model_hash == "cd" * 32
        assert loaded.weights is model.weights
        assert loaded.routers.keys() == {"layers_1", "layers_2"}
    # Rounded to one dtype after the other, as by convert and load.
    twice = cast(cast(same(params), "float16"), "bfloat16")
    loaded = load_adapter(twice, tmp_path / "adapter")
    assert loaded.policy.learned.budgets == BUDGETS


def test_a_file_as_it_was_read_may_be_numpy(params, saved):
    weights = jax.tree.map(np.asarray, params.weights)
    model = dataclasses.replace(same(params), weights=weights)
    assert load_adapter(model, saved).policy.learned.budgets == BUDGETS


@pytest.mark.devices(8)
@pytest.mark.parametrize("config", [CONFIG, OPT])
def test_a_mesh_does_not_matter(config, params, tmp_path):
    model, mesh = params, make_mesh(4, 2)
    if config is OPT:
        config = dataclasses.replace(OPT, heads=8, kv_heads=8, layers=2)
        model = random_params(config, 0, routers=True, budgets=(8, 4))
    cut = shard(model, mesh)
    one, other = Fingerprint.of(model), Fingerprint.of(cut)
    assert one.shapes == other.shapes
    jax.tree.map(np.testing.assert_array_equal, one.values, other.values)
    save_adapter(tmp_path / "cut", cut)
    theirs = Fingerprint.load(tmp_path / "cut/fingerprint.safetensors")
    assert theirs.difference(one) == one.difference(theirs) == ""
    bare = same(model)
    write_folder(tmp_path / "model", bare.config, bare.weights)
    loaded = polarjax.load(tmp_path / "model", adapter=tmp_path / "cut", mesh=mesh)
    for found in (loaded, load_adapter(shard(bare, mesh), tmp_path / "cut")):
        where = {x.sharding.mesh for x in jax.tree.leaves(found.routers)}
        assert where == {mesh}


def requantised(x):
    blocks = x.reshape(-1, 16)
    scale = jnp.abs(blocks).max(axis=1, keepdims=True) / 7
    return (jnp.round(blocks / scale) * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (requantised, r"differ by [0-9.]+ %, so it looks like another quantisation"),
        (
            lambda x: x * 1.02,
            r"so it looks like another quantisation or fine-tune of",
        ),
        (lambda x: x.at[:, ::2].add(0.01), r"weights differ by [0-9.]+ %, so it looks"),
    ],
)
def test_other_weights_are_refused(params, saved, change, match):
    model = changed(params, change)
    match = rf"made for another model .hash abababababab, .*cdcdcdcdcdcd; .*{match}"
    with pytest.raises(ValueError, match=match) as caught:
        load_adapter(model, saved)
    assert "any_model=True (--any-model)" in str(caught.value)
    assert "\n" not in str(caught.value)
    found = load_adapter(model, saved, any_model=True)
    assert found.policy.learned.budgets == BUDGETS


def test_models_that_have_nothing_in_common(params, saved):
    other = same(random_params(CONFIG, 1))
    with pytest.raises(ValueError, match=r"weights differ by 1\d\d %\): calibrate"):
        load_adapter(other, saved)
    nan = changed(params, lambda x: x * jnp.nan)
    with pytest.raises(ValueError, match="another model"):
        load_adapter(nan, saved)


def test_other_shapes_are_refused_with_the_override_too(saved):
    wide = dataclasses.replace(CONFIG, vocab_size=337, model_hash="ef")
    model = random_params(wide, 0)
    match = r"its embed/tokens has shape \[336, 48\], this model's \[337, 48\]"
    with pytest.raises(ValueError, match=match):
        load_adapter(model, saved)
    load_adapter(model, saved, any_model=True)  # no router depends on it
    narrow = dataclasses.replace(CONFIG, kv_heads=2, model_hash="ef")
    for any_model in (False, True):
        with pytest.raises(ValueError, match=r"\[256, 48\], this|router layers_1 has"):
            load_adapter(random_params(narrow, 0), saved, any_model)


def test_adapters_without_a_sample_are_known_by_their_hash(params, saved, tmp_path):
    folder = tmp_path / "old"
    save_adapter(folder, params)
    for name in ("fingerprint.safetensors", "checksums.json"):
        (folder / name).unlink()
    assert load_adapter(params, folder).policy.learned.budgets == BUDGETS
    with pytest.raises(ValueError, match=r"it has no sample .* any_model=True"):
        load_adapter(same(params), folder)
    assert load_adapter(same(params), folder, any_model=True).routers


@pytest.mark.parametrize("known", ["", "of its source"])
def test_a_hash_does_not_speak_for_weights_that_have_changed(params, tmp_path, known):
    config = dataclasses.replace(params.config, model_hash=known)
    params = dataclasses.replace(params, config=config)
    save_adapter(tmp_path / "adapter", params)
    other = dataclasses.replace(params, weights=jax.tree.map(jnp.flip, params.weights))
    with pytest.raises(ValueError, match="sampled weights differ by"):
        load_adapter(other, tmp_path / "adapter")
    assert load_adapter(params, tmp_path / "adapter").routers


def test_load_and_the_override(params, saved, tmp_path):
    model = changed(params, requantised)
    write_folder(tmp_path / "model", model.config, model.weights)
    with pytest.raises(ValueError, match="looks like another quantisation"):
        polarjax.load(tmp_path / "model", adapter=saved)
    loaded = polarjax.load(tmp_path / "model", adapter=saved, any_model=True)
    assert loaded.policy.learned.budgets == BUDGETS
    with pytest.raises(ValueError, match=r"any_model .* goes with an adapter"):
        polarjax.load(tmp_path / "model", any_model=True)


def test_which_entries_are_sampled():
    """For ever the same: files hold their values alone."""
    rows, columns = entries((49152, 576))
    assert len(rows) == len(columns) == SAMPLES == 32
    assert rows[:3].tolist() == [768, 2304, 3840] and rows[-1] == 48384
    assert columns[:4].tolist() == [355, 135, 491, 271]
    assert len(set(columns.tolist())) == 32
    (rows,) = entries((576,))
    assert rows[:3].tolist() == [9, 27, 45] and rows[-1] == 567
    rows, columns = entries((5, 3))
    assert (rows * 3 + columns).tolist() == list(range(15))
    for shape in ((2**24, 2**24), (1, 40), (40, 1), (32,), (31,), (1,)):
        # A matrix of few rows or columns may have the same entry twice.
        found = entries(shape)
        size = min(32, int(np.prod(shape, dtype=np.float64)))
        assert all(len(x) == size and (x >= 0).all() for x in found)
        assert all((x < n).all() for x, n in zip(found, shape, strict=True))
        if shape != (1, 40):
            assert len(set(zip(*(x.tolist() for x in found), strict=True))) == size


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-1pct"])
def test_those_that_ship_have_one(name):
    folder = find_adapter(name)
    found = Fingerprint.load(folder / "fingerprint.safetensors")
    assert found.dtype == "bfloat16" and len(found.shapes) == 212
    with safe_open(folder / "routers.safetensors", "numpy") as tensors:
        assert len(tensors.keys()) > 50
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json",
        "checksums.json",
        "fingerprint.safetensors",
        "routers.safetensors",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-1pct"])
def test_those_that_ship_know_their_model(name, smollm2_folder, tmp_path):
    """By its weights, whatever the dtype and the way that they came."""
    from convert import convert
    from convert.export import export

    export(polarjax.load(smollm2_folder), tmp_path / "hf", dtype="bfloat16")
    for dtype in ("bfloat16", "float16"):
        convert(tmp_path / "hf", tmp_path / dtype, dtype=dtype, progress=False)
        loaded = polarjax.load(tmp_path / dtype, adapter=name)
        hashes = {loaded.config.model_hash, polarjax.load(smollm2_folder).config}
        assert len(hashes) == 2
    for dtype in ("float32", "bfloat16", "float16"):
        model = cast(polarjax.load(smollm2_folder), dtype)
        unknown = dataclasses.replace(model.config, model_hash="unknown")
        model = dataclasses.replace(model, config=unknown)
        assert load_adapter(model, find_adapter(name)).routers
    other = changed(model, lambda x: x * 1.05)
    with pytest.raises(ValueError, match="looks like another quantisation"):
        load_adapter(other, find_adapter(name))
