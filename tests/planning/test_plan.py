"""`polarjax.plan` beside the arrays that it has never seen."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.bench import steps
from polarjax.bench.shapes import MODELS
from polarjax.cache import PagedCache
from polarjax.cli import main, plan
from polarjax.engine import steps as engine
from polarjax.engine.sampling import Variant
from polarjax.mesh.cut import local_config, make_mesh, shard
from polarjax.model import make_decoder
from polarjax.params import Params
from polarjax.planning import devices
from polarjax.planning.cost import kv_row_bytes, step_weight_bytes, tree_bytes
from polarjax.planning.memory import (
    PAGE,
    cache_bytes,
    prefill_bytes,
    sampling_bytes,
)
from polarjax.planning.sizes import bucket
from polarjax.policies.adapter import as_stored, of_learned
from polarjax.policy import Learned, Load
from tests.convert.checkpoints import LLAMA as PUBLISHED
from tests.convert.checkpoints import write_gguf
from tests.models import LLAMA, OPT, random_params

WINDOWED = dataclasses.replace(LLAMA, windows=(0, 9, 0, 9))
OPT_12 = dataclasses.replace(OPT, heads=12, kv_heads=12, vocab_size=336)
LLAMA_2_7B = dataclasses.replace(MODELS["llama-2-7b"], context=2**17)


def real(config, head_rank, neuron_rank=0) -> Params:
    """In bfloat16, with the routers of an adapter."""
    params = random_params(
        config, routers=True, head_rank=head_rank, neuron_rank=neuron_rank
    )
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params.weights)
    policy = of_learned(Learned(as_stored(params.routers)))
    return Params(weights, policy, config)


@pytest.mark.parametrize(
    ("config", "policy", "ranks"),
    [
        (LLAMA, polarjax.Polar(0.5), (0, 0)),
        (LLAMA, polarjax.Polar(0.5), (4, 0)),
        (
            dataclasses.replace(LLAMA, windows=(0, 9, 0, 9)),
            polarjax.Polar(0.25),
            (4, 0),
        ),
        (OPT, polarjax.Polar(0.5, 0.3), (4, 8)),
        (LLAMA, polarjax.Dense(), (4, 0)),
    ],
)
def test_bytes_are_those_of_the_arrays(config, policy, ranks):
    batch, context = 3, 20
    params = real(config, *ranks)
    weights, bound = policy.bind(params)
    density = getattr(policy, "density", 1.0)
    neurons = getattr(policy, "neuron_density", None) or 1.0
    [row] = polarjax.plan(
        config,
        "h200",
        densities=[density],
        neuron_density=neurons,
        batches=[batch],
        contexts=[context],
        head_rank=ranks[0],
        neuron_rank=ranks[1],
    ).rows
    kept = [config.kv_heads, *[int(density * config.kv_heads)] * (config.layers - 1)]
    seen = [min(context, config.window(i) or context) for i in range(config.layers)]
    rows = batch * sum(n * s for n, s in zip(kept, seen, strict=True))
    reads = bound.reads(config, Load(batch, context))
    want = step_weight_bytes(weights, config, bound, reads)
    want += rows * kv_row_bytes(config, jnp.bfloat16)
    # A bias that two kinds of rows share is counted for both.
    assert row.step_bytes == pytest.approx(want, rel=1e-2 if neurons < 1 else 1e-9)
    assert row.step_ms == pytest.approx(row.step_bytes / 4.8e12 * 1e3)
    assert row.tokens_per_second == pytest.approx(batch / row.step_ms * 1e3)
    assert row.sent_bytes == 0 and row.read_ms == row.step_ms
    assert row.density == density and row.neuron_density == pytest.approx(neurons, 0.05)

    # Memory: what is there once a policy is bound, the cache, and what comes and goes.
    leaves = jax.tree.leaves((params.weights, params.routers, weights))
    if isinstance(policy, polarjax.Dense):
        leaves = jax.tree.leaves(params.weights)
    held = sum({id(leaf): leaf.nbytes for leaf in leaves}.values())
    capacity = -(-context // PAGE) * PAGE
    cache = PagedCache.pool(
        config, batch, capacity, batch * capacity // PAGE, PAGE, jnp.bfloat16
    )
    held += tree_bytes((cache.keys, cache.values))
    held += sampling_bytes(config, batch)
    held += prefill_bytes(config, bucket(batch * context), jnp.bfloat16)
    assert row.memory_bytes == held


def test_a_model_that_everybody_knows():
    # 512 KiB of keys and values for each token.
    weights, token = 2 * 6_738_415_616, 2 * 32 * 4096 * 2
    found = polarjax.plan(
        LLAMA_2_7B, "h100", batches=[16], contexts=[2048], head_rank=0
    )
    assert found.weight_bytes == weights
    dense, sparse = found.rows
    read = weights - 2 * 32000 * 4096 + 16 * 2048 * token
    assert dense.step_bytes == read and dense.over_dense == 1
    assert dense.step_ms == pytest.approx(read / 3.35e9)
    saved = 16 * 2048 * token * 31 / 32 / 2
    assert sparse.step_bytes == pytest.approx(read - saved, rel=1e-3)
    assert sparse.over_dense == dense.step_bytes / sparse.step_bytes > 1.3
    assert "datasheet" in found.device.source


def by_hand(config, tp, dp, batch, read, sent, **settings):
    """The rows, dense and sparse, that read and send these bytes."""
    found = polarjax.plan(
        config,
        "h200",
        tp=tp,
        dp=dp,
        batches=[batch],
        contexts=[1024],
        densities=[1.0] * (len(read) == 2) + [0.5],
        **settings,
    )
    for row, bytes_read, bytes_sent in zip(found.rows, read, sent, strict=True):
        assert row.step_bytes == bytes_read and row.sent_bytes == bytes_sent
        assert row.read_ms == pytest.approx(bytes_read / 4.8e9)
        assert row.step_ms == pytest.approx(row.read_ms + bytes_sent / 450e6)
        assert row.tokens_per_second == pytest.approx(batch / row.step_ms * 1e3)
    return found


def test_two_devices_have_half_each():
    # Norms alone are whole on both. A ring of two sends each byte that is summed once.
    m, layers, b, v = 4096, 32, 16, 32000
    # A token, its score and logit, and its device's log-sum-exp, which went before it.
    best = 16 + 4
    norms = 2 * (2 * layers + 1) * m
    weights = (2 * 6_738_415_616 - norms) // 2 + norms
    reductions = layers * 2 * 4 * b * m + 2 * b * m
    gathered = best * b
    dense = weights - v * m + b * 1024 * 2**18
    rows = 31 * 16 * 2 * (m + 1)
    bias = 31 * 2 * 3 * m // 2  # a policy gives the QKV matrix one
    sparse = dense + rows + bias - 31 * b * 1024 * 2**13 // 2
    found = by_hand(
        LLAMA_2_7B,
        2,
        1,
        b,
        (dense, sparse),
        (reductions + gathered, reductions + gathered + 31 * 4 * b * 32 // 2),
        head_rank=0,
    )
    assert found.weight_bytes == weights and (found.tp, found.dp) == (2, 1)
    assert found.rows[1].over_dense == pytest.approx(
        found.rows[0].step_ms / found.rows[1].step_ms
    )


def test_fewer_groups_than_devices_lie_on_several():
    # 16 devices, 8 groups: each has one, another has it too. 5 requests: 3 and 2.
    config, m, b = MODELS["llama-3.1-8b"], 4096, 3
    layer = (2 + 2) * 128 * m + 2 * 128 * m + 3 * 896 * m + 2 * m
    weights = 2 * (32 * layer + 2 * 8016 * m + m)
    cache = 32 * b * 1024 * 2 * 2 * 128
    dense = weights - 2 * 8016 * m + cache
    sent = (32 * 2 * 4 * b * m + 2 * b * m) * 30 // 16 + 20 * b * 15
    # 8 + 64 rows of routers: 5 a device, 80 with those that fill up. The other half of
    # the head router's quadratic form is whole.
    added = 31 * 2 * (5 * (m + 1) + 4 * 128 + 8 * 64)
    sparse = dense + added - (cache - cache // 32) // 2
    more = 31 * 4 * b * 80 * 15 // 16
    found = by_hand(config, 16, 2, 5, (dense, sparse), (sent, sent + more))
    assert found.weight_bytes == weights
    # Each has an eighth of the cache of its part of the batch.
    held = cache_bytes(config, b, 1024, jnp.bfloat16) // 8
    work = sampling_bytes(config, b) + prefill_bytes(
        local_config(config, 16), 2048, jnp.bfloat16
    )
    assert found.rows[0].memory_bytes == weights + held + work


@pytest.mark.parametrize("vocabulary", [50272, 50273])
def test_devices_share_neurons_and_their_routers(vocabulary):
    config = dataclasses.replace(MODELS["opt-6.7b"], vocab_size=vocabulary)
    m, f, b, cut = 4096, 16384, 8, vocabulary % 2 == 0
    neurons = f // 2 * (2 * m + 1)
    layer = 4 * m * m // 2 + 3 * m // 2 + m + neurons + m + 4 * m
    table = vocabulary * m // (1 + cut)
    weights = 2 * (32 * layer + table + 2050 * m + 2 * m)
    cache = 32 * b * 1024 * 2**13
    dense = weights - 2 * 2050 * m + cache
    # Rows of the head and the neuron router; the second matrices, cut by neurons alone.
    added = 31 * 2 * (560 * (m + 1) + 32 * 64 + f // 2 * 1024)
    sparse = dense + added - 31 * 2 * neurons // 2 - 31 * b * 1024 * 2**12
    sent = 32 * 2 * 4 * b * m + cut * (2 * b * m + 20 * b)
    more = 31 * (4 * b * 1120 // 2 + 4 * f // 2 + 4 * f // 2)
    found = by_hand(
        config,
        2,
        2,
        16,
        (dense, sparse),
        (sent, sent + more),
        neuron_density=0.5,
    )
    assert found.weight_bytes == weights
    # Kept: the routers as stored, whole but for what is cut by neurons, and the QKV
    # matrices with rows in them.
    routers = 31 * (4 * 32 * (m + 1) + 2 * (64 * m + 32 * 64 + 1024 * (m + f // 2)))
    bound = 31 * 2 * (3 * m // 2 + 560) * (m + 1)
    kept = routers + bound
    assert found.rows[1].memory_bytes - found.rows[0].memory_bytes == kept


OTHERS = ("pmax", "pmin", "ppermute", "all_to_all", "reduce_scatter", "pbroadcast")


def on_first_device(tree):
    """Bytes of what lies there, each array once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def sent_by(jaxpr, devices):
    """Bytes that the collectives of a traced program send, each counted once."""
    total = 0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        if name in ("psum", "all_gather"):
            axes = settings["axes" if name == "psum" else "axis_name"]
            axes = axes if isinstance(axes, tuple) else (axes,)
            [n] = [devices[axis] for axis in axes]
            whole = sum(x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
            total += (1 + (name == "psum")) * (n - 1) * whole / n
        assert name not in OTHERS
        for value in settings.values():
            inner = getattr(value, "jaxpr", value)
            total += sent_by(inner, devices) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("config", "tp", "dp", "policy", "ranks"),
    [
        (LLAMA, 8, 1, polarjax.Polar(0.5), (4, 0)),
        (dataclasses.replace(LLAMA, vocab_size=332), 4, 2, polarjax.Dense(), (0, 0)),
        (OPT_12, 4, 2, polarjax.Polar(0.5, 0.3), (5, 7)),
        (LLAMA, 2, 2, polarjax.Polar(0.3, balanced=2), (4, 0)),
        (OPT_12, 4, 2, polarjax.Polar(0.5, 0.28, balanced=4), (5, 7)),
    ],
    ids=["fewer groups", "dense", "neurons", "balanced", "balanced neurons"],
)
@pytest.mark.devices(8)
def test_each_device_has_and_sends_what_is_planned(config, tp, dp, policy, ranks):
    batch, context = 6, 20
    params, mesh = shard(real(config, *ranks), make_mesh(tp, dp)), make_mesh(tp, dp)
    weights, bound = policy.bind(params)
    neurons = getattr(policy, "neuron_density", None) or 1.0
    balanced = getattr(policy, "balanced", 1) > 1
    found = polarjax.plan(
        config,
        "h200",
        densities=[getattr(policy, "density", 1.0)],
        neuron_density=neurons,
        batches=[batch],
        contexts=[context],
        head_rank=ranks[0],
        neuron_rank=ranks[1],
        tp=tp,
        dp=dp,
        balanced=balanced,
    )
    [row] = found.rows
    assert found.weight_bytes == on_first_device(params.weights)
    capacity = -(-context // PAGE) * PAGE
    model = make_decoder(config, params.weights)
    own = local_config(config, tp)
    held = kv_row_bytes(config, jnp.bfloat16) * own.kv_heads * config.layers
    held *= batch // dp * capacity
    if isinstance(policy, polarjax.Dense):
        held += on_first_device(params.weights)
    else:
        held += on_first_device((params.weights, params.routers, weights))
    held += sampling_bytes(config, batch // dp) + prefill_bytes(
        local_config(config, tp), bucket(batch // dp * context), jnp.bfloat16
    )
    assert row.memory_bytes == held

    step = steps.make_step(params, weights, bound, "xla")
    state = steps.make_state(params, batch, context)
    read_on = engine.decode.trace(weights, bound, state, model=step.model)
    drawing = engine.draw_tokens.trace(state, model=model, variant=Variant.GREEDY)
    sent = sum(sent_by(each.jaxpr, mesh.shape) for each in (read_on, drawing))
    assert sent == row.sent_bytes > 0

    # A bias that two kinds of rows share is counted for both.
    full = jnp.full(batch, context - 1, device=state.cache.lengths.sharding)
    cache = dataclasses.replace(state.cache, lengths=full)
    _, drawn = step(dataclasses.replace(state, cache=cache))
    # Of each device, over layers and requests.
    groups = np.asarray(drawn.own, np.int64).sum(axis=0)
    own = jax.tree.map(lambda x: x.addressable_shards[0].data, (weights, bound))
    reads = bound.reads(config, Load(batch, context))
    read = step_weight_bytes(own[0], config, own[1], reads)
    read += groups.mean() * context * kv_row_bytes(config, jnp.bfloat16)
    assert row.step_bytes == pytest.approx(read, rel=1e-2 if neurons < 1 else 1e-9)
    assert not balanced or groups.min() == groups.max()
    assert row.density == (drawn.reads[1] / config.kv_heads).min()


def test_the_largest_batch_fits_and_one_more_does_not():
    def rows(batch):
        found = polarjax.plan(
            LLAMA_2_7B, "h100", batches=[batch], contexts=[2048, 100_000]
        )
        return found, [row.fits for row in found.rows if row.context == 2048]

    found, _ = rows(1)
    assert found.largest_batch[100_000] == {1.0: 0, 0.5: 0}
    assert not found.rows[-1].fits
    dense, half = found.largest_batch[2048][1.0], found.largest_batch[2048][0.5]
    assert dense > half > 8
    assert rows(half)[1] == [True, True] and rows(half + 1)[1] == [True, False]
    assert rows(dense)[1] == [True, False] and rows(dense + 1)[1] == [False, False]
    # Dense needs no router and no second QKV matrix.
    assert found.rows[0].memory_bytes < found.rows[1].memory_bytes


def test_what_fits_is_said_of_the_row_that_it_is_of(capsys):
    """Of an 8B model on a GPU that has room for it, but not for its QKV twice."""
    config = MODELS["llama-3.1-8b"]
    found = polarjax.plan(config, "rtx-4090", batches=[1], contexts=[2048])
    assert [row.fits for row in found.rows] == [True, False]
    assert found.largest_batch == {2048: {1.0: 2, 0.5: 0}}
    more = found.rows[1].memory_bytes - found.rows[0].memory_bytes
    [note] = found.notes
    assert f"sparse rows hold {more / 1e9:.2f} GB more" in note and "QKV" in note
    plan._show(found)
    shown = capsys.readouterr().out
    assert "fits, 2,048 tokens: 2 at density 1.000, 0 at density 0.500\n" in shown
    assert f"note: {note}\n" in shown
    assert "tokens/s, at most" in shown and "are bounds" in shown


def test_what_was_asked_for_and_what_it_became(capsys):
    config = dataclasses.replace(LLAMA, heads=9, kv_heads=3)
    found = polarjax.plan(config, "h200", densities=[1.0, 2 / 3, 0.5])
    assert [row.density for row in found.rows[:3]] == [1.0, 2 / 3, 1 / 3]
    assert found.notes[0] == "density 0.5 was asked for: it is 1 of 3 KV groups"
    assert len(found.notes) == 2  # and of memory
    found = polarjax.plan(OPT, "h200", densities=[0.5], neuron_density=0.4321)
    assert found.notes[0].startswith("neuron density 0.432 was asked for: it is ")
    assert polarjax.plan(LLAMA, "h200", densities=[1.0]).notes == ()


def test_xlas_share_and_the_fraction_are_settings(monkeypatch):
    assert polarjax.plan(LLAMA, "h100").usable_bytes == pytest.approx(
        80e9 * 0.75 * 0.95
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    found = polarjax.plan(LLAMA, "H100", memory_fraction=0.5)
    assert found.usable_bytes == pytest.approx(80e9 * 0.9 * 0.5)


class Device:
    device_kind, platform = "NVIDIA Toy", "gpu"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_a_live_device_is_asked_and_measured(monkeypatch):
    monkeypatch.setattr(devices, "read_bandwidth", lambda device: 1e9)
    live = Device({"bytes_limit": 10**6, "bytes_in_use": 5})
    found = polarjax.plan(LLAMA, live, batches=[1, 10**4], contexts=[32])
    assert found.usable_bytes == 0.95e6 and found.device.bandwidth == 1e9
    assert [row.fits for row in found.rows] == [True, True, False, False]
    assert "measured" in found.device.source
    assert polarjax.plan(LLAMA).device.platform == jax.default_backend()
    with pytest.raises(ValueError, match=r"NVIDIA Toy does not say.*h100"):
        polarjax.plan(LLAMA, Device(None))


def test_contexts_go_as_far_as_the_model():
    def contexts(context):
        config = dataclasses.replace(LLAMA, context=context)
        return list(polarjax.plan(config, "h100").largest_batch)

    assert contexts(100) == [100]
    assert contexts(4096) == [2048, 4096]
    assert contexts(10**6) == [2048, 8192, 32768]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "h1000"}, "'h1000' is not known: there are .*h200"),
        ({"batches": [0]}, "batch must be a positive integer"),
        ({"contexts": [129]}, "context 129: the model's own is 128"),
        ({"densities": [0.0]}, "density must be a number above 0"),
        ({"neuron_density": 0.5}, "needs a ReLU MLP"),
        ({"memory_fraction": 1.5}, "memory_fraction must be above 0"),
        ({"head_rank": -1}, "head_rank must be an integer of at least 0, got -1"),
        ({"tp": 0}, "tp must be a positive integer"),
        ({"dp": 1.5}, "dp must be a positive integer"),
        ({"tp": 3}, r"tp 3 does not divide the model's 8 query heads: .* 1, 2, 4 or 8"),
        ({"tp": 2, "device": "l4"}, "how fast l4 sends .*--link-gb-s"),
        ({"tp": 8, "balanced": True}, "4 KV groups do not divide into 8 equal parts"),
        ({"tp": 2, "link_gb_s": 0}, "link_gb_s must be GB per second above 0"),
        ({"link_gb_s": 9}, "link_gb_s has no effect on one device"),
        ({"dp": 2, "balanced": True}, "balanced has no effect on one device"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        polarjax.plan(LLAMA, **{"device": "h100", **settings})


def test_neurons_that_are_chosen_need_routers():
    with pytest.raises(ValueError, match="neuron_rank must be a positive integer, got"):
        polarjax.plan(OPT, "h100", neuron_density=0.5, neuron_rank=0)


@pytest.fixture
def sources(tmp_path):
    """The same model, three ways; of the folder, config.json alone."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    write_gguf(tmp_path / "model.gguf", config=PUBLISHED)
    from convert import convert

    convert(tmp_path / "model.gguf", tmp_path / "converted", progress=False)
    for file in (tmp_path / "converted").glob("tensors-*"):
        file.unlink()
    return [folder, tmp_path / "model.gguf", tmp_path / "converted"]


def test_the_command_needs_no_weights(sources, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    options = "--device h200 --batches 1 3 --contexts 64 --densities 1 1/2".split()
    records = []
    for source in sources:
        assert main.main(["plan", str(source), *options, "--json"]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0] == records[1] == records[2]
    rows = records[0]["rows"]
    assert [(r["batch"], r["density"]) for r in rows] == [
        (1, 1.0),
        (1, 0.5),
        (3, 1.0),
        (3, 0.5),
    ]
    assert main.main(["plan", str(sources[0]), *options]) == 0
    shown = capsys.readouterr().out
    assert (
        "4,800 GB/s" in shown
        and "datasheet" in shown
        and "largest batch that fits" in shown
    )
    assert f"{rows[-1]['tokens_per_second']:,.0f}" in shown
    assert "sent" not in shown
    options += "--tp 2 --dp 2 --link-gb-s 0.5".split()
    assert main.main(["plan", str(sources[0]), *options, "--balanced"]) == 0
    assert "as many of its own groups" in capsys.readouterr().out.replace("\n", " ")
    assert main.main(["plan", str(sources[0]), *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    row = record["rows"][-1]
    assert (record["tp"], record["dp"], record["device"]["link"]) == (2, 2, 0.5e9)
    assert row["sent_ms"] == row["sent_bytes"] / 0.5e9 * 1e3 > 0
    assert main.main(["plan", str(sources[0]), *options]) == 0
    shown = capsys.readouterr().out
    assert "4 devices, tp 2 x dp 2, which send 0.5 GB/s" in shown and "sent" in shown
    assert "taken to lie evenly" in shown.replace("\n", " ")
    for number in (row["sent_bytes"] / 1e6, row["read_ms"], row["step_ms"]):
        assert f"{number:.3f}"[:4] in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ('{"model_type": "gpt2"}', "'gpt2' is not supported"),
        ('{"format_version": 1}', "convert the original model again"),
        ("[", "is not valid JSON"),
    ],
)
def test_what_is_no_configuration_is_one_line(tmp_path, capsys, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    assert main.main(["plan", str(tmp_path), "--device", "h100"]) == 1
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error and error.count("\n") == 1
