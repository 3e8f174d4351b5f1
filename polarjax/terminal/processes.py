"""The options of a command that several processes can run together."""

from __future__ import annotations

import argparse

START_TIMEOUT = 45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that several processes can run together."""
    add = parser.add_argument_group(
        "several processes",
        "Run the same command once per host (or per GPU, with CUDA_VISIBLE_DEVICES), "
        "each with its own --process; they use the GPUs of all. Process 0 prints.",
    ).add_argument
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens: its host as the others reach it, and any free "
        "port; auto for all three from Slurm, Open MPI and what else jax knows",
    )
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which this one is, 0 to N-1")
    add(
        "--start-timeout",
        type=int,
        default=START_TIMEOUT,
        metavar="SECONDS",
        help="in which all must have started",
    )
