"""The arguments of `polarjax plan`."""

from __future__ import annotations

import argparse

from polarjax.terminal.choices import (
    BATCHES,
    DENSITIES,
    GPUS,
    LINKED,
    MEMORY_FRACTION,
)
from polarjax.terminal.common import fraction, refuse

PLAN = (
    "Which batch x context fits into a device's memory, and what decode speed its "
    "bandwidth allows at most at which density. Reads the model's configuration alone: "
    "a checkpoint, a Hugging Face folder (its config.json will do), a .gguf (its "
    "header), or an id of the hub. A step's floor is the bytes it must read (weights "
    "and the KV cache of the groups that are on) over the bandwidth; real steps take "
    "longer. With --tp or --dp all bytes are those of each device, and the floor has "
    "those that it sends to the others too."
)
PLAN_EXAMPLE = (
    "polarjax plan checkpoints/smollm2-135m --device h100 --batches 16 64 "
    "--contexts 2048 --densities 1 1/2"
)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `plan`."""
    add = parser.add_argument
    add("source", help="checkpoint, Hugging Face folder, .gguf, or id of the hub")
    add(
        "--device",
        help="a GPU that is not here, by its datasheet: "
        f"{', '.join(GPUS)} (default: the device that is here, its bandwidth measured)",
    )
    add("--batches", type=int, nargs="+", default=BATCHES, help="numbers of sequences")
    add(
        "--contexts",
        type=int,
        nargs="+",
        help="tokens of a sequence, prompt and continuation (default: 2048, 8192 and "
        "32768, as far as the model goes)",
    )
    add(
        "--densities",
        type=fraction,
        nargs="+",
        default=DENSITIES,
        help="fractions of the KV groups to read from layer 1 on; 1 is dense",
    )
    add(
        "--neuron-density",
        type=fraction,
        default=1.0,
        help="fraction of the MLP neurons to read where the density is below 1, for "
        "ReLU models",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of weights and cache",
    )
    add("--head-rank", type=int, default=64, help="of the head routers")
    add("--neuron-rank", type=int, default=1024, help="of the neuron routers")
    add(
        "--memory-fraction",
        type=fraction,
        default=MEMORY_FRACTION,
        help="to fill of what XLA may take of the device, which is 0.75 of it or "
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    )
    add("--tp", type=int, default=1, help="devices that share a model")
    add("--dp", type=int, default=1, help="copies of the model that share a batch")
    add(
        "--balanced",
        action="store_true",
        help="each of --tp devices reads as many of its own KV groups and neurons, "
        "rounded up, so that the floor is every device's; without it they read the "
        "best of all, and the floor has them lie evenly, which the busiest device of a "
        "real step cannot be below",
    )
    add(
        "--link-gb-s",
        type=float,
        help="GB per second that a device sends to the others (default: NVLink's, by "
        f"the datasheet, of {', '.join(LINKED)})",
    )
    add("--json", action="store_true", help="print the result as JSON")


def check_plan(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if min(args.densities) == 1:
        routed = "neuron-density head-rank neuron-rank balanced"
        refuse(args, routed, "where no density is below 1: nothing is selected")
    if args.neuron_density == 1:
        refuse(args, "neuron-rank", "without --neuron-density below 1")
    if args.tp == 1:
        refuse(args, "balanced", "without --tp: one device does all the work")
    if args.tp == args.dp == 1:
        refuse(args, "link-gb-s", "without --tp or --dp: one device sends nothing")
