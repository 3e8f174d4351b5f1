"""What the engine promises as a table in Markdown: wanted, found, and whether it holds.

    python -m benchmarks.promises_table FILE

FILE is what `benchmarks.engine_promises` has written.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.engine_promises import read
from benchmarks.tables import print_table

_HOLDS = {True: "yes", False: "no", None: "not promised here"}


def promises_table(path: Path) -> str:
    """What a file holds, in Markdown.

    Args:
      path: of the file.

    Raises:
      ValueError: if it is no file of promises.
    """
    runs = read(path)
    lines = [
        "Random weights. Times are promised of one H200 at the whole size. What each "
        "promise is, and how it is measured, stands in "
        f"`benchmarks/engine_promises.py`. Raw results: `{path.name}`.",
        "",
        "| run | device | model | slots | versions | commit, date | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs, 1):
        lines.append(
            f"| {number} | {run['device']} | {run['model']} | {run['slots']} "
            f"| jax {run['versions']['jax']} | {run['commit']}, {run['date'][:10]} "
            f"| `{run['command']}` |"
        )
    lines += ["", "| run | promise | figure | wanted | found | holds | beside it |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, run in enumerate(runs, 1):
        for result in run["results"]:
            lines += [f"| {number} | {row} |" for row in _rows(result)]
    return "\n".join(lines)


def _rows(result: Mapping[str, Any]) -> list[str]:
    """Those of one promise, without the run's number."""
    found, promised = result["found"], result["wanted"]
    named = {each["figure"] for each in promised}
    beside = [f"{name} {shown(x)}" for name, x in found.items() if name not in named]
    rows = []
    for i, each in enumerate(promised):
        cells = [
            "" if i else result["promise"],
            each["figure"],
            each["wanted"],
            shown(found[each["figure"]]),
            _HOLDS[each["holds"]],
            "" if i else "; ".join(beside),
        ]
        rows.append(" | ".join(cells))
    return rows


def shown(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if value is None:
        return "not measured"
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def main(argv: list[str] | None = None) -> int:
    return print_table(
        promises_table,
        argv,
        prog="python -m benchmarks.promises_table",
        description="Print what the engine promises as a table in Markdown.",
        writer="engine_promises",
    )


if __name__ == "__main__":
    sys.exit(main())
