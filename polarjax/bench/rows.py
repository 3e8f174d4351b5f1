"""The rows of the decode benchmark: what they hold, and the file that keeps them.

A file holds runs (device, versions, commit, command, date, read bandwidth) and rows,
each with the number of its run. It is written after every row, and a later run with
the same file adds to it: rows of the same case and policy are replaced.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polarjax.bench.meshes import Devices
from polarjax.bench.shapes import Case, Sparsity
from polarjax.storage.writing import try_file, write_file

# Dense bf16 TFLOP/s by device kind (NVIDIA's data sheets, SXM, without sparsity).
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H200": 989.5}

ROUNDS = 5  # timed: with fewer, no ratio of times is told

Row = dict[str, Any]
ONE = Devices()


class Rows:
    """Rows of a run beside those of earlier ones, printed and kept as they come.

    Raises:
      OSError: if the file cannot be written.
    """

    def __init__(self, run: dict[str, Any], path: Path | None):
        if path is not None:
            try_file(path)  # before the first row, not after
        self.path = path
        self.runs: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        if path is not None and path.exists():
            kept = read(path)
            self.runs, self.rows = kept["runs"], kept["rows"]
        self.runs.append(run)

    @property
    def own(self) -> list[Row]:
        """The rows of this run."""
        return [row for row in self.rows if row["run"] == len(self.runs) - 1]

    def add(self, row: Row) -> None:
        """Print a row and write the file."""
        row = {"run": len(self.runs) - 1, **row}
        self.rows = [old for old in self.rows if _name(old) != _name(row)] + [row]
        print(line(row), flush=True)
        if self.path is not None:
            write_json(self.path, {"runs": self.runs, "rows": self.rows})


def read(path: Path) -> dict[str, Any]:
    """Runs and rows of a file.

    Raises:
      ValueError: if it is no file of this benchmark.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not {"runs", "rows"} <= report.keys():
        raise ValueError(f"{path} is no file of `polarjax bench`: it needs runs, rows")
    return report


def read_runs(path: Path, key: str, command: str) -> list[dict[str, Any]]:
    """The runs of a file {key: [{"results": [...], ...}, ...]}.

    Args:
      path: of the file.
      key: of the benchmark's own.
      command: that writes such files, for the message.

    Raises:
      ValueError: if it is no file of this benchmark.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))[key]
        right = all(isinstance(run["results"], list) for run in runs)
    except (ValueError, TypeError, LookupError):
        right, runs = False, []
    if not right:
        raise ValueError(f"{path} is no file of {command}: choose another name")
    return runs


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Replace a file by one that is written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, f"{json.dumps(report, indent=2)}\n")


def _name(row: Row) -> tuple:
    return row["kind"], row["case"], row["policy"], *mesh_of(row)


def mesh_of(row: Row) -> tuple[int, int]:
    """Of a row tp and dp; files of before there were several devices have neither."""
    return row.get("tp", 1), row.get("dp", 1)


def shown_case(row: Row) -> str:
    """Model, batch and context of a row; tp and dp, if they are more than 1."""
    model, _, count = row["model"].partition(":")
    alone = f" layers 1-{count} alone" if count else ""
    return f"{model}{alone} b {row['batch']} s {row['context']}{shown_mesh(row)}"


def shown_mesh(row: Row) -> str:
    """Such as " tp 2"; "" for one device."""
    sizes = zip(("tp", "dp"), mesh_of(row), strict=True)
    return "".join(f" {name} {size}" for name, size in sizes if size > 1)


def decode_row(
    name: str,
    case: Case,
    sparse: Sparsity | None,
    spread: dict[str, float],
    read: tuple[int, float],
    rate: float,
    where: Devices = ONE,
    sent: int = 0,
) -> Row:
    """A timed policy.

    Args:
      name: of the case.
      case: the case.
      sparse: the policy; None for dense.
      spread: milliseconds a step.
      read: bytes of weights, and of keys and values, a step, of the busiest device.
      rate: R in bytes per second.
      where: the devices.
      sent: bytes that each of them sends in a step.
    """
    ms, total = spread["ms"], sum(read)
    sent_ms = sent / where.link * 1e3 if where.link else 0.0
    floor_ms = total / rate * 1e3 + sent_ms
    label = sparse.label(where.tp) if sparse else "dense"
    over = {
        "balanced": bool(sparse and sparse.balanced),
        "link_gb_s": where.link and where.link / 1e9,
        "link_is": "measured" if where.measured else "given",
        "sent_bytes": sent,
        "sent_ms": sent_ms,
        "wanted_over_one_device": (sparse or case).over_one,
    }
    return {
        **about("decode", name, case, label, where),
        **(over if where.count > 1 else {}),
        "heads": sparse and sparse.heads,
        "neurons": sparse and sparse.neurons,
        **spread,
        "tokens_per_second": case.batch / ms * 1e3,
        "weight_bytes": read[0],
        "kv_bytes": read[1],
        "gb_s": total / ms / 1e6,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / ms,
        "wanted_floor_fraction": sparse.floor if sparse else case.floor,
        "over_dense": None if sparse else 1.0,
        "wanted_over_dense": sparse and sparse.over_dense,
    }


def error_row(
    kind: str,
    name: str,
    case: Case,
    policy: str,
    error: Exception,
    where: Devices = ONE,
) -> Row:
    """A policy or prefill that could not be timed, and why."""
    lines = str(error).splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return {**about(kind, name, case, policy, where), "ms": None, "error": text}


def prefill_row(
    name: str,
    case: Case,
    size: tuple[int, int],
    spread: dict[str, float],
    flops: int,
    device: str,
    where: Devices = ONE,
) -> Row:
    """A timed prefill; `flops` as `shapes.prefill_flops` counts them."""
    prompts, tokens = size
    rate, peak = flops / spread["ms"] / 1e9, PEAK_TFLOPS.get(device)
    peak = peak and where.count * peak
    return {
        **about("prefill", name, case, f"{prompts}x{tokens}", where),
        "batch": prompts,
        "context": tokens,
        **spread,
        "flops": flops,
        "flops_are": "2 x parameters x tokens (head: last token of each prompt) + "
        "causal attention, 2 d t (t + 1) for each query head, layer and prompt",
        "tflop_s": rate,
        "peak_tflop_s": peak,
        "of_peak": rate / peak if peak else None,
        "tokens_per_second": prompts * tokens / spread["ms"] * 1e3,
    }


def profile_row(
    name: str, case: Case, policy: str, found: dict[str, Any], where: Devices = ONE
) -> Row:
    """What a profile of some steps showed, of one device."""
    return {**about("profile", name, case, policy, where), **found}


def about(kind: str, name: str, case: Case, policy: str, where: Devices = ONE) -> Row:
    """What every row says: of which kind it is, of which case, and where it was run."""
    return {
        "kind": kind,
        "case": name,
        "model": case.model,
        "policy": policy,
        "batch": case.batch,
        "context": case.context,
        "tp": where.tp,
        "dp": where.dp,
    }


def line(row: Row) -> str:
    """A row as one line of text."""
    start = f"{shown_case(row):44} {row['policy']:28}"
    if row.get("error"):
        return f"{start} {row['kind']}: {row['error']}"
    if row["kind"] == "profile":
        parts = ", ".join(
            f"{name} {found['share']:.0%}" for name, found in row["groups"].items()
        )
        return (
            f"{start} profile: step {row['step_us']:.0f} us, gaps "
            f"{row['gap_share']:.1%} (long ones {row['long_gap_share']:.1%}), "
            f"{row['kernels']:.0f} kernels ({row['graph_share']:.0%} in graphs), "
            f"{row['copies']:.1f} copies of {row['copied_bytes']:,.0f} bytes; {parts}"
        )
    start += f" {row['ms']:9.3f} ms ({row['ms_min']:.3f} to {row['ms_max']:.3f})"
    if row["kind"] == "prefill":
        share = f", {row['of_peak']:.1%} of the peak" if row["of_peak"] else ""
        return f"{start} prefill, {row['tflop_s']:.1f} TFLOP/s{share}"
    start += (
        f", floor {row['floor_ms']:8.3f} ({row['floor_fraction']:5.1%}), "
        f"{row['tokens_per_second']:8,.0f} tokens/s, {row['gb_s']:,.0f} GB/s"
    )
    if row["kind"] == "transformers":
        return f"{start}, transformers"
    floors = row.get("floor_over_dense")
    if "sent_ms" in row:
        start += (
            f", {row['sent_bytes'] / 1e6:,.3f} MB sent ({row['sent_ms']:.3f} ms), "
            f"busiest {row['imbalance']:.3f}x the mean, {counted(row)}"
        )
    return (
        start
        + "".join(
            f", beside {name}: {shown}"
            for name in ("dense", "one device", "transformers")
            if (shown := shown_ratio(row, f"over_{name.replace(' ', '_')}"))
        )
        + (f" (by the floors {floors:.2f}x)" if floors else "")
        + f"; trace {row['trace_s']:.1f} s, compile {row['compile_s']:.1f} s"
        + "".join(f"; {note}" for note in row.get("notes", ()))
    )


def counted(row: Row) -> str:
    """Collectives of a step, by kind."""
    found = row["collectives"].items()
    return ", ".join(f"{each['count']:g} {kind}" for kind, each in found)


def one_device(rows: Sequence[Row], case: str, sparse: Sparsity | None) -> Row | None:
    """The same densities of a case on one device, if timed."""
    wanted = (sparse.heads, sparse.neurons) if sparse else (None, None)
    for row in rows:
        dense = row["policy"] == "dense"
        if (
            (row["kind"], row["case"], *mesh_of(row)) == ("decode", case, 1, 1)
            and dense == (sparse is None)
            and (row.get("heads"), row.get("neurons")) == wanted
            and row["ms"]
        ):
            return row
    return None


def best_transformers(rows: Sequence[Row], case: str) -> Row | None:
    """The best mode of `transformers` on a case, if timed."""
    found = [
        row
        for row in rows
        if row["kind"] == "transformers" and row["case"] == case and row["ms"]
    ]
    return min(found, key=lambda row: row["ms"], default=None)


def ratio(name: str, slow: Sequence[float], fast: Sequence[float]) -> Row:
    """How many times faster: the median over rounds, and their range.

    The range of five rounds or more covers the median that many would have with a
    probability of 94 % or more: each round is above it or below, as a coin falls.

    Args:
      name: of the ratio.
      slow: seconds of what it is over, in each round.
      fast: of the row itself, in the same rounds.
    """
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        name: statistics.median(found),
        f"{name}_range": [min(found), max(found)],
        f"{name}_rounds": len(found),
    }


def apart(name: str, slow: Row | None, row: Row) -> Row:
    """The same of what was timed apart: as far as the two ranges reach.

    Args:
      name: of the ratio.
      slow: the row that it is over; None if there is none.
      row: the row itself.
    """
    if slow is None:
        return {name: None}
    return {
        name: slow["ms"] / row["ms"],
        f"{name}_range": [
            slow["ms_min"] / row["ms_max"],
            slow["ms_max"] / row["ms_min"],
        ],
        f"{name}_rounds": min(slow["repeats"], row["repeats"]),
    }


def shown_ratio(row: Row, name: str, unit: str = "x") -> str:
    """A ratio with its range; the range alone, where it does not tell the two apart.

    Args:
      row: that may have it; those of before ranges were kept have the number alone.
      name: of the ratio.
      unit: behind the number.
    """
    value, bounds = row.get(name), row.get(f"{name}_range")
    if not value or not bounds:
        return f"{value:.2f}{unit}" if value else ""
    shown = f"{bounds[0]:.2f} to {bounds[1]:.2f}"
    told = row[f"{name}_rounds"] >= ROUNDS and not bounds[0] <= 1 <= bounds[1]
    return f"{value:.2f}{unit} ({shown})" if told else f"not told apart ({shown})"
