"""The few rows of measurements that README.md shows, each beside its opponent."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from polarjax.bench.rows import read as read_rows

# Cases and policies of `polarjax bench`, and what they are in words.
_STEPS = (
    ("llama-2-7b-b16", "heads 0.5", "16 of 32 groups"),
    ("llama-3.1-8b-b64", "heads 0.625", "5 of 8 groups"),
    ("llama-3.1-8b-b1", "heads 0.5", "4 of 8 groups"),
)
_TEXTS = {"books": "books by unseen authors", "wikitext2": "WikiText-2"}


def headline_table(bench: Path, kernels: Path, quality: Mapping[str, Path]) -> str:
    """A Markdown table: what was measured, the opponent, and where and when.

    Args:
      bench: results of `polarjax bench`.
      kernels: results of `python -m benchmarks.kernels`.
      quality: records of `polarjax eval` with the adapter that promises a loss of at
        most 1 %, by text.
    """
    lines = [
        "| what | polarjax | beside it | measured |",
        "|---|---|---|---|",
        *_steps(bench),
        _kernel(kernels),
        *(_quality(text, path) for text, path in quality.items()),
    ]
    return "\n".join(lines)


def _line(what: str, ours: str, beside: Sequence[str], measured: Sequence[str]) -> str:
    return f"| {what} | {ours} | {'; '.join(beside)} | {', '.join(measured)} |"


def _steps(path: Path) -> list[str]:
    report = read_rows(path)
    lines = []
    for case, policy, groups in _STEPS:
        rows = [row for row in report["rows"] if row["case"] == case and row.get("ms")]
        [ours] = [row for row in rows if row["policy"] == policy]
        [dense] = [row for row in rows if row["policy"] == "dense"]
        theirs = [row for row in rows if row["kind"] == "transformers"]
        beside = [f"our dense step: {dense['ms']:.2f} ms"]
        if theirs:
            best = min(theirs, key=lambda row: row["ms"])
            beside.insert(0, f"`transformers`, {best['policy']}: {best['ms']:.2f} ms")
        run = report["runs"][ours["run"]]
        lines.append(
            _line(
                f"decode step, {ours['model']}, batch {ours['batch']}, context "
                f"{ours['context']:,}, {groups}",
                f"{ours['ms']:.2f} ms (floor {ours['floor_ms']:.2f})",
                beside,
                (run["date"], run["device"], run["commit"]),
            )
        )
    return lines


def _kernel(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    name, read = "llama-3.1-8b", 4
    shape = report["shapes"][name]
    rows = [row for row in report["results"] if row["shape"] == name and row["ms"]]
    libraries = ("torch", "jax.nn")

    def fastest(rows: list[dict]) -> dict:
        return min(rows, key=lambda row: row["ms"])

    own = [row for row in rows if not row["what"].startswith(libraries)]
    ours = fastest([row for row in own if row["read"] == read])
    full = fastest([row for row in own if row["read"] == row["of"]])
    dense = fastest([row for row in rows if row["what"].startswith(libraries)])
    return _line(
        f"attention kernel, {name}, batch {shape['b']}, context {shape['s']:,}, "
        f"{read} of {ours['of']} groups",
        f"{ours['ms']:.3f} ms",
        (
            f"{dense['what']}, all groups: {dense['ms']:.3f} ms",
            f"ours, all groups: {full['ms']:.3f} ms",
        ),
        (report["date"], report["device"], report["commit"]),
    )


def _quality(text: str, path: Path) -> str:
    record = json.loads(path.read_text(encoding="utf-8"))
    polar = record["perplexity"]["windows"]["results"]["Polar"]
    ratio, low, high = polar["against_dense"]["ratio"]
    made = record["made"]
    return _line(
        f"perplexity of {_TEXTS[text]}, SmolLM2-135M with `smollm2-135m-1pct`, batch "
        f"{record['setup']['batch']}, {polar['density']:.3f} of the groups",
        f"{ratio:.4f} x dense ({low:.4f} to {high:.4f})",
        ("dense, on the same windows: 1",),
        (made["finished"][:10], made["device"], made["commit"]),
    )
