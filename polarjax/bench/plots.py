"""Draws what the decode benchmark measured.

Throughput against batch (as figures 6 and 7 of the paper), time of a step against
context (figure 9), and where a step's time goes (figure 1), each where there is
something to draw: several batches, several contexts, profiles.
"""

import collections
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polarjax.bench.profiling import GROUPS
from polarjax.bench.rows import Row, read, shown_case, shown_mesh
from polarjax.storage.writing import write_file

COLOURS = ("#343a40", "#0b6e99", "#d9480f", "#2f9e44", "#862e9c", "#e8590c", "#868e96")


def require() -> Any:
    """Matplotlib.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "the plots need matplotlib: install the extra, pip install 'polarjax[plot]'"
        ) from error


def draw(source: Path) -> list[Path]:
    """Write the plots of a file of rows beside it, as SVG.

    Returns:
      Those that there was something to draw for.
    """
    matplotlib, rows = require(), read(source)["rows"]
    timed = [row for row in rows if row["kind"] == "decode" and row["ms"]]
    profiles = [row for row in rows if row["kind"] == "profile" and "groups" in row]
    wanted = {
        "throughput": _panels(timed, "batch", "context"),
        "latency": _panels(timed, "context", "batch"),
    }
    written = []
    for name, panels in wanted.items():
        if panels:
            path = source.with_name(f"{source.stem}-{name}.svg")
            _lines(matplotlib, path, panels, name == "throughput")
            written.append(path)
    if profiles:
        path = source.with_name(f"{source.stem}-breakdown.svg")
        _bars(matplotlib, path, profiles)
        written.append(path)
    return written


def _panels(rows: Sequence[Row], x: str, fixed: str) -> dict[str, list[Row]]:
    """Rows by model, devices and what is fixed, where x takes several values."""
    found = collections.defaultdict(list)
    for row in rows:
        short = "b" if fixed == "batch" else "s"
        found[f"{row['model']}{shown_mesh(row)}, {short} {row[fixed]}"].append(row)
    return {
        title: own for title, own in found.items() if len({row[x] for row in own}) > 1
    }


def _lines(
    matplotlib: Any, path: Path, panels: dict[str, list[Row]], throughput: bool
) -> None:
    figure = matplotlib.figure.Figure((5.0 * len(panels), 4.0), layout="constrained")
    x = "batch" if throughput else "context"
    cells = figure.subplots(1, len(panels), squeeze=False).ravel()
    for cell, (title, rows) in zip(cells, panels.items(), strict=True):
        for i, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
            own = sorted(
                (row for row in rows if row["policy"] == policy), key=lambda row: row[x]
            )
            colour = COLOURS[i % len(COLOURS)]
            at = [row[x] for row in own]
            y = [row["tokens_per_second" if throughput else "ms"] for row in own]
            cell.plot(at, y, marker="o", markersize=4, color=colour, label=policy)
            floor = [
                row["batch"] / row["floor_ms"] * 1e3 if throughput else row["floor_ms"]
                for row in own
            ]
            cell.plot(at, floor, color=colour, linestyle=":", linewidth=1)
        cell.set_xscale("log", base=2)
        cell.set_ylim(bottom=0)
        cell.set_xlabel("sequences" if throughput else "tokens in the cache")
        cell.set_ylabel("tokens/s" if throughput else "ms a step")
        cell.set_title(title + " (dotted: the floor)", fontsize=9)
        cell.grid(linewidth=0.3)
        cell.legend(fontsize=8)
    _save(matplotlib, figure, path)


def _bars(matplotlib: Any, path: Path, rows: Sequence[Row]) -> None:
    figure = matplotlib.figure.Figure(
        (7.5, 1.2 + 0.4 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    labels = [f"{shown_case(row)}, {row['policy']}" for row in rows]
    start = [0.0] * len(rows)
    parts = [group for group in GROUPS if any(group in row["groups"] for row in rows)]
    for i, group in enumerate(parts):
        width = [row["groups"].get(group, {"us": 0.0})["us"] / 1e3 for row in rows]
        axes.barh(labels, width, left=start, color=colours(i % 10), label=group)
        start = [a + b for a, b in zip(start, width, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    _save(matplotlib, figure, path)


def _save(matplotlib: Any, figure: Any, path: Path) -> None:
    # No date, no random ids: drawn again from the same results, the file is the same.
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "polarjax"}):
        figure.savefig(file, format=path.suffix[1:], metadata={"Date": None})
    write_file(path, file.getvalue())
