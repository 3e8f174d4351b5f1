"""What the commands are called with: help, options without effect, the folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import convert.core
import convert.verify
from convert import arguments as conversion
from convert.__main__ import main as convert_main
from pallas_kernels import Implementation
from polarjax.bench import latencies, loads
from polarjax.cli import common, main
from polarjax.evaluation.batches import Mode
from polarjax.evaluation.run import Kind
from polarjax.planning import devices, memory, plan
from polarjax.policies import names
from polarjax.storage import siblings
from polarjax.terminal import choices
from polarjax.training.losses import HeadLoss
from polarjax.training.recovery import Routers
from tests.convert.checkpoints import write_gguf

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [command.name for command in main.COMMANDS]

# What is asked of the script, and what must not be loaded to answer.
ANSWERED = """
import contextlib, io, sys
from polarjax.cli.main import main
calls = [[], ["--help"], ["nonsense"], ["generate", "x", "y", "--densitty", "1"]]
calls += [["generate", "x", "y", "--density", "half"], ["plan"]]
calls += [[name, "--help"] for name in {names}] + [["bench", "serve", "--help"]]
calls += [["bench", "swerve"], ["bench", "serve", "--load", "chatter"]]
for call in calls:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(call)
        except SystemExit as stop:
            status = stop.code
    assert status == (0 if "--help" in call else 2), (call, status, said.getvalue())
    assert "usage: polarjax" in said.getvalue(), call
heavy = {{"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "transformers", "rich"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}))
"""


def python(*arguments, cwd, path=REPOSITORY):
    """Run Python there, as if polarjax were installed from `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_help_and_slips_are_answered_without_jax(tmp_path):
    done = python("-c", ANSWERED.format(names=NAMES), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_public_names_come_when_one_is_used(tmp_path):
    code = """
import sys, polarjax
assert "jax" not in sys.modules and polarjax.__version__
assert {*polarjax.__all__} <= {*dir(polarjax)}
assert not hasattr(polarjax, "__wrapped__") and "jax" not in sys.modules
from polarjax import Polar
assert polarjax.Polar is Polar and "jax" in sys.modules
assert callable(polarjax.generate) and polarjax.engine.generate
assert polarjax.mesh.cut.make_mesh and polarjax.mesh.processes.start
assert not hasattr(polarjax, "nonsense")
import pickle
assert pickle.loads(pickle.dumps(polarjax.Dense())) == polarjax.Dense()
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_choices_are_those_of_the_code():
    assert choices.MODES == get_args(Mode)
    assert choices.PERPLEXITIES == get_args(Kind)
    assert choices.HEAD_LOSSES == get_args(HeadLoss)
    assert choices.ROUTERS == get_args(Routers)
    shown = [i for i in get_args(Implementation) if not i.endswith("_interpret")]
    assert list(choices.IMPLEMENTATIONS) == shown
    assert {*choices.POLICIES} == {*names.NAMES}
    assert choices.MEMORY_FRACTION == memory.MEMORY_FRACTION
    assert choices.GPUS == tuple(devices.GPUS)
    assert {*choices.LINKED} == {*devices.GPUS} & {*devices.LINKS}
    assert choices.LOADS == loads.NAMES
    assert choices.LATENCIES == latencies.LIMITED
    assert choices.BATCHES == plan.BATCHES
    assert choices.DENSITIES == plan.DENSITIES
    assert conversion.DTYPES == tuple(convert.core.DTYPES)
    assert conversion.TOLERANCE == convert.verify.TOLERANCE


def shown_help(capsys, *call):
    with pytest.raises(SystemExit) as stop:
        main.main([*call, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_says_something(name, capsys):
    shown = shown_help(capsys, name)
    for nothing in ("None", "False", "[]", "default: )", "SUPPRESS", "0.66666"):
        assert nothing not in shown
    assert f"polarjax {name}" in shown.partition("options:")[2]  # an example


def test_help_shows_defaults(capsys):
    assert "most tokens to add (default: 64)" in shown_help(capsys, "generate")
    assert "fraction of KV groups to keep (default: 0.6667)" in shown_help(
        capsys, "calibrate"
    )
    assert "numbers of sequences (default: 1 4 16 64 256)" in shown_help(capsys, "plan")
    assert "(1% or 0.01)" in shown_help(capsys, "calibrate")


TEXTS = "--text {0} --out {0}/x"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("generate x y --policy dense --density 0.5", "--density has no effect with"),
        ("generate x y --policy adaptive --density 1/2", "--density has no effect"),
        ("generate x y --top-k 5", "--top-k has no effect at --temperature 0"),
        ("generate x y --top-p 0.5", "--top-p has no effect at --temperature 0"),
        ("generate x y --seed 3", "--seed has no effect at --temperature 0"),
        ("generate x y --balanced", "--balanced is of the policy polar, and goes with"),
        ("generate x y --start-timeout 9", "--start-timeout has no effect without"),
        ("eval x --tasks y --window 9", "--window has no effect without --text"),
        ("eval x --tasks y --tokens 9", "--tokens has no effect without --text"),
        ("eval x --tasks y --perplexity words", "--perplexity has no effect without"),
        ("eval x --text y --limit 9", "--limit has no effect without --tasks"),
        ("eval x --text y --stride 9", "--stride has no effect without --perplexity"),
        ("eval x --text y --perplexity words --prefix 9", "--prefix has no effect"),
        ("eval x --text y --prompts 9", "--prompts has no effect without --generation"),
        (
            "eval x --text y --prompt-tokens 9",
            "--prompt-tokens has no effect without --generation",
        ),
        ("eval x --text y --policies dense --densities 1/2", "--densities has no eff"),
        (
            "eval x --text y --policies oracle --neuron-density 1/2",
            "--neuron-density is of the policies polar and adaptive",
        ),
        ("lm-eval x --tasks y --overwrite", "--overwrite has no effect without --out"),
        ("lm-eval x --tasks y --policies adaptive --densities 1", "--densities has no"),
        (f"calibrate x {TEXTS} --fixed", "--fixed has no effect without --max-drop"),
        (f"calibrate x {TEXTS} --confidence 90%", "--confidence has no effect without"),
        (f"calibrate x {TEXTS} --decode-batch 2", "--decode-batch has no effect"),
        (f"calibrate x {TEXTS} --decode-context 2", "--decode-context has no effect"),
        (
            f"recover x {TEXTS} --adapter a --routers nothing --router-learning-rate 1",
            "--router-learning-rate has no effect with --routers nothing",
        ),
        ("plan x --densities 1 --head-rank 8", "--head-rank has no effect where no"),
        ("plan x --densities 1 --neuron-density 1/2", "--neuron-density has no effect"),
        ("plan x --neuron-rank 8", "--neuron-rank has no effect without"),
        ("plan x --balanced", "--balanced has no effect without --tp"),
        ("plan x --dp 2 --balanced", "--balanced has no effect without --tp"),
        ("plan x --link-gb-s 9", "--link-gb-s has no effect without --tp or --dp"),
        (
            "bench --toy --cases toy-llama --balanced",
            "--balanced has no effect without --tp above 1",
        ),
        (
            "bench --toy --tp 1 --link-gb-s 9",
            "--link-gb-s has no effect on one device",
        ),
        (
            "bench --models x --adapter a --head-rank 8",
            "--head-rank has no effect with --adapter",
        ),
    ],
)
def test_what_changes_nothing_is_refused(call, message, tmp_path, capsys):
    """Before anything is loaded: none of the files exists."""
    assert main.main(call.format(tmp_path).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call", ["generate x y --seed 0 --top-p 1", "eval x --tasks y --prompts 64"]
)
def test_a_default_said_aloud_is_none_of_them(call, capsys):
    assert main.main(call.split()) == 1
    assert "no checkpoint folder at x" in capsys.readouterr().err


def test_a_policy_takes_a_density_or_none():
    for name in ("dense", "adaptive"):
        with pytest.raises(ValueError, match=f"the policy {name} takes no density"):
            names.named(name, 0.5)
    with pytest.raises(ValueError, match="oracle takes no density of neurons"):
        names.named("oracle", 0.5, 0.5)
    policies = common.make_policies("dense,polar,oracle", "1/2", 0.25)
    assert policies["Polar 0.500"].neuron_density == 0.25


@pytest.fixture
def hijacked(tmp_path):
    """A folder with files of the user's that have our packages' names."""
    for name in ("benchmarks", "pallas_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('hijacked')\n")
    (tmp_path / "convert.py").write_text("print('hijacked')\n")
    return tmp_path


@pytest.mark.parametrize("call", [["--help"], ["convert", "--help"], ["bench", "-h"]])
def test_it_does_not_matter_where_the_module_is_called(hijacked, call):
    done = python("-m", "polarjax", *call, cwd=hijacked)
    assert done.returncode == 0 and "usage: polarjax" in done.stdout
    assert "hijacked" not in done.stdout and not done.stderr


def test_a_clone_is_called_where_it_lies():
    done = python("-m", "polarjax", "convert", "--help", cwd=REPOSITORY, path=None)
    assert done.returncode == 0 and "usage: polarjax convert" in done.stdout
    done = python("-P", "-m", "polarjax", "bench", "--help", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["convert", "pallas_kernels"])
def test_another_module_of_that_name_is_told(hijacked, name, monkeypatch):
    siblings.check_ours(name)  # in memory
    monkeypatch.delitem(sys.modules, name)
    siblings.check_ours(name)  # on disk
    monkeypatch.syspath_prepend(str(hijacked))
    with pytest.raises(ImportError, match=rf"{hijacked}/{name}.*rename it"):
        siblings.check_ours(name)
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(ImportError, match=f"polarjax needs .*{name}"):
        siblings.check_ours(name)


def test_a_notebook_beside_such_a_file_is_told(hijacked):
    # `-c` and notebooks have their folder first: here nothing may be taken away.
    code = "import polarjax; polarjax.Polar"
    done = python("-c", code, cwd=hijacked)
    assert done.returncode == 1 and "hijacked" not in done.stdout
    assert f"ImportError: {hijacked}/pallas_kernels/__init__.py is" in done.stderr
    (hijacked / "pallas_kernels" / "__init__.py").unlink()
    (hijacked / "pallas_kernels").rmdir()
    code = "from polarjax.cli.main import main; main(['plan', 'x', '--device', 'h100'])"
    done = python("-c", code, cwd=hijacked)
    error = f"error: {hijacked}/convert.py is found in the place of polarjax's own"
    assert done.stderr.startswith(error) and done.stderr.count("\n") == 1


def test_convert_is_a_command(tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf")
    call = ["convert", str(tmp_path / "model.gguf"), str(tmp_path / "model")]
    assert main.main(call) == 0
    assert "layers" in capsys.readouterr().out
    assert (tmp_path / "model" / "config.json").exists()
    assert main.main(call) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert convert_main(call[1:]) == 1
    assert capsys.readouterr().err == said
    for wrong in (["--adapter", "x"], ["--prompts", "x"], ["--to-hf", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            main.main([*call, *wrong])
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        with pytest.raises(SystemExit):
            convert_main([*call[1:], *wrong])
        other = capsys.readouterr().err.splitlines()[-1]
        assert error.partition(": error:")[2] == other.partition(": error:")[2] != ""


def test_both_conversions_have_the_same_options(capsys):
    ours = shown_help(capsys, "convert").partition("options:")[2]
    with pytest.raises(SystemExit):
        convert_main(["--help"])
    theirs = " ".join(capsys.readouterr().out.split())
    assert ours == theirs.partition("options:")[2]
    assert "`polarjax convert` and `python -m convert` are the same" in theirs


def test_nobody_is_told_to_run_the_module():
    """A `convert.py` of the user's would run instead."""
    told = "python -m " + "convert"
    allowed = {"convert/__main__.py", "convert/arguments.py", "convert/command.py"}
    for package in ("polarjax", "convert", "benchmarks", "pallas_kernels"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if str(path.relative_to(REPOSITORY)) not in allowed:
                assert told not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "options", ["--cases llama-3.1-8b-b1", "--models llama-3.1-8b --batches 1"]
)
def test_a_dry_run_times_no_real_model(options, capsys):
    assert main.main(["bench", "--toy", *options.split()]) == 1
    assert "--toy is of its own cases" in capsys.readouterr().err


def interrupt(*_):
    raise KeyboardInterrupt


def test_who_interrupts_is_told_what_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(main, "_run", interrupt)
    work = tmp_path / "w"
    words = f"calibrate x --text y --out {tmp_path / 'z'} --work {work}"
    assert main.main(words.split()) == 130
    assert capsys.readouterr().err == "interrupted\n"  # nothing is there yet
    work.mkdir()
    assert main.main(words.split()) == 130
    said = f"interrupted: the same command goes on from {work}\n"
    assert capsys.readouterr().err == said


def test_an_interrupt_ends_the_process(monkeypatch, capfd):
    """Without Python's farewell, and where modules are loaded at once."""

    def end(status):
        raise SystemExit(status)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["polarjax", "report", "x"])
    try:
        with pytest.raises(SystemExit) as stop, main._ending_at_once(True):
            signal.raise_signal(signal.SIGINT)
        assert stop.value.code == 130 and capfd.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt), main._ending_at_once(False):
            signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(main, "_run", interrupt)
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert stop.value.code == 130
    finally:
        signal.signal(signal.SIGINT, before)
