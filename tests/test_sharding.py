"""A model cut over host devices computes what it computes on one."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors import safe_open

import polarjax
from polarjax.sharding import make_data_mesh, make_mesh, partition, shard
from tests.models import LLAMA, MHA, OPT, random_params, write_checkpoint

PROMPTS = [[1, 2, 3], [7] * 20, [5, 6]]
pytestmark = pytest.mark.devices(4)


@pytest.mark.parametrize(
    ("config", "tp"), [(LLAMA, 4), (MHA, 2), (OPT, 2)], ids=["gqa", "mha", "opt"]
)
def test_logits_and_sparse_tokens_are_those_of_one_device(config, tp):
    config = dataclasses.replace(config, layers=2, vocab_size=332)
    params = random_params(config, routers=True, head_rank=4)
    cut = shard(params, make_mesh(tp))
    qkv = cut.weights["layers_0"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.shape[0] * tp == qkv.shape[0]
    tokens = np.arange(24).reshape(2, 12)
    one, many = (
        np.asarray(polarjax.logits(p, tokens, implementation="xla"))
        for p in (params, cut)
    )
    assert np.linalg.norm(one - many) < 1e-5 * np.linalg.norm(one)
    settings = {"max_new_tokens": 8, "density": [1.0, 0.5, 0.5], "chunk": 8}
    one, many = (
        polarjax.generate(p, PROMPTS, implementation="xla", **settings)
        for p in (params, cut)
    )
    assert one.tokens == many.tokens
    assert one.stats.density == many.stats.density


def test_each_device_reads_its_own_rows(tmp_path, monkeypatch):
    config = dataclasses.replace(LLAMA, layers=2, vocab_size=332)
    params, mesh = random_params(config, routers=True), make_mesh(4)
    write_checkpoint(tmp_path / "model", params)
    read, get_slice = Counter(), safe_open.get_slice

    class Rows:
        def __init__(self, rows):
            self.rows, self.get_shape = rows, rows.get_shape

        def __getitem__(self, index):
            part = self.rows[index]
            read["bytes"] += part.nbytes
            read["most"] = max(read["most"], part.nbytes)
            return part

    class Spied:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.opened = self.file.__enter__()
            self.keys = self.opened.keys
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            return Rows(get_slice(self.opened, name))

    monkeypatch.setattr("polarjax.params.safe_open", Spied)
    loaded = polarjax.load(tmp_path / "model", mesh=mesh)
    leaves = jax.tree.leaves((params.weights, params.routers))
    largest = max(leaf.nbytes for leaf in leaves)
    assert read["most"] < largest
    # What is on every device is read for each; it is little.
    assert read["bytes"] < 1.2 * sum(leaf.nbytes for leaf in leaves)
    want = shard(params, mesh)
    for one, other in zip(*map(jax.tree.leaves, (loaded, want)), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


def test_what_does_not_divide_is_whole_everywhere():
    mesh = make_mesh(4)
    assert partition("layers_3/mlp/up", (80, 48), mesh) == PartitionSpec("tp", None)
    assert partition("embed/tokens", (331, 48), mesh) == PartitionSpec(None, None)
    assert partition("final_norm/scale", (48,), mesh) == PartitionSpec()


def test_too_many_devices():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"there are {count} devices"):
        make_mesh(count + 1)


def test_meshes_without_the_axis(tmp_path):
    params = random_params(dataclasses.replace(LLAMA, layers=1))
    write_checkpoint(tmp_path / "model", params)
    with pytest.raises(ValueError, match=r'has the axes dp, but .* along "tp"'):
        polarjax.load(tmp_path / "model", mesh=make_data_mesh())
