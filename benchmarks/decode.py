"""Runs `polarjax bench` with what torch and `transformers` do on the same device.

    python -m benchmarks.decode [--cases NAME ...] [--models NAME ...] [--toy] ...

R, which floors are held against, is then the rate of torch's dense attention if that
reads faster than the streaming sum.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernels
from benchmarks.against_transformers import is_timed, transformers_times
from benchmarks.cases import CASES as KERNEL_CASES
from benchmarks.report import REPOSITORY, best_rates
from polarjax.bench.arguments import DESCRIPTION, EXAMPLE, add_arguments
from polarjax.bench.decode import Beside, run
from polarjax.bench.rounds import spread as spread_of
from polarjax.bench.rows import Row, Rows, about
from polarjax.bench.shapes import Case, parse_model
from polarjax.model import weight_shapes
from polarjax.planning.cost import kv_row_bytes

# Where torch's dense attention reads fastest, see the kernels' table.
RATE_SHAPES = {name: KERNEL_CASES[name] for name in ("llama-2-7b", "opt-66b")}
RESULTS = "benchmarks/results/"


def add_opponents(add: Any) -> None:
    """Give a parser the arguments that `polarjax bench` has not."""
    add(
        "--transformers",
        action="store_true",
        help="time it on every whole LLaMA or Mistral, not only where the table asks",
    )
    add("--no-torch", action="store_true", help="nothing of torch's or transformers'")


def time_opponents(args: argparse.Namespace, cases: Mapping[str, Case]) -> Beside:
    """What torch reads and `transformers` does, in processes that leave the device.

    Args:
      args: of the command.
      cases: that are asked for.
    """
    if args.no_torch:
        return Beside(facts={"torch": None, "transformers": []})
    timed = {
        name: transformers_times(case.model, case.batch, case.context, args.toy)
        for name, case in cases.items()
        if case.transformers
        or (args.transformers and case.devices == 1 and is_timed(case.model))
    }
    version, rates = (None, []) if args.toy else kernels.torch_results(RATE_SHAPES)

    def add(rows: Rows) -> None:
        for name, found in timed.items():
            add_transformers(name, cases[name], found, rows)

    versions = [found.get("transformers") for found in timed.values()]
    return Beside(
        rate=max(best_rates(RATE_SHAPES, rates, 0.0).values()),
        facts={"torch": version, "transformers": versions},
        add=add,
    )


def add_transformers(name: str, case: Case, timed: dict, rows: Rows) -> None:
    """Rows of what `transformers_times` found."""
    found = parse_model(case.model)
    assert found
    config, dtype = found[0], jnp.dtype(rows.runs[-1]["dtype"])
    r = rows.runs[-1]["r_gb_s"] * 1e9
    if timed["error"]:
        print(f"no rows of transformers': {timed['error']}", flush=True)
    shapes = weight_shapes(config, dtype)
    if not config.tied_embeddings:
        del shapes["embed"]["tokens"]
    weights = sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(shapes))
    token = config.layers * config.kv_heads * kv_row_bytes(config, dtype)
    for mode, found in timed["modes"].items():
        spread, read = None, 0.0
        if "step_ms" in found:
            spread = spread_of([ms / 1e3 for ms in found["step_ms"]])
            read = weights + case.batch * found["visible"] * token
        row = transformers_row(name, case, mode, found, spread, read, r)
        rows.add(row)


def transformers_row(
    name: str,
    case: Case,
    mode: str,
    timed: dict[str, Any],
    spread: dict[str, float] | None,
    read: float,
    rate: float,
) -> Row:
    """A mode of `transformers`; without `spread`, the error in `timed`."""
    start = about("transformers", name, case, mode)
    if spread is None:
        return {**start, "ms": None, "error": timed["error"]}
    floor_ms = read / rate * 1e3
    return {
        **start,
        **spread,
        "compile_s": timed["compile_s"],
        "tokens_per_second": case.batch / spread["ms"] * 1e3,
        "gb_s": read / spread["ms"] / 1e6,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / spread["ms"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=DESCRIPTION,
        epilog=f"example: {EXAMPLE}",
    )
    add_arguments(parser.add_argument, RESULTS)
    add_opponents(parser.add_argument)
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        if args.no_torch and args.transformers:
            raise ValueError(
                "--transformers has no effect with --no-torch: leave one out"
            )
        run(
            args,
            ["python", "-m", "benchmarks.decode", *given],
            lambda cases: time_opponents(args, cases),
            REPOSITORY / RESULTS,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
