"""The results of serving as a table in Markdown: ours and others' on the same loads.

    python -m benchmarks.serving_table FILE

FILE is what `polarjax bench serve` and `benchmarks.transformers_serving` have written.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import print_table
from polarjax.bench.serve_results import read

Run = dict[str, Any]
_HEAD = (
    "run",
    "load",
    "requests/s asked",
    "engine",
    "slots",
    "tokens/s",
    "queued",
    "x transformers",
    "TTFT, p50 and p99",
    "TPOT, p50 and p99",
    "ITL p99",
    "density",
    "KV read",
)


def serving_table(path: Path) -> str:
    """What a file holds, in Markdown.

    Args:
      path: of the file.

    Raises:
      ValueError: if it is no file of serving.
    """
    runs = read(path)
    lines = [
        "A load is played from its beginning to its last token; warming up is left "
        "out. Times in milliseconds; p50 is the median. Density and KV read are those "
        "of the decode steps, layer 0 with them, where the engine counts them. Queued: "
        "tokens a second until every request has its first one. Tokens "
        "a second are held against the fastest of transformers' with FlashAttention on "
        f"the same load. Raw results: `{path.name}`.",
        "",
        "| run | device | model | dtype | load | versions | commit, date | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs, 1):
        load, known = run["load"], run["versions"]
        versions = ", ".join(
            f"{name} {known[name]}"
            for name in ("jax", "torch", "transformers")
            if known.get(name)
        )
        lines.append(
            f"| {number} | {run['device']} | {run['model']} | {run['dtype']} "
            f"| {load['name']}: {load['requests']:,} requests, "
            f"{load['prompt_tokens']:,} + {load['new_tokens']:,} tokens "
            f"| {versions} | {run['commit']}, {run['date'][:10]} "
            f"| `{run['command']}` |"
        )
    lines += ["", f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    best = _best_of_transformers(runs)
    for number, run in enumerate(runs, 1):
        for result in run["results"]:
            theirs = best.get(_played(run, result))
            lines.append(f"| {number} | {' | '.join(_cells(run, result, theirs))} |")
    return "\n".join(lines)


def _is_transformers(result: Run) -> bool:
    return result["how"].startswith("transformers")


def _played(run: Run, result: Run) -> tuple:
    """What was played, and on what: results that may be held against each other."""
    place = run["device"], run["model"], run["dtype"], run["devices"]
    load = tuple(sorted(run["load"].items()))
    return *place, load, result["rate"], result["most_open"]


def _best_of_transformers(runs: Sequence[Run]) -> dict[tuple, float]:
    """By what was played, the most tokens a second; without FlashAttention it is none.

    What gathers keys and values anew in every step is no opponent.
    """
    best: dict[tuple, float] = {}
    for run in runs:
        for result in run["results"]:
            if not (_is_transformers(result) and "flash_attention" in result["how"]):
                continue
            played = _played(run, result)
            rate = result["served"]["tokens_per_second"]
            best[played] = max(rate, best.get(played, 0.0))
    return best


def _cells(run: Run, result: Run, theirs: float | None) -> list[str]:
    """A row, without the run's number."""
    served, reached = result["served"], result["reached"]
    over, density, read_part = "", "", ""
    if theirs and not _is_transformers(result):
        over = f"{served['tokens_per_second'] / theirs:.2f}"
    if reached:
        layers = reached["density"]
        density = f"{sum(layers) / len(layers):.3f}"
        read_part = f"{reached['kv_bytes'] / reached['kv_bytes_dense']:.3f}"
    ours = "" if _is_transformers(result) else f", {result['policy']}"
    itl = served["itl_ms"]
    queued = served.get("queued_tokens_per_second")  # not in files of before
    return [
        run["load"]["name"],
        "all at once" if result["rate"] is None else f"{result['rate']:g}",
        result["how"] + ours,
        str(result["slots"] or ""),
        f"{served['tokens_per_second']:,.0f}",
        f"{queued:,.0f}" if queued else "",
        over,
        _spread(served["ttft_ms"]),
        _spread(served["tpot_ms"]),
        f"{itl['p99']:,.1f}" if itl else "",
        density,
        read_part,
    ]


def _spread(spread: dict[str, float] | None) -> str:
    return f"{spread['p50']:,.1f}, {spread['p99']:,.1f}" if spread else ""


def main(argv: list[str] | None = None) -> int:
    return print_table(
        serving_table,
        argv,
        prog="python -m benchmarks.serving_table",
        description="Print results of serving as a table in Markdown.",
        writer="a benchmark of serving",
    )


if __name__ == "__main__":
    sys.exit(main())
