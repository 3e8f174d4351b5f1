"""The arguments of `polarjax generate` and `demo`."""

from __future__ import annotations

import argparse

from polarjax.terminal import processes
from polarjax.terminal.choices import MEMORY_FRACTION, POLICIES
from polarjax.terminal.common import (
    add_any_model,
    add_checkpoint,
    add_mesh_arguments,
    fraction,
    refuse,
)

GENERATE = "Continue prompts, sparsely with an adapter."
GENERATE_EXAMPLE = (
    'polarjax generate checkpoints/smollm2-135m "Once upon a time" --adapter '
    "smollm2-135m --density 2/3"
)
DEMO = "Dense and sparse continuations side by side, and what sparsity saved."
DEMO_EXAMPLE = (
    "polarjax demo checkpoints/smollm2-135m --adapter smollm2-135m-1pct smollm2-135m"
)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `generate`."""
    add = parser.add_argument
    add_checkpoint(add)
    add("prompts", nargs="+", metavar="PROMPT", help="text to continue")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    add_any_model(add)
    add("--density", type=fraction, help="fraction of KV groups to read, in (0, 1]")
    add(
        "--policy",
        choices=POLICIES,
        help="which heads to read (default: polar with an adapter, else dense)",
    )
    add("--max-new-tokens", type=int, default=64, help="most tokens to add")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is all")
    add("--top-p", type=float, default=1.0, help="probability mass to draw from")
    add("--seed", type=int, default=0, help="prompt i, from 0, gets this + i")
    add("--stop", action="append", default=[], help="end a text here; repeatable")
    add("--chat", action="store_true", help="prompts are questions to a chat model")
    add(
        "--memory-fraction",
        type=fraction,
        default=MEMORY_FRACTION,
        help="to fill of what XLA may take of the device",
    )
    add_mesh_arguments(add, "prompts")
    add(
        "--balanced",
        action="store_true",
        help="each of --tp devices reads the best of its own KV groups, as many as "
        "the others: even work, but another model than the best of all",
    )
    add("--json", action="store_true", help="print the result as JSON")
    processes.add_arguments(parser)


def check_generate(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if args.policy == "dense":
        refuse(args, "density", "with --policy dense, which reads all")
    if args.policy == "adaptive":
        refuse(args, "density", "with --policy adaptive, which goes by thresholds")
    if args.temperature == 0:
        refuse(args, "top-k top-p seed", "at --temperature 0, which draws nothing")
    if args.balanced and (args.policy not in (None, "polar") or args.tp is None):
        raise ValueError("--balanced is of the policy polar, and goes with --tp")


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `demo`."""
    add = parser.add_argument
    add_checkpoint(add)
    add(
        "--adapter",
        nargs="+",
        required=True,
        help="folders of routers, names of those that ship, or ids of the hub",
    )
    add_any_model(add)
    add("--max-new-tokens", type=int, default=32, help="tokens per prompt")
