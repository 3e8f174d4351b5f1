"""What commands make of their arguments: meshes and policies."""

from __future__ import annotations

import argparse
import sys

import jax
from jax.sharding import Mesh

from polarjax.loading import read_config
from polarjax.mesh.cut import check_mesh, default_mesh, make_mesh
from polarjax.policies import named
from polarjax.policy import Policy
from polarjax.terminal.common import fraction


def choose_mesh(args: argparse.Namespace, batch: int | None = None) -> Mesh | None:
    """The devices asked for, or all GPUs; says which.

    Args:
      args: that a parser with `add_mesh_arguments` made, and with a checkpoint.
      batch: of a training, see `default_mesh`.
    """
    if args.tp is not None or args.dp is not None:
        mesh = make_mesh(args.tp, args.dp)
        check_mesh(mesh, read_config(args.checkpoint))
    elif jax.default_backend() == "gpu" and jax.device_count() > 1:
        mesh = default_mesh(read_config(args.checkpoint), batch)
    else:
        return None
    sizes = " and ".join(f"{name} {size}" for name, size in mesh.shape.items())
    devices = "device" if mesh.size == 1 else "devices"
    print(f"over {mesh.size} {devices}: {sizes}", file=sys.stderr)
    return mesh


def make_policies(
    names: str,
    densities: str,
    neuron_density: float | None = None,
    balanced: int | None = None,
) -> dict[str, Policy]:
    """Every policy at every density, by label; without densities, the adapter's own.

    Args:
      names: such as "dense,polar".
      densities: such as "1/2,2/3"; may be empty.
      neuron_density: fraction of the neurons that a batch reads; None for the
        adapter's own.
      balanced: beside "polar", that of so many parts; see `Polar`.

    Raises:
      ValueError: if a name or a density is none, or stands there twice, or no policy
        has a use for one.
    """
    try:
        wanted = [fraction(x) for x in densities.split(",") if x] or [None]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--densities: {error}") from None
    policies: dict[str, Policy] = {}
    wanted_names = [name.strip() for name in names.split(",")]
    if balanced is not None and "polar" not in wanted_names:
        raise ValueError("--balanced is of the policy polar: name it in --policies")
    if densities and not {"polar", "oracle", "random"} & {*wanted_names}:
        raise ValueError(
            "--densities has no effect on dense and adaptive: name a policy that takes "
            "one in --policies, or leave it out"
        )
    if neuron_density is not None and not {"polar", "adaptive"} & {*wanted_names}:
        raise ValueError(
            "--neuron-density is of the policies polar and adaptive: name one in "
            "--policies, or leave it out"
        )
    for name in wanted_names:
        own = neuron_density if name in ("polar", "adaptive") else None
        for density in [None] if name in ("dense", "adaptive") else wanted:
            label = name.capitalize() + (f" {density:.3f}" if density else "")
            if label in policies:
                raise ValueError(f"--policies, --densities: {label} is there twice")
            policies[label] = named(name, density, own)
            if name == "polar" and balanced is not None:
                label = label.replace("Polar", f"Polar balanced {balanced}")
                policies[label] = named(name, density, neuron_density, balanced)
    return policies
