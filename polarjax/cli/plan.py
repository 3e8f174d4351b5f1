"""`polarjax plan`: what fits, and how fast it can be, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby

from rich.table import Table

from polarjax.planning.plan import Plan, plan
from polarjax.storage.siblings import check_ours
from polarjax.terminal.output import make_console


def run_plan(args: argparse.Namespace) -> None:
    """Run the command, of the arguments that its parser describes."""
    check_ours("convert")
    from convert.describe import read_config

    config = read_config(args.source)
    found = plan(
        config,
        args.device,
        dtype=args.dtype,
        densities=args.densities,
        neuron_density=args.neuron_density,
        batches=args.batches,
        contexts=args.contexts,
        head_rank=args.head_rank,
        neuron_rank=args.neuron_rank,
        memory_fraction=args.memory_fraction,
        tp=args.tp,
        dp=args.dp,
        balanced=args.balanced,
        link_gb_s=args.link_gb_s,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _show(found)


def _show(found: Plan) -> None:
    console, device = make_console(), found.device
    several = found.tp * found.dp > 1
    each = " each" if several else ""
    console.print(
        f"{device.name}: {found.usable_bytes / 1e9:.1f} GB to fill, "
        f"{device.bandwidth / 1e9:,.0f} GB/s ({device.source}). Weights: "
        f"{found.weight_bytes / 1e9:.2f} GB{each}.",
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
        "context",
        "batch",
        "density",
        "memory, GB",
        "fits",
        *(("sent, MB", "reading, ms") if several else ()),
        "floor, ms a step",
        "tokens/s, at most",
        "over dense, by floors",
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
                f"{row.context:,}",
                f"{row.batch:,}",
                density,
                f"{row.memory_bytes / 1e9:.2f}",
                "yes" if row.fits else "no",
                *(sent if several else ()),
                f"{row.step_ms:.3f}",
                f"{row.tokens_per_second:,.0f}",
                f"{row.over_dense:.2f}x",
                style=None if row.fits else "dim",
            )
        table.add_section()
    console.print(table)
    for context, batches in found.largest_batch.items():
        fitting = (f"{n:,} at density {d:.3f}" for d, n in batches.items())
        console.print(
            f"largest batch that fits, {context:,} tokens: {', '.join(fitting)}"
        )
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(
        "Floors and tokens/s are bounds, by the bytes alone: real steps take longer."
    )
