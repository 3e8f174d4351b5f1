"""The arguments of the decode benchmark, and the cases that they stand for."""

import argparse
import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from polarjax.bench.shapes import CASES, MODELS, TOY_CASES, Case, Sparsity, parse_model
from polarjax.terminal.common import add_any_model, fraction

DESCRIPTION = (
    "Time decode steps at the shapes of real models, on random weights or a "
    "checkpoint, beside the floor that the memory sets: the bytes that a step must "
    "read over the best read rate of the same run. Without --models the cases that "
    "--cases lists are run, each dense and at its densities; with it, every model at "
    "every batch, context and density. A row is printed and written as soon as it is "
    "measured, and a later command with the same --out adds to the file, so that a "
    "table can be made in parts."
)
EXAMPLE = (
    "polarjax bench --models llama-3.1-8b opt-66b:8 --batches 16 64 --contexts 2048 "
    "--densities 1/2 5/8 --profile --out bench.json"
)


class _Elsewhere(argparse.Action):
    """Refuses a flag of the repository's command, which times other libraries too."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        raise ValueError(
            f"{option_string} goes with `python -m benchmarks.decode`, in a clone of "
            "polarjax's repository, which times torch and transformers too: leave it "
            "out here"
        )


def add_command(add: Any) -> None:
    """Give the parser of `polarjax bench` its arguments.

    Args:
      add: its `add_argument`.
    """
    add_arguments(add)
    for flag in ("--transformers", "--no-torch"):
        add(flag, action=_Elsewhere, nargs=0, help=argparse.SUPPRESS)


def add_arguments(add: Any, folder: str = "") -> None:
    """Give a parser the benchmark's arguments.

    Args:
      add: its `add_argument`.
      folder: where results go, with a slash; "" for the folder that it is called in.
    """
    _add_cases(add)
    _add_devices(add)
    _add_runs(add, folder)


_SEVERAL: dict[str, Any] = {"nargs": "+", "metavar": "N"}


def _add_cases(add: Any) -> None:
    """What is timed."""
    add(
        "--cases",
        nargs="+",
        choices=[*CASES, *TOY_CASES],
        metavar="NAME",
        help=f"some of the table's: {', '.join(CASES)} (without --models: all)",
    )
    add(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"instead of the table: {', '.join(MODELS)}; NAME:N for its layers 1 to N "
        "alone, with no embedding and no head; or a checkpoint's folder or id",
    )
    add(
        "--layers", type=int, help="time layers 1 to so many alone, of each of --models"
    )
    add(
        "--adapter",
        help="of the checkpoint in --models; without one, routers by chance",
    )
    add_any_model(add)
    add("--batches", type=int, help="sequences, with --models (16)", **_SEVERAL)
    add("--contexts", type=int, help="tokens, with --models (2048)", **_SEVERAL)
    add(
        "--densities",
        type=fraction,
        help="of KV groups, with --models (1/2, or the adapter's own budgets)",
        **_SEVERAL,
    )
    add(
        "--neuron-densities",
        type=fraction,
        help="of MLP neurons, with --models: each beside every head density, ReLU only",
        **_SEVERAL,
    )
    add(
        "--prefill",
        type=prompt_size,
        nargs="+",
        metavar="BxT",
        help="time reading B prompts of T tokens too, such as 8x2048, for every case",
    )


def _add_devices(add: Any) -> None:
    """Over which devices."""
    add(
        "--tp",
        type=int,
        help="devices that share the model, each with its heads and neurons; of "
        "several numbers one after the other, beside 1 as speedups over one device",
        **_SEVERAL,
    )
    add("--dp", type=int, help="copies of the model, which share the batch", **_SEVERAL)
    add(
        "--balanced",
        action="store_true",
        help="each of --tp devices reads as many of its own KV groups and neurons, "
        "rounded up",
    )
    add(
        "--link-gb-s",
        type=float,
        help="GB per second that a device sends to the others (default: measured, by "
        "summing a large array over them)",
    )


def _add_runs(add: Any, folder: str) -> None:
    """How it is timed, and where the results go."""
    add("--profile", action="store_true", help="trace some steps of each and sum it up")
    add(
        "--repeats",
        type=int,
        default=5,
        help="warm rounds of steps, or prefills, timed",
    )
    add("--head-rank", type=int, default=0, help="of random head routers; 0 is linear")
    add(
        "--memory-fraction",
        type=fraction,
        help="of the device that jax may take, XLA_PYTHON_CLIENT_MEM_FRACTION; the "
        "72 GB of llama-2-7b-b28 need 0.95 of an H100 (jax's own default: 0.75)",
    )
    add("--toy", action="store_true", help="tiny shapes, float32: a dry run for a CPU")
    add("--plot", action="store_true", help="draw the plots beside the results")
    add(
        "--out",
        type=Path,
        help="JSON file, continued if it exists (default: "
        f"{folder}DATE-DEVICE-COMMIT-bench.json; --toy: none)",
    )


def check_options(args: argparse.Namespace, cases: dict[str, Case]) -> None:
    """Raise if an option changes nothing, or is out of range.

    Args:
      args: of the command.
      cases: that they ask for.

    Raises:
      ValueError: naming it.
    """
    from polarjax.planning.memory import check_fraction  # jax is loaded from here on
    from polarjax.planning.sizes import at_least, positive

    positive("--repeats", args.repeats)
    at_least("--head-rank", args.head_rank, 0)
    if args.memory_fraction is not None:
        check_fraction(args.memory_fraction)
    if args.link_gb_s is not None and not 0 < args.link_gb_s < float("inf"):
        raise ValueError(f"--link-gb-s must be above 0, got {args.link_gb_s}")
    if args.adapter and args.head_rank:
        raise ValueError(
            "--head-rank has no effect with --adapter, which brings its routers: leave "
            "one out"
        )
    meshes = [mesh for case in cases.values() for mesh in case.meshes]
    if args.balanced and all(tp == 1 for tp, _ in meshes):
        raise ValueError("--balanced has no effect without --tp above 1: leave it out")
    if args.link_gb_s and all(tp * dp == 1 for tp, dp in meshes):
        raise ValueError(
            "--link-gb-s has no effect on one device, which sends nothing: leave it out"
        )


def prompt_size(text: str) -> tuple[int, int]:
    """Prompts and tokens from text such as 8x2048."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 8x2048")
    return int(match[1]), int(match[2])


def chosen_cases(args: argparse.Namespace) -> dict[str, Case]:
    """The cases that the arguments ask for, those of one model next to each other.

    Raises:
      ValueError: if arguments exclude each other.
    """
    lists = (
        "batches",
        "contexts",
        "densities",
        "neuron_densities",
        "layers",
        "adapter",
    )
    if args.any_model and not args.adapter:
        raise ValueError("--any-model goes with --adapter")
    real = [name for name in args.cases or () if name not in TOY_CASES]
    real += [model for model in args.models or () if parse_model(model)]
    if args.toy and real:
        raise ValueError(
            f"--toy is of its own cases ({', '.join(TOY_CASES)}): {real[0]} is a real "
            "model's, leave one of them out"
        )
    if not args.models:
        given = [name for name in lists if getattr(args, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag} goes with --models: the cases bring their own")
        table = TOY_CASES if args.toy else CASES
        cases = {**CASES, **TOY_CASES}
        return {name: _placed(cases[name], args) for name in args.cases or table}
    if args.cases:
        raise ValueError("pass either --cases or --models, not both")
    heads: list[float | None] = args.densities or [None if args.adapter else 0.5]
    neurons = [None, *(args.neuron_densities or [])]
    sparse = tuple(Sparsity(h, n) for h, n in itertools.product(heads, neurons))
    cases = {}
    for model in args.models:
        known = parse_model(model)
        if args.adapter and known:
            raise ValueError(f"--adapter goes with a checkpoint, not with {model}")
        if args.layers is not None and not known:
            raise ValueError(f"--layers goes with {', '.join(MODELS)}, not {model}")
        if args.layers is not None:
            model = f"{model}:{args.layers}"
        for batch, context in itertools.product(
            args.batches or [16], args.contexts or [2048]
        ):
            case = Case(model, batch, context, sparse)
            cases[f"{model}-b{batch}-s{context}"] = _placed(case, args)
    return cases


def _placed(case: Case, args: argparse.Namespace) -> Case:
    """A case on the devices asked for, else on its own, with what is asked for all."""
    prefill = (*case.prefill, *(args.prefill or ()))
    case = dataclasses.replace(case, prefill=prefill)
    if args.balanced:
        sparse = (dataclasses.replace(each, balanced=True) for each in case.sparse)
        case = dataclasses.replace(case, sparse=tuple(sparse))
    if args.tp or args.dp:
        meshes = itertools.product(args.tp or [1], args.dp or [1])
        case = dataclasses.replace(case, meshes=tuple(meshes))
    return case


def with_devices(
    cases: dict[str, Case], args: argparse.Namespace, count: int
) -> dict[str, Case]:
    """The cases that so many devices can run; says which others there are.

    Raises:
      ValueError: if one was asked for.
    """
    here = f"{count} {'is' if count == 1 else 'are'} here"
    short = {name: c.devices for name, c in cases.items() if c.devices > count}
    for name, needed in short.items():
        text = f"{name} needs {needed} devices, {here}"
        if args.cases or args.models or args.tp or args.dp:
            raise ValueError(text)
        print(f"left out: {text}")
    return {name: case for name, case in cases.items() if name not in short}


def check(cases: dict[str, Case]) -> None:
    """Raise where a case cannot be run, before anything is.

    Raises:
      ValueError: naming the case, or the density.
    """
    from polarjax.loading import read_config  # jax is loaded from here on
    from polarjax.policies.budgets import check_density

    for name, case in cases.items():
        for tp, dp in case.meshes:
            _check_mesh(name, case, tp, dp)
    configs = {}
    for model in {case.model: None for case in cases.values()}:
        known = parse_model(model)
        configs[model] = known[0] if known else read_config(model)
    for name, case in cases.items():
        if case.batch < 1 or case.context < 2:
            raise ValueError(f"{name}: the batch must be positive, the context above 1")
        for sparse in case.sparse:
            for density in (sparse.heads, sparse.neurons):
                if density is not None:
                    check_density(density)
        config = configs[case.model]
        longest = max([case.context, *(tokens for _, tokens in case.prefill)])
        if longest > config.context:
            raise ValueError(
                f"{name}: the context of {case.model} is {config.context} tokens"
            )
        if config.activation != "relu" and any(s.neurons for s in case.sparse):
            raise ValueError(f"{name}: {case.model} has no ReLU: leave neurons out")


def _check_mesh(name: str, case: Case, tp: int, dp: int) -> None:
    from polarjax.mesh.cut import check_tp
    from polarjax.policies.budgets import check_parts

    if min(tp, dp) < 1:
        raise ValueError(f"--tp and --dp must be positive, got {tp} and {dp}")
    sizes = [case.batch, *(prompts for prompts, _ in case.prefill)]
    if odd := [size for size in sizes if size % dp]:
        raise ValueError(f"{name}: dp {dp} does not divide the batch of {odd[0]}")
    found = parse_model(case.model)
    if not found:
        return  # a checkpoint: who loads it checks
    config, alone = found
    if alone and tp * dp > 1:
        raise ValueError(
            f"{name}: layers alone run on one device: leave --tp and --dp out, or time "
            f"{case.model.partition(':')[0]} whole"
        )
    try:
        check_tp(tp, config)
        if any(sparse.balanced for sparse in case.sparse):
            check_parts(config.kv_heads, tp)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
