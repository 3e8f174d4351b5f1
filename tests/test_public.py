"""What users see: names, docstrings, the README's code."""

import contextlib
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import pallas_kernels
import polarjax
from convert import convert
from polarjax.policies import save_adapter
from tests.models import LLAMA, random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoints/smollm2-135m"
PUBLIC = [
    (package, name)
    for package in (polarjax, pallas_kernels)
    for name in package.__all__
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_public_names_exist_and_say_what_they_are(package, name):
    thing = getattr(package, name)
    if not callable(thing) or not hasattr(thing, "__module__"):
        return  # a type alias
    if inspect.isclass(thing) or inspect.isfunction(thing):
        doc = inspect.getdoc(thing)
        assert doc and doc.splitlines()[0].endswith("."), f"{name} has no docstring"
        # A dataclass without one gets its signature instead.
        assert not doc.startswith(f"{name}(")
    if inspect.isfunction(thing):
        for argument in inspect.signature(thing).parameters:
            assert re.search(rf"^\s*{argument}: ", doc, re.M), f"{name}: {argument}"


def test_public_names_are_sorted_and_complete():
    assert sorted(polarjax.__all__) == list(polarjax.__all__)
    for name in polarjax.__all__:
        assert hasattr(polarjax, name)


def test_packages_carry_their_types():
    for package in (polarjax, pallas_kernels):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_policies_answer_the_protocol():
    policies = [polarjax.Dense, polarjax.Polar, polarjax.Adaptive]
    for policy in (*policies, polarjax.Oracle, polarjax.Random):
        assert issubclass(policy, polarjax.Policy)
        questions = "groups", "pages", "neurons", "channels"
        for name in ("wants", "bind", *questions, "reads"):
            assert hasattr(policy, name) or name in policy.__dataclass_fields__


def run_readme(folder, capsys):
    """Run the README's Python in a folder where its checkpoint and adapter are."""
    readme = REPOSITORY / "README.md"
    if not readme.exists():
        pytest.skip("needs the README: run it in a clone of the repository")
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks and all(CHECKPOINT in block for block in blocks)
    for block in blocks:
        names: dict = {}
        with contextlib.chdir(folder):
            exec(compile(block, str(readme), "exec"), names)
        out = names["out"]
        assert len(out.texts) == 2 and out.stats.policy == "Polar"
        assert repr(out.texts[0])[1:-1] in capsys.readouterr().out


def test_the_readmes_python_runs(tmp_path, capsys):
    # A small model in the place of the real one: a path wins over a shipped adapter.
    config = dataclasses.replace(LLAMA, layers=2)
    params = random_params(config, 0, routers=True, budgets=(4, 2))
    write_checkpoint(tmp_path / CHECKPOINT, params)
    save_adapter(tmp_path / "smollm2-135m", params)
    run_readme(tmp_path, capsys)


@pytest.mark.slow
def test_the_readmes_python_runs_on_the_default_model(smollm2_gguf, tmp_path, capsys):
    convert(smollm2_gguf, tmp_path / CHECKPOINT, progress=False)
    run_readme(tmp_path, capsys)


def test_the_policy_of_the_docs_is_measured(tmp_path, capsys):
    page = REPOSITORY / "docs" / "sparsity.md"
    if not page.exists():
        pytest.skip("needs the docs: run it in a clone of the repository")
    text = page.read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    config = dataclasses.replace(LLAMA, layers=2)
    write_checkpoint(tmp_path / CHECKPOINT, random_params(config, 0))
    (tmp_path / "book.txt").write_text("It was the best of times. " * 30)
    with contextlib.chdir(tmp_path):
        exec(compile(block, str(page), "exec"), {})
    dense, half, everything = capsys.readouterr().out.splitlines()
    assert dense.startswith("Dense [") and half.startswith("half [")
    assert everything.endswith("{'ratio': [1.0, 1.0, 1.0]}")
