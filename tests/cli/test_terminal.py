"""What is printed is what was said: no markup, no emoji, no highlighting, no cuts."""

import ast
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

import polarjax
from convert.verify import Comparison
from polarjax.cli import calibrate, demo, evaluate, generate, main
from polarjax.engine import Stats
from polarjax.engine.output import Output
from polarjax.evaluation import Perplexity
from polarjax.evaluation.lm_eval import tasks
from polarjax.policies import save_adapter, with_density, with_learned
from polarjax.terminal import output
from tests.models import LLAMA, random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
NASTY = r"The formula \[x^2 + y\] says :smile: that, a \[/b] c, [red]1 'two'[/red] {0}"
ESCAPES = "\x1b[2J\x07\x9b31m"


class Screen(io.StringIO):
    """A terminal, as far as it is asked."""

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def show():  # pytest puts its own there before the test itself
        shown = Screen()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "model"
    config = dataclasses.replace(LLAMA, vocab_size=257, context=512, model_hash="abc")
    write_checkpoint(folder, random_params(config))
    return folder


def said(texts):
    """As if a model had said them."""
    facts = dict.fromkeys((field.name for field in dataclasses.fields(Stats)), 1)
    names = ("density", "neuron_density")
    facts |= {"policy": "Dense", "notes": (NASTY,)} | dict.fromkeys(names, (1.0,))
    stats = Stats(**facts)
    return Output([[1]] * len(texts), list(texts), [[0.0]], ["stop"], stats)


def generated(texts, monkeypatch, checkpoint, *prompts):
    """Run the command on a model that is made to say these texts."""

    monkeypatch.setattr(generate, "generate", lambda *_, **__: said(texts))
    assert main.main(["generate", str(checkpoint), *prompts]) == 0


def test_generate_to_a_pipe_is_the_text_to_the_letter(checkpoint, monkeypatch, capsys):
    text = f" and\tso on, {ESCAPES}\r\n\n" + "very long " * 50
    generated([text, ""], monkeypatch, checkpoint, NASTY, "b" * 300)
    shown = capsys.readouterr().out
    assert f"\n{NASTY}{text}\n" in shown and "\n" + "b" * 300 + "\n" in shown
    assert f"\n{NASTY}\n" in shown  # a note of the stats


def test_generate_on_a_terminal_does_nothing_but_show(checkpoint, monkeypatch, screen):
    shown = screen()
    generated([f" and {NASTY}{ESCAPES}"], monkeypatch, checkpoint, NASTY)
    shown = shown.getvalue()
    assert "\x1b[1m" + NASTY + "\x1b[0m" in shown.replace("\x1b[22m", "")
    assert NASTY + r"\x1b[2J\x07\x9b31m" in shown and "\x07" not in shown


def test_an_encoding_without_a_character_loses_no_text(
    checkpoint, monkeypatch, tmp_path
):
    path = tmp_path / "out.txt"
    with open(path, "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        generated([" said ☃"], monkeypatch, checkpoint, "é")
    assert r"\xe9 said \u2603" in path.read_text()


def test_errors_show_names_as_they_are_on_one_line(capsys):
    assert main.main(["generate", f"/nowhere/\n{NASTY}{ESCAPES}", "x"]) == 1
    error = capsys.readouterr().err
    assert NASTY in error and error.count("\n") == 1 and "\x1b" not in error


def test_the_demo_shows_texts_and_adapters_as_they_are(
    checkpoint, tmp_path, monkeypatch, screen
):
    folder = tmp_path / "a [b]:smile:[/c]"
    params = polarjax.load(checkpoint)
    routers = random_params(params.config, routers=True).routers
    params = with_density(with_learned(params, routers=routers), 0.5)
    save_adapter(folder, params, {"contract": {"verdict": NASTY}})
    monkeypatch.setattr(demo, "PROMPTS", (NASTY, "another"))
    texts = [f"{NASTY} and on", "said"]
    monkeypatch.setattr(demo, "generate", lambda *_, **__: said(texts))
    found = Perplexity(np.ones(9), np.full(9, 2), 1.0)
    monkeypatch.setattr(demo, "perplexity", lambda *_, **__: {"": found})
    shown = screen()
    demo.show(checkpoint, [folder], 2)
    shown = shown.getvalue()
    assert shown.count(NASTY) == 4  # a prompt, two texts, a promise
    assert f"{folder.name}: compiling" in shown


def printed(*things):
    """By a console whose output is no terminal's."""
    shown = io.StringIO()
    console = output.make_console()
    console.file = shown
    for thing in things:
        console.print(thing)
    return shown.getvalue()


def test_tables_are_neither_read_as_markup_nor_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    wide = NASTY * 9
    table = Table(NASTY, "second", title=NASTY, caption=NASTY)
    table.add_row(wide, wide)
    shown = printed(table, wide)
    assert shown.count(wide) == 3 and "…" not in shown
    assert printed(table).count("\n") == 7  # title, frame, rows, caption
    assert r"\x1b[2J" in printed(ESCAPES) and "\x1b" not in printed(ESCAPES)


def test_every_commands_tables_and_bars(screen):
    label = {"value": 0.5, "stderr": 0.1, "against_dense": None}
    task = {"policies": {"Dense": {"metrics": {NASTY: label}, "density": 1.0}}}
    compared = Comparison("float32", 1, 2, 0.0, 0.0, 1.0, (1.0, 1.0), 0)
    shown = printed(tasks.table({"tasks": {NASTY: task}}), compared.table())
    assert shown.count(NASTY) == 2
    result = {
        "accuracy": [0.5, 0.4, 0.6],
        "accuracy_per_byte": [0.5, 0.4, 0.6],
        "against_dense": None,
        "density": 1.0,
        "neuron_density": 1.0,
        "tokens_per_second": 1.0,
    }
    result = {
        "setup": {"mode": "decode"},
        "tasks": {NASTY: {"kind": "choices", "ids": ["1"], "results": {NASTY: result}}},
        "perplexity": {},
        "generation": None,
        "recall": None,
    }
    assert printed(*evaluate.tables(result)).count(NASTY) == 2
    said = screen()
    for make in (output.counting_bar, output.share_bar):
        with make(output.make_console()) as bar:
            calibrate._Bar(bar)(NASTY + ESCAPES, 1, 2)
    with output.bytes_bar("x", output.make_console(), shown=True) as bar:
        bar.add_task(NASTY)
    said = said.getvalue()
    assert said.count(NASTY) >= 3 and "\x1b[2J\x07" not in said


def test_bars_are_for_terminals(capsys):
    for make in (output.counting_bar, output.share_bar):
        with make(output.make_console(stderr=True)) as bar:
            bar.add_task("working", total=2)
    assert capsys.readouterr() == ("", "")


def parsed():
    for package in ("polarjax", "convert", "benchmarks", "pallas_kernels"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = str(path.relative_to(REPOSITORY))
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_nobody_else_makes_a_console_or_writes_markup():
    """One module knows how text is printed without being read."""
    for name, tree in parsed():
        # The tuner knows no polarjax. It prints names of kernels.
        exempt = name in (
            "polarjax/terminal/output.py",
            "pallas_kernels/tuning/tune.py",
        )
        forbidden = {"from_markup"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module not in ("rich", "rich.markup", "rich.emoji"), name
                if node.module in ("rich.console", "rich.progress"):
                    forbidden |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Import):
                imported = {alias.name.partition(".")[0] for alias in node.names}
                assert "rich" not in imported, name
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            where = f"{name}:{node.lineno}"
            assert exempt or called not in forbidden, where
            if called == "status":  # rich reads a str there whatever the console
                assert ast.unparse(node.args[0]).startswith("Text("), where
            for keyword in node.keywords:
                if keyword.arg in ("markup", "emoji", "highlight"):
                    assert ast.unparse(keyword.value) == "False", where
            if called in ("print", "add_row", "add_column", "rule"):
                texts = [x for x in ast.walk(node) if isinstance(x, ast.Constant)]
                found = [x.value for x in texts if isinstance(x.value, str)]
                assert not any("[/" in x or "[bold" in x for x in found), where
