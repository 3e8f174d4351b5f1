import copy
import html
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs it: pip install matplotlib")

from polarjax.evaluation.report import plots
from polarjax.evaluation.report.page import make_report
from polarjax.storage.folder import mark
from tests.evaluation.report_sample import DENSITY, POLICIES, task, text, whole

PLOTS = {
    "tasks-by-density",
    "tasks-by-speed",
    "perplexity-by-density",
    "perplexity-by-speed",
    "head-use",
    "router-recall",
    "kl-per-token",
}


@pytest.fixture
def result():
    return whole()


@pytest.fixture
def small():
    """Makes one plot only."""
    return whole() | {"tasks": {}, "perplexity": {}, "generation": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of the whole result."""
    path = tmp_path_factory.mktemp("whole") / "result0.json"
    path.write_text(json.dumps(whole()))
    return make_report([path], path.parent / "report").parent


@pytest.fixture
def report(tmp_path):
    def write(*records, out="report"):
        paths = []
        for i, record in enumerate(records):
            path = tmp_path / f"result{i}.json"
            path.write_text(json.dumps(record))
            paths.append(path)
        page = make_report(paths, tmp_path / out)
        assert page == tmp_path / out / "report.html"
        return page.parent

    return write


class Rows(HTMLParser):
    """Texts of the cells of each table row, and everything that was tagged."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.ids = [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "span" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += " "

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def both(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    plain = (folder / "report.md").read_text(encoding="utf-8")
    return page, re.sub(r"\\(.)", r"\1", plain)


def test_every_value_stands_with_its_interval(folder):
    page, plain = both(folder)
    rows = Rows(page).rows
    wanted = [
        # arc
        "50.00 [45.00, 55.00]|–|–|33.01 [31.02, 35.03]|–|–|1.000|12,345|1.00",
        "51.00 [46.00, 56.00]|−1.00 [−2.23, +1.23]|0.032|33.01 [31.02, 35.03]|"
        "−1.01 [−2.02, +3.03]|0.41|0.625|19,752|1.60",
        # lambada
        "61.00 [56.00, 66.00]|−1.00 [−2.23, +1.23]|0.032|9.111 [8.222, 10.333]|"
        "1.0511 [1.0312, 1.0713]|0.625|19,752|1.60",
        # windows, words
        "21.500 [20.250, 22.750]|1.1000 [1.0500, ∞]|0.625|19,752|1.60",
        "21.500 [20.250, 22.750]|1.1000 [1.0500, ∞]|41.500 [40.500, 42.500]|1.7500|"
        "0.8125 [0.7500, ∞]|0.625|19,752|1.60",
        "61.5 [51.1, 71.2]|33.3 [30.1, 36.6]|0.0456 [0.0345, 0.0567]|"
        "97.15 [96.16, 98.17]|0.625",
    ]
    found = ["|".join(row[1:]) for row in rows]
    for row in wanted:
        assert row in found
        assert " | ".join(row.split("|")) in plain
    assert rows[0][:3] == ["Policy", "Accuracy, %", "Minus dense, points"]
    assert [row[0] for row in rows[1:5]] == list(DENSITY)


def test_what_was_measured_and_how(folder):
    for page in both(folder):
        page = html.unescape(page)
        for word in ("toy-135m", "decode", "16", "float32", "xla", "NVIDIA H200"):
            assert word in page
        for word in ("abc1234", "2026-11-22T20:00:00+00:00", "jax 0.11.2", "a-toy"):
            assert word in page
        assert "feed" * 16 in page and "2, 1 × 3" in page
        assert "polarjax eval checkpoints/toy --out 'my result.json'" in page
        assert "choice, 2 questions, file choice.jsonl.gz, sha256 111111111111" in page
        assert "tokens 4,321, window 2,048, prefix 64, file text.txt" in page


def test_sections_and_plots(folder):
    page, plain = both(folder)
    for title in ("Tasks", "Perplexity", "Generation damage", "Heads"):
        assert f">{title}</h2>" in page and f"## {title}\n" in plain
    assert {path.stem for path in folder.glob("*.svg")} == PLOTS
    assert page.count("<svg") == page.count("<figcaption>") == len(PLOTS)
    assert all(f"({name}.svg)" in plain for name in PLOTS)
    assert 'class="missing"' not in page and "\n> " not in plain
    ids = Rows(page).ids
    assert len(ids) == len(set(ids))
    # Whole in itself.
    assert not re.search(
        r"(src|href)=\"(?!#|data:)", page.replace("xlink:href", "href")
    )


def test_plots_take_the_colour_of_the_page(folder):
    page, _ = both(folder)
    assert "prefers-color-scheme: dark" in page
    for path in folder.glob("*.svg"):
        svg = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
        assert "currentColor" in svg and "prefers-color-scheme:dark" in svg
        texts = [e for e in root.iter() if e.tag.endswith("}text")]
        assert texts
        for element in texts:
            assert "fill: currentColor" in element.get("style", "")
        assert not re.search("#000000|#010203|black", svg)
        assert "date" not in svg.lower() and "Matplotlib v" not in svg


@pytest.fixture
def drawn(monkeypatch):
    """What was to be drawn, by plot; it is not."""
    seen = {}

    def note(name, label, *arguments):
        seen[name] = arguments
        return f'<svg aria-label="{label}"></svg>'

    for function in ("quality", "heat_maps", "recall", "histograms"):
        monkeypatch.setattr(plots, function, note)
    return seen


def test_points_stand_where_the_numbers_say(report, result, drawn):
    report(result)
    panels, axes = drawn["tasks-by-density"]
    assert [panel.title for panel in panels] == ["arc", "lambada"]
    assert axes.dense == 0 and not axes.speed
    points = {series.name: found for series, found in panels[0].series.items()}
    assert list(points) == ["Polar", "Random"]
    first, second = points["Polar"]
    assert first == pytest.approx((0.625, -1.0, -2.23, 1.23))
    assert second == pytest.approx((0.8125, -2.0, -3.23, 1.23))
    panels, axes = drawn["perplexity-by-speed"]
    [point] = next(v for k, v in panels[0].series.items() if k.name == "Random")
    assert point[:3] == pytest.approx((1.6, 1.3, 1.25)) and point.high is None
    assert axes.dense == 1 and axes.speed


def test_head_use_is_that_of_most_positions(report, result, drawn):
    for label in DENSITY:
        result["perplexity"]["words"]["results"][label] |= {
            "positions": 9999,
            "use": [[0.25, 0.75]] * 4,
        }
    report(result)
    [use] = drawn["head-use"]
    assert {label: use.tolist() for label, use in use.items()} == {
        label: [[0.25, 0.75]] * 4 for label in DENSITY if label != "Dense"
    }


def test_the_same_input_makes_the_same_files(folder, report, result):
    first, second = folder, report(result)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted([*(f"{n}.svg" for n in PLOTS), "report.html", "report.md"])
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_is_missing_is_named(report, result):
    result |= {"tasks": {}, "perplexity": {}, "generation": None, "recall": None}
    folder = report(result)
    page, plain = both(folder)
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md"}
    for option in ("--tasks", "--text", "--generation", "--adapter"):
        assert f"<code>{option}</code>" in page and f"`{option}`" in plain
    assert page.count('class="missing"') == plain.count("\n> ") == 5


def test_dense_alone_has_tables_and_no_plots(report, result):
    result |= {"generation": None, "recall": None}
    result["setup"]["policies"] = {"Dense": POLICIES["Dense"]}
    for found in (*result["tasks"].values(), *result["perplexity"].values()):
        found["results"] = {"Dense": found["results"]["Dense"]}
    folder = report(result)
    page, _ = both(folder)
    assert "50.00" in page and "it needs Dense and another policy" in page
    assert not list(folder.glob("*.svg"))


def test_foreign_text_stays_text(report, result):
    evil = "<b>x</b></svg><script>alert(1)</script> | `a` $\\frac{$ \u0000\ud800 “文字”"
    record = json.loads(json.dumps(result).replace("Polar 0.5", json.dumps(evil)[1:-1]))
    record["setup"]["checkpoint"] = evil
    record["setup"]["policies"][evil]["policy"] = r"_<i> $\frac{$"
    record["tasks"] = {evil: record["tasks"]["arc"], "_b": record["tasks"]["lambada"]}
    record["made"]["command"] = ["eval", "</code><u>"]
    folder = report(record)
    page, _ = both(folder)
    assert not Rows(page).tags & {"b", "script", "i", "u"}
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "\0" not in page
    raw = (folder / "report.md").read_text(encoding="utf-8")
    assert r"\<b\>x\</b\>\</svg\>\<script\>" in raw and r" \| \`a\` \$" in raw
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)
    svg = (folder / "tasks-by-density.svg").read_text(encoding="utf-8")
    assert "_&lt;i&gt; $\\frac{$</text>" in svg  # the legend has it, as it is


def test_several_files(report, result):
    other = copy.deepcopy(result)
    other["setup"] |= {"mode": "mask", "checkpoint": "toy-360m"}
    # Other questions of the same name are not the same task.
    other["tasks"]["lambada"]["sha256"] = "e" * 64
    folder = report(result, other)
    page, plain = both(folder)
    first, second = "result0, decode", "result1, mask"
    assert "Evaluation of toy-135m, toy-360m in mode decode, mask" in page
    rows = Rows(page).rows
    labels = [row[0] for row in rows]
    assert labels[1] == f"Dense {first}" and labels[5] == f"Dense {second}"
    assert (
        labels.count(f"Polar 0.5 {first}") == labels.count(f"Polar 0.5 {second}") == 5
    )
    assert "### lambada (2)\n" in plain and "### arc (2)" not in plain
    assert "Mode mask computes everything" in plain
    names = {path.stem for path in folder.glob("*.svg")}
    assert names == PLOTS - {"head-use"} | {"head-use-1", "head-use-2"}
    svg = (folder / "tasks-by-density.svg").read_text(encoding="utf-8")
    assert f"Polar · {first}" in svg and f"Random · {second}" in svg


def test_a_file_named_twice_has_two_names(tmp_path, small):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(small))
    page = make_report([path, path], tmp_path / "out").read_text(encoding="utf-8")
    assert "<h3>r, decode</h3>" in page and "<h3>r, decode (2)</h3>" in page
    alone = make_report(str(path), tmp_path / "out").read_text(encoding="utf-8")
    assert "<h3>r.json</h3>" in alone


def without(record, *keys):
    for key in keys[:-1]:
        record = record[key]
    del record[keys[-1]]


def put(record, value, *keys):
    for key in keys[:-1]:
        record = record[key]
    record[keys[-1]] = value


ARC = "tasks", "arc", "results", "Polar 0.5"
WINDOWS = "perplexity", "windows", "results", "Polar 0.5"
KL = "generation", "results", "Polar 0.5", "kl_per_token"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: put(r, "polarjax bench", "kind"), "no result of `polarjax eval`"),
        (
            lambda r: put(r, 2, "format_version"),
            "format version 2, this polarjax reads 1",
        ),
        (lambda r: without(r, "setup"), "damaged .*setup"),
        (lambda r: without(r, "setup", "policies", "Polar 0.5"), "damaged .*Polar 0.5"),
        (
            lambda r: without(r, *ARC, "accuracy"),
            "tasks, 'Polar 0.5': accuracy is not there",
        ),
        (lambda r: put(r, 0.5, *ARC, "accuracy"), r"accuracy .*\[value, low, high\]"),
        (
            lambda r: put(r, [1, 2], *WINDOWS, "perplexity"),
            "perplexity, 'Polar 0.5': perplexity must be",
        ),
        (
            lambda r: put(r, "x", *WINDOWS, "density"),
            "density must be a number",
        ),
        (lambda r: put(r, 10**400, *WINDOWS, "density"), "damaged"),
        (lambda r: put(r, [[1.0], []], *WINDOWS, "use"), "damaged"),
        (lambda r: put(r, ["x"], *KL), "damaged"),
        (lambda r: put(r, [0.5], "recall", "chance"), "damaged"),
        (lambda r: put(r, [1], "tasks"), "damaged"),
    ],
)
def test_bad_results(report, result, tmp_path, change, message):
    good = copy.deepcopy(result)
    change(result)
    with pytest.raises(ValueError, match=message) as error:
        report(good, result)
    assert str(tmp_path / "result1.json") in str(error.value)
    assert "polarjax eval --out FILE" in str(error.value)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"result0.json", "result1.json"}


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no result file"):
        make_report([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        make_report([tmp_path / "nowhere.json"], tmp_path / "out")
    bad = tmp_path / "bad.json"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.json is no JSON"):
            make_report([bad], tmp_path / "out")
    bad.write_text("[1]")
    with pytest.raises(ValueError, match=r"bad\.json is no result"):
        make_report([bad], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_places(report, small, tmp_path):
    folder = report(small, out="deep/er/report")
    (folder / "old-plot.svg").write_text("<svg/>")
    report(small, out="deep/er/report")
    assert not (folder / "old-plot.svg").exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        report(small, out="deep/er/report")
    assert (folder / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    report(small, out="other")
    with pytest.raises(FileExistsError, match="is a file"):
        report(small, out="result0.json")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "mine.svg").write_text("<svg/>")
    with pytest.raises(FileExistsError, match=r"mine\.svg"):
        report(small, out="pictures")


def test_what_stands_beside_a_report_is_left_alone(report, small, tmp_path):
    report(small)
    partial = tmp_path / "report.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"report\.partial holds thesis\.txt"):
        report(small)
    assert (partial / "thesis.txt").read_text() == "years of work"
    # A process that was killed between moving the older one aside and its end.
    partial.joinpath("thesis.txt").unlink()
    mark(partial)
    (tmp_path / "report").rename(partial / "old")
    (partial / "old" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report holds notes\.txt"):
        report(small)
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
    assert not partial.exists()


def test_an_error_while_writing_leaves_the_older_report(report, small, monkeypatch):
    folder = report(small)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(plots, "as_file", lambda svg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(small)
    monkeypatch.setattr(plots, "as_file", lambda svg: None)  # fails when it is written
    with pytest.raises(TypeError):
        report(small)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {p.name for p in folder.parent.iterdir()} == {"report", "result0.json"}


def test_without_matplotlib(report, small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'polarjax\[plot\]'"):
        report(small)
    assert not (tmp_path / "report").exists()


def test_a_scale_for_ratios_that_span_much(report, small):
    windows = text(2048)
    windows["results"]["Random 0.5"]["against_dense"]["ratio"] = [30.0, 20.0, 45.0]
    windows["results"]["Polar 0.5"]["against_dense"]["ratio"] = [1.1, None, None]
    small["perplexity"] = {"windows": windows}
    # Better than dense, one by far: differences stay on a linear scale.
    arc = task("choice", 1)
    for label, change in zip(DENSITY, (None, 0.01, 0.1, 0.9), strict=True):
        if change:
            arc["results"][label]["against_dense"]["accuracy"] = [change, 0.0, 0.95]
    small["tasks"] = {"arc": arc}
    folder = report(small)
    svg = (folder / "perplexity-by-density.svg").read_text(encoding="utf-8")
    assert ">10</text>" in svg and ">20</text>" in svg and ">5</text>" in svg
    assert ">0</text>" in (folder / "tasks-by-density.svg").read_text(encoding="utf-8")
    page, _ = both(folder)
    assert page.count("The interval of a point without a bar is not known.") == 2


def test_values_that_no_float_holds(report, result):
    for found in result["perplexity"].values():
        for row in found["results"].values():
            row["word_perplexity"] = [None, None, None]
    html, markdown = both(report(result))
    assert "Per word" not in html + markdown
