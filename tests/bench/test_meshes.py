"""`polarjax bench` over host devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import polarjax
from benchmarks import readme
from polarjax.bench import (
    decode,
    meshes,
    plots,
    profiling,
    random_weights,
    rounds,
    rows,
    shapes,
    steps,
)
from polarjax.bench.meshes import Devices
from polarjax.cli import main
from polarjax.engine import steps as engine
from polarjax.engine.programs import Drawn
from polarjax.engine.stats import imbalance
from polarjax.mesh.cut import make_mesh, placement, shard, whole
from polarjax.params import Params
from tests.bench.test_bench import options

pytestmark = pytest.mark.devices(8)

CONFIG = shapes.TOY_MODELS["toy-opt"]  # 4 heads and groups of 16, 2 layers
B, M, F, V = 2, 64, 256, 500


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "toy.json"
    common = ["--toy", "--repeats", "1", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "read_bandwidth", lambda device: 1e10)
        patch.setattr(meshes, "link_rate", lambda mesh: 2e9)
        assert main.main(["bench", "--cases", "toy-tp2", *common]) == 0
        given = ["--tp", "1", "--dp", "2", "--link-gb-s", "5", "--prefill", "2x16"]
        assert main.main(["bench", "--cases", "toy-llama", *given, *common]) == 0
    return path


def test_rows_of_a_mesh_stand_beside_those_of_one_device(results):
    found = rows.read(results)["rows"]
    assert [(r["kind"], r["policy"], r["tp"], r["dp"]) for r in found] == [
        ("decode", "dense", 1, 1),
        ("decode", "heads 0.5, neurons 0.5", 1, 1),
        ("decode", "dense", 2, 1),
        ("decode", "heads 0.5, neurons 0.5", 2, 1),
        ("decode", "heads 0.5, neurons 0.5, balanced", 2, 1),
        ("decode", "dense", 1, 2),
        ("decode", "heads 0.5", 1, 2),
        ("prefill", "2x32", 1, 2),
        ("prefill", "2x16", 1, 2),
    ]
    for one, two in zip((0, 1, 1), found[2:5], strict=True):
        one = found[one]
        assert "sent_ms" not in one and not one.get("over_one_device")
        assert two["over_one_device"] == one["ms"] / two["ms"]
        assert two["over_dense"] > 0
        assert ("over_dense_range" in two) == (two["policy"] != "dense")
        reads = (two["weight_bytes"] + two["kv_bytes"]) / 1e10
        floor = reads + two["sent_bytes"] / 2e9
        assert two["floor_ms"] == pytest.approx(floor * 1e3)
        assert two["sent_ms"] == pytest.approx(two["sent_bytes"] / 2e6)
        assert two["floor_fraction"] == pytest.approx(two["floor_ms"] / two["ms"])
        assert (two["link_gb_s"], two["link_is"]) == (2.0, "measured")
        assert two["cache_copies"] == 0
        # What the compiled program says is what was planned.
        said = sum(each["bytes"] for each in two["collectives"].values())
        assert said == two["sent_bytes"] > 0
    dense, both, balanced = found[2:5]
    counts = {kind: each["count"] for kind, each in dense["collectives"].items()}
    assert counts == {"all-reduce": 5, "all-gather": 2}
    assert both["collectives"]["all-gather"]["count"] == 4
    # Each chooses among its own neurons: nobody has to ask.
    assert balanced["collectives"]["all-gather"]["count"] == 3
    # Two sums a layer and one of the embedding; log-sum-exps, and the best tokens.
    assert dense["sent_bytes"] == 5 * 4 * B * M + (4 + 16) * B
    # Half of everything but norms, biases of sums and positions.
    half = V * M + 2 * (4 * M * M + 3 * M + F * (2 * M + 1))
    alike = 2 * (4 * M + 2 * M) + 2 * M
    assert dense["weight_bytes"] == 4 * (half // 2 + alike)
    token = 2 * CONFIG.head_dim * 4
    assert dense["kv_bytes"] == 2 * 96.5 * 2 * 2 * token  # of 4 groups 2, 2 layers
    assert balanced["kv_bytes"] == 2 * 96.5 * (2 + 1) * token
    assert dense["imbalance"] == balanced["imbalance"] == 1.0
    assert 1 <= both["imbalance"] <= 4 / 3 and both["kv_bytes"] == pytest.approx(
        both["imbalance"] * balanced["kv_bytes"]
    )
    # Copies of the model: a half of the batch each, and nothing to say.
    copied = found[5]
    assert copied["kv_bytes"] == 96.5 * 4 * 2 * CONFIG.head_dim * 4
    assert copied["sent_bytes"] == 0 and copied["collectives"] == {}
    assert copied["over_one_device"] is None
    assert (copied["link_gb_s"], copied["link_is"]) == (5.0, "given")


def test_columns_of_a_mesh_are_shown_where_there_are_such_rows(results, tmp_path):
    table = readme.decode_table(results)
    report = rows.read(results)
    two = report["rows"][2]
    cells = f"5 all-reduce, 2 all-gather | 0.0 MB, 0.00 ms | 1.00 | {two['ms']}"
    cells = cells.rpartition(" | ")[0] + " | not told apart ("  # of one round
    assert f"| toy-opt b 2 s 128 tp 2 | dense | 1 | {two['ms']:.2f}" in table
    assert cells in table and "over one device |" in table and "busiest" in table
    widths = {
        line.count("|")
        for line in table.splitlines()
        if line.startswith(("| model,", "| toy"))
    }
    assert widths == {14}
    report["rows"] = [row for row in report["rows"] if "sent_ms" not in row]
    rows.write_json(tmp_path / "one.json", report)
    table = readme.decode_table(tmp_path / "one.json")
    assert "busiest" not in table and "over one device" not in table
    one, *_, last = rows.read(results)["rows"]
    panels = plots._panels([one, {**one, "batch": 4}, two, last], "batch", "context")
    assert list(panels) == ["toy-opt, s 128"]


@pytest.mark.parametrize("name", ["toy-opt", "toy-llama"])
def test_random_weights_are_made_where_they_lie(name):
    config, mesh = shapes.TOY_MODELS[name], make_mesh(2, 2)
    found = random_weights.random_params(config, jnp.float32, head_rank=3, mesh=mesh)
    one = random_weights.random_params(config, jnp.float32, head_rank=3)
    leaves = jax.tree.leaves(found), jax.tree.leaves(shard(one, mesh))
    for leaf, want in zip(*leaves, strict=True):
        assert leaf.sharding == want.sharding and leaf.shape == want.shape
    back = whole(found)
    shaped = jax.tree.map(jnp.shape, back.weights)
    assert shaped == jax.tree.map(jnp.shape, one.weights)
    qkv = found.weights["layers_1"]["attention"]["qkv"]
    parts = {s.device.id: np.asarray(s.data) for s in qkv.addressable_shards}
    assert not np.array_equal(parts[0], parts[1])  # other heads
    assert np.array_equal(parts[0], parts[2])  # another copy
    place = placement("layers_1/mlp/up", (F, M), config, mesh).sharding
    key = jax.random.key(0)
    lowered = random_weights._normal.lower(key, (F, M), jnp.float32, place)
    program = lowered.compile().as_text()
    assert f"[{F // 2},{M}]" in program and f"[{F},{M}]" not in program


def test_noise_is_made_where_it_lies_and_one_program_runs():
    mesh = make_mesh(2, 2)
    params = random_weights.random_params(CONFIG, jnp.float32, mesh=mesh)
    state = steps.make_state(params, 4, 64)
    keys = state.cache.keys[0]
    assert keys.sharding.spec == P("dp", "tp")
    parts = [np.asarray(part.data) for part in keys.addressable_shards]
    assert parts[0].shape == (3, 2, 64, 16)  # trash, and one page for each of two
    assert len({part.tobytes() for part in parts}) == 4
    weights, bound = polarjax.Polar(0.5, balanced=2).bind(params)
    step = steps.make_step(params, weights, bound)
    jax.clear_caches()
    _, _, [drawn] = rounds.times([step], state, 64, 1)
    assert engine.decode._cache_size() == engine.draw_tokens._cache_size() == 1
    assert len(drawn) == 63 and drawn[0].own.shape == (2, 2, 2)


def test_the_floor_is_that_of_the_busiest():
    """Two steps of two layers; 2 copies of the model, each over 2 devices."""
    own = [[[3, 1], [2, 2]], [[0, 4], [1, 1]]], [[[2, 2], [2, 2]], [[4, 0], [2, 2]]]
    empty = np.zeros(0)
    both = [
        Drawn(empty, empty, empty, empty, np.array([n] * 4), np.array(each))
        for n, each in zip((10, 11), own, strict=True)
    ]
    # The first copy's: 3 and 4 groups, then 2 and 4.
    rows = [steps.busiest_rows(drawn, CONFIG) for drawn in both]
    assert rows == [10 * (3 + 4), 11 * (2 + 4)]
    assert imbalance(both) == (3 + 2 + 4 + 1 + 2 + 2 + 4 + 2) / 15


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %s = f32[2,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %t = (bf16[4]{0}, f32[]) all-reduce-start(%y, %z), replica_groups=[1,4]<=[4]
  %u = (bf16[4]{0}, f32[]) all-reduce-done(%t)
}

%called (p: f32[2,8]) -> f32[2,16] {
  %g = (f32[2,8]{1,0}, f32[2,16]{1,0}) all-gather-start(%p), replica_groups={{0,1}}
  %d = f32[2,16]{1,0} all-gather-done(%g)
}

ENTRY %main.2 (p: f32[2,8]) -> f32[2,16] {
  %w = (s32[], f32[2,8]{1,0}) while(%i), condition=%c, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %c = f32[2,16]{1,0} call(%v), to_apply=%called
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert profiling.collectives(HLO) == {
        "all-reduce": {"count": 6, "bytes": 3 * (64 + 2 * 3 / 4 * 12)},
        "all-gather": {"count": 1, "bytes": 64},
    }
    groups, axes = "replica_groups={{0,1},{2,3}}", "replica_groups=mesh['dp'=4,'tp'=2]"
    for other, n in (("{'tp'}", 2), ("{'dp','tp'}", 8)):
        found = profiling.collectives(HLO.replace(groups, f"{axes} {other}"))
        sent = 3 * (2 * (n - 1) / n * 64 + 2 * 3 / 4 * 12)
        assert found["all-reduce"] == {"count": 6, "bytes": sent}
    found = profiling.collectives(HLO.replace(groups, "replica_groups={}"))
    assert found["all-reduce"] == {"count": 6, "bytes": None}
    assert found["all-gather"] == {"count": 1, "bytes": 64}


def test_a_profile_is_of_one_device_and_knows_collectives():
    def plane(name, *events):
        found = [types.SimpleNamespace(**event) for event in events]
        line = types.SimpleNamespace(name="Stream #1", events=found)
        return types.SimpleNamespace(name=name, lines=[line])

    sum_up = {"name": "ncclDevKernel_AllReduce", "start_ns": 0, "duration_ns": 5}
    sum_up["stats"] = {"hlo_op": "all-reduce-start.1"}.items()
    data = types.SimpleNamespace(
        planes=[
            *(plane("/host:CPU", sum_up), plane("/device:GPU:0")),
            *(plane("/device:GPU:1", sum_up), plane("/device:GPU:2", sum_up)),
        ]
    )
    [event] = profiling.events(data)
    place = {"all-reduce-start.1": "while/body/attention.output_parts/psum"}
    assert profiling.group(event, place) == "collectives"


def test_the_link_is_measured_unless_it_is_given(monkeypatch):
    assert meshes.link_rate(make_mesh(2, 2)) > 0
    assert meshes.link_rate(make_mesh(1, 2)) > 0
    # 2 (n - 1) / n of what is summed, in as many seconds as its calls took.
    ticks = iter(np.arange(100.0))
    monkeypatch.setattr(meshes.time, "perf_counter", lambda: next(ticks))
    rate = meshes.link_rate(make_mesh(4))
    assert rate == 2 * 3 / 4 * 2**24 * meshes.CALLS
    monkeypatch.setattr(meshes, "link_rate", lambda mesh: 1 / 0)
    assert Devices.of(1, 1, None) == Devices() and Devices().mesh is None
    assert Devices.of(2, 2, 7.0) == Devices(2, 2, 7e9)


def test_the_cases_that_two_gpus_are_wanted_for():
    case = shapes.CASES["llama-3.1-8b-b64-tp2"]
    assert (case.batch, case.context, case.meshes) == (64, 4096, ((1, 1), (2, 1)))
    wanted = [case.over_one, *(sparse.over_one for sparse in case.sparse)]
    assert wanted == [1.75, 1.6, 1.7]
    labels = [[s.label(tp) for s in case.sparse] for tp in (1, 2)]
    assert labels[0] == ["heads 0.625", "heads 0.75"]
    assert labels[1] == ["heads 0.625", "heads 0.75, balanced"]
    case = shapes.CASES["llama-3.1-70b-tp2"]
    assert (case.batch, case.context, case.floor) == (8, 2048, 0.85)
    assert case.model == "llama-3.1-70b" and case.meshes == ((2, 1),)


def test_cases_go_where_they_are_told():
    asked = options("--cases", "toy-llama", "--tp", "1", "2", "--dp", "2", "--balanced")
    [case] = decode.chosen_cases(asked).values()
    assert case.meshes == ((1, 2), (2, 2)) and case.devices == 4
    assert all(sparse.balanced for sparse in case.sparse)


def test_too_few_devices_are_an_error_only_where_asked_for(capsys):
    everything = decode.chosen_cases(options())
    kept = decode.with_devices(everything, options(), 1)
    assert set(everything) - set(kept) == {"llama-3.1-8b-b64-tp2", "llama-3.1-70b-tp2"}
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2
    assert "left out: llama-3.1-70b-tp2 needs 2 devices, 1 is here\n" in shown
    assert decode.with_devices(everything, options(), 2) == everything
    for argv in (["--cases", "toy-tp2"], ["--models", "opt-30b", "--tp", "2"]):
        asked = options(*argv)
        with pytest.raises(ValueError, match="needs 2 devices, 1 is here"):
            decode.with_devices(decode.chosen_cases(asked), asked, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "toy-layers", "--tp", "2"], "layers alone run on one device"),
        (["--cases", "toy-opt", "--tp", "3"], "toy-opt: tp 3 does not divide"),
        (["--cases", "toy-opt", "--tp", "0"], "must be positive, got 0 and 1"),
        (["--cases", "toy-opt", "--dp", "4"], "dp 4 does not divide the batch of 2"),
        (["--cases", "toy-opt", "--dp", "2", "--prefill", "3x8"], "the batch of 3"),
        (["--cases", "toy-opt", "--link-gb-s", "0"], "--link-gb-s must be above 0"),
        (["--cases", "toy-opt", "--tp", "4", "--dp", "4"], "does not divide the batch"),
        (
            ["--cases", "toy-llama", "--tp", "4", "--balanced"],
            "toy-llama: 2 KV groups do not divide into 4",
        ),
    ],
)
def test_what_does_not_fit_a_mesh_is_one_line(argv, message, capsys):
    assert main.main(["bench", "--toy", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_model_too_large_for_its_devices_is_a_row(monkeypatch):
    def refuse(*_) -> Params:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(decode, "load_model", refuse)
    kept = rows.Rows({"dtype": "float32"}, None)
    asked = options("--cases", "toy-tp2")
    decode.run_model(
        "toy-opt", Devices(2, 1, 1e9), decode.chosen_cases(asked), asked, kept
    )
    [row] = kept.own
    assert "no room" in row["error"] and (row["tp"], row["dp"]) == (2, 1)
