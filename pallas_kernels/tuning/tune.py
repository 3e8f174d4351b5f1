"""Fills the table of this device's kind: `python -m pallas_kernels.tuning.tune`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import tables
from pallas_kernels.tuning.problems import KINDS, Mlp, Problem, parse
from pallas_kernels.tuning.search import Outcome, Search, dense_above, search

# The shapes of OPT-66B, LLaMA-2-7B, LLaMA-3.1-8B and 70B, OPT-6.7B, LLaMA-3.1-8B.
_SHAPES = (
    *(f"mlp:b=64,m=9216,f=36864,n={n}" for n in (18432, 11059, 3686)),
    *(f"mlp:b=16,m=4096,f=16384,n={n}" for n in (8192, 4915, 1638)),
    *(f"mlp:b=1,m=4096,f=16384,n={n}" for n in (8192, 4915, 1638)),
    *(f"mlp:b=1,m=4096,f=14336,gated=1,n={n}" for n in (7168, 4300, 1433)),
    # All neurons, the rows of QKV without a router's, and attention's output.
    *(f"mlp:b={b},m=4096,f=14336,gated=1,n=14336" for b in (1, 32, 64)),
    "mlp:b=16,m=4096,f=11008,gated=1,n=11008",
    "mlp:b=48,m=4096,f=16384,n=16384",
    *(f"product:b={b},m=4096,n=6144" for b in (1, 32, 64)),
    *(f"product:b={b},m=4096,n=12288" for b in (16, 48)),
    *(f"product:b={b},m=4096,n=4096,axis=0" for b in (1, 16, 32, 64)),
)
_TOY_SHAPES = (
    "mlp:b=2,m=64,f=128,n=64,dtype=float32",
    "product:b=2,m=64,n=32,axis=0,dtype=float32",
)

_DESCRIPTION = """\
Measure which config of a kernel is fastest at given shapes, on this machine's GPU.

Each shape begins with the heuristic's config and the kernel's own candidates; then
numbers of the best one are varied until nothing is faster. The winner is checked
against the reference and, if it beats the heuristic, goes into the device's table,
which the kernels consult when they are traced. For MLP shapes the density above which
the dense product is faster is measured too. Nothing is ever tuned inside `generate`.
"""
_EPILOG = """\
examples:
  python -m pallas_kernels.tuning.tune
  python -m pallas_kernels.tuning.tune --kernels mlp --seconds 20 --out h200.json
  python -m pallas_kernels.tuning.tune \\
      --shapes product:b=8,m=2048,n=3072 mlp:b=8,m=2048,f=8192,n=819

A shape is the kernel's name and, for mlp, b (batch), m (model dim), f (neurons), n
(selected), gated (0 or 1); for product, b, m (numbers of an input), n (outputs), axis
(of the matrix, that is summed over: 1 or 0); and dtype (default bfloat16). It stands
for its bucket: b counts to the next power of two, product's n down to a multiple of
128, everything else as it is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not args.toy:
        return _refuse(
            f"tuning needs a GPU, and the default backend here is "
            f"{jax.default_backend()!r}; --toy tries the command on a CPU"
        )
    shapes = args.shapes or (_TOY_SHAPES if args.toy else _SHAPES)
    try:
        problems = [parse(text) for text in shapes]
        target, record = _open(args.out, args.toy)
    except ValueError as error:
        return _refuse(str(error))
    problems = [problem for problem in problems if problem.section in args.kernels]
    failures = 0
    with (
        ThreadPoolExecutor(args.jobs) as pool,
        _progress(len(problems)) as (show, say),
    ):
        options = {"interpret": not on_gpu}
        limits = {"seconds": args.seconds, "per_round": 2 if args.toy else None}
        for place, problem in enumerate(problems, 1):
            shown = functools.partial(show, place, problem)
            shown(Search())
            try:
                outcome = search(problem, pool, show=shown, **limits, **options)
            except (RuntimeError, ValueError) as error:
                failures += 1
                say(f"error: {error}")
                continue
            say(_summary(problem, outcome))
            _enter(record, problem, outcome)
            _write(target, record)
        for layer in _layers(problems):
            try:
                above = dense_above(layer, pool, _served_by(record), **options)
            except (RuntimeError, ValueError) as error:
                failures += 1
                say(f"error: {error}")
                continue
            say(f"{layer}: the dense product is faster above {above} of the neurons")
            entry = {"shape": _dense_shape(layer), "fraction": above}
            _replace(record, "mlp_dense_above", entry["shape"], entry)
            _write(target, record)
    print(f"written to {target}" if target else "nothing written: no --out")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tuning.tune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels = [kind.section for kind in KINDS]
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=kernels,
        default=kernels,
        help="which kernels (default: all)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="shapes to tune (default: those of some common models)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="table to write; entries that it has of other shapes stay (default: "
        "this device's, in the package)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="time for each shape's search (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="configs compiled at once (default: %(default)s)",
    )
    parser.add_argument(
        "--toy",
        action="store_true",
        help="toy shapes, interpreted where there is no GPU; writes only to --out",
    )
    return parser


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _open(out: Path | None, toy: bool) -> tuple[Path | None, dict[str, Any]]:
    """Where to write, and what stands there or in the package now.

    Raises:
        ValueError: if that is no table, or one of another device.
    """
    kind = jax.devices()[0].device_kind
    packaged = Path(__file__).parent / tables.file_name(kind)
    target = out or (None if toy else packaged)
    source = target if target and target.exists() else packaged
    record: dict[str, Any] = {"device": kind, "jax": jax.__version__}
    if source.exists():
        text = source.read_text(encoding="utf-8")
        old = tables.parse(text, str(source))
        if old.device != kind:
            raise ValueError(f"{source} is the table of {old.device}, not of {kind}")
        record = {**json.loads(text), **record}
    return target, record


def _enter(record: dict[str, Any], problem: Problem, outcome: Outcome) -> None:
    """Put a faster config into the table; where there is none, take an old one out."""
    entry = None
    if outcome.config is not None:
        entry = {
            "shape": problem.shape,
            "config": dataclasses.asdict(outcome.config),
            "us": round(outcome.us, 2),
            "heuristic_us": round(outcome.heuristic_us, 2),
        }
    _replace(record, problem.section, problem.shape, entry)


def _replace(
    record: dict[str, Any], section: str, shape: tables.Shape, entry: dict | None
) -> None:
    others = [e for e in record.get(section, []) if e["shape"] != shape]
    entries = [*others, *([] if entry is None else [entry])]
    record[section] = sorted(entries, key=lambda e: list(e["shape"].values()))


def _write(target: Path | None, record: dict[str, Any]) -> None:
    """Write the table whole or not at all."""
    if target is None:
        return
    text = json.dumps(record, indent=1) + "\n"
    tables.parse(text, str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of nobody's, which is gone if it cannot be written.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tuning-") as folder:
        whole = Path(folder, target.name)
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, target)


def _layers(problems: Sequence[Problem]) -> list[Mlp]:
    """The MLP problems that differ in more than how many neurons are selected."""
    layers = {str(_dense_shape(p)): p for p in problems if isinstance(p, Mlp)}
    return list(layers.values())


def _dense_shape(layer: Mlp) -> dict[str, int]:
    facts = {name: value for name, value in layer.facts.items() if name != "n"}
    return tables.dense_shape(f=layer.f, **facts)


def _served_by(record: dict[str, Any]) -> Callable[[Mlp], Any]:
    measured = tables.parse(json.dumps(record), "the table so far")
    return lambda layer: tables.lookup(measured, "mlp", layer.shape, layer.default)


def _summary(problem: Problem, outcome: Outcome) -> str:
    state = outcome.search
    text = f"{problem}: {outcome.us:.1f} us, heuristic {outcome.heuristic_us:.1f} us; "
    text += f"{state.tried} configs, {len(state.failed)} do not run"
    if state.wrong:
        text += f", {len(state.wrong)} fast ones are wrong: {state.wrong}"
    return text + (f"; new: {outcome.config}" if outcome.config else "; kept")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable, Callable[[str], None]]]:
    """A progress bar: what shows a search's state, and what prints a line above."""
    try:
        from rich.progress import BarColumn, Progress, TimeElapsedColumn
    except ImportError:  # the sweep does not need it
        yield (lambda place, problem, state: None), lambda text: print(text, flush=True)
        return
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=None)

        def show(place: int, problem: Problem, state: Search) -> None:
            best = f", best {min(state.us.values()):.1f} us" if state.us else ""
            failed = f", {len(state.failed)} failed" if state.failed else ""
            text = f"shape {place}/{total} {problem.section}{best}{failed}"
            known = state.known or None
            bar.update(task, description=text, completed=state.tried, total=known)

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield show, say


if __name__ == "__main__":
    sys.exit(main())
