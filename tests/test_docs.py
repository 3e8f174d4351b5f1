"""README.md and docs/: links, commands, floors and walks are what the code says."""

import re
import shlex
from pathlib import Path

import pytest

from polarjax.cli.main import _parser
from tests.test_house import FLOORS, MODULES, REPOSITORY, imports

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"


def ids(path: Path) -> str:
    return path.name


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def test_the_readme_is_short():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 250


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`(benchmarks/results/\S+?)`", text):
        assert (REPOSITORY / path).exists(), path


def test_every_page_is_in_the_readmes_list():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"| [docs/{page.name}](docs/{page.name}) |" in text


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_parse(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    for line in "\n".join(code for kind, code in blocks if not kind).splitlines():
        if line.startswith("polarjax "):
            args = _parser().parse_args(shlex.split(line, comments=True)[1:])
            args.command.check(args)


def test_the_table_of_floors_is_the_tests():
    rows = re.findall(
        r"^\| (\d+) \| `([\w.]+)` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.M
    )
    said = [(int(number), name) for number, name in rows]
    assert said == [(i, name) for i, f in enumerate(FLOORS) for name in f.split()]


@pytest.mark.parametrize("walk", ["generate", "convert", "calibrate"])
def test_walks_go_downward(walk):
    """At most nine files, none of which imports one that was passed before it."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.split(f"\n## {walk}\n")[1].split("\n## ")[0]
    paths = {path.relative_to(REPOSITORY).as_posix(): n for n, path in MODULES.items()}
    files = re.findall(r"^\d\. `([\w/.]+)`", section, re.M)
    assert 0 < len(files) <= 9
    for i, file in enumerate(files):
        imported = imports(paths[file], REPOSITORY / file)
        assert not imported & {paths[above] for above in files[:i]}, file
    for file in re.findall(r"`((?:polarjax|convert)/[\w/]+\.py)`", section):
        assert file in paths, file
    for file, names in re.findall(r"^\d\. `([\w/.]+)` \(([^)]*)\)", section, re.M):
        for name in re.findall(r"`([\w.]+)`", names):
            word = name.split(".")[-1]
            source = (REPOSITORY / file).read_text(encoding="utf-8")
            assert re.search(rf"\b(def|class) {word}\b", source), f"{file}: {name}"
