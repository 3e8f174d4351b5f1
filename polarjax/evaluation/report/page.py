"""A page of tables and plots from the result files of `polarjax eval`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from polarjax.evaluation.report import plots
from polarjax.evaluation.report.data import (
    PARTS,
    Column,
    Group,
    Part,
    Row,
    Run,
    divergences,
    facts_of,
    gather,
    head_use,
    read_results,
    recall,
)
from polarjax.storage.folder import whole_folder

_HTML, _MARKDOWN = "report.html", "report.md"
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
    _check_folder(out)
    runs = read_results([results] if isinstance(results, str | Path) else results)
    sections = [
        _quality(runs, "tasks"),
        _quality(runs, "perplexity"),
        _generation(runs),
        _heads(runs),
    ]
    title, facts = _title(runs), [facts_of(run) for run in runs]
    files = {
        _HTML: _html(title, facts, sections),
        _MARKDOWN: "\n".join(_markdown(title, facts, sections)) + "\n",
    }
    for plot in itertools.chain(*(section.plots for section in sections)):
        files[f"{plot.name}.svg"] = plots.as_file(plot.svg)
    _write(out, files)
    return out / _HTML


def _title(runs: Sequence[Run]) -> str:
    setups = [run.record["setup"] for run in runs]
    models, modes = (
        ", ".join(dict.fromkeys(str(setup[key] or "a model") for setup in setups))
        for key in ("checkpoint", "mode")
    )
    return f"Evaluation of {models} in mode {modes}"


def _check_folder(out: Path) -> None:
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
    out = out.resolve()
    with whole_folder(out, lambda: _check_folder(out)) as new:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8", newline="\n")


def _table(part: Part, group: Group) -> _Table:
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


def _cell(row: Row, column: Column) -> _Cell:
    value = row.value(column)
    if value is None:
        return _Cell("–")
    if not isinstance(value, list):
        return _Cell(_number(value, column))
    middle, low, high = value
    low = "−∞" if low is None else _number(low, column)
    high = "∞" if high is None else _number(high, column)
    return _Cell(_number(middle, column), f"[{low}, {high}]")


def _number(value: float, column: Column) -> str:
    value *= column.scale
    text = format(value, column.form if abs(value) < 1e7 else ".4g")
    if not float(text.replace(",", "")):
        text = text.lstrip("+-")  # zero has no sign
    return text.replace("-", "−")


def _section(runs: Sequence[Run], name: str) -> _Section:
    part, groups = PARTS[name], gather(runs, name)
    tables = [_table(part, group) for group in groups]
    return _Section(part.title, part.text, tables, [], [] if tables else [part.missing])


def _quality(runs: Sequence[Run], name: str) -> _Section:
    """Tables, and plots of what is lost by density and by speed."""
    section, part = _section(runs, name), PARTS[name]
    assert part.quality
    column, y, dense = part.quality
    ways = (
        ("density", "density: KV groups read / KV groups there", _DENSITY_CAPTION),
        ("speed", "speed: tokens per second / dense", _speed_caption(runs)),
    )
    for by, x, caption in ways:
        found = [
            _panel(group, _series(runs), by, column) for group in gather(runs, name)
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


def _speed_caption(runs: Sequence[Run]) -> str:
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


def _series(runs: Sequence[Run]) -> dict[tuple[str, str], plots.Series]:
    """Colour, marker and line of each file's policies, the same in every plot."""
    pairs = [
        (i, kind)
        for i, run in enumerate(runs)
        for kind in dict.fromkeys(map(run.kind, run.record["setup"]["policies"]))
        if kind != "dense"
    ]
    return {
        (runs[i].tag, kind): plots.Series(runs[i].named(kind.capitalize()), order, i)
        for order, (i, kind) in enumerate(pairs)
    }


def _panel(
    group: Group,
    known: Mapping[tuple[str, str], plots.Series],
    by: str,
    column: Column,
) -> plots.Panel:
    series: dict[plots.Series, list[plots.Point]] = {}
    for row in group.rows:
        x, value = row.found.get(by), row.value(column)
        if x is not None and value is not None and not row.dense:
            low, high = (v if v is None else v * column.scale for v in value[1:])
            points = series.setdefault(known[row.run.tag, row.kind], [])
            points.append(plots.Point(x, value[0] * column.scale, low, high))
    return plots.Panel(group.title, series)


def _generation(runs: Sequence[Run]) -> _Section:
    section = _section(runs, "generation")
    known = _series(runs)
    panels = [
        (
            known[row.run.tag, row.kind]._replace(name=row.run.named(row.label)),
            values,
            row.found["kl"][0],
        )
        for row, values in divergences(runs)
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


def _heads(runs: Sequence[Run]) -> _Section:
    """Which heads were read, and what the routers know."""
    section = _Section(
        "Heads", "Which KV groups were read, and how well routers choose."
    )
    uses = [(i, run, head_use(run)) for i, run in enumerate(runs, 1)]
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
    if panels := {run.tag: recall(run) for run in runs if recall(run)}:
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
