"""The opponent: what it is asked for is what polarjax is, and nothing falls back."""

import argparse
import os
import queue
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import flash_attention, transformers_manager, transformers_serving
from polarjax.bench import serve_arguments, serve_results, serving
from polarjax.bench.loads import Ask
from polarjax.terminal.common import Parser

REPOSITORY = Path(__file__).resolve().parents[2]
TOY = ("--shape", "toy-llama", "--requests", "6", "--max-output", "4")
LOAD = ("--requests", "20", "--load", "shared-prefix", "--seed", "3")


def options(*argv):
    parser = Parser()
    transformers_serving.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("extra", [(), ("--context", "256", "--max-output", "7")])
def test_both_sides_are_asked_for_the_same(extra):
    given = ("--shape", "toy-llama", *LOAD, *extra)
    theirs = options(*given)
    parser = Parser()
    serve_arguments.add_serve(parser)
    ours = parser.parse_args(given)
    config = serving.model_config(ours)
    for drawing in (0, 1):
        pairs = zip(
            transformers_serving.choose_load(theirs, drawing),
            serving.choose_load(ours, config, drawing),
            strict=True,
        )
        for a, b in pairs:
            assert np.array_equal(a.prompt, b.prompt)
            assert a.new_tokens == b.new_tokens


class Manager:
    """Ends a request, as its thread would, 20 ms after it was added."""

    def __init__(self, short=(), error=None, dies=False):
        self.short, self.error, self.dies = short, error, dies
        self.asked, self.open, self.most_open = [], 0, 0
        self.results = queue.SimpleQueue()

    def add_request(self, ids, max_new_tokens, record_timestamps, eos_token_id):
        assert isinstance(ids, list) and record_timestamps and eos_token_id == -1
        name = f"req_{len(self.asked)}"
        self.asked.append((ids, max_new_tokens))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        count = max_new_tokens - (name in self.short)
        stamps = [time.perf_counter() + 0.001 * i for i in range(1, count + 1)]
        if not self.dies:
            self.results.put(
                types.SimpleNamespace(
                    request_id=name,
                    generated_tokens=[1] * count,
                    timestamps=stamps,
                    error=self.error,
                    status="FINISHED",
                )
            )
        return name

    def get_result(self, timeout):
        try:
            found = self.results.get(timeout=min(timeout, 0.01))
        except queue.Empty:
            return None
        time.sleep(0.02)
        self.open -= 1
        return found

    def is_running(self):
        return not self.dies


def asks(*new_tokens):
    return [Ask(np.arange(1, 4, dtype=np.int32), n) for n in new_tokens]


def test_timestamps_become_traces():
    manager, ended = Manager(), []
    load = asks(3, 1, 2)
    traces = transformers_manager.play(
        manager, load, [0.0, 0.0, 0.05], ended=lambda: ended.append(1)
    )
    assert manager.asked == [([1, 2, 3], 3), ([1, 2, 3], 1), ([1, 2, 3], 2)]
    assert [trace.new_tokens for trace in traces] == [3, 1, 2] and len(ended) == 3
    assert [trace.sent for trace in traces] == [0.0, 0.0, 0.05]
    assert traces[0].tpot == pytest.approx(0.001, rel=0.01)
    assert 0.001 <= traces[0].ttft < 0.05
    assert traces[2].chunks[0][0] >= 0.051


def test_a_client_holds_requests_back():
    manager = Manager()
    traces = transformers_manager.play(manager, asks(1, 1, 1, 1), [0.0] * 4, 1)
    assert manager.most_open == 1
    sent = [trace.sent for trace in traces]
    assert sent[0] == 0 and np.diff(sent).min() >= 0.02


@pytest.mark.parametrize(
    ("manager", "message"),
    [
        (Manager(short=("req_1",)), "request 1 ended after 1 tokens of 2: FINISHED"),
        (Manager(error="no room"), "request 0 ended after 2 tokens of 2: no room"),
        (Manager(dies=True), "thread has ended"),
    ],
)
def test_what_fails_is_no_figure(manager, message):
    with pytest.raises(RuntimeError, match=message):
        transformers_manager.play(manager, asks(2, 2), [0.0, 0.0])


def test_another_attention_than_asked_for_is_an_error():
    for used in ("flash_attention_3", "paged|flash_attention_3"):
        transformers_manager.check_attention(used, "flash_attention_3")
    for used in ("paged|sdpa", "sdpa", "kernels-community/flash-attn3"):
        with pytest.raises(RuntimeError) as error:
            transformers_manager.check_attention(used, "flash_attention_3")
        assert used in str(error.value)
    new = {"auto_switch_to_flash", "page_size"}
    assert transformers_manager.requested("sdpa", new) == "sdpa"
    assert transformers_manager.requested("sdpa", {"block_size"}) == "paged|sdpa"
    for names in (new, {"block_size"}):
        found = transformers_manager.requested("flash_attention_3", names)
        assert found == "flash_attention_3"


def test_versions_are_told_in_their_own_words():
    def found(*names, cuda=True):
        return transformers_manager.cb_config(names, 2, 256, 64, 1000, cuda)

    common = {"default_compile_level": 2, "max_requests_per_batch": 64}
    # 1,000 tokens are 4 blocks; one more, and an even number of them.
    assert found("block_size") == {
        **common,
        "block_size": 256,
        "max_blocks_per_request": 6,
    }
    assert found("page_size", "block_size", "auto_switch_to_flash", cuda=False) == {
        **common,
        "page_size": 256,
        "auto_switch_to_flash": False,
        "num_blocks": 6 * 64,
        "max_batch_tokens": 512,
    }


def test_a_share_of_the_device_is_weights_and_cache():
    cuda = types.SimpleNamespace(
        empty_cache=lambda: None, mem_get_info=lambda: (120e9, 140e9)
    )
    torch = types.SimpleNamespace(cuda=cuda)
    percent = transformers_manager.memory_percent(torch, 0.5)
    assert percent == pytest.approx((70 - 20) / 120)
    with pytest.raises(ValueError, match=r"0.1 is 14.0 GB, and the weights take 20.0"):
        transformers_manager.memory_percent(torch, 0.1)


FOUND = """
import sys
from importlib.metadata import packages_distributions
from benchmarks import flash_attention as fa
assert not fa.has_its_name() and "transformers" not in sys.modules
before = list(sys.path)
with fa.under_its_name():
    assert fa.has_its_name()
    assert "flash-attn-3" in packages_distributions()["flash_attn_interface"]
    assert fa.wheel() == "flash-attn-3 3.0.0"
    try:
        from transformers.utils import import_utils
    except ImportError:
        print("no transformers")
    else:
        import_utils.is_torch_cuda_available = lambda: True
        import_utils.is_flash_attn_3_available.cache_clear()
        print(import_utils.is_flash_attn_3_available())
assert sys.path == before and not fa.has_its_name()
"""


def test_the_wheel_is_found_under_the_name_that_is_looked_for(tmp_path):
    """By transformers itself, where it is installed and takes this for a GPU."""
    (tmp_path / "flash_attn_interface.py").touch()
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", FOUND],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "no transformers")


def test_without_the_wheel_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps tokenspeed-fa3"):
        with flash_attention.under_its_name():
            pass
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with pytest.raises(RuntimeError, match="imported too early"):
        with flash_attention.under_its_name():
            pass
    monkeypatch.setattr(flash_attention, "has_its_name", lambda: True)
    with flash_attention.under_its_name():  # a build of that name needs no help
        pass


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--requests", "0"], "--requests must be a positive integer, got 0"),
        (["--block-size", "0"], "--block-size must be a positive integer, got 0"),
        (["--warmup", "-1"], "--warmup must be an integer of at least 0, got -1"),
        (["--memory-fraction", "1.5"], "--memory-fraction must be in (0, 1], got 1.5"),
        (["--context", "1000"], "--context is 1000, beyond the model's of 512"),
        (["--rate", "2", "2"], "--rate has a number twice"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    assert transformers_serving.main([*TOY, *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_it_says_what_it_needs(monkeypatch, capsys):
    def cuda(there):
        torch = types.SimpleNamespace(
            cuda=types.SimpleNamespace(is_available=lambda: there)
        )
        monkeypatch.setattr(
            transformers_serving.importlib, "import_module", lambda name: torch
        )

    monkeypatch.setattr(transformers_serving, "find_spec", lambda name: None)
    assert transformers_serving.main([*TOY]) == 1
    error = capsys.readouterr().err
    assert error == (
        "error: this needs torch and transformers: see benchmarks/README.md\n"
    )
    monkeypatch.setattr(transformers_serving, "find_spec", lambda name: name)
    cuda(False)
    assert transformers_serving.main(["--shape", "llama-3.1-8b"]) == 1
    assert "llama-3.1-8b needs a GPU that torch sees" in capsys.readouterr().err
    assert transformers_serving.main([*TOY]) == 1
    assert "on a CPU take --attention sdpa" in capsys.readouterr().err


def test_it_serves(tmp_path, capsys):
    """The real one, on a CPU; in a process that it does not share with jax's work."""
    pytest.importorskip("torch", reason="needs it: pip install torch")
    pytest.importorskip("transformers", reason="needs it: pip install transformers")
    path = tmp_path / "theirs.json"
    given = [*TOY, "--attention", "sdpa", "--rate", "inf", "100", "--slots", "3"]
    settings = ["--block-size", "32", "--json", str(path), "--goodput", "ttft:1e6"]
    assert transformers_serving.main([*given, *settings]) == 0
    shown = capsys.readouterr().out
    assert "attention sdpa, compile level 0: {" in shown or "paged|sdpa" in shown
    [run] = serve_results.read(path)
    assert run["load"]["requests"] == 6 and run["model"] == "toy-llama"
    assert run["versions"]["transformers"] and run["device"] == "cpu"
    assert [result["rate"] for result in run["results"]] == [None, 100]
    for result in run["results"]:
        assert result["how"].startswith("transformers, ")
        assert result["served"]["new_tokens"] == run["load"]["new_tokens"] == 24
        assert result["served"]["goodput"]["requests"] == 6
        assert result["served"]["tokens_per_chunk"] == 1
        assert result["settings"]["max_requests_per_batch"] == 3
        assert result["reached"] is None and result["compilations"] is None


def test_an_attention_that_falls_back_is_no_figure(capsys, monkeypatch):
    """The real one: asked for sdpa, it is made to serve with another."""
    pytest.importorskip("torch", reason="needs it: pip install torch")
    pytest.importorskip("transformers", reason="needs it: pip install transformers")
    monkeypatch.setattr(transformers_manager, "requested", lambda *_: "paged|eager")
    assert transformers_serving.main([*TOY, "--attention", "sdpa"]) == 1
    said = capsys.readouterr()
    assert (
        "error: sdpa, level 0: transformers serves with the attention paged|eager"
        in (said.err)
    )
    assert "tokens/s" in said.out and "compile level 0" not in said.out


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        transformers_serving.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "example: python -m benchmarks.transformers_serving --shape toy" in shown
    assert isinstance(options(*TOY), argparse.Namespace)
