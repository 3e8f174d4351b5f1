"""Times decode steps of whole models beside their floor: `polarjax bench`.

The step is an engine's own: the programs that it sends to the devices for each token of
its requests, over pages that lie in no order. Its floor is the bytes it must
read (weights, router weights, and the KV of the groups that are on) over R, the best
read rate of the same run: that of a streaming sum in jax, or of another library's dense
attention if one is timed beside and reads faster.
"""

import argparse
import dataclasses
import datetime
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.bench import plots, rounds, steps
from polarjax.bench.arguments import check, check_options, chosen_cases, with_devices
from polarjax.bench.meshes import Devices
from polarjax.bench.random_weights import load_model
from polarjax.bench.rows import (
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
)
from polarjax.bench.rows import read as read_rows
from polarjax.bench.shapes import Case, parse_model, prefill_flops
from polarjax.bench.table import table
from polarjax.bench.timing import time_policy
from polarjax.evaluation.record import commit
from polarjax.params import Params
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.storage.writing import try_file
from polarjax.terminal.output import make_console


@dataclasses.dataclass(frozen=True)
class Beside:
    """What other libraries do on the same device, found out before jax takes it.

    Attributes:
      rate: bytes per second that the fastest of them reads; 0 without one.
      facts: what the run's record says of them, such as versions.
      add: adds the rows of what was timed, when the run has its read rate.
    """

    rate: float = 0.0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add: Callable[[Rows], None] = lambda rows: None


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
    found = parse_model(case.model)
    alone = bool(found and found[1])
    r = rows.runs[-1]["r_gb_s"] * 1e9
    beside = best_transformers(rows.own, name) if where.count == 1 else None
    state, dense, beside_row = None, None, None
    # Two policies that differ in their balance alone are one on one device.
    policies = {sparse.label(where.tp): sparse for sparse in reversed(case.sparse)}
    for label, sparse in [("dense", None), *reversed(policies.items())]:
        try:
            if state is None:
                state = steps.make_state(params, case.batch, case.context, alone)
            policy, asked = steps.make_policy(sparse, where.tp)
            # But for dense's, which has the model's own weights, nothing outlives
            # this round: the next policy needs its room.
            timed = time_policy(
                params,
                policy,
                asked,
                state,
                case,
                alone,
                args,
                where,
                beside=dense,
            )
        except jax.errors.JaxRuntimeError as error:  # out of memory, mostly
            rows.add(error_row("decode", name, case, label, error, where))
            state = None  # it may have been donated
            continue
        state, known = timed.state, timed.known
        spread = rounds.spread(timed.seconds)
        sent = known.pop("sent_bytes", 0)
        row = decode_row(name, case, sparse, spread, timed.read, r, where, sent)
        if sparse is None:
            dense, beside_row = timed.step, row
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
    if not alone:
        time_prefills(name, case, params, args.repeats, rows, where)


def time_prefills(
    name: str, case: Case, params: Params, repeats: int, rows: Rows, where: Devices
) -> None:
    """Time reading prompts of the case's sizes.

    Args:
      name: of the case.
      case: the case.
      params: its model, whole.
      repeats: warm calls.
      rows: where the results go.
      where: the devices that the model is on.
    """
    device = rows.runs[-1]["device"]
    for prompts, tokens in case.prefill:
        size = prompts, tokens
        try:
            seconds, compiling = rounds.prefill_times(params, *size, repeats)
        except jax.errors.JaxRuntimeError as error:
            policy = f"{prompts}x{tokens}"
            rows.add(error_row("prefill", name, case, policy, error, where))
            continue
        flops, spread = prefill_flops(params.config, *size), rounds.spread(seconds)
        row = prefill_row(name, case, size, spread, flops, device, where)
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


def run(
    args: argparse.Namespace,
    command: Sequence[str],
    opponents: Callable[[Mapping[str, Case]], Beside] = lambda cases: Beside(),
    folder: Path | None = None,
) -> None:
    """Run the benchmark.

    Args:
      args: that `polarjax.bench.arguments` describes.
      command: that was given, for the record.
      opponents: times other libraries on the cases, if they are wanted.
      folder: where results go without `--out`; None for the one it is called in.

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
    if args.memory_fraction is not None:
        # Read when jax takes the device, which is below.
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(args.memory_fraction)
    beside = opponents(cases)
    cases = with_devices(cases, args, jax.device_count())
    head = about_run(args, command, beside)
    path = args.out
    if path is None and not args.toy:
        path = default_path(head, folder or Path())
    rows = Rows(head, path)
    best, stream = head["r_gb_s"], head["stream_gb_s"]
    print(
        f"{head['device']}, jax {head['jax']}, {head['dtype']}; the memory can be read "
        f"at {best:,.1f} GB/s (R; a streaming sum: {stream:,.1f})"
    )
    if any(":" in case.model and parse_model(case.model) for case in cases.values()):
        print(
            "layers alone: no embedding, head or layer 0 in time or floor; attention "
            "is sparse in every layer"
        )
    beside.add(rows)
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


def about_run(
    args: argparse.Namespace, command: Sequence[str], beside: Beside
) -> dict[str, Any]:
    """What a file says of a run: device, versions, settings, and how fast it reads.

    Args:
      args: of the command.
      command: that was given.
      beside: of other libraries.
    """
    device = jax.devices()[0]
    stream = read_bandwidth(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(command),
        "commit": commit() or "unknown",
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        **beside.facts,
        "dtype": "float32" if args.toy else "bfloat16",
        "head_rank": args.head_rank,
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        "compilation_cache": bool(jax.config.values["jax_compilation_cache_dir"]),
        "stream_gb_s": stream / 1e9,
        "r_gb_s": max(stream, beside.rate) / 1e9,
    }


def default_path(head: Mapping[str, Any], folder: Path) -> Path:
    """The file to write in a folder; outside of a clone there is no commit to name."""
    slug = re.sub(r"\W+", "-", head["device"].lower())
    known = [] if head["commit"] == "unknown" else [head["commit"]]
    return folder / "-".join([head["date"], slug, *known, "bench.json"])
