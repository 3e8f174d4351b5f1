"""The console script, on a random model whose tokens are bytes."""

import argparse
import dataclasses
import json
import os
import runpy
import sys

import jax
import pytest

import polarjax
from polarjax.cli import calibrate, common, demo, evaluate, generate, main
from polarjax.policies import save_adapter, with_density, with_learned
from tests.models import LLAMA, random_params, write_checkpoint

TEXT = "\n\n".join(f"{i} green bottles, standing on the wall." for i in range(60))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    config = dataclasses.replace(LLAMA, vocab_size=257, context=512, model_hash="abc")
    write_checkpoint(folder, random_params(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A folder of routers that know nothing."""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    params = polarjax.load(checkpoint)
    routers = random_params(params.config, routers=True).routers
    params = with_learned(params, routers=routers)
    save_adapter(folder, with_density(params, 0.5))
    return folder


def test_generate(checkpoint, adapter, capsys):
    command = [
        "generate",
        str(checkpoint),
        "one",
        "[red]two",
        "--adapter",
        str(adapter),
    ]
    assert main.main([*command, "--max-new-tokens", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    params = polarjax.load(checkpoint, adapter=adapter)
    out = polarjax.generate(params, ["one", "[red]two"], max_new_tokens=5)
    assert result["tokens"] == out.tokens and result["texts"] == out.texts
    assert result["stats"]["density"] == [1.0, 0.5, 0.5, 0.5]
    assert main.main([*command, "--max-new-tokens", "5", "--policy", "dense"]) == 0
    shown = capsys.readouterr().out
    assert "[red]two" in shown and "tokens/s" in shown and "floor" in shown
    options = (
        "--density 1 --temperature 1 --top-k 9 --top-p 0.9 --seed 3 --stop x --chat"
    )
    assert main.main([*command, "--max-new-tokens", "5", *options.split()]) == 0


@pytest.mark.parametrize("options", [[], ["--chat"], ["--stop", "\udcff"]])
def test_bytes_that_are_no_text_are_one_line(checkpoint, options, capsys):
    prompt = "ok" if "--stop" in options else os.fsdecode(b"caf\xe9")
    assert main.main(["generate", str(checkpoint), "one", prompt, *options]) == 1
    error = capsys.readouterr().err
    named = r"the stop string '\udcff'" if "--stop" in options else "prompt 1"
    assert error.startswith(f"error: {named} is no Unicode text: its character")
    assert error.count("\n") == 1 and error.isascii()


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("generate MODEL hi", generate),
        ("eval MODEL --text TEXT", evaluate),
        ("lm-eval MODEL --tasks arc_easy", evaluate),
        ("recover MODEL --text TEXT --out OUT", calibrate),
        ("demo MODEL", demo),
    ],
)
def test_an_adapter_of_other_weights_is_taken_by_name(
    command, module, checkpoint, adapter, text, tmp_path, monkeypatch, capsys
):
    """Every command that takes an adapter says how, and does."""
    params = polarjax.load(checkpoint)
    config = dataclasses.replace(params.config, model_hash="other")
    weights = jax.tree.map(lambda x: 1.05 * x, params.weights)
    model, out = tmp_path / "model", tmp_path / "out"
    polarjax.save(polarjax.Params(weights, polarjax.Dense(), config), model)
    places = {"MODEL": model, "TEXT": text, "OUT": out}
    words = [str(places.get(word, word)) for word in command.split()]
    words += ["--adapter", str(adapter)]
    assert main.main(words) == 1
    said = capsys.readouterr().err
    assert "looks like another quantisation" in said and "(--any-model)" in said
    found = []
    name = "load_adapter" if module is demo else "load"
    load = getattr(module, name)

    def stop(*args, **options):
        found.append(load(*args, **options))
        if found[-1].routers:
            raise ValueError("loaded")
        return found[-1]

    monkeypatch.setattr(module, name, stop)
    assert main.main([*words, "--any-model"]) == 1
    assert capsys.readouterr().err.endswith("error: loaded\n")
    assert found[-1].policy.learned.budgets == (4, 2, 2, 2)


def test_the_demo_shows_each_adapter_beside_dense(
    checkpoint, adapter, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    other = tmp_path / "promised"
    params = polarjax.load(checkpoint, adapter=adapter)
    card = {"tokens": 1234, "contract": {"verdict": "kept within 1%"}}
    save_adapter(other, with_density(params, 0.75), card)
    command = ["demo", str(checkpoint), "--adapter", str(adapter), str(other)]
    assert main.main([*command, "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    [densities] = [line for line in shown.splitlines() if "density" in line]
    assert [x.strip() for x in densities.split("│")[2:5]] == ["1.000", "0.625", "0.812"]
    [ratios] = [line for line in shown.splitlines() if "/ dense" in line]
    assert ratios.count(" to ") == 2
    assert "learned from 1,234 tokens; kept within 1%" in " ".join(shown.split())


def test_eval_writes_what_it_prints(checkpoint, adapter, text, tmp_path, capsys):
    out, task = tmp_path / "result.json", tmp_path / "colours.jsonl"
    row = {"context": "green", "choices": ["bottles", "wall"], "label": 1}
    task.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i in range(9)))
    command = ["eval", str(checkpoint), "--text", str(text), "--adapter", str(adapter)]
    command += ["--tasks", str(task), "--limit", "3", "--out", str(out)]
    options = "--policies polar --densities 1/2,3/4 --tokens 256 --generation 4"
    shape = "--window 64 --prefix 16 --batch 2 --prompts 2 --prompt-tokens 8"
    arguments = [*command, *options.split(), *shape.split()]
    assert main.main(arguments) == 0
    record = json.loads(out.read_text())
    results = record["perplexity"]["windows"]["results"]
    assert list(results) == ["Dense", "Polar 0.500", "Polar 0.750"]
    assert record["setup"]["adapter"]["name"] == "mine"
    assert results["Polar 0.750"]["density"] == pytest.approx((1 + 3 * 0.75) / 4)
    assert record["tasks"]["colours"]["ids"] == ["0", "1", "2"]
    shown = capsys.readouterr().out
    assert shown.startswith("colours, mode decode")  # bars are for terminals
    # Squeezed tables break their words.
    for number in (
        *results["Polar 0.750"]["perplexity"][:1],
        record["tasks"]["colours"]["results"]["Dense"]["accuracy"][0],
    ):
        assert f"{number:.3f}" in shown
    for word in ("colours", "decode", "Recall", "continued by 4 tokens", str(out)):
        assert word in " ".join(shown.split())
    # Again: nothing is left to do.
    assert main.main(arguments) == 0
    assert json.loads(out.read_text()) == record
    assert main.main([*arguments, "--mode", "mask"]) == 1
    # A folder's file has a name of its own; the page is drawn from it.
    pytest.importorskip("matplotlib", reason="needs it: pip install matplotlib")
    page = tmp_path / "page"
    assert main.main(["report", str(out), "--out", str(page)]) == 0
    assert "Polar 0.500" in (page / "report.md").read_text()
    assert "<svg" in (page / "report.html").read_text()


@pytest.mark.devices(4)
def test_eval_over_devices(checkpoint, adapter, tmp_path, monkeypatch, capsys):
    """Dense, the global and the balanced selection, on the same rows."""
    monkeypatch.setenv("COLUMNS", "200")
    task = tmp_path / "colours.jsonl"
    rows = [
        {"context": "green", "choices": ["bottle", "wall"], "label": i % 2}
        for i in range(5)
    ]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"eval {checkpoint} --adapter {adapter} --tasks {task} --mode mask"
    options = "--policies polar --balanced 2 --batch 5"
    found = []
    for devices in ("--tp 2 --dp 2", ""):
        out = tmp_path / f"{len(found)}.json"
        arguments = f"{command} {options} {devices} --out {out}"
        assert main.main(arguments.split()) == 0
        found.append(json.loads(out.read_text())["tasks"]["colours"]["results"])
        said = capsys.readouterr()
        assert "Polar balanced 2" in " ".join(said.out.split())
        assert said.err == ("over 4 devices: dp 2 and tp 2\n" if devices else "")
    assert list(found[0]) == ["Dense", "Polar", "Polar balanced 2"]
    for label, result in found[0].items():
        assert result["right"] == found[1][label]["right"]
        assert result["nll"] == pytest.approx(found[1][label]["nll"], rel=1e-5)
    nll = [found[0][label]["nll"] for label in ("Polar", "Polar balanced 2")]
    assert nll[0] != pytest.approx(nll[1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate nowhere x", "no checkpoint folder at nowhere"),
        ("generate {checkpoint} x --adapter nowhere", "no adapter at nowhere"),
        ("generate {checkpoint} x --density 3/2", "density must be a number above 0"),
        ("generate {checkpoint} x --density 1/2", "no router for layer 1"),
        ("generate {checkpoint} x --policy polar", "no density given"),
        ("generate {checkpoint} x --memory-fraction 2", "memory_fraction must be"),
        ("generate {checkpoint} x --tp 0", "tp must be at least 1, got 0"),
        ("generate {checkpoint} x --dp 0", "dp must be at least 1, got 0"),
        ("eval {checkpoint} --text {text} --tp 0", "tp must be at least 1, got 0"),
        (
            "recover {checkpoint} --text {text} --adapter x --tp 0 --out {tmp}/a",
            "got 0",
        ),
        ("demo {checkpoint} --adapter x --max-new-tokens 1", "needs 2 new tokens"),
        ("eval {checkpoint} --text {text} --policies best", "no policy 'best'"),
        ("eval {checkpoint} --policies dense", "pass tasks (--tasks) or a --text"),
        ("eval {checkpoint} --policies dense --tasks nowhere", "no task file at"),
        ("eval {checkpoint} --text {text} --tokens 99", "99 tokens are less than one"),
        ("eval {checkpoint} --text {text} --densities x", "'x' is no number such as"),
        ("eval {checkpoint} --text {text} --out {text}", "is a file, but no .json"),
        ("eval {checkpoint} --text {text} --densities 1,1 --policies oracle", "twice"),
        (
            "eval {checkpoint} --text {text} --policies oracle --balanced 2",
            "--balanced is of the policy polar",
        ),
        pytest.param(
            "eval {checkpoint} --text {text} --tp 3",
            "tp 3 does not divide the model's 8",
            marks=pytest.mark.devices(3),
        ),
        ("report nowhere.json --out {tmp}/page", "nowhere.json"),
    ],
)
def test_errors_are_one_line(checkpoint, text, tmp_path, capsys, arguments, message):
    filled = arguments.format(checkpoint=checkpoint, text=text, tmp=tmp_path)
    assert main.main(filled.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["generate {0} x", "eval {0} --text y"])
def test_no_name_is_no_folder(command, capsys):
    words = [word.replace("{0}", "") for word in command.split()]
    assert main.main(words) == 1
    assert "the checkpoint is '': name its folder" in capsys.readouterr().err


def test_one_device_is_told_as_one(checkpoint, monkeypatch, capsys):
    args = argparse.Namespace(checkpoint=checkpoint, tp=1, dp=None)
    common.choose_mesh(args)
    assert capsys.readouterr().err == "over 1 device: dp 1 and tp 1\n"
    monkeypatch.setattr(jax, "devices", lambda: [None])
    args.tp = 3
    with pytest.raises(ValueError, match=r"tp is 3, but there is 1 device$"):
        common.choose_mesh(args)


def test_help_teaches(capsys):
    commands = "generate", "calibrate", "recover", "eval", "plan", "report", "demo"
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main.main([command, "--help"])
        assert stop.value.code == 0
        assert "example: polarjax " + command in " ".join(
            capsys.readouterr().out.split()
        )
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0 and "org/name@revision" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main.main(["generate", "x", "y", "--density", "half"])
    assert stop.value.code == 2
    assert "no number such as 0.5 or 2/3" in capsys.readouterr().err


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["polarjax", "generate", "nowhere", "x"])
    monkeypatch.delitem(sys.modules, "polarjax.cli.main")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("polarjax.cli.main", run_name="__main__")
    assert stop.value.code == 1
