"""What the commands share: arguments, progress bars."""

from __future__ import annotations

import argparse
import fractions
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from polarjax.hub import read_config
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sharding import check_mesh, default_mesh, make_mesh
from polarjax.sparsity import Oracle, Polar, Random

POLICIES = {"polar": Polar, "adaptive": Polar, "oracle": Oracle, "random": Random}


def fraction(text: str) -> float:
    """A number such as 0.5 or 2/3."""
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"{text!r} is no number such as 0.5 or 2/3"
        raise argparse.ArgumentTypeError(message) from None


def add_any_model(add: Callable[..., Any]) -> None:
    """The option that goes with --adapter.

    Args:
      add: of a parser.
    """
    add(
        "--any-model",
        action="store_true",
        help="take the adapter although it was learned on other weights, such as "
        "another quantisation or fine-tune, if its shapes are right",
    )


def add_mesh_arguments(add: Callable[..., Any], shared: str) -> None:
    """The options that say over which devices a model is cut.

    Args:
      add: of a parser.
      shared: what copies of the model have parts of.
    """
    add(
        "--tp",
        type=int,
        metavar="N",
        help="devices that share the model, each with its heads and neurons; alone, "
        "there is one copy",
    )
    add(
        "--dp",
        type=int,
        metavar="M",
        help=f"copies of the model, which share the {shared}; alone, each is over as "
        "many devices as there are for it. Without both: all GPUs",
    )


def choose_mesh(args: argparse.Namespace, batch: int | None = None) -> Mesh | None:
    """The devices asked for, or all GPUs; says which.

    Args:
      args: that a parser with `add_mesh_arguments` made, and with a checkpoint.
      batch: of a training, see `default_mesh`.
    """
    if args.tp or args.dp:
        mesh = make_mesh(args.tp, args.dp)
        check_mesh(mesh, read_config(args.checkpoint))
    elif jax.default_backend() == "gpu" and jax.device_count() > 1:
        mesh = default_mesh(read_config(args.checkpoint), batch)
    else:
        return None
    sizes = " and ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"over {mesh.size} devices: {sizes}", file=sys.stderr)
    return mesh


def make_policy(
    name: str, density: float | None, neuron_density: float | None = None
) -> SelectionPolicy:
    """A policy by its name.

    Args:
      name: "dense" or one of `POLICIES`.
      density: of heads; None for the adapter's budgets.
      neuron_density: of MLP neurons, for "polar" and "adaptive"; None for the
        adapter's own budgets, or all where it has none.

    Raises:
      ValueError: if there is none of that name.
    """
    if name == "dense":
        return Dense()
    if name not in POLICIES:
        raise ValueError(
            f"no policy {name!r}: there are dense, {', '.join(sorted(POLICIES))}"
        )
    if name in ("polar", "adaptive"):
        return Polar(density, neuron_density, adaptive=name == "adaptive")
    return POLICIES[name](density)


def make_policies(
    names: str,
    densities: str,
    neuron_density: float | None = None,
    balanced: int | None = None,
) -> dict[str, SelectionPolicy]:
    """Every policy at every density, by label; without densities, the adapter's own.

    Args:
      names: such as "dense,polar".
      densities: such as "1/2,2/3"; may be empty.
      neuron_density: see `make_policy`.
      balanced: beside "polar", that of so many parts; see `Polar`.

    Raises:
      ValueError: if a name or a density is none, or stands there twice.
    """
    try:
        wanted = [fraction(x) for x in densities.split(",") if x] or [None]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--densities: {error}") from None
    policies: dict[str, SelectionPolicy] = {}
    wanted_names = [name.strip() for name in names.split(",")]
    if balanced is not None and "polar" not in wanted_names:
        raise ValueError("--balanced is of the policy polar: name it in --policies")
    for name in wanted_names:
        for density in [None] if name in ("dense", "adaptive") else wanted:
            label = name.capitalize() + (f" {density:.3f}" if density else "")
            if label in policies:
                raise ValueError(f"--policies, --densities: {label} is there twice")
            policies[label] = make_policy(name, density, neuron_density)
            if name == "polar" and balanced is not None:
                label = label.replace("Polar", f"Polar balanced {balanced}")
                policies[label] = Polar(density, neuron_density, balanced=balanced)
    return policies


def counting_bar(console: Console) -> Progress:
    """A progress bar that shows how many are done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console)


def share_bar(console: Console) -> Progress:
    """A progress bar for work of which the units mean nothing to people."""
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        console=console,
        speed_estimate_period=86_400,  # batches differ: what counts is their mean
    )
