import json
import subprocess

import numpy as np
import pytest

from benchmarks import kernels, readme, report, roofline
from benchmarks.cases import CASES, TOY_CASES, Attention, Mlp
from pallas_kernels import gathered_mlp, select_head_attention


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy benchmark's file, and what was printed is of no interest."""
    path = tmp_path_factory.mktemp("results") / "2000-01-01-toy-kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        # Timings on a CPU mean nothing: one call each, and a bandwidth made up.
        patch.setattr(kernels, "calls_to_time", lambda nbytes: 2)
        patch.setattr(kernels, "sets_to_rotate", lambda nbytes: 2)
        patch.setattr(kernels, "read_bandwidth", lambda device: 1e10)
        options = ["--jobs", "2", "--implementations", "xla", "--out", str(path)]
        kernels.main(["--toy", *options])
    return path


def test_every_row_is_timed_or_says_why(toy):
    record = json.loads(toy.read_text())
    assert record["stream_gb_s"] == 10 and set(record["shapes"]) == set(TOY_CASES)
    rows = record["results"]
    timed = {(r["shape"], r["what"], r["read"]) for r in rows if r["ms"]}
    assert timed >= {
        ("toy", "xla", 2),
        ("toy", "xla", 1),
        ("toy", "jax.nn xla", 2),
        ("toy-mlp", "xla", 256),
        ("toy-mlp", "xla", 128),
        ("toy-mlp-gated", "xla", 64),
        ("toy-neurons", "xla", 64),
        ("toy-heads", "xla", 4),
    }
    for row in rows:
        assert (row["ms"] is None) == bool(row["error"])
        if row["ms"]:
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
            assert row["of_r"] == row["of_stream"] == pytest.approx(row["gb_s"] / 10)
    case = TOY_CASES["toy"]
    assert isinstance(case, Attention)
    tokens = int(case.lengths().sum())
    assert 2 * 8 <= tokens < 2 * 64  # ragged: the bytes that are needed, no more
    assert rows[0]["bytes"] == 2 * tokens * 2 * 64 * 4
    assert not list(toy.parent.glob("*.tmp"))


def test_the_tables_show_the_fastest_of_ours_beside_the_fastest_library(toy):
    record = json.loads(toy.read_text())
    first = record["results"][0]
    record["results"] += [
        {
            **first,
            "what": "triton",
            "ms": first["ms"] / 4,
            "gb_s": 8.0,
            "of_stream": 0.9,
        },
        {**first, "what": "torch SDPA flash", "ms": 1e-3},
    ]
    path = toy.with_name("other-kernels.json")
    path.write_text(json.dumps(record))
    lines = readme.kernels_table(path).splitlines()
    [row] = [
        line
        for line in lines
        if line.startswith("| toy: b 2 h 4 k 2 s 64 d 64 | 2 of 2")
    ]
    assert (
        f"| triton | {first['ms'] / 4:.3f} | 8 | 0.80 | 0.90 | 0.001 (torch SDPA" in row
    )
    assert any("| 128 of 256 | xla |" in line and "(xla) |" in line for line in lines)
    assert any(
        line.startswith("| `union_neurons` | 2 x 256 | 64 | xla |") for line in lines
    )
    assert "other-kernels.svg" in lines[0]


def test_the_rate_to_beat_is_the_best_seen():
    def dense(shape, ms, error=""):
        case = CASES[shape]
        assert isinstance(case, Attention)
        nbytes = case.bytes(case.k)
        return report.Result("attention", shape, "torch", 1, 1, nbytes, ms, error=error)

    nbytes = CASES["llama-3.1-8b"].bytes(8)
    fast, slow = nbytes / 5e9, CASES["opt-66b"].bytes(72) / 1e9
    rows = [dense("llama-3.1-8b", fast), dense("opt-66b", slow)]
    rows.append(dense("llama-2-7b", None, "out of memory"))
    rates = report.best_rates(CASES, rows, 4e12)
    assert rates["llama-3.1-8b"] == rates["llama-3.1-8b-ragged"] == pytest.approx(5e12)
    assert rates["opt-66b"] == rates["llama-2-7b"] == 4e12  # the streaming sum's
    assert rates["opt-66b-mlp"] == pytest.approx(5e12)


def test_plot(toy, tmp_path):
    record = json.loads(toy.read_text())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"polarjax\[plot\]"):
            roofline.draw(record, tmp_path / "plot.svg")
        return
    roofline.main([str(toy), "--out", str(tmp_path / "plot.svg")])
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_rows_of_torch_come_from_a_process_of_its_own(monkeypatch, capsys):
    timed = {"shape": "opt-66b-mlp", "what": "torch linear", "ms": 0.5, "error": ""}
    answer = {"torch": "2.0", "results": [timed], "error": ""}

    def run(command, **_):
        assert command[1:] == [
            *("-m", "benchmarks.torch_baseline", "--shapes", "opt-66b-mlp")
        ]
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(answer)}\n")

    monkeypatch.setattr(kernels, "find_spec", lambda name: name == "torch")
    monkeypatch.setattr(kernels.subprocess, "run", run)
    cases = {name: CASES[name] for name in ("opt-66b-mlp", "opt-66b-heads")}
    version, [row] = kernels.torch_results(cases)
    assert (version, row.ms, row.read, row.of) == ("2.0", 0.5, 36864, 36864)
    assert row.bytes == 2 * 36864 * 9216 * 2 and row.kernel == "mlp"
    answer |= {"results": [], "error": "torch sees no CUDA device"}
    assert kernels.torch_results(cases) == ("2.0", [])
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.torch_results(cases) == (None, [])
    shown = capsys.readouterr().out
    assert "no CUDA device" in shown and "it is not installed" in shown


def test_torch_computes_what_we_do(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    from benchmarks import torch_baseline

    rng = np.random.default_rng(0)
    drawn = []

    def normal(*shape, scale=1.0):
        drawn.append((rng.normal(size=shape) * scale).astype(np.float32))
        return torch.from_numpy(drawn[-1])

    monkeypatch.setattr(torch_baseline, "normal", normal)
    monkeypatch.setattr(torch_baseline, "counts", lambda nbytes: (1, 1))
    timed = {
        what: rest
        for what, *rest in torch_baseline.attention(Attention(2, 4, 2, 16, 8, (2,)))
    }
    function, q, [caches], _ = timed["torch SDPA default"]
    ours = select_head_attention(
        *(np.asarray(a) for a in (q[:, :, 0], *caches)), np.full(2, 16, np.int32)
    )
    np.testing.assert_allclose(function(q, *caches)[:, :, 0], ours, atol=1e-5)
    for case in (Mlp(2, 8, 24), Mlp(2, 8, 24, gated=True)):
        drawn.clear()
        [(_, function, x, [layer], _)] = torch_baseline.mlp(case)
        *matrices, up_bias, down_bias, _ = drawn
        weights = dict(zip(("up", "down", "gate"), matrices, strict=False))
        weights["down"] = weights["down"].T
        if not case.gated:
            weights |= {"up_bias": up_bias, "down_bias": down_bias}
        activation = "silu" if case.gated else "relu"
        ours = gathered_mlp(np.asarray(x), weights, activation=activation)
        np.testing.assert_allclose(function(x, *layer), ours, atol=1e-5)
