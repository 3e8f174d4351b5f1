"""A page of tables and plots from the result files of `polarjax eval`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import reprlib
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from polarjax.evaluation import plots

_VERSION = 1
_RIGHT = "`polarjax eval --out FILE` writes a result"
_HTML, _MARKDOWN = "report.html", "report.md"
_MODES = {
    "decode": "contexts are read dense, what follows them is decoded sparsely",
    "kernel": "every token goes through the sparse decode step",
    "mask": "a dense model in which what is not selected is set to zero",
}


class _Column(NamedTuple):
    heading: str
    key: str
    form: str
    scale: float = 1
    change: bool = False  # against dense
    interval: bool = True  # always; a number may have one, too


_Number = functools.partial(_Column, interval=False)
_DENSITY = _Number("Density", "density", ".3f")
_COST = (
    _DENSITY,
    _Number("Tokens/s", "tokens_per_second", ",.0f"),
    _Number("Speed / dense", "speed", ".2f"),
)
_COST_TEXT = (
    " Density is the share of KV groups read, as counted; a speed was timed once and "
    "has no interval."
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a kind of measurement has, and what the page says of it.

    Attributes:
      title: of the section.
      text: how its intervals came about.
      needs: keys that are always there.
      columns: of the tables.
      quality: what is plotted against dense: the column, its axis, dense's value.
      caption: of those plots.
      missing: what is said if it was not measured.
    """

    title: str
    text: str
    needs: tuple[str, ...]
    columns: tuple[_Column, ...]
    missing: str
    quality: tuple[_Column, str, float] | None = None
    caption: str = ""


_CHANGE = _Column("Minus dense, points", "accuracy", "+.2f", 100, True)
_RATIO = _Column("Ratio to dense", "ratio", ".4f", 1, True)
_PARTS = {
    "tasks": _Part(
        title="Tasks",
        text="Accuracies have Wilson intervals. Others come from resampling questions, "
        "those against dense together with dense's answers; where no answer changed, "
        "the bounds are Clopper and Pearson's. McNemar's p is exact." + _COST_TEXT,
        needs=("accuracy", "positions", "use"),
        columns=(
            _Column("Accuracy, %", "accuracy", ".2f", 100),
            _CHANGE,
            _Number("McNemar p", "mcnemar_p", ".2g", 1, True),
            _Column("Accuracy per byte, %", "accuracy_per_byte", ".2f", 100),
            _Column("Per byte minus dense", "accuracy_per_byte", "+.2f", 100, True),
            _Number("p per byte", "mcnemar_p_per_byte", ".2g", 1, True),
            _Column("Target perplexity", "target_perplexity", ",.3f"),
            _Column("Ratio to dense", "target_perplexity_ratio", ".4f", 1, True),
            *_COST,
        ),
        missing="No task was measured: `--tasks` of `polarjax eval` adds the tables "
        "and the plots of accuracy by density and by speed.",
        quality=(_CHANGE, "accuracy minus dense, points", 0),
        caption="One panel for each task. Bars are 95 % intervals, from resampling "
        "questions together with dense's answers to them; where a bar crosses the "
        "dashed line, which is dense, the difference may be chance.",
    ),
    "perplexity": _Part(
        title="Perplexity",
        text="Intervals come from resampling windows of the text; those of the ratio "
        "are paired with dense." + _COST_TEXT,
        needs=("perplexity", "positions", "use"),
        columns=(
            _Column("Perplexity", "perplexity", ",.3f"),
            _RATIO,
            _Number("Per word", "word_perplexity", ",.3f"),
            _Number("Per byte", "byte_perplexity", ",.4f"),
            _Number("Bits per byte", "bits_per_byte", ".4f"),
            *_COST,
        ),
        missing="No text was measured: `--text` of `polarjax eval` adds the tables and "
        "the plots of perplexity by density and by speed.",
        quality=(_RATIO, "perplexity / dense", 1),
        caption="One panel for each way of cutting the text. Bars are 95 % intervals, "
        "from resampling windows together with dense's likelihoods of them; above the "
        "dashed line, which is dense, a policy predicts worse.",
    ),
    "generation": _Part(
        title="Generation damage",
        text="Greedy continuations of the same prompts as dense: the share that is the "
        "same to the last token, tokens before the first that differs, and, along "
        "dense's own text, the Kullback-Leibler divergence from dense and how often "
        "the likeliest token is the same. The share has a Wilson interval; the others "
        "come from resampling prompts.",
        needs=("identical", "tokens_until_divergence", "kl", "agreement"),
        columns=(
            _Column("Identical, %", "identical", ".1f", 100),
            _Column("Tokens until divergence", "tokens_until_divergence", ".1f"),
            _Column("Mean KL, nats", "kl", "#.3g"),
            _Column("Top-1 agreement, %", "agreement", ".2f", 100),
            _DENSITY,
        ),
        missing="No text was generated: `--generation` of `polarjax eval`, with "
        "`--text`, adds the table and the histogram of KL by token.",
    ),
}

_DENSITY_CAPTION = (
    "Policies of equal density stand slightly apart, so that their bars are seen."
)
_USE_CAPTION = (
    "One panel for each sparse policy: the share of positions at which a layer (row) "
    "read a KV group (column), in the measurement with the most positions. One colour "
    "along a row would be no preference."
)
_RECALL_CAPTION = (
    "The share of the truly largest KV groups that the router chooses, and that random "
    "choice would; means over tokens, without intervals. The further above the dashed "
    "line, the more the router knows."
)


class _Run(NamedTuple):
    """A result file; the tag tells it from others, if there are any."""

    record: Mapping[str, Any]
    file: str
    tag: str

    def named(self, label: str) -> str:
        return f"{label} · {self.tag}" if self.tag else label

    def kind(self, label: str) -> str:
        return self.record["setup"]["policies"][label]["policy"]

    def measured(self, part: str) -> Mapping[str, Any]:
        found = self.record.get(part) or {}
        return {part: found} if part == "generation" and found else found


class _Row(NamedTuple):
    run: _Run
    label: str
    found: Mapping[str, Any]

    def value(self, column: _Column) -> Any:
        found = self.found.get("against_dense") if column.change else self.found
        return (found or {}).get(column.key)

    @property
    def kind(self) -> str:
        return self.run.kind(self.label)

    @property
    def dense(self) -> bool:
        return self.kind == "dense"


class _Group(NamedTuple):
    """What policies yielded on the same data."""

    title: str
    note: str
    rows: list[_Row]


class _Cell(NamedTuple):
    value: str
    interval: str = ""


class _Table(NamedTuple):
    title: str
    note: str
    headings: list[str]
    rows: list[list[_Cell]]


class _Plot(NamedTuple):
    name: str  # of its file
    title: str
    caption: str  # how to read it
    svg: str


@dataclasses.dataclass
class _Section:
    """A part of the page; `missing` says what is not in it and how to get it."""

    title: str
    text: str
    tables: list[_Table] = dataclasses.field(default_factory=list)
    plots: list[_Plot] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)


def make_report(results: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page that shows what `polarjax eval` measured.

    The folder gets `report.html`, which is whole in itself, `report.md`, and the plots
    that it links as SVG files. It is written whole or not at all.

    Args:
      results: result files, at least one.
      out: the folder; an older report there is replaced.

    Returns:
      The path of `report.html`.

    Raises:
      FileNotFoundError: if there is no such result file.
      FileExistsError: if the folder holds something else than a report.
      ValueError: naming the file that is no result of `polarjax eval`; or if
        matplotlib is not installed.
    """
    out = Path(out)
    _check_place(out)
    runs = _read([results] if isinstance(results, str | Path) else results)
    sections = [
        *(_quality(runs, "tasks"), _quality(runs, "perplexity")),
        *(_generation(runs), _heads(runs)),
    ]
    title, facts = _title(runs), [_facts(run) for run in runs]
    files = {
        _HTML: _html(title, facts, sections),
        _MARKDOWN: "\n".join(_markdown(title, facts, sections)) + "\n",
    }
    for plot in itertools.chain(*(section.plots for section in sections)):
        files[f"{plot.name}.svg"] = plots.as_file(plot.svg)
    _write(out, files)
    return out / _HTML


def _check_place(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: a report is a folder")
    names = {path.name for path in out.iterdir()}
    ours = {n for n in names if n in (_HTML, _MARKDOWN) or n.endswith(".svg")}
    if names and (names - ours or not ours & {_HTML, _MARKDOWN}):
        raise FileExistsError(
            f"{out} holds {min(names - ours or names)}, which is of no report: choose "
            "a new or an empty folder"
        )


def _write(out: Path, files: Mapping[str, str]) -> None:
    """Make the folder beside its place, then put it there."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        new = Path(work) / "new"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8", newline="\n")
        if out.exists():
            out.rename(Path(work) / "old")
        new.rename(out)


# Reading.


def _read(paths: Sequence[str | Path]) -> list[_Run]:
    if not paths:
        raise ValueError("no result file: name at least one")
    runs: list[_Run] = []
    for path in map(Path, paths):
        record = _load(path)
        base = f"{_clean(path.stem)}, {record['setup']['mode']}"
        tags = itertools.chain([base], (f"{base} ({i})" for i in itertools.count(2)))
        tag = next(tag for tag in tags if tag not in [run.tag for run in runs])
        runs.append(_Run(record, _clean(path.name), tag))
    return runs if len(runs) > 1 else [runs[0]._replace(tag="")]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_RIGHT}")
    try:
        text = path.read_text(encoding="utf-8")
        record = _clean(json.loads(text, parse_constant=lambda _: None))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {_RIGHT}") from None
    if not isinstance(record, dict) or record.get("kind") != "polarjax eval":
        raise ValueError(f"{path} is no result of `polarjax eval`; {_RIGHT}")
    if (version := record.get("format_version")) != _VERSION:
        raise ValueError(
            f"{path} has format version {reprlib.repr(version)}, this polarjax reads "
            f"{_VERSION}; {_RIGHT}"
        )
    try:
        _check(_Run(record, path.name, ""))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {_RIGHT}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({what}); {_RIGHT}") from None
    return record


def _clean(value: Any) -> Any:
    """Without control characters and halves of surrogate pairs, which XML forbids."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _check(run: _Run) -> None:
    """Raise something if there is what cannot be shown."""
    _facts(run)
    for name, part in _PARTS.items():
        for row in (row for group in _gather([run], name) for row in group.rows):
            place = f"{name}, {row.label!r}"
            for key in part.needs:
                if row.found.get(key) is None:
                    raise ValueError(f"{place}: {key} is not there")
            for column in part.columns:
                value = row.value(column)
                _check_value(value, column.interval, f"{place}: {column.key}")
            _check_value(row.found.get("positions"), False, f"{place}: positions")
    _head_use(run)
    _divergences([run])
    _recall(run)


def _check_value(value: Any, interval: bool, place: str) -> None:
    if value is None:
        return
    numbers = value if isinstance(value, list) else [value]
    known = [number for number in numbers if number is not None]
    right = all(type(n) in (int, float) and math.isfinite(n) for n in known)
    if interval or isinstance(value, list):
        right &= len(numbers) == 3 and numbers[0] is not None
    if not right:
        shape = "[value, low, high]" if interval else "a number, or with an interval"
        raise ValueError(f"{place} must be {shape}, got {reprlib.repr(value)}")


def _array(values: Any, dimensions: int, place: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{place} must be numbers in {dimensions} dimensions")
    return array


def _gather(runs: Sequence[_Run], name: str) -> list[_Group]:
    """What all files hold of a part, by the data that it was measured on."""
    groups: dict[Any, _Group] = {}
    for run in runs:
        for title, found in run.measured(name).items():
            key = title, _note(found)
            if key not in groups:
                same = sum(title == other for other, _ in groups)
                title = f"{title} ({same + 1})" if same else title
                groups[key] = _Group(title, key[1], [])
            groups[key].rows.extend(_rows(run, found["results"]))
    return list(groups.values())


def _note(found: Mapping[str, Any]) -> str:
    """What was measured on; equal for equal data."""
    words = [str(found["kind"])] if found.get("kind") else []
    if "ids" in found:
        words.append(f"{len(found['ids']):,} questions")
    counts = "tokens", "words", "bytes", "window", "prefix", "stride", "prompts"
    for key in (*counts, "prompt_tokens", "new_tokens", "file"):
        if (value := found.get(key)) is not None:
            value = f"{value:,}" if isinstance(value, int) else value
            words.append(f"{key.replace('_', ' ')} {value}")
    if found.get("sha256"):
        words.append(f"sha256 {str(found['sha256'])[:12]}")
    return ", ".join(words)


def _rows(run: _Run, results: Mapping[str, Any]) -> list[_Row]:
    """With speeds relative to dense in the same measurement."""
    dense = [found for label, found in results.items() if run.kind(label) == "dense"]
    base = dense[0].get("tokens_per_second") if dense else None
    rows = []
    for label, found in results.items():
        own = found.get("tokens_per_second")
        speed = own / base if own and base else None
        rows.append(_Row(run, label, {**found, "speed": speed}))
    return rows


def _head_use(run: _Run) -> dict[str, np.ndarray]:
    """Of each sparse policy, in the measurement with the most positions."""
    most: dict[str, Mapping[str, Any]] = {}
    for name in ("tasks", "perplexity"):
        for row in (row for group in _gather([run], name) for row in group.rows):
            known = most.get(row.label, {"positions": -1})
            if not row.dense and row.found["positions"] > known["positions"]:
                most[row.label] = row.found
    return {
        label: _array(found["use"], 2, f"use of {label!r}")
        for label, found in most.items()
    }


def _divergences(runs: Sequence[_Run]) -> list[tuple[_Row, np.ndarray]]:
    """Of each sparse policy, KL of every token of every prompt."""
    found = []
    for row in (row for group in _gather(runs, "generation") for row in group.rows):
        values = list(itertools.chain(*(row.found.get("kl_per_token") or ())))
        if values and not row.dense:
            found.append((row, _array(values, 1, f"KL of {row.label!r}")))
    return found


def _recall(run: _Run) -> list[np.ndarray]:
    """Layers, recall of the routers, and of chance; [] if there is none."""
    if not (recall := run.record.get("recall")):
        return []
    keys = "layers", "routers", "chance"
    return list(_array([recall[key] for key in keys], 2, "recall"))


def _title(runs: Sequence[_Run]) -> str:
    setups = [run.record["setup"] for run in runs]
    models, modes = (
        ", ".join(dict.fromkeys(str(setup[key] or "a model") for setup in setups))
        for key in ("checkpoint", "mode")
    )
    return f"Evaluation of {models} in mode {modes}"


def _facts(run: _Run) -> dict[str, Any]:
    """What was measured, how and where: for the head of the page."""
    made, setup = run.record["made"], run.record["setup"]
    adapter, versions = setup.get("adapter") or {}, made.get("versions") or {}
    same = itertools.groupby(adapter.get("budgets") or ())
    budgets = [(groups, len(list(layers))) for groups, layers in same]
    mode = setup["mode"]
    rows = {
        "Checkpoint": setup["checkpoint"],
        "Model": f"{setup.get('layers')} layers of {setup.get('kv_heads')} KV groups",
        "Model hash": setup.get("model_hash"),
        "Mode": f"{mode}: {_MODES[mode]}" if mode in _MODES else mode,
        "Batch": setup.get("batch"),
        "Dtype": setup.get("dtype"),
        "Implementation": setup.get("implementation"),
        "Device": made.get("device"),
        "Commit": made.get("commit"),
        "Finished": made.get("finished"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
        "Policies": ", ".join(setup["policies"]),
        "Adapter": adapter.get("name", "none"),
        "Adapter hash": adapter.get("sha256"),
        # Such as 3, 2 × 29.
        "Adapter budgets": ", ".join(
            f"{k} × {n}" if n > 1 else f"{k}" for k, n in budgets
        ),
        "Bootstrap seed": setup.get("bootstrap_seed"),
    }
    return {
        "title": run.tag or run.file,
        "rows": {key: str(v) for key, v in rows.items() if v not in (None, "")},
        "command": shlex.join(["polarjax", *made["command"]]),
    }


# Tables and plots.


def _table(part: _Part, group: _Group) -> _Table:
    """Of the columns for which any row has something."""
    columns = [
        column
        for column in part.columns
        if any(row.value(column) is not None for row in group.rows)
    ]
    headings = ["Policy", *(column.heading for column in columns)]
    rows = [
        [_Cell(row.label, row.run.tag), *(_cell(row, column) for column in columns)]
        for row in group.rows
    ]
    return _Table(group.title, group.note, headings, rows)


def _cell(row: _Row, column: _Column) -> _Cell:
    value = row.value(column)
    if value is None:
        return _Cell("–")
    if not isinstance(value, list):
        return _Cell(_number(value, column))
    middle, low, high = value
    low = "−∞" if low is None else _number(low, column)
    high = "∞" if high is None else _number(high, column)
    return _Cell(_number(middle, column), f"[{low}, {high}]")


def _number(value: float, column: _Column) -> str:
    value *= column.scale
    text = format(value, column.form if abs(value) < 1e7 else ".4g")
    if not float(text.replace(",", "")):
        text = text.lstrip("+-")  # zero has no sign
    return text.replace("-", "−")


def _section(runs: Sequence[_Run], name: str) -> _Section:
    part, groups = _PARTS[name], _gather(runs, name)
    tables = [_table(part, group) for group in groups]
    return _Section(part.title, part.text, tables, [], [] if tables else [part.missing])


def _quality(runs: Sequence[_Run], name: str) -> _Section:
    """Tables, and plots of what is lost by density and by speed."""
    section, part = _section(runs, name), _PARTS[name]
    assert part.quality
    column, y, dense = part.quality
    ways = (
        ("density", "density: KV groups read / KV groups there", _DENSITY_CAPTION),
        ("speed", "speed: tokens per second / dense", _speed_caption(runs)),
    )
    for by, x, caption in ways:
        found = [
            _panel(group, _series(runs), by, column) for group in _gather(runs, name)
        ]
        panels = [panel for panel in found if panel.series]
        title = (
            f"{name.replace('tasks', 'accuracy').capitalize()} against dense, by {by}"
        )
        if panels:
            axes = plots.Axes(x, y, dense, by == "speed")
            svg = plots.quality(f"{name}-by-{by}", title, panels, axes)
            caption = f"{part.caption} {caption}{_unknown(panels)}"
            section.plots.append(_Plot(f"{name}-by-{by}", title, caption, svg))
        elif found:
            section.missing.append(
                f"No plot of {title[0].lower()}{title[1:]}: it needs Dense and another "
                "policy in the same file (`--policies`)."
            )
    return section


def _unknown(panels: Sequence[plots.Panel]) -> str:
    points = itertools.chain(*(p for panel in panels for p in panel.series.values()))
    if any(point.low is None and point.high is None for point in points):
        return " The interval of a point without a bar is not known."
    return ""


def _speed_caption(runs: Sequence[_Run]) -> str:
    words = [
        "Speed is tokens per second over dense's in the same measurement of the same "
        "file: right of the upright line is faster than dense."
    ]
    setups = [run.record["setup"] for run in runs]
    if any(setup["mode"] == "mask" for setup in setups):
        words.append("Mode mask computes everything: its speed says nothing.")
    if any(p["policy"] == "oracle" for s in setups for p in s["policies"].values()):
        words.append("The oracle computes every head first and cannot be fast.")
    return " ".join(words)


def _series(runs: Sequence[_Run]) -> dict[tuple[str, str], plots.Series]:
    """Colour, marker and line of each file's policies, the same in every plot."""
    pairs = [
        (i, kind)
        for i, run in enumerate(runs)
        for kind in dict.fromkeys(map(run.kind, run.record["setup"]["policies"]))
        if kind != "dense"
    ]
    return {
        (runs[i].tag, kind): plots.Series(runs[i].named(kind.capitalize()), place, i)
        for place, (i, kind) in enumerate(pairs)
    }


def _panel(
    group: _Group,
    known: Mapping[tuple[str, str], plots.Series],
    by: str,
    column: _Column,
) -> plots.Panel:
    series: dict[plots.Series, list[plots.Point]] = {}
    for row in group.rows:
        x, value = row.found.get(by), row.value(column)
        if x is not None and value is not None and not row.dense:
            low, high = (v if v is None else v * column.scale for v in value[1:])
            points = series.setdefault(known[row.run.tag, row.kind], [])
            points.append(plots.Point(x, value[0] * column.scale, low, high))
    return plots.Panel(group.title, series)


def _generation(runs: Sequence[_Run]) -> _Section:
    section = _section(runs, "generation")
    known = _series(runs)
    panels = [
        (
            known[row.run.tag, row.kind]._replace(name=row.run.named(row.label)),
            *(values, row.found["kl"][0]),
        )
        for row, values in _divergences(runs)
    ]
    if panels:
        title = "Kullback-Leibler divergence of each token from dense"
        caption = (
            "One panel for each policy: the share of tokens by how far their "
            "distribution is from dense's, in half decades. The first bar holds zeros "
            "and what is too small for the arithmetic; the dashed line is the mean, "
            "whose 95 % interval over prompts stands in the table."
        )
        svg = plots.histograms("kl-per-token", title, panels)
        section.plots.append(_Plot("kl-per-token", title, caption, svg))
    return section


def _heads(runs: Sequence[_Run]) -> _Section:
    """Which heads were read, and what the routers know."""
    section = _Section(
        "Heads", "Which KV groups were read, and how well routers choose."
    )
    uses = [(i, run, _head_use(run)) for i, run in enumerate(runs, 1)]
    for i, run, use in uses:
        if use:
            name = f"head-use-{i}" if len(runs) > 1 else "head-use"
            title = run.named("KV groups read by layer")
            svg = plots.heat_maps(name, title, use)
            section.plots.append(_Plot(name, title, _USE_CAPTION, svg))
    if not section.plots:
        section.missing.append(
            "No map of the heads in use: `--tasks` or `--text` of `polarjax eval` adds "
            "it, with a policy beside Dense (`--policies`)."
        )
    if panels := {run.tag: _recall(run) for run in runs if _recall(run)}:
        title = "Recall of the routers by layer, beside chance"
        svg = plots.recall("router-recall", title, panels)
        section.plots.append(_Plot("router-recall", title, _RECALL_CAPTION, svg))
    else:
        section.missing.append(
            "No plot of router recall: `--adapter` with `--text` of `polarjax eval` "
            "adds it."
        )
    return section


# Writing.


def _html(title: str, facts: list[dict[str, Any]], sections: list[_Section]) -> str:
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).from_string(source)
    return page.render(title=title, facts=facts, sections=sections)


def _markdown(
    title: str, facts: list[dict[str, Any]], sections: list[_Section]
) -> Iterator[str]:
    """Lines of the page for where no browser is."""
    yield f"# {_plain(title)}"
    for fact in facts:
        yield f"\n## {_plain(fact['title'])}\n"
        yield from _markdown_table(["", ""], fact["rows"].items())
        yield f"\n```\n{fact['command']}\n```"
    for section in sections:
        yield f"\n## {section.title}"
        if section.tables or section.plots:
            yield f"\n{section.text}"
        for plot in section.plots:
            yield f"\n### {_plain(plot.title)}\n"
            yield f"![{_plain(plot.title)}]({plot.name}.svg)\n\n{plot.caption}"
        for table in section.tables:
            yield f"\n### {_plain(table.title)}\n\n{_plain(table.note)}\n"
            cells = ([" ".join(cell).strip() for cell in row] for row in table.rows)
            yield from _markdown_table(table.headings, cells)
        for words in section.missing:
            yield f"\n> {words}"


def _markdown_table(
    headings: Sequence[str], rows: Iterable[Iterable[str]]
) -> Iterator[str]:
    yield f"| {' | '.join(map(_plain, headings))} |"
    yield f"|{' --- |' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>#!|~$&])", r"\\\1", text)
