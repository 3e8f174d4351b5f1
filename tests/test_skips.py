"""What is skipped says why, and what to install or set to run it."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SKIPS = ("importorskip", "skip", "skipif")


def skips():
    """Place, function and source of every call that skips."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.startswith("pytest.") and called.split(".")[-1] in SKIPS:
                    where = f"{path.relative_to(TESTS)}:{node.lineno}"
                    yield where, called.split(".")[-1], ast.unparse(node)


def test_every_skip_says_what_it_needs():
    found = list(skips())
    assert len(found) > 30
    for where, called, source in found:
        assert "need" in source, where
        if called == "importorskip":
            assert re.search(r"pip install \W*[a-z]", source), where


def test_the_summary_shows_the_reasons(pytestconfig):
    assert "s" in pytestconfig.getoption("reportchars")
