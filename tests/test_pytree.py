"""Params as a pytree, and its configuration as JSON."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import polarjax
from polarjax.policies import with_learned
from polarjax.policy import Learned
from tests.models import LLAMA, OPT, OPT_AFTER, random_params

CONFIG = dataclasses.replace(
    LLAMA, layers=2, eos_ids=(256,), bos_ids=(1,), model_hash="abc"
)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, routers=True, budgets=(4, 2))


def test_params_are_a_pytree_that_keeps_its_config(params):
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert isinstance(doubled, polarjax.Params) and doubled.config == CONFIG
    np.testing.assert_array_equal(
        doubled.weights["embed"]["tokens"], 2 * params.weights["embed"]["tokens"]
    )
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    assert ".weights['layers_1']['attention']['qkv']" in paths
    assert ".policy.learned.routers['layers_1']['heads']['weight']" in paths


def test_jit_keeps_two_checkpoints_of_one_architecture_apart(params):
    # A static half that compared equal would be taken from the first call.
    update = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p))
    for change in (
        {"folder": "/another"},
        {"model_hash": "def"},
        {"eos_ids": (7,)},
    ):
        config = dataclasses.replace(CONFIG, **change)
        other = dataclasses.replace(params, config=config)
        # Field by field: equality itself is what may be wrong.
        for given in (params, other):
            kept = dataclasses.astuple(update(given).config)
            assert kept == dataclasses.astuple(given.config)
        assert config.architecture == CONFIG.architecture
        assert hash(config.architecture) == hash(CONFIG.architecture)
    fewer = with_learned(params, budgets=(4, 1))
    for given in (params, fewer):
        assert update(given).policy.learned.budgets == given.policy.learned.budgets


def test_optax_updates_params(params):
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimiser.init(params), []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(float(value))
    assert isinstance(params, polarjax.Params) and params.config == CONFIG
    assert values[0] > values[1] > values[2]
    assert polarjax.logits(params, [[1, 2]]).shape == (1, 2, CONFIG.vocab_size)


def test_config_survives_json():
    rope = polarjax.Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192, (1.0, 2.5) * 4)
    config = dataclasses.replace(CONFIG, rope=rope, folder="/here")
    windows = dataclasses.replace(CONFIG, windows=(4, *(0,) * (CONFIG.layers - 1)))
    rotary = (False, *(True,) * (CONFIG.layers - 1))
    windows = dataclasses.replace(windows, folder="/here", qk_norm=True, rotary=rotary)
    after = dataclasses.replace(OPT_AFTER, folder="/here")
    for one in (config, windows, after, dataclasses.replace(OPT, folder="/here")):
        again = polarjax.ModelConfig.from_json(one.to_json({}), folder="/here")
        assert again == one and hash(again) == hash(one)
    assert "folder" not in json.loads(config.to_json({}))


def test_windows_and_rotary_positions_are_by_layer():
    layers = CONFIG.layers
    config = dataclasses.replace(
        CONFIG, windows=(4, CONFIG.context, *(0,) * (layers - 2))
    )
    assert [config.window(i) for i in range(layers)] == [4, *(None,) * (layers - 1)]
    for wrong in ((4,), (-1,) * layers):
        with pytest.raises(ValueError, match=f"windows must be {layers} numbers"):
            dataclasses.replace(CONFIG, windows=wrong)
    config = dataclasses.replace(CONFIG, rotary=(True,) * (layers - 1) + (False,))
    ropes = [config.rope_of(i) for i in range(layers)]
    assert ropes == [CONFIG.rope] * (layers - 1) + [None]
    for wrong in ({"rotary": (True,)}, {"rotary": (True,) * layers, "rope": None}):
        with pytest.raises(ValueError, match=f"rotary must be {layers} flags beside"):
            dataclasses.replace(CONFIG, **wrong)


def test_neuron_budgets_survive_json():
    budgets = ((1, (80, 20, 30, 40)), (8, (80, 40, 80, 80)))
    learned = Learned(neuron_budgets=budgets)
    text = OPT.to_json(learned.numbers())
    again = Learned.from_json(text)
    assert again == learned
    assert hash(jax.tree.structure(again)) == hash(jax.tree.structure(learned))
    # What the model is does not depend on them.
    assert polarjax.ModelConfig.from_json(text) == OPT
    fields = json.loads(text)
    for wrong in (5, None, [3], [[1]], [[1, 2]], [[1, [80], 3]]):
        text = json.dumps({**fields, "neuron_budgets": wrong})
        with pytest.raises(ValueError, match="not a polarjax config"):
            Learned.from_json(text)


def test_a_model_shows_itself_in_a_few_lines(params):
    text = repr(params)
    assert text.count("\n") < 5 and len(text) < 400
    size = sum(leaf.size for leaf in jax.tree.leaves(params.weights))
    for part in ("llama", f"{size / 1e6:.1f}M weights", "float32", "MB", "cpu:0"):
        assert part in text or (part == "cpu:0" and jax.default_backend() != "cpu")
    assert f"{4 * size / 1e6:.1f} MB" in text
    assert "2 layers of 48, 8 heads in 4 KV groups" in text
    assert "adapter for 1 layers" in text and "reads 3.00 of 4 KV groups" in text
    bare = with_learned(params, routers={})
    assert "no adapter" in repr(bare) == str(bare)


def test_whatever_jax_puts_into_a_model_shows_itself(params):
    shapes = jax.eval_shape(lambda: params)
    assert "as ShapeDtypeStruct" in repr(shapes) and "float32" in repr(shapes)
    seen = []
    jax.jit(lambda p: seen.append(repr(p)) or p.weights["embed"]["tokens"])(params)
    assert "float32" in seen[0] and len(seen[0]) < 400
    assert "as ndarray" in repr(jax.device_get(params))
    for other in (None, object(), "x", jax.sharding.PartitionSpec("tp")):
        assert "no arrays" in repr(jax.tree.map(lambda _, x=other: x, params))
    gone = jax.tree.map(jax.numpy.array, params)
    jax.tree.map(lambda x: x.delete(), gone)
    assert len(repr(gone)) < 400


@pytest.mark.devices(2)
def test_a_model_on_a_mesh_says_so(params):
    there = polarjax.mesh.cut.shard(params, polarjax.mesh.cut.make_mesh(2))
    assert "on 2 devices" in repr(there)
