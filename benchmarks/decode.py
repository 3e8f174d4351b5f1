"""Times decode steps of whole models beside their floor; also `polarjax bench`.

    python -m benchmarks.decode [--cases NAME ...] [--models NAME ...] [--toy] ...

The step is the one that `polarjax.generate` compiles. Its floor is the bytes it must
read (weights, router weights, and the KV of the groups that are on) over R, the best
read rate of the same run: that of a streaming sum in jax, or of torch's dense
attention if it is higher.
"""

import argparse
import datetime
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import polarjax
from benchmarks import kernels, plots, steps
from benchmarks.against_transformers import is_timed, transformers_times
from benchmarks.arguments import (
    DESCRIPTION,
    EXAMPLE,
    add_arguments,
    check,
    check_options,
    chosen_cases,
    with_devices,
)
from benchmarks.cases import CASES as KERNEL_CASES
from benchmarks.meshes import Devices
from benchmarks.random_weights import random_params, random_routers
from benchmarks.report import REPOSITORY, best_rates, commit
from benchmarks.rows import (
    ONE,
    Rows,
    apart,
    best_transformers,
    decode_row,
    error_row,
    one_device,
    prefill_row,
    profile_row,
    ratio,
    transformers_row,
)
from benchmarks.rows import read as read_rows
from benchmarks.shapes import Case, layers_alone, parse_model
from benchmarks.table import table
from benchmarks.timing import time_policy
from polarjax.generation.stats import read_bandwidth
from polarjax.model import weight_shapes
from polarjax.params import Params
from polarjax.sparsity.cost import kv_row_bytes
from polarjax.sparsity.select import with_density
from polarjax.terminal import make_console
from polarjax.writing import try_file

# Where torch's dense attention reads fastest, see the kernels' table.
RATE_SHAPES = {name: KERNEL_CASES[name] for name in ("llama-2-7b", "opt-66b")}


def load_model(
    model: str,
    adapter: str | None,
    dtype: Any,
    head_rank: int,
    mesh: Mesh | None = None,
    any_model: bool = False,
) -> Params:
    """Random weights, or those of a checkpoint, on one device or cut over several."""
    found = parse_model(model)
    if found is None:
        params = polarjax.load(
            model, adapter=adapter, dtype=dtype, mesh=mesh, any_model=any_model
        )
        if adapter:
            return params
        routers = random_routers(params.config, params.dtype, head_rank, mesh)
        return Params(params.weights, routers, params.config)
    config, count = found
    if count:
        config = layers_alone(config, count)
    params = random_params(
        config, dtype, head_rank=head_rank, alone=bool(count), mesh=mesh
    )
    return with_density(params, 0.5)


def run_case(
    name: str,
    case: Case,
    params: Params,
    args: argparse.Namespace,
    rows: Rows,
    where: Devices = ONE,
) -> None:
    """Time dense and the sparse policies, one after the other, on one cache.

    Args:
      name: of the case.
      case: the case.
      params: its model.
      args: of the command.
      rows: where the results go.
      where: the devices that the model is on.
    """
    run = rows.runs[-1]
    found = parse_model(case.model)
    alone = bool(found and found[1])
    r = run["r_gb_s"] * 1e9
    beside = best_transformers(rows.own, name) if where.count == 1 else None
    state, dense, beside_row = None, None, None
    # Two policies that differ in their balance alone are one on one device.
    policies = {sparse.label(where.tp): sparse for sparse in reversed(case.sparse)}
    for label, sparse in [("dense", None), *reversed(policies.items())]:
        try:
            if state is None:
                state = steps.make_state(params, case.batch, case.context, alone)
            policy = polarjax.Dense()
            if sparse:
                parts = where.tp if sparse.balanced else 1
                policy = polarjax.Polar(sparse.heads, sparse.neurons, balanced=parts)
            # But for dense's, which has the model's own weights, nothing outlives
            # this round: the next policy needs its room.
            asked = sparse is None or bool(sparse.heads or sparse.neurons)
            timed = time_policy(
                *(params, policy, asked, state, case, alone, args, where),
                beside=dense,
            )
        except jax.errors.JaxRuntimeError as error:  # out of memory, mostly
            rows.add(error_row("decode", name, case, label, error, where))
            state = None  # it may have been donated
            continue
        state, known = timed.state, timed.known
        spread = steps.spread(timed.seconds)
        sent = known.pop("sent_bytes", 0)
        row = decode_row(name, case, sparse, spread, timed.read, r, where, sent)
        if sparse is None:
            dense, beside_row = timed.chunk, row
        elif timed.beside and beside_row:
            row |= ratio("over_dense", timed.beside, timed.seconds)
            row["floor_over_dense"] = beside_row["floor_ms"] / row["floor_ms"]
        row |= known | apart("over_transformers", beside, row)
        if where.count > 1:
            one = one_device(rows.own, name, sparse)
            row |= apart("over_one_device", one, row)
        summary = timed.summary
        del timed
        rows.add(row)
        if summary:
            rows.add(profile_row(name, case, label, summary, where))
    state = dense = None
    for prompts, tokens in () if alone else case.prefill:
        size = prompts, tokens
        try:
            seconds, compiling = steps.prefill_times(params, *size, args.repeats)
        except jax.errors.JaxRuntimeError as error:
            policy = f"{prompts}x{tokens}"
            rows.add(error_row("prefill", name, case, policy, error, where))
            continue
        flops, spread = steps.prefill_flops(params.config, *size), steps.spread(seconds)
        row = prefill_row(name, case, size, spread, flops, run["device"], where)
        rows.add({**row, **compiling})


def run_model(
    model: str,
    where: Devices,
    cases: dict[str, Case],
    args: argparse.Namespace,
    rows: Rows,
) -> None:
    """Make a model on some devices, time its cases there, and let it go."""
    own = {
        name: case
        for name, case in cases.items()
        if case.model == model and (where.tp, where.dp) in case.meshes
    }
    dtype = jnp.dtype(rows.runs[-1]["dtype"])
    try:
        params = load_model(
            model, args.adapter, dtype, args.head_rank, where.mesh, args.any_model
        )
    except jax.errors.JaxRuntimeError as error:  # out of memory, mostly
        for name, case in own.items():
            rows.add(error_row("decode", name, case, "dense", error, where))
        return
    for name, case in own.items():
        run_case(name, case, params, args, rows, where)


def against_transformers(name: str, case: Case, timed: dict, rows: Rows) -> None:
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
            spread = steps.spread([ms / 1e3 for ms in found["step_ms"]])
            read = weights + case.batch * found["visible"] * token
        row = transformers_row(name, case, mode, found, spread, read, r)
        rows.add(row)


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Run the benchmark.

    Args:
      args: that `benchmarks.arguments` describes.
      command: that was given, for the record.

    Raises:
      ValueError: if an argument does not fit.
    """
    cases = chosen_cases(args)
    check_options(args, cases)
    check(cases)
    if args.plot:
        plots.require()
        if args.toy and not args.out:
            raise ValueError("--plot draws beside the results: give --out with --toy")
    if args.out:  # what cannot be written or continued is told before the work
        try_file(args.out)
        if args.out.exists():
            read_rows(args.out)
    if args.memory_fraction:  # read when jax takes the device, which is below
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(args.memory_fraction)
    beside, version, rates = {}, None, []
    if not args.no_torch:  # before jax takes the device
        beside = {
            name: transformers_times(case.model, case.batch, case.context, args.toy)
            for name, case in cases.items()
            if case.transformers
            or (args.transformers and case.devices == 1 and is_timed(case.model))
        }
        if not args.toy:
            version, rates = kernels.torch_results(RATE_SHAPES)
    cases = with_devices(cases, args, jax.device_count())
    device = jax.devices()[0]
    stream = read_bandwidth(device)
    r = max(best_rates(RATE_SHAPES, rates, stream).values())
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(command),
        "commit": commit(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "torch": version,
        "transformers": [timed.get("transformers") for timed in beside.values()],
        "dtype": "float32" if args.toy else "bfloat16",
        "head_rank": args.head_rank,
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        "compilation_cache": bool(jax.config.values["jax_compilation_cache_dir"]),
        "stream_gb_s": stream / 1e9,
        "r_gb_s": r / 1e9,
    }
    rows = Rows(head, args.out or (None if args.toy else default_path(head)))
    print(
        f"{head['device']}, jax {head['jax']}, {head['dtype']}; the memory can be read "
        f"at {r / 1e9:,.1f} GB/s (R; a streaming sum: {stream / 1e9:,.1f})"
    )
    if any(":" in case.model and parse_model(case.model) for case in cases.values()):
        print(
            "layers alone: no embedding, head or layer 0 in time or floor; attention "
            "is sparse in every layer"
        )
    for name, timed in beside.items():
        against_transformers(name, cases[name], timed, rows)
    placed = ((case.model, mesh) for case in cases.values() for mesh in case.meshes)
    links: dict[tuple[int, int], Devices] = {}
    for model, mesh in dict.fromkeys(placed):
        if mesh not in links:  # before anything else is in the devices' memory
            links[mesh] = Devices.of(*mesh, args.link_gb_s)
        run_model(model, links[mesh], cases, args, rows)
    make_console().print(table(rows.own))
    if rows.path:
        print(f"written to {rows.path}")
        if args.plot:
            for path in plots.draw(rows.path):
                print(f"written to {path}")


def default_path(head: dict[str, Any]) -> Path:
    """The file to write: among the repository's results, or here outside of it."""
    slug = re.sub(r"\W+", "-", head["device"].lower())
    if head["commit"] == "unknown":
        return Path(f"{head['date']}-{slug}-bench.json")
    file = f"{head['date']}-{slug}-{head['commit']}-bench.json"
    return REPOSITORY / "benchmarks" / "results" / file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=DESCRIPTION,
        epilog=f"example: {EXAMPLE}",
    )
    add_arguments(parser.add_argument)
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        run(args, ["python", "-m", "benchmarks.decode", *given])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
