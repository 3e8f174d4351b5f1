"""A model cut over host devices computes what it computes on one."""

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors import safe_open

import polarjax
from polarjax import Polar
from polarjax.engine import steps
from polarjax.engine.checks import (
    settings_of,
    variant_of,
)
from polarjax.engine.sampling import draw
from polarjax.engine.slots import empty_slots
from polarjax.mesh.cut import (
    default_mesh,
    make_mesh,
    shard,
    shard_groups,
    whole,
)
from polarjax.mesh.share import Share
from polarjax.model import make_decoder
from polarjax.policies import with_learned
from polarjax.policies.routed import Routed
from polarjax.policies.updates import init_updates
from tests.mesh.one_of_several import sharing_neurons
from tests.models import LLAMA, MHA, OPT, make_sampling, random_params, write_checkpoint

PROMPTS = [[1, 2, 3], [7] * 20, [5, 6]]
SHAPES = [(8, 1), (4, 2)]
MORE = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
SLOW = [pytest.param(*shape, marks=pytest.mark.slow) for shape in MORE]
pytestmark = pytest.mark.devices(8)

EIGHT = {"layers": 2, "vocab_size": 336, "heads": 8, "head_dim": 8}
MODELS = {
    "gqa": dataclasses.replace(LLAMA, **EIGHT, kv_heads=4),
    "mha": dataclasses.replace(MHA, **EIGHT, kv_heads=8),
    "opt": dataclasses.replace(OPT, **EIGHT, kv_heads=8),
}


def make(name, **changes):
    config = dataclasses.replace(MODELS[name], **changes)
    neuron_rank = 5 if config.activation == "relu" else 0
    return random_params(config, routers=True, head_rank=4, neuron_rank=neuron_rank)


@pytest.fixture
def spied(monkeypatch):
    """What policies choose, by layer, as (heads or neurons) of each row, counted."""
    heads, neurons = Routed.groups, Routed.neurons
    found = {"heads": Counter(), "neurons": Counter()}

    def count(kind, layer, chosen):
        found[kind][layer, str(chosen)] += 1

    def spy_heads(self, layer, seen, pick):
        chosen = heads(self, layer, seen, pick)
        if chosen is not None:

            def log(indices, n_active, live):
                rows = zip(indices[live], n_active[live], strict=True)
                count("heads", layer, [sorted(i[:n].tolist()) for i, n in rows])

            jax.debug.callback(log, chosen.index, chosen.count, seen.live)
        return chosen

    def spy_neurons(self, layer, seen, pick):
        chosen = neurons(self, layer, seen, pick)
        if chosen is not None:
            f = self.neuron_routers[layer].shape[0]

            def log(indices, place):
                mine = [int(i + place * f) for i in indices if i < f]
                count("neurons", layer, mine)

            jax.debug.callback(log, chosen.index, pick.share.number())
        return chosen

    monkeypatch.setattr(Routed, "groups", spy_heads)
    monkeypatch.setattr(Routed, "neurons", spy_neurons)
    jax.clear_caches()  # of what was traced before
    yield found
    jax.clear_caches()


@pytest.mark.parametrize(("tp", "dp"), [*SHAPES, *SLOW])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_sparse_tokens_are_those_of_one_device(name, tp, dp):
    assert_same_as_on_one(make(name), tp, dp)


def test_the_biases_of_a_gated_mlp_are_cut():
    params = make("gqa", mlp_bias=True, activation="relu")
    cut = assert_same_as_on_one(params, 4, 2, policy=Polar(0.5, 0.4))
    mlp = cut.weights["layers_1"]["mlp"]
    for name in ("gate_bias", "up_bias"):
        assert mlp[name].addressable_shards[0].data.shape[0] * 4 == mlp[name].size


def assert_same_as_on_one(params, tp, dp, policy=None):
    cut = shard(params, make_mesh(tp, dp))
    qkv = cut.weights["layers_0"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.shape[0] * tp == qkv.shape[0]
    tokens = np.arange(24).reshape(2, 12)
    one, many = (
        np.asarray(polarjax.logits(p, tokens, implementation="xla"))
        for p in (params, cut)
    )
    assert np.linalg.norm(one - many) < 1e-5 * np.linalg.norm(one)
    asked = {"policy": policy} if policy else {"density": [1.0, 0.5, 0.25]}
    settings = {"max_new_tokens": 8, **asked}
    one, many = (
        polarjax.generate(p, PROMPTS, implementation="xla", **settings)
        for p in (params, cut)
    )
    assert one.tokens == many.tokens
    assert one.stats.density == many.stats.density
    assert one.finish_reasons == many.finish_reasons
    return cut


@pytest.mark.parametrize(
    "asked",
    [
        {"policy": Polar(0.5, 0.4)},
        {"density": [0.25, 0.5, 0.9]},
        {"policy": Polar(0.5, 0.4, balanced=4)},
    ],
    ids=["global", "mixed", "balanced"],
)
def test_the_same_heads_and_neurons_are_chosen(asked, spied):
    params, tp = sharing_neurons(make("opt", layers=3), 0.3), 4

    def run(params):
        for counter in spied.values():
            counter.clear()
        options = {"max_new_tokens": 4, "implementation": "xla"}
        found = polarjax.generate(params, PROMPTS, **asked, **options)
        jax.effects_barrier()
        neurons = {}
        for (layer, text), number in spied["neurons"].items():
            neurons.setdefault(layer, []).extend(eval(text) * number)
        counts = {layer: Counter(found) for layer, found in neurons.items()}
        return found.tokens, dict(spied["heads"]), counts

    tokens, heads, neurons = run(params)
    cut_tokens, cut_heads, cut_neurons = run(shard(params, make_mesh(tp)))
    assert tokens == cut_tokens
    # Each device knows what is read of all groups, and reads its own neurons.
    assert cut_heads == {key: tp * number for key, number in heads.items()}
    assert len(heads) > 2 and cut_neurons == neurons and len(neurons) == 2


@pytest.mark.parametrize("balanced", [1, 4])
def test_how_uneven_the_work_is(balanced, monkeypatch):
    """Scores of its last two groups of eight put all a sequence reads on one device."""
    params = make("mha", layers=2)
    bias = np.zeros(8, np.float32)
    bias[-2:] = 1e3
    routers = {"layers_1": {"heads": {**params.routers["layers_1"]["heads"]}}}
    routers["layers_1"]["heads"]["bias"] = bias
    params = with_learned(params, routers=routers)
    options = {"max_new_tokens": 5, "mesh": make_mesh(4)}
    policy = Polar(0.25, balanced=balanced)
    stats = polarjax.generate(params, PROMPTS, policy=policy, **options).stats
    # Layer 0 reads 2 a device; layer 1 2, 0, 0, 0, or one each where it is balanced.
    assert stats.imbalance == pytest.approx((2 + 2) / (2 + 0.5) if balanced == 1 else 1)
    assert "times the mean" in stats.notes[0]
    assert stats.density[1] == (0.25 if balanced == 1 else 0.5)


def test_kernels_run_on_each_device():
    params, policy = make("opt"), Polar(0.5, 0.4)
    options = {"max_new_tokens": 3, "implementation": "triton_interpret"}
    found = polarjax.generate(
        params, PROMPTS[:2], policy=policy, mesh=make_mesh(2, 2), **options
    )
    options["implementation"] = "xla"
    want = polarjax.generate(params, PROMPTS[:2], policy=policy, **options)
    assert found.tokens == want.tokens


@pytest.mark.parametrize(
    ("policy", "top_p", "shape"),
    [
        (polarjax.Oracle(0.5), 0.8, (8,)),
        (polarjax.Random(0.5), 1.0, (4, 2)),
        (polarjax.Dense(), 0.8, (8,)),
    ],
)
def test_draws_and_norms_do_not_depend_on_the_mesh(policy, top_p, shape):
    params = make("gqa", qk_norm=True)
    settings = {"max_new_tokens": 6, "temperature": [0.9, 0, 2.0], "top_p": top_p}
    one, many = (
        polarjax.generate(p, PROMPTS, policy=policy, seed=3, **settings)
        for p in (params, shard(params, make_mesh(*shape)))
    )
    assert one.tokens == many.tokens
    for a, b in zip(one.logprobs, many.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_best_of_all_devices_is_the_best(temperature):
    """Of equal ones the first, and the first NaN, as on one device."""
    mesh, config = make_mesh(4, 2), MODELS["gqa"]
    rows, v = 64, config.vocab_size
    logits = np.random.default_rng(0).integers(0, 9, (rows, v)).astype(np.float32)
    logits[-1, 200:], logits[-2] = np.nan, -1e30
    logits[-3] = -np.arange(v)
    settings = settings_of(config, None, rows, {"temperature": temperature})
    sampling = make_sampling(config, settings)
    position = np.arange(rows, dtype=np.int32)
    variant = variant_of(settings)
    token, logprob = draw(logits, None, sampling, position, variant=variant)
    share = Share(config, mesh)
    where = P("dp", "tp"), P("dp"), P("dp")
    found, found_logprob = share.over(
        lambda logits, sampling, position: draw(
            logits, None, sampling, position, share=share, variant=variant
        ),
        where,
        P("dp"),
    )(logits, sampling, position)
    np.testing.assert_array_equal(found, token)
    np.testing.assert_allclose(found_logprob, logprob, rtol=1e-5)
    assert token[-1] == 200 and np.isnan(found_logprob[-1])
    assert len(np.unique(token[:-3])) > 9 or not temperature


def test_heads_of_a_group_may_lie_on_several_devices():
    """6 heads of 2 groups over 3 devices, and of 3 groups over 2: 2 and 3 each."""
    for kv_heads, tp, groups in ((2, 3, ((0,), (0, 1), (1,))), (3, 2, None)):
        config = dataclasses.replace(LLAMA, **{**EIGHT, "heads": 6}, kv_heads=kv_heads)
        config = dataclasses.replace(config, neurons=72)
        found = shard_groups(config, tp)
        assert {g for own in found for g in own} == set(range(kv_heads))
        if groups:
            assert [sorted(set(own)) for own in found] == [list(g) for g in groups]
        params = random_params(config, routers=True)
        options = {"max_new_tokens": 5, "density": 0.5}
        one, many = (
            polarjax.generate(p, PROMPTS, **options)
            for p in (params, shard(params, make_mesh(tp)))
        )
        assert one.tokens == many.tokens and one.stats.density == many.stats.density


@pytest.mark.parametrize(
    ("sparse", "temperature", "top_p"), [(False, 0, 1), (True, 1, 1), (False, 1, 0.5)]
)
def test_the_step_says_to_other_devices_what_it_must(sparse, temperature, top_p):
    params = shard(make("opt", layers=3), make_mesh(4))
    policy = Polar(0.5, 0.4) if sparse else polarjax.Dense()
    weights, bound = policy.bind(params)
    config, rows = params.config.architecture, bound.wants.scores
    dense = make_decoder(config, params.weights, implementation="xla")
    slots = empty_slots(dense, 2, 16, 3, 16, params.weights)
    asked = {"temperature": temperature, "top_p": top_p, "stop_ids": ()}
    variant = variant_of(settings_of(config, None, 2, asked))
    model = dense.clone(score_rows=rows)
    text = "".join(
        lowered.compile().as_text()
        for lowered in (
            steps.decode.lower(weights, bound, slots, model=model),
            steps.draw_tokens.lower(slots, model=dense, variant=variant),
        )
    )
    reduced, gathered = (
        len(re.findall(rf"= \S+ {name}(?:-start)?\(", text))
        for name in ("all-reduce", "all-gather")
    )
    # Two a layer and the embedding; the sum of each device's logits and its best token,
    # and of two sparse layers what the routers' rows yield and what neurons are needed.
    assert reduced == 2 * 3 + 1
    assert gathered == 2 + (2 * 2 if sparse else 0)
    # Logits of all the vocabulary are needed where a draw is from a part of it.
    everything = re.findall(rf"= f32\[2,{config.vocab_size}\]\S* all-gather", text)
    assert len(everything) == (top_p < 1)
    assert not re.search(r"= \S+ (all-to-all|collective-permute)\(", text)


def test_a_model_comes_back_whole(tmp_path):
    params = make("gqa")
    cut = shard(params, make_mesh(8))
    back = whole(cut)
    for one, other in zip(*map(jax.tree.leaves, (params, back)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole(params) is params
    with pytest.raises(ValueError, match=r"save polarjax.mesh.cut.whole\(params\)"):
        polarjax.save(cut, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_a_model_is_not_moved_to_another_mesh():
    params, mesh = make("gqa"), make_mesh(4)
    cut = shard(params, mesh)
    assert shard(cut, mesh) is cut
    with pytest.raises(ValueError, match=r"cut over {'dp': 1, 'tp': 4}, not .*: load"):
        polarjax.generate(cut, PROMPTS, mesh=make_mesh(2))


def test_what_recovery_changed_is_cut_too():
    params = make("gqa")
    updates = init_updates(jax.random.key(0), params.weights, 2, 3)
    draw = np.random.default_rng(0)
    updates = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape), updates)
    updates = jax.tree.map(lambda x: x.astype(np.float32), updates)
    routers = dict(params.routers)
    for name, change in updates.items():
        routers[name] = {**routers.get(name, {}), "updates": change}
    params = with_learned(params, routers=routers)
    options = {"max_new_tokens": 6, "density": 0.5}
    one, many = (
        polarjax.generate(p, PROMPTS, **options)
        for p in (params, shard(params, make_mesh(8)))
    )
    assert one.tokens == many.tokens


def test_each_device_reads_its_own_rows(tmp_path, monkeypatch):
    config = dataclasses.replace(LLAMA, layers=2, vocab_size=332)
    params, mesh = random_params(config, routers=True), make_mesh(4)
    write_checkpoint(tmp_path / "model", params)
    read, get_slice = Counter(), safe_open.get_slice

    class Rows:
        def __init__(self, rows):
            self.rows, self.get_shape = rows, rows.get_shape
            self.get_dtype = rows.get_dtype

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

    monkeypatch.setattr("polarjax.storage.tensors.safe_open", Spied)
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


def test_a_vocabulary_that_does_not_divide_is_whole_everywhere():
    params = make("gqa", vocab_size=331)
    cut = shard(params, make_mesh(4))
    assert cut.weights["embed"]["tokens"].is_fully_replicated
    assert not cut.weights["layers_1"]["mlp"]["up"].is_fully_replicated
    tokens = np.arange(12)[None]
    one, many = (polarjax.logits(p, tokens) for p in (params, cut))
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-4)


def test_meshes_that_cannot_be():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"there are {count} devices"):
        make_mesh(count + 1)
    with pytest.raises(ValueError, match="dp 2 x tp 8 needs 16 devices"):
        make_mesh(8, 2)
    with pytest.raises(ValueError, match="dp 3 does not divide the 8 devices"):
        make_mesh(dp=3)
    assert dict(make_mesh(dp=2).shape) == {"dp": 2, "tp": 4}
    assert dict(default_mesh(MODELS["mha"]).shape) == {"dp": 1, "tp": 8}
    assert dict(default_mesh(MHA).shape) == {"dp": 4, "tp": 2}  # 6 heads
    # A training's copies have equal parts of the batch.
    assert dict(default_mesh(MHA, 1).shape) == {"dp": 1, "tp": 2}
    assert dict(default_mesh(MHA, 12).shape) == {"dp": 4, "tp": 2}
    assert dict(default_mesh(MHA, 6).shape) == {"dp": 6, "tp": 1}
    assert dict(default_mesh(MHA, 16).shape) == {"dp": 8, "tp": 1}
    params = make("gqa", heads=12, neurons=72)
    with pytest.raises(ValueError, match=r"tp 8 does not divide .* 12 query heads"):
        shard(params, make_mesh(8))
    with pytest.raises(ValueError, match="it may be 1, 2, 3, 4, 6 or 12"):
        shard(params, make_mesh(5))
    with pytest.raises(ValueError, match="4 KV groups do not divide into 8"):
        polarjax.generate(make("gqa"), PROMPTS, policy=Polar(0.5, balanced=8))
    with pytest.raises(ValueError, match="over 2 devices, but the model is cut over 4"):
        mesh = make_mesh(4)
        polarjax.generate(
            make("gqa"), PROMPTS, policy=Polar(0.5, balanced=2), mesh=mesh
        )


def test_meshes_without_the_axis(tmp_path):
    params = random_params(dataclasses.replace(LLAMA, layers=1))
    write_checkpoint(tmp_path / "model", params)
    with pytest.raises(ValueError, match=r'has the axes dp, but .* along "tp"'):
        polarjax.load(tmp_path / "model", mesh=jax.make_mesh((8,), ("dp",)))
