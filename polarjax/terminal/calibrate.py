"""The arguments of `polarjax calibrate` and `recover`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from polarjax.terminal import processes
from polarjax.terminal.choices import HEAD_LOSSES, MODES, ROUTERS
from polarjax.terminal.common import (
    add_any_model,
    add_checkpoint,
    add_mesh_arguments,
    fraction,
    percentage,
    refuse,
)

CALIBRATE = (
    "Train routers on text, measure them on text they have not seen, and save them as "
    "an adapter. With --max-drop, find the sparsest budgets that keep the loss of "
    "quality within it, and promise no more than held-out text shows."
)
CALIBRATE_EXAMPLE = (
    "polarjax calibrate checkpoints/smollm2-135m --text books.txt manuals.txt=0.5 "
    "self=0.5 --max-drop 1% --out adapters/mine"
)
RECOVER = (
    "Distil the dense model into its sparse self: small updates of its weights, for "
    "the sparse policy alone, and routers trained along."
)
RECOVER_EXAMPLE = (
    "polarjax recover checkpoints/smollm2-135m --adapter adapters/mine --text "
    "books.txt self --tokens 10000000 --rank 8 --out adapters/recovered"
)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `calibrate`."""
    add = parser.add_argument
    add_checkpoint(add)
    _add_texts(add, tokens=400_000)
    add("--density", type=fraction, default=2 / 3, help="fraction of KV groups to keep")
    add(
        "--loss",
        choices=HEAD_LOSSES,
        default="bce",
        help="of head routers: the paper's, or one that weighs a wrong order by the "
        "norm it loses, which serves fixed budgets best (--fixed)",
    )
    add(
        "--sparse",
        type=fraction,
        default=0.5,
        help="share of the sequences that are read as decoding reads them, after a "
        "dense prompt of random length with the heads picked so far",
    )
    add(
        "--head-rank",
        type=int,
        default=64,
        help="of a quadratic form in head routers: they find more of the heads, and "
        "their rows take a few bytes; 0 for linear ones, as the paper has them",
    )
    add(
        "--neuron-rank",
        type=int,
        default=0,
        help="of neuron routers, for ReLU models; their budgets are found for batches "
        "of 1, 8 and 64",
    )
    add("--batch", type=int, default=1, help="blocks per optimiser step")
    add("--learning-rate", type=float, default=2e-2, help="peak of AdamW's")
    add("--target-recall", type=fraction, help="stop when held-out recall reaches it")
    add(
        "--max-drop",
        type=percentage,
        help="largest loss of quality to promise, as a relative increase of perplexity "
        "on every text (1%% or 0.01); budgets are then searched layer by layer",
    )
    add("--confidence", type=percentage, default=0.95, help="of the promise")
    add(
        "--fixed",
        action="store_true",
        help="search budgets that are the same for every token, not means over tokens: "
        "simpler, and less sparse for the same promise",
    )
    add("--decode-batch", type=int, default=16, help="batch size of the promise")
    add(
        "--decode-context",
        type=int,
        default=2048,
        help="tokens in the cache for which the bytes saved are counted",
    )
    _add_run(add)
    processes.add_arguments(parser)


def check_calibrate(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if args.max_drop is None:
        promised = "confidence fixed decode-batch decode-context"
        refuse(args, promised, "without --max-drop: it is of the promise")


def add_recover(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `recover`."""
    add = parser.add_argument
    add_checkpoint(add)
    add("--adapter", required=True, help="folder of routers, name of one, or id")
    add_any_model(add)
    _add_texts(add, tokens=10_000_000)
    add("--density", type=fraction, help="instead of the adapter's budgets")
    add("--rank", type=rank, default=8, help="of the updates, or 'full'")
    add(
        "--prompts",
        type=fraction,
        default=0.5,
        help="share of the sequences that begin with a dense prompt",
    )
    add("--batch", type=int, default=16, help="blocks per optimiser step")
    add("--learning-rate", type=float, default=1e-3, help="peak, of the updates")
    add(
        "--routers",
        choices=ROUTERS,
        default="bce",
        help="what they learn meanwhile: which heads are largest, by either loss of "
        "`calibrate`, the slopes of the divergence, or nothing",
    )
    add("--router-learning-rate", type=float, default=1e-3, help="peak, of the routers")
    add("--remat", action="store_true", help="use less memory, and a third more time")
    add("--patience", type=int, default=4, help="looks without progress before the end")
    _add_run(add)
    processes.add_arguments(parser)


def check_recover(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if args.routers == "nothing":
        why = "with --routers nothing: they learn nothing"
        refuse(args, "router-learning-rate", why)


def _add_texts(add: Callable[..., Any], tokens: int) -> None:
    add(
        "--text",
        nargs="+",
        required=True,
        help="UTF-8 files (.gz too), JSON lines with a field text, folders that "
        "`datasets` saved, or self for what the model writes; PATH=WEIGHT for a share",
    )
    add("--tokens", type=int, default=tokens, help="tokens to learn from")
    add("--passes", type=float, default=1.0, help="over them")
    add(
        "--context",
        type=int,
        help="tokens per block; default 512, or the model's context",
    )
    add(
        "--held-out",
        type=int,
        default=16_384,
        help="tokens of each text to measure on, behind those learned from",
    )
    add("--seed", type=int, default=0, help="of all draws")


def _add_run(add: Callable[..., Any]) -> None:
    add(
        "--mode",
        choices=MODES,
        default="decode",
        help="how perplexities are measured: see `polarjax eval`",
    )
    add_mesh_arguments(add, "batch, which they must divide")
    add(
        "--work",
        help="folder that keeps the training while it runs: the same command goes on "
        "from there",
    )
    add("--out", required=True, help="folder of the adapter to make")
    add("--overwrite", action="store_true", help="replace an adapter that is there")


def rank(text: str) -> int | None:
    """A number, or None for full."""
    return None if text == "full" else int(text)
