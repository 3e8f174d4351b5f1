"""Writes the measured tables of README.md and docs/: `python -m benchmarks.readme`.

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import polarjax
from benchmarks.headline import headline_table
from polarjax.bench.rows import counted, shown_case, shown_ratio
from polarjax.bench.rows import read as read_rows
from polarjax.storage.writing import write_file

REPOSITORY = Path(__file__).resolve().parent.parent
_MESH_COLUMNS = "a step's collectives", "sent", "busiest / mean", "over one device"
ADAPTERS = Path(polarjax.__file__).parent / "adapters"


def adapter_table(name: str) -> str:
    """What the card of a recovered adapter says of its recall and perplexity."""
    card = _card(name)
    lines = [
        f"`polarjax/adapters/{name}`: {card['budgets'][1]} of "
        f"{card['kv_heads']} KV groups from layer 1 on; {card['parameters']:,} numbers "
        "of routers and low-rank updates, which `polarjax recover` learned in "
        f"{card['training_seconds']:.0f} s on one {card['made']['device']} from "
        f"{card['tokens']:,} tokens ({_texts(card)}). On held-out text of the same "
        "kinds, every position masked:",
        "",
        "| text | dense perplexity | Oracle / dense | Polar / dense | Random / dense "
        "| recall (chance) |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in card["quality"].items():
        ratios = [
            _interval(found[policy]["ratio_to_dense"], 1, ".3f")
            for policy in ("Oracle", "Polar", "Random")
        ]
        recall = card["recall"][name]["mean"]
        lines.append(
            f"| {name} | {found['Dense']['perplexity']:.2f} | "
            + " | ".join(ratios)
            + f" | {recall['routers']:.3f} ({recall['chance']:.3f}) |"
        )
    return "\n".join(lines)


def contract_table(name: str) -> str:
    """What the card of an adapter promises, and the test that it rests on."""
    card = _card(name)
    contract = card["contract"]
    kept = [setting for setting in contract["tested"] if setting["passed"]][-1]
    [tokens] = {found["tokens"] for found in kept["domains"].values()}
    lines = [
        f"`polarjax/adapters/{name}`: routers alone, trained for "
        f"{card['training_seconds']:.0f} s on one {card['made']['device']} on "
        f"{card['tokens']:,} tokens ({_texts(card)}). Its contract: "
        f"{contract['verdict']}. One more text will hardly lose more than "
        f"{kept['further_domain']:.2%}. The test, on {tokens:,} held-out tokens of "
        f"each text, with {contract['confidence']:.0%} intervals:",
        "",
        "| text | Polar / dense | KV groups |",
        "|---|---|---|",
    ]
    for text, found in kept["domains"].items():
        ratio = _interval(found["ratio"], 1, ".4f")
        lines.append(f"| {text} | {ratio} | {found['density']:.3f} |")
    return "\n".join(lines)


def _card(name: str) -> dict:
    return json.loads((ADAPTERS / name / "card.json").read_text(encoding="utf-8"))


def _texts(card: dict) -> str:
    return ", ".join(f"{text['name']} {text['weight']:.0%}" for text in card["texts"])


def decode_table(path: Path) -> str:
    """Times of decode steps and of prefill, as `polarjax bench` wrote them."""
    report = read_rows(path)
    lines = [
        "Random weights at real shapes; a floor is the bytes that a step must read "
        "over R, the best read rate of the same run. Layers alone: no embedding, no "
        "head, and no layer 0, whose attention is always dense. Medians, the range in "
        f"brackets. Raw results: `benchmarks/results/{path.name}`.",
        "",
        "| run | device | jax | dtype | commit, date | R, GB/s | command |",
        "|---|---|---|---|---|---|---|",
    ]
    used = sorted({row["run"] for row in report["rows"]})
    for number in used:
        run = report["runs"][number]
        lines.append(
            f"| {used.index(number) + 1} | {run['device']} | {run['jax']} "
            f"| {run['dtype']} | {run['commit']}, {run['date']} "
            f"| {run['r_gb_s']:,.0f} | `{run['command']}` |"
        )
    several = any("sent_ms" in row for row in report["rows"])
    if several:
        lines += [
            "",
            "Over several devices a floor is that of the busiest of them in each "
            "layer, and of what each sends in a step, in rings, as fast as in a large "
            "all-reduce (or at `--link-gb-s`). The steps of one device that they are "
            "held against are of the same run.",
        ]
    lines += ["", *_step_lines(report["rows"], used, several)]
    for row in report["rows"]:
        if row["kind"] == "prefill" and row["ms"]:
            peak = row["of_peak"]
            share = f", {peak:.1%} of {row['peak_tflop_s']} TFLOP/s" if peak else ""
            lines += [
                "",
                f"Prefill of {row['policy'].replace('x', ' x ')} tokens, "
                f"{row['model']}: {_range(row)} ms, {row['tflop_s']:.0f} TFLOP/s"
                f"{share} ({row['flops_are']}).",
            ]
    lines += ["", _compile_times(path, report["rows"])]
    profiles = [row for row in report["rows"] if row.get("groups")]
    if profiles:
        lines += ["", *_profile_lines(profiles)]
    return "\n".join(lines)


def _step_lines(rows: list[dict], used: list[int], several: bool) -> list[str]:
    """The table of decode steps.

    Args:
      rows: of the report.
      used: numbers of the runs that have rows, in order.
      several: whether a row is of several devices.
    """
    columns = [
        "model, batch, context",
        "policy",
        "run",
        "ms a step",
        "tokens/s",
        "floor, ms",
        "floor / time",
        "over our dense",
        "over `transformers`",
        *(_MESH_COLUMNS if several else ()),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if row["kind"] not in ("decode", "transformers"):
            continue
        theirs = "`transformers`, " if row["kind"] == "transformers" else ""
        start = (
            f"| {shown_case(row)} | {theirs}{row['policy']} "
            f"| {used.index(row['run']) + 1} |"
        )
        if row["ms"] is None:
            lines.append(f"{start} {row['error']} |" + "  |" * (len(columns) - 4))
            continue
        lines.append(
            f"{start} {_range(row)} | {row['tokens_per_second']:,.0f} "
            f"| {row['floor_ms']:.2f} | {row['floor_fraction']:.3f} "
            f"| {shown_ratio(row, 'over_dense')} "
            f"| {shown_ratio(row, 'over_transformers')} |"
            + (_mesh_cells(row) if several else "")
        )
    return lines


def _profile_lines(rows: list[dict]) -> list[str]:
    """The table of what the profiles showed."""
    lines = [
        "| profile | policy | us a step | gaps | long gaps, in which "
        "the host is waited for | kernels | in graphs | copied, bytes a step "
        "| where the time goes |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        parts = ", ".join(
            f"{name} {part['share']:.1%}" for name, part in row["groups"].items()
        )
        lines.append(
            f"| {shown_case(row)} | {row['policy']} | {row['step_us']:.0f} "
            f"| {row['gap_share']:.2%} | {row['long_gap_share']:.2%} "
            f"| {row['kernels']:.0f} | {row['graph_share']:.0%} "
            f"| {row['copied_bytes']:,.0f} | {parts} |"
        )
    return lines


def _compile_times(path: Path, rows: list[dict]) -> str:
    """What it takes until a program runs, and what with the command's kept programs."""

    def spread(rows: list[dict]) -> str:
        found = [row["trace_s"] + row["compile_s"] for row in rows if "trace_s" in row]
        return f"{min(found):.1f} to {max(found):.1f} s"

    text = f"To trace and compile one of these programs took {spread(rows)}"
    for warm in sorted(path.parent.glob("*-warm-start.json"))[-1:]:  # the newest
        found = read_rows(warm)
        kept, commit = spread(found["rows"]), found["runs"][0]["commit"]
        text += f"; once compiled, with the cache that `polarjax` keeps, {kept}"
        text += f" (at {commit}, `benchmarks/results/{warm.name}`)"
    return text + "."


def _range(row: dict) -> str:
    return f"{row['ms']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f})"


def _mesh_cells(row: dict) -> str:
    if "sent_ms" not in row:
        return "  |" * len(_MESH_COLUMNS)
    sent = f"{row['sent_bytes'] / 1e6:,.1f} MB, {row['sent_ms']:.2f} ms"
    cells = counted(row), sent, f"{row['imbalance']:.2f}"
    over = shown_ratio(row, "over_one_device")
    return "".join(f" {cell} |" for cell in (*cells, over))


def kernels_table(path: Path) -> str:
    """Times of the kernels, as `python -m benchmarks.kernels` wrote them.

    One line for each count of groups or neurons: the fastest of ours, and beside it
    the fastest dense library.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    shapes, rates = report["shapes"], report["r_gb_s"]
    places: dict[tuple, list[dict]] = {}
    for row in report["results"]:
        if row["ms"] is not None:
            places.setdefault((row["shape"], row["read"], _is_ours(row)), []).append(
                row
            )
    fastest = {
        key: min(rows, key=lambda row: row["ms"]) for key, rows in places.items()
    }
    link = f"../benchmarks/results/{path.stem}.svg"  # as seen from docs/
    lines = [
        f"One {report['device']}, jax {report['jax']}, {report['dtype']}. R is the "
        f"best read rate of the same run: a streaming sum in jax "
        f"({report['stream_gb_s']:,.0f} GB/s), or torch's dense attention if that is "
        f"higher: on the same shape, and for an MLP on any. [Plot]({link}), raw "
        f"results: `benchmarks/results/{path.name}`.",
        "",
        "| shape | read | kernel | ms | GB/s | of R | of the sum "
        "| best dense library, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, read, own), row in fastest.items():
        if not own or row["kernel"] == "select":
            continue
        dense = fastest.get((name, row["of"], False))
        beside = f"{dense['ms']:.3f} ({dense['what']})" if dense else "none ran"
        lines.append(
            f"| {_shown_shape(name, shapes[name])} | {read} of {row['of']} "
            f"| {row['what']} | {row['ms']:.3f} | {row['gb_s']:,.0f} "
            f"| {row['gb_s'] / rates[name]:.2f} | {row['of_stream']:.2f} | {beside} |"
        )
    chosen = [row for row in report["results"] if row["kernel"] == "select"]
    if chosen:
        lines += [
            "",
            "| selection | scores | kept | by | us |",
            "|---|---|---|---|---|",
        ]
    for row in chosen:
        shape = shapes[row["shape"]]
        function = "union_neurons" if shape["union"] else "top_heads"
        scores = f"{shape['b']} x {shape['c']}"
        time = row["error"] if row["ms"] is None else f"{row['ms'] * 1e3:.1f}"
        lines.append(
            f"| `{function}` | {scores} | {row['read']} | {row['what']} | {time} |"
        )
    return "\n".join(lines)


def _is_ours(row: dict) -> bool:
    """Whether a row is one of our kernels; XLA's dense product is the library's."""
    if row["kernel"] == "mlp" and row["what"] == "xla":
        return row["read"] < row["of"]
    return not row["what"].startswith(("torch", "jax.nn"))


def _shown_shape(name: str, shape: dict) -> str:
    letters = " ".join(f"{key} {shape[key]}" for key in "bhksdmf" if key in shape)
    return f"{name}: {letters}"


def eval_table(path: Path) -> str:
    """Quality as `polarjax eval --out` wrote it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    made, setup = record["made"], record["setup"]
    labels = [label for label in setup["policies"] if label != "Dense"]
    lines = [
        f"{setup['checkpoint']}, {setup['dtype']}, mode {setup['mode']}, batch "
        f"{setup['batch']}, one {made['device']}; the sparse policies at the adapter's "
        f"budgets (`benchmarks/results/{path.name}`). Accuracies in percent, "
        "differences in points with 95 % intervals, paired by row.",
        "",
        "| task | rows | Dense | " + " | ".join(f"{x} - Dense" for x in labels) + " |",
        "|---" * (3 + len(labels)) + "|",
    ]
    for name, task in record["tasks"].items():
        results = task["results"]
        changes = (results[x]["against_dense"]["accuracy"] for x in labels)
        cells = [_interval(change, 100, "+.1f") for change in changes]
        dense = _interval(results["Dense"]["accuracy"], 100, ".1f")
        rows = f"{len(task['ids']):,}"
        lines.append(f"| {name} | {rows} | {dense} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained_table(paths: Iterable[Path]) -> str:
    """What several runs of `polarjax eval` measured, a line for each text.

    Args:
      paths: of their records, named `...-eval-ADAPTER-...`.
    """
    lines = [
        "| run | text | mode, batch | KV groups | neurons | Oracle / dense "
        "| Polar / dense | recall (chance) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tasks, devices = [], set()
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        setup = record["setup"]
        devices.add(record["made"]["device"])
        name = path.stem.split("-eval-")[1]
        for text in record["perplexity"].values():
            found, recall = text["results"], record["recall"]
            ratios = [
                _interval(found[label]["against_dense"]["ratio"], 1, ".4f")
                if label in found
                else "-"
                for label in ("Oracle", "Polar")
            ]
            polar = found["Polar"]
            means = [
                f"{sum(recall[x]) / len(recall[x]):.3f}" for x in ("routers", "chance")
            ]
            shown = f"{means[0]} ({means[1]})" if polar["density"] < 1 else "-"
            lines.append(
                f"| {name} | `{text['file']}` | {setup['mode']}, {setup['batch']} "
                f"| {polar['density']:.3f} | {polar['neuron_density']:.3f} | "
                + " | ".join([*ratios, shown])
                + " |"
            )
        if record["tasks"]:
            changes = {
                task: 100 * found["results"]["Polar"]["against_dense"]["accuracy"][0]
                for task, found in record["tasks"].items()
            }
            each = ", ".join(f"{task} {x:+.1f}" for task, x in changes.items())
            mean = sum(changes.values()) / len(changes)
            tasks += [
                "",
                f"{name}, mode {setup['mode']}: accuracy against dense, points: mean "
                f"{mean:+.2f} ({each}).",
            ]
    return "\n".join([f"One {' or '.join(sorted(devices))}.", "", *lines, *tasks])


def _interval(bounds: list[float], scale: float, form: str) -> str:
    value, low, high = (format(scale * x, form) for x in bounds)
    return f"{value} ({low} to {high})"


def newest(kind: str) -> Path:
    """The latest result file of a kind; names begin with the date."""
    return max((REPOSITORY / "benchmarks" / "results").glob(f"*-{kind}.json"))


def trained() -> list[Path]:
    """The latest record of each run on an adapter of SmolLM2's, or of books-OPT's."""
    latest: dict[str, tuple[str, Path]] = {}
    for path in (REPOSITORY / "benchmarks" / "results").glob("*-eval-*.json"):
        name = path.stem.split("-eval-")[1]
        made = json.loads(path.read_text(encoding="utf-8"))["made"]
        latest[name] = max(latest.get(name, ("", path)), (made["finished"], path))
    return [latest[name][1] for name in sorted(latest)]


def pages() -> dict[str, dict[str, str]]:
    """The tables made anew, by page, and by the name of their marks."""
    contract = "eval-smollm2-contract-{}-b64"
    texts = {text: newest(contract.format(text)) for text in ("books", "wikitext2")}
    return {
        "README.md": {
            "headline": headline_table(newest("bench"), newest("kernels"), texts)
        },
        "docs/results.md": {
            "adapter": adapter_table("smollm2-135m"),
            "contract": contract_table("smollm2-135m-1pct"),
            "eval": eval_table(newest("eval-smollm2-shipped-tasks")),
            "trained": trained_table(trained()),
            "kernels": kernels_table(newest("kernels")),
            "decode": decode_table(newest("bench")),
            "turns": decode_table(newest("bench-in-turns")),
        },
    }


def render(page: str, text: str) -> str:
    """The text of a page with its tables made anew.

    Args:
      page: a key of `pages()`.
      text: of that file.

    Raises:
      ValueError: naming the marks that the page lacks, or has twice.
    """
    for name, table in pages()[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        replacement = rf"\g<1>{table.replace(chr(92), chr(92) * 2)}\n\g<2>"
        text, count = re.subn(pattern, replacement, text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page} needs one pair of <!-- {name} --> marks")
    return text


def main() -> None:
    for page in pages():
        path = REPOSITORY / page
        write_file(path, render(page, path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
