"""`polarjax plan`: what fits, and how fast it can be, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from convert.describe import read_config
from polarjax.console import fraction
from polarjax.devices import GPUS, LINKS
from polarjax.generation.memory import MEMORY_FRACTION
from polarjax.planning import BATCHES, DENSITIES, Plan, plan


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Give the console script this command.

    Args:
      command: makes one, from its name, function, text and example.
    """
    add = command(
        "plan",
        _plan,
        "Which batch x context fits into a device's memory, and what decode speed its "
        "bandwidth allows at which density. Reads the model's configuration alone: a "
        "checkpoint, a Hugging Face folder (its config.json will do), a .gguf (its "
        "header), or an id of the hub. A step's floor is the bytes it must read "
        "(weights and the KV cache of the groups that are on) over the bandwidth; real "
        "steps take a little longer. With --tp or --dp all bytes are those of each "
        "device, and the floor has those that it sends to the others too.",
        "polarjax plan checkpoints/smollm2-135m --device h100 --batches 16 64 "
        "--contexts 2048 --densities 1 1/2",
        checkpoint=False,
    ).add_argument
    add("source", help="checkpoint, Hugging Face folder, .gguf, or id of the hub")
    add(
        "--device",
        help="a GPU that is not here, by its datasheet: "
        f"{', '.join(GPUS)} (default: the device that is here, its bandwidth measured)",
        default=argparse.SUPPRESS,
    )
    add("--batches", type=int, nargs="+", default=BATCHES, help="numbers of sequences")
    add(
        "--contexts",
        type=int,
        nargs="+",
        help="tokens of a sequence, prompt and continuation (default: 2048, 8192 and "
        "32768, as far as the model goes)",
        default=argparse.SUPPRESS,
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
        f"the datasheet, of {', '.join(name for name in GPUS if name in LINKS)})",
        default=argparse.SUPPRESS,
    )
    add("--json", action="store_true", help="print the result as JSON")


def _plan(args: argparse.Namespace) -> None:
    config = read_config(args.source)
    found = plan(
        config,
        getattr(args, "device", None),
        dtype=args.dtype,
        densities=args.densities,
        neuron_density=args.neuron_density,
        batches=args.batches,
        contexts=getattr(args, "contexts", None),
        head_rank=args.head_rank,
        neuron_rank=args.neuron_rank,
        memory_fraction=args.memory_fraction,
        tp=args.tp,
        dp=args.dp,
        balanced=args.balanced,
        link_gb_s=getattr(args, "link_gb_s", None),
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _show(found)


def _show(found: Plan) -> None:
    console, device = Console(), found.device
    several = found.tp * found.dp > 1
    each = " each" if several else ""
    console.print(
        f"{device.name}: {found.usable_bytes / 1e9:.1f} GB to fill, "
        f"{device.bandwidth / 1e9:,.0f} GB/s ({device.source}). Weights: "
        f"{found.weight_bytes / 1e9:.2f} GB{each}.",
        markup=False,
        highlight=False,
    )
    if several:
        link = f", which send {device.link / 1e9:g} GB/s" if device.link else ""
        console.print(
            f"{found.tp * found.dp} devices, tp {found.tp} x dp {found.dp}{link}. All "
            "bytes are those of each device; what it sends in a step is that of rings. "
            "The floor is reading, then sending, without the microseconds that a "
            "collective takes however small. "
            + (
                "Each device reads as many of its own groups and neurons."
                if found.balanced
                else "What is selected is taken to lie evenly on the devices."
            ),
            markup=False,
            highlight=False,
        )
    table = Table(
        *("context", "batch", "density", "memory, GB", "fits"),
        *(("sent, MB", "reading, ms") if several else ()),
        *("floor, ms a step", "tokens/s", "over dense"),
    )
    for column in table.columns[:4] + table.columns[5:]:
        column.justify = "right"
    for _, rows in groupby(found.rows, key=lambda row: row.context):
        for row in rows:
            density = f"{row.density:.3f}"
            if row.neuron_density < 1:
                density += f", neurons {row.neuron_density:.3f}"
            sent = f"{row.sent_bytes / 1e6:.2f}", f"{row.read_ms:.3f}"
            table.add_row(
                *(f"{row.context:,}", f"{row.batch:,}", density),
                *(f"{row.memory_bytes / 1e9:.2f}", "yes" if row.fits else "no"),
                *(sent if several else ()),
                *(f"{row.step_ms:.3f}", f"{row.tokens_per_second:,.0f}"),
                f"{row.over_dense:.2f}x",
                style=None if row.fits else "dim",
            )
        table.add_section()
    console.print(table)
    fitting = (f"{n:,} at {s:,} tokens" for s, n in found.largest_batch.items())
    console.print("largest batch that fits: " + ", ".join(fitting), highlight=False)
