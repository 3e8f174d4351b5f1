"""What `python -m benchmarks.decode` adds to `polarjax bench`: other libraries."""

import argparse

import jax
import pytest

from benchmarks import against_transformers, decode, kernels
from benchmarks.report import Result
from polarjax.bench import decode as bench
from polarjax.bench import rows, shapes
from polarjax.bench.arguments import add_arguments
from polarjax.cli import main
from polarjax.model import weight_shapes


@pytest.mark.slow
def test_transformers_is_timed_in_both_modes():
    pytest.importorskip("torch", reason="needs it: pip install torch")
    pytest.importorskip("transformers", reason="needs it: pip install transformers")
    found = against_transformers.transformers_times("toy-llama", 2, 128, toy=True)
    assert not found["error"] and found["transformers"]
    assert list(found["modes"]) == ["eager", "static cache, torch.compile"]
    for timed in found["modes"].values():
        assert len(timed["step_ms"]) == 5 and min(timed["step_ms"]) > 0
        assert timed["visible"] == 88.5


def test_rows_of_transformers(tmp_path, monkeypatch):
    config = shapes.TOY_MODELS["toy-llama"]
    timed = {
        "error": "",
        "modes": {
            "eager": {"step_ms": [4.0, 2.0, 3.0], "visible": 100, "compile_s": 1.0},
            "static": {"error": "no room"},
        },
    }
    kept = rows.Rows({"r_gb_s": 1.0, "device": "x", "dtype": "float32"}, None)
    case = shapes.TOY_CASES["toy-llama"]
    decode.add_transformers("toy-llama", case, timed, kept)
    eager, static = kept.own
    leaves = jax.tree.leaves(weight_shapes(config))
    weights = 4 * (sum(x.size for x in leaves) - config.vocab_size * config.dim)
    kv = 2 * 100 * config.layers * config.kv_heads * 2 * config.head_dim * 4
    assert eager["floor_ms"] == pytest.approx((weights + kv) / 1e6)
    assert (eager["ms"], eager["tokens_per_second"]) == (3.0, pytest.approx(2e3 / 3))
    assert static["error"] == "no room"
    assert rows.best_transformers(kept.own, "toy-llama") == eager
    monkeypatch.setattr(against_transformers, "find_spec", lambda name: None)
    missing = against_transformers.transformers_times("toy-llama", 2, 128)
    assert missing["error"] == "torch and transformers not installed"


@pytest.mark.parametrize("flag", ["--transformers", "--no-torch"])
def test_the_packages_command_says_where_other_libraries_are_timed(flag, capsys):
    assert main.main(["bench", "--toy", flag]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} goes with `python -m benchmarks.decode`")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main.main(["bench", "--help"])
    assert flag not in capsys.readouterr().out


def test_the_repositorys_command_times_them_first(tmp_path, monkeypatch, capsys):
    """Before jax takes the device; the best rate of all is what floors are held to."""
    path, asked = tmp_path / "x.json", []
    modes = {"eager": {"step_ms": [4.0] * 5, "visible": 100, "compile_s": 1.0}}

    def timed(model, batch, context, toy):
        asked.append((model, batch, context, toy))
        return {"error": "", "transformers": "5.0", "modes": modes}

    monkeypatch.setattr(decode, "transformers_times", timed)
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 1e10)
    given = ["--toy", "--cases", "toy-llama", "--repeats", "1", "--out", str(path)]
    assert decode.main(given) == 0
    report = rows.read(path)
    [run] = report["runs"]
    assert run["transformers"] == ["5.0"] and run["torch"] is None
    assert run["command"].startswith("python -m benchmarks.decode --toy")
    assert asked == [("toy-llama", 2, 128, True)]
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds == ["transformers", "decode", "decode", "prefill"]
    theirs, ours = report["rows"][:2]
    assert ours["over_transformers"] == theirs["ms"] / ours["ms"]
    assert "beside transformers" in capsys.readouterr().out
    # Nothing of theirs, if it is not wanted, and nothing that cannot be.
    assert decode.main([*given, "--no-torch"]) == 0
    assert len(asked) == 1 and rows.read(path)["runs"][1]["transformers"] == []
    assert decode.main([*given, "--no-torch", "--transformers"]) == 1
    assert "--transformers has no effect with --no-torch" in capsys.readouterr().err


def test_torchs_rate_counts_where_it_is_the_best(monkeypatch):
    case = decode.RATE_SHAPES["opt-66b"]
    read = case.bytes(case.k)
    row = Result("attention", "opt-66b", "torch", case.k, case.k, read, ms=read / 5e9)
    monkeypatch.setattr(kernels, "torch_results", lambda shapes: ("2.13", [row]))
    args = decode_options()
    found = decode.time_opponents(args, {})
    assert found.rate == pytest.approx(5e12) and found.facts["torch"] == "2.13"
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 4e12)
    assert bench.about_run(args, [], found)["r_gb_s"] == pytest.approx(5000)
    assert bench.about_run(args, [], bench.Beside())["r_gb_s"] == pytest.approx(4000)
    monkeypatch.setattr(kernels, "torch_results", lambda shapes: (None, []))
    assert decode.time_opponents(args, {}).rate == 0


def test_results_go_where_they_belong(tmp_path):
    head = {"device": "NVIDIA H200", "date": "2000-01-01", "commit": "abc"}
    name = "2000-01-01-nvidia-h200-abc-bench.json"
    assert bench.default_path(head, tmp_path) == tmp_path / name
    outside = bench.default_path({**head, "commit": "unknown"}, tmp_path)
    assert outside.name == "2000-01-01-nvidia-h200-bench.json"


def decode_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_argument)
    decode.add_opponents(parser.add_argument)
    return parser.parse_args([])
