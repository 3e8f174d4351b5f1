"""Draws the rate at which the kernels read against the bytes that they must read.

    python -m benchmarks.roofline [RESULT.json] [--out FILE.svg]

The lines are the roof: the best read rate of the same run, and the streaming sum's.
Small calls lie below it because a launch costs what some 10 MB of reading do.
"""

import argparse
import importlib
import io
import json
from pathlib import Path
from typing import Any

from benchmarks.readme import newest
from polarjax.storage.writing import write_file

COLOURS = {
    "triton": "#0b6e99",
    "mosaic": "#d9480f",
    "xla": "#868e96",
    "jax.nn": "#adb5bd",
    "torch": "#2f9e44",
}
MARKERS = {"attention": "o", "mlp": "s"}


def draw(report: dict, path: Path) -> None:
    """Write the plot of a report of `benchmarks.kernels`; the name's end says how."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "the plot needs matplotlib: install the extra, pip install 'polarjax[plot]'"
        ) from error
    rows = [
        r for r in report["results"] if r["ms"] is not None and r["kernel"] in MARKERS
    ]
    if not rows:
        raise ValueError("the results hold no timed attention or MLP row to draw")
    figure = figures.Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    best = max(report["r_gb_s"].values())
    axes.axhline(best, color="black", linewidth=1, label=f"R, {best:,.0f} GB/s")
    stream = report["stream_gb_s"]
    label = f"streaming sum, {stream:,.0f} GB/s"
    axes.axhline(stream, color="black", linewidth=1, linestyle=":", label=label)
    drawn = dict.fromkeys((r["kernel"], _family(r["what"])) for r in rows)
    for kernel, family in drawn:
        own = [r for r in rows if (r["kernel"], _family(r["what"])) == (kernel, family)]
        axes.plot(
            [r["bytes"] / 1e6 for r in own],
            [r["gb_s"] for r in own],
            linestyle="none",
            marker=MARKERS[kernel],
            markersize=5,
            markerfacecolor="none",
            color=COLOURS[family],
            label=f"{kernel}, {family}",
        )
    axes.set_xscale("log")
    axes.set_ylim(0, best * 1.1)
    axes.set_xlabel("bytes that must be read, MB")
    axes.set_ylabel("GB/s")
    axes.set_title(f"{report['device']}, {report['dtype']}, {report['date']}")
    axes.grid(which="both", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="lower right")
    # No date, no random ids: drawn again from the same results, the file is the same.
    kind, file = path.suffix[1:], io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "polarjax"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind or None, metadata=metadata)
    write_file(path, file.getvalue())


def _family(what: str) -> str:
    return next(family for family in COLOURS if what.startswith(family))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description="Draw the roofline plot."
    )
    parser.add_argument(
        "results", type=Path, nargs="?", help="JSON file (default: the newest)"
    )
    parser.add_argument("--out", type=Path, help="default: beside the results, .svg")
    args = parser.parse_args(argv)
    source = args.results or newest("kernels")
    path = args.out or source.with_suffix(".svg")
    draw(json.loads(source.read_text(encoding="utf-8")), path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
