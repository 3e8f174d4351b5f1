"""`polarjax bench` at toy size, and what it makes of events that are made up."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import polarjax
from benchmarks import readme
from polarjax.bench import (
    arguments,
    decode,
    plots,
    prefills,
    profiling,
    random_weights,
    rounds,
    rows,
    shapes,
    steps,
)
from polarjax.bench.table import table
from polarjax.cli import main
from polarjax.engine import steps as engine
from polarjax.mesh.cut import make_mesh, shard
from polarjax.model import Share, make_decoder, weight_shapes
from polarjax.model.layer import Layer
from polarjax.planning.cost import step_weight_bytes
from polarjax.policy import Seen
from polarjax.terminal.output import make_console
from tests.models import LLAMA, random_params, write_checkpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of two toy runs, the second of which adds a case to the first's."""
    path = tmp_path_factory.mktemp("bench") / "toy.json"
    common = ["--toy", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "read_bandwidth", lambda device: 1e10)
        first = ["--cases", "toy-llama", "--repeats", "2", "--profile"]
        assert main.main(["bench", *first, *common]) == 0
        assert main.main(["bench", "--cases", "toy-layers", *common]) == 0
    return path


def test_a_file_holds_every_row_and_where_it_comes_from(results):
    report = rows.read(results)
    assert [run["r_gb_s"] for run in report["runs"]] == [10, 10]
    for run in report["runs"]:
        assert {"device", "commit", "command", "date", "jax"} <= run.keys()
    found = [(r["kind"], r["case"], r["policy"], r["run"]) for r in report["rows"]]
    assert found == [
        ("decode", "toy-llama", "dense", 0),
        ("profile", "toy-llama", "dense", 0),
        ("decode", "toy-llama", "heads 0.5", 0),
        ("profile", "toy-llama", "heads 0.5", 0),
        ("prefill", "toy-llama", "2x32", 0),
        ("decode", "toy-layers", "dense", 1),
        ("decode", "toy-layers", "heads 0.5, neurons 0.5", 1),
    ]
    timed = {r["case"] + " " + r["policy"]: r for r in report["rows"] if "ms" in r}
    for row in timed.values():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["repeats"] == (2 if row["run"] == 0 else 5)
        assert row["trace_s"] > 0 and row["compile_s"] > 0
    dense, half = timed["toy-llama dense"], timed["toy-llama heads 0.5"]
    config = shapes.TOY_MODELS["toy-llama"]
    # 64 steps see 65 to 128 tokens; layer 0 reads both of its groups, layer 1 one.
    token = 2 * config.head_dim * 4
    assert dense["kv_bytes"] == 2 * 96.5 * 4 * token
    assert half["kv_bytes"] == 2 * 96.5 * 3 * token
    leaves = jax.tree.leaves(weight_shapes(config))
    table = config.vocab_size * config.dim
    assert dense["weight_bytes"] == 4 * (sum(x.size for x in leaves) - table)
    router = 2 * config.dim + 2  # rows, and a bias for each row of the matrix
    bias = (config.heads + 2 * config.kv_heads) * config.head_dim
    assert half["weight_bytes"] == dense["weight_bytes"] + 4 * (router + bias)
    floor = (half["weight_bytes"] + half["kv_bytes"]) / 1e10
    assert half["floor_ms"] == pytest.approx(floor * 1e3)
    assert half["floor_fraction"] == pytest.approx(half["floor_ms"] / half["ms"])
    assert dense["over_dense"] == 1 and half["over_dense_rounds"] == 2
    low, high = half["over_dense_range"]
    assert 0 < low <= half["over_dense"] <= high
    assert half["floor_over_dense"] == dense["floor_ms"] / half["floor_ms"] > 1
    assert half["tokens_per_second"] == pytest.approx(2e3 / half["ms"])
    alone = timed["toy-layers dense"]
    assert alone["kv_bytes"] == 2 * 96.5 * 4 * token  # one layer, four groups
    one = weight_shapes(shapes.TOY_MODELS["toy-opt"])["layers_1"]
    assert alone["weight_bytes"] == 4 * sum(x.size for x in jax.tree.leaves(one))


def test_what_is_compared_is_timed_in_turn(monkeypatch):
    """On a machine that gets twice as slow, what costs the same is found to."""
    clock, order, cost = [0.0], [], {"a": 3.0, "b": 3.0, "c": 2.0}

    def follow(step, state, context):
        order.append(step)
        clock[0] += 64 * cost[step] * (1.0 if len(order) < 6 else 2.0)
        return state, [step] * 64

    monkeypatch.setattr(rounds, "follow", follow)
    monkeypatch.setattr(rounds, "rewind", lambda state, context: state)
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    _, (a, b), drawn = rounds.times(["a", "b"], 0, 128, 5)
    assert order == [*"baab" * 3]
    assert a == [3, 6, 6, 6, 6] and b == [3, 3, 6, 6, 6]
    assert drawn == [["a"] * 64, ["b"] * 64]
    found = rows.ratio("over_dense", a, b)
    assert found["over_dense"] == 1 and found["over_dense_rounds"] == 5
    order.clear()
    _, (a, c), _ = rounds.times(["a", "c"], 0, 128, 5)
    assert rows.ratio("over_dense", a, c)["over_dense"] == 1.5


@pytest.mark.parametrize(
    ("slow", "fast", "shown"),
    [
        ([2.0, 2.2, 2.0, 1.8, 2.1], [1.0] * 5, "2.00x (1.80 to 2.20)"),
        ([1.0] * 5, [2.0, 1.6, 2.0, 2.5, 2.0], "0.50x (0.40 to 0.62)"),
        # A lucky round, a slow one: their ratio is no speedup.
        ([1.71, 1.8, 1.9, 0.9, 1.7], [1.0] * 5, "not told apart (0.90 to 1.90)"),
        ([1.71, 1.72], [1.0, 1.0], "not told apart (1.71 to 1.72)"),
    ],
)
def test_a_ratio_within_the_spread_is_none(slow, fast, shown):
    row = rows.ratio("over_dense", slow, fast)
    assert rows.shown_ratio(row, "over_dense") == shown
    assert rows.shown_ratio({"over_dense": 1.5}, "over_dense") == "1.50x"
    assert rows.shown_ratio({}, "over_dense") == ""


def test_what_was_timed_apart_differs_where_the_ranges_do():
    def row(low, ms, high):
        return {"ms": ms, "ms_min": low, "ms_max": high, "repeats": 5}

    found = rows.apart("over_one_device", row(3.0, 4.0, 5.0), row(1.0, 2.0, 2.5))
    assert rows.shown_ratio(found, "over_one_device") == "2.00x (1.20 to 5.00)"
    found = rows.apart("over_one_device", row(2.0, 4.0, 5.0), row(1.0, 2.0, 2.5))
    assert rows.shown_ratio(found, "over_one_device") == "not told apart (0.80 to 5.00)"
    assert rows.apart("over_one_device", None, row(1.0, 1.0, 1.0)) == {
        "over_one_device": None
    }


def test_the_line_and_the_table_say_so(results, capsys):
    report = rows.read(results)
    [half] = [r for r in report["rows"] if r["policy"] == "heads 0.5" and "ms" in r]
    half |= rows.ratio("over_dense", [1.71, 0.9, 1, 1, 1], [1] * 5)
    half["floor_over_dense"] = 1.005
    shown = rows.line(half)
    assert "beside dense: not told apart (0.90 to 1.71) (by the floors 1.00x)" in shown
    assert "1.71x dense" not in shown
    make_console().print(table(report["rows"]))
    said = capsys.readouterr().out
    assert "not told apart (0.90 to 1.71)" in said and "…" not in said


def test_a_row_measured_again_takes_the_place_of_the_old_one(results, tmp_path):
    path = tmp_path / "again.json"
    path.write_bytes(results.read_bytes())
    again = rows.Rows({"device": "x"}, path)
    [old] = [r for r in rows.read(path)["rows"] if r["policy"] == "2x32"]
    again.add({**old, "run": 2, "tflop_s": 7.0})
    report = rows.read(path)
    assert len(report["rows"]) == 7 and report["rows"][-1]["tflop_s"] == 7
    assert again.own == report["rows"][-1:]
    path.write_text("[]")
    with pytest.raises(ValueError, match="no file of `polarjax bench`"):
        rows.read(path)


def test_the_readmes_table(results, tmp_path):
    report = rows.read(results)
    report["rows"][1] |= {"error": "", **profiling.summarise(EVENTS, 2, PLACES)}
    for policy in ("eager", "static"):
        row = {**report["rows"][0], "kind": "transformers", "policy": policy}
        report["rows"].append(row)
    report["rows"][-1] |= {"ms": None, "error": "no room"}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    text = readme.decode_table(path)
    dense = report["rows"][0]
    assert f"| toy-llama b 2 s 128 | dense | 1 | {dense['ms']:.2f} (" in text
    assert "| toy-opt layers 1-1 alone b 2 s 128 | dense | 2 |" in text
    assert "| `transformers`, static | 1 | no room |" in text
    assert "Prefill of 2 x 32 tokens, toy-llama:" in text
    assert "attention 75.0%" in text and "polarjax" in text


def test_plots(results, tmp_path):
    report = rows.read(results)
    whole = [row for row in report["rows"] if row["case"] == "toy-llama"]
    for batch, context in ((4, 128), (2, 256)):
        report["rows"] += [{**r, "batch": batch, "context": context} for r in whole]
    report["rows"][1] |= profiling.summarise(EVENTS, 2, PLACES)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(report))
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ImportError, match=r"polarjax\[plot\]"):
            plots.draw(path)
        return
    drawn = plots.draw(path)
    assert [p.name for p in drawn] == [
        *("x-throughput.svg", "x-latency.svg", "x-breakdown.svg")
    ]
    first = [p.read_bytes() for p in drawn]
    assert [p.read_bytes() for p in plots.draw(path)] == first
    report = rows.read(results)  # one batch, one context; a GPU has a profile of it
    report["rows"] = [row for row in report["rows"] if row["kind"] != "profile"]
    path.write_text(json.dumps(report))
    assert plots.draw(path) == []


def test_layers_alone_compute_what_the_layers_compute():
    config = shapes.layers_alone(LLAMA, 2)
    params = random_weights.random_params(config, jnp.float32, alone=True)
    assert "layers_0" not in params.weights and params.config.layers == 3
    weights, bound = polarjax.Polar(0.5).bind(params)
    own = steps.make_step(params, weights, bound)
    state = steps.rewind(steps.make_state(params, 2, 100, alone=True), 100)
    zeros = jnp.zeros(2, jnp.int32)
    seen = Seen(jnp.ones(2, bool), jnp.zeros(2), zeros, jnp.arange(2))

    @jax.jit
    def step(x, cache):
        parts, read = None, None
        first = dataclasses.replace(seen, lengths=cache.lengths + 1)
        for i in (1, 2):
            layer = Layer(config, i, jnp.float32, Share(config), bound.wants.scores[i])
            x, parts, _, cache, read = layer.apply(
                {"params": weights[f"layers_{i}"]},
                x,
                parts,
                first,
                cache,
                bound,
                method="step",
            )
        x = x + parts.sum(axis=0)
        x = x / jnp.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
        return x, cache.grown(zeros + 1), read.groups

    x, cache = state.x, state.cache
    for _ in range(4):
        x, cache, read = step(x, cache)
        assert read.tolist() == [2, 2]  # of 4: no layer of these is dense
    for _ in range(4):
        state, drawn = own(state)
    np.testing.assert_allclose(state.x, x, atol=1e-4)
    assert state.cache.layers == 3 and len(state.cache.keys[0]) == 1  # but a number
    np.testing.assert_allclose(state.cache.keys[2], cache.keys[2], atol=1e-4)
    assert drawn.visible.tolist() == [40, 40]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    counted = step_weight_bytes(weights, config, bound)
    assert counted == whole - 4 * config.dim  # all but the row that says the dtype


@pytest.mark.parametrize("mesh", [None, (2, 2)], ids=["one device", "mesh"])
@pytest.mark.devices(8)
def test_a_prefill_reads_its_prompts(mesh):
    """Cut where a program is full: what is drawn is what follows each whole prompt."""
    params = random_params(LLAMA)
    cut = params if mesh is None else shard(params, make_mesh(*mesh))
    drawn = {}
    read = prefills.make_prefill(cut, 4, 70, 64)
    for _ in range(2):  # what was read before is in the way of nobody
        drawn.clear()

        def call(function, *args, **options):
            found = function(*args, **options)
            if function is engine.begin:
                asks, (token, *_) = jax.tree.map(np.asarray, (args[1], found[1][0]))
                for i in np.flatnonzero(asks.lasts):
                    part = i // (2 if mesh else 4)
                    drawn[2 * part + asks.pieces.slots[i]] = int(token[i])
            return found

        read(call)
    ids = jax.random.randint(jax.random.key(3), (4, 70), 0, LLAMA.vocab_size)
    wanted = np.asarray(polarjax.logits(params, ids))[:, -1].argmax(axis=1)
    assert [drawn[i] for i in range(4)] == wanted.tolist()


def test_pages_lie_in_no_order():
    for parts in (1, 2):
        table = steps.shuffled_pages(4, 200, parts)
        assert table.shape == (4, 4)
        for own in np.split(table, parts):
            pages = own.ravel().tolist()
            assert sorted(pages) == [*range(1, len(pages) + 1)] != pages


def test_flops_of_a_prefill_are_counted_as_they_are_said_to_be():
    config = shapes.MODELS["llama-3.1-8b"]
    flops = shapes.prefill_flops(config, 8, 2048)
    leaves = weight_shapes(config)
    layer = sum(x.size for x in jax.tree.leaves(leaves["layers_0"]) if len(x.shape) > 1)
    head = config.vocab_size * config.dim
    causal = sum(2 * 2 * 128 * (i + 1) for i in range(2048)) * 32 * 32
    # Behind its keys and values the last layer serves the last token alone.
    behind = layer - config.dim * (32 + 2 * 8) * 128
    products = 32 * layer * 2048 - behind * 2047 + head
    assert flops == 8 * (2 * products + causal)
    row = rows.prefill_row(
        *("x", shapes.CASES["llama-3.1-8b-b64"], (8, 2048)),
        *(rounds.spread([0.5, 0.6, 0.7]), flops, "NVIDIA H200"),
    )
    assert row["ms"] == 600 and (row["ms_min"], row["ms_max"]) == (500, 700)
    assert row["tflop_s"] == pytest.approx(flops / 0.6e12)
    assert row["of_peak"] == pytest.approx(row["tflop_s"] / 989.5)


def test_the_shapes_are_those_that_were_published():
    billions = {
        "opt-6.7b": 6.66,
        "opt-30b": 29.97,
        "opt-66b": 65.72,
        "llama-2-7b": 6.74,
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "mistral-7b": 7.25,
        "qwen2.5-7b": 7.62,
    }
    for name, config in shapes.MODELS.items():
        total = sum(leaf.size for leaf in jax.tree.leaves(weight_shapes(config)))
        assert total / 1e9 == pytest.approx(billions[name], abs=0.006), name
    assert set(billions) == set(shapes.MODELS)
    for case in shapes.CASES.values():
        assert shapes.parse_model(case.model)


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser.add_argument)
    return parser.parse_args(argv)


def test_lists_become_cases():
    args = options(
        *("--models", "opt-6.7b", "opt-66b:8", "--batches", "1", "16"),
        *("--contexts", "512", "--densities", "1/2", "--neuron-densities", "0.3"),
    )
    cases = arguments.chosen_cases(args)
    assert list(cases) == [
        *("opt-6.7b-b1-s512", "opt-6.7b-b16-s512"),
        *("opt-66b:8-b1-s512", "opt-66b:8-b16-s512"),
    ]
    labels = [sparse.label() for sparse in cases["opt-6.7b-b1-s512"].sparse]
    assert labels == ["heads 0.5", "heads 0.5, neurons 0.3"]
    arguments.check(cases)
    assert list(arguments.chosen_cases(options())) == list(shapes.CASES)
    layers = arguments.chosen_cases(options("--models", "opt-30b", "--layers", "4"))
    assert layers["opt-30b:4-b16-s2048"].model == "opt-30b:4"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batches", "2"], "--batches goes with --models"),
        (["--cases", "toy-opt", "--models", "opt-30b"], "either --cases or --models"),
        (["--models", "opt-66b:64"], "n from 1 to 63"),
        (["--models", "opt-66b", "--contexts", "4096"], "is 2048 tokens"),
        (["--models", "mistral-7b", "--neuron-densities", "0.5"], "no ReLU"),
        (["--models", "mistral-7b", "--adapter", "a"], "--adapter goes with a"),
        (["--models", "folder", "--any-model"], "--any-model goes with --adapter"),
        (["--models", "folder", "--layers", "2"], "not folder"),
        (["--models", "opt-30b", "--contexts", "1"], "above 1"),
        (["--models", "opt-30b", "--densities", "1.5"], "above 0 and at most 1"),
        (["--toy", "--repeats", "0"], "--repeats must be a positive integer, got 0"),
        (["--toy", "--head-rank", "-1"], "--head-rank must be an integer of at least"),
        (["--toy", "--memory-fraction", "0"], "memory_fraction must be above 0"),
        (["--toy", "--prefill", "2x999"], "the context of toy-llama is 512 tokens"),
        (["--models", "opt-30b", "--layers", "0"], "n from 1 to 47"),
        (["--layers", "0"], "--layers goes with --models"),
        (["--models", "folder", "--layers", "0"], "not folder"),
    ],
)
def test_what_does_not_fit_is_one_line(argv, message, capsys):
    assert main.main(["bench", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--contexts 64000", "the context of {0} is 128 tokens"),
        ("--contexts 64 --prefill 2x999", "the context of {0} is 128 tokens"),
        ("--contexts 64 --neuron-densities 1/2", "{0} has no ReLU: leave neurons out"),
    ],
)
def test_what_does_not_fit_a_checkpoint_is_one_line(options, message, tmp_path, capsys):
    folder = tmp_path / "model"
    polarjax.save(random_params(LLAMA), folder)
    assert main.main(["bench", "--models", str(folder), *options.split()]) == 1
    error = capsys.readouterr().err
    assert message.format(folder) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/nope.json", "cannot write it: No such file or directory: '/proc/nope."),
        ("{0}", "is no file: choose another name"),
    ],
)
def test_the_place_is_tried_before_the_work(
    out, message, tmp_path, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(decode, "read_bandwidth", never)
    out = out.format(tmp_path)
    assert main.main(["bench", "--toy", "--cases", "toy-llama", "--out", out]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(OSError, match="cannot write it"):
        rows.Rows({}, Path("/proc/nope.json"))  # of the default's name


def test_a_checkpoint_without_an_adapter_gets_routers_by_chance(tmp_path):
    write_checkpoint(tmp_path / "model", random_params(LLAMA, 0, routers=False))
    found = decode.load_model(str(tmp_path / "model"), None, jnp.bfloat16, 4)
    assert found.dtype == jnp.bfloat16 and "layers_0" not in found.routers
    _, bound = polarjax.Polar(0.5).bind(found)
    assert bound.budget.limits[1] == 2 and 1 in bound.head_routers


def test_what_does_not_fit_the_device_is_a_row(monkeypatch, tmp_path):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nmore")

    monkeypatch.setattr(decode.steps, "make_state", refuse)
    kept = rows.Rows({"r_gb_s": 1.0, "device": "x"}, tmp_path / "x.json")
    case = shapes.Case("toy-llama", 2, 128, (shapes.Sparsity(0.5),))
    params = random_weights.random_params(shapes.TOY_MODELS["toy-llama"], jnp.float32)
    decode.run_case("toy", case, params, options(), kept)
    assert [row["policy"] for row in kept.own] == ["dense", "heads 0.5"]
    assert all(
        r["error"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: no room" for r in kept.own
    )


PLACES = {"custom.1": "while/body/layers_1.decode/attention.decode/attention.project/x"}
EVENTS = [
    profiling.Event("_attend_group", 1000.0, 30_000.0, graph=True),
    profiling.Event("_attend_group", 31_500.0, 30_000.0, graph=True),  # 500 ns later
    profiling.Event("nvjet_tst", 61_500.0, 10_000.0, "custom.1", graph=True),
    profiling.Event("other", 66_500.0, 2_000.0),  # beside the one before
    profiling.Event("MemcpyD2D", 80_000.0, 8_000.0, copied=4096),  # 8.5 us later
]


def test_events_become_a_summary():
    found = profiling.summarise(EVENTS, 2, PLACES)
    assert found["step_us"] == pytest.approx(87 / 2)
    assert found["busy_us"] == pytest.approx(78 / 2)
    assert found["gap_share"] == pytest.approx(9 / 87)
    assert found["long_gap_share"] == pytest.approx(8.5 / 87)
    assert found["largest_gap_us"] == pytest.approx(8.5)
    assert (found["kernels"], found["graph_share"]) == (2, 0.75)
    assert (found["copies"], found["copied_bytes"]) == (0.5, 2048)
    shares = {name: part["share"] for name, part in found["groups"].items()}
    assert shares == pytest.approx(
        {"attention": 60 / 80, "qkv": 10 / 80, "rest": 2 / 80, "copies": 8 / 80}
    )
    first = found["top"][0]
    assert (first["name"], first["calls"], first["us"]) == ("_attend_group", 1, 30)


def test_a_kernel_is_told_by_its_place_in_the_program():
    config = shapes.TOY_MODELS["toy-opt"]
    params = random_weights.random_params(config, jnp.float32)
    weights, bound = polarjax.Polar(0.5, 0.5).bind(params)
    step = steps.make_step(params, weights, bound)
    state = steps.make_state(params, 2, 32)
    texts = [program.compile().as_text() for program in step.lower(state)]
    places = profiling.op_names(*texts)
    groups = {
        profiling.group(profiling.Event("kernel", 0, 1, op), places) for op in places
    }
    assert groups >= {"selection", "attention", "qkv", "out", "mlp", "head", "rest"}


def test_copies_of_a_cache_are_seen_in_the_program():
    text = """
  %copy.3 = bf16[2,4,64,16]{3,2,1,0} copy(%param.1)
  %c = (bf16[2,4,64,16]{3,2,1,0}, bf16[2,4,64,16], u32[]) copy-start(%param.1)
  %copy.5 = bf16[2,4,64]{2,1,0} copy(%param.2)
  ROOT %f = bf16[2,4,64,16]{3,2,1,0} fusion(%copy.3), calls=%x
"""
    assert profiling.cache_copies(text, (2, 4, 64, 16)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-66b-layers", "llama-3.1-70b-layers"])
def test_layers_alone_lower_for_a_gpu(name):
    case = shapes.CASES[name]
    config = shapes.layers_alone(*shapes.parse_model(case.model))
    [sparse] = case.sparse

    def bound():
        params = random_weights.random_params(config, jnp.bfloat16, alone=True)
        policy = polarjax.Polar(sparse.heads, sparse.neurons)
        state = steps.make_state(params, case.batch, case.context, alone=True)
        return *policy.bind(params), state

    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        weights, policy, state = jax.eval_shape(bound)
        traced = steps.layers_step.trace(
            weights,
            policy,
            state,
            model=make_decoder(
                config, weights, policy.wants.scores, implementation="triton"
            ),
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") >= 8  # attention alone
