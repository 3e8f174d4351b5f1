"""`polarjax calibrate` and `recover`: adapters from text."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from polarjax import distributed
from polarjax.calibration import Calibration, Terms, Texts, calibrate
from polarjax.console import (
    add_mesh_arguments,
    choose_mesh,
    counting_bar,
    fraction,
)
from polarjax.evaluation import Mode, Perplexity, Recall
from polarjax.evaluation.record import environment, now
from polarjax.folder import check_destination
from polarjax.hub import load
from polarjax.params import Params
from polarjax.recovery import Recovered, recover_on_text
from polarjax.sparsity.select import with_density
from polarjax.training import Recovery, RouterTraining, Source
from polarjax.training.losses import HeadLoss
from polarjax.training.outcome import try_places
from polarjax.training.recover import Routers, check_model, trained_shapes
from polarjax.training.train import router_shapes


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Give the console script these commands.

    Args:
      command: makes one, from its name, function, text and example.
    """
    parser = command(
        "calibrate",
        _calibrate,
        "Train routers on text, measure them on text they have not seen, and save them "
        "as an adapter. With --max-drop, find the sparsest budgets that keep the loss "
        "of quality within it, and promise no more than held-out text shows.",
        "polarjax calibrate checkpoints/smollm2-135m --text books.txt manuals.txt=0.5 "
        "self=0.5 --max-drop 1% --out adapters/mine",
    )
    distributed.add_arguments(parser)
    add = parser.add_argument
    _add_texts(add, tokens=400_000)
    add("--density", type=fraction, default=2 / 3, help="fraction of KV groups to keep")
    add(
        "--loss",
        choices=get_args(HeadLoss),
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

    parser = command(
        "recover",
        _recover,
        "Distil the dense model into its sparse self: small updates of its weights, "
        "for the sparse policy alone, and routers trained along.",
        "polarjax recover checkpoints/smollm2-135m --adapter adapters/mine --text "
        "books.txt self --tokens 10000000 --rank 8 --out adapters/recovered",
    )
    distributed.add_arguments(parser)
    add = parser.add_argument
    add("--adapter", required=True, help="folder of routers, name of one, or id")
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
        choices=get_args(Routers),
        default="bce",
        help="what they learn meanwhile: which heads are largest, by either loss of "
        "`calibrate`, the slopes of the divergence, or nothing",
    )
    add("--router-learning-rate", type=float, default=1e-3, help="peak, of the routers")
    add("--remat", action="store_true", help="use less memory, and a third more time")
    add("--patience", type=int, default=4, help="looks without progress before the end")
    _add_run(add)


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
        choices=get_args(Mode),
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


def percentage(text: str) -> float:
    """1% or 0.01."""
    if text.endswith("%"):
        return fraction(text[:-1]) / 100
    return fraction(text)


def rank(text: str) -> int | None:
    """A number, or None for full."""
    return None if text == "full" else int(text)


def _texts(args: argparse.Namespace) -> Texts:
    return Texts(
        [Source.parse(text) for text in args.text],
        tokens=args.tokens,
        context=args.context,
        held_out=args.held_out,
        seed=args.seed,
    )


def _common(args: argparse.Namespace) -> dict[str, Any]:
    work = Path(args.work) if args.work else None
    return {"mode": args.mode, "work": work}


class _Bar:
    """One line for each kind of work; off a terminal, now and then a line of text."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}
        self.shown: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        kind = what.split(":")[0]
        if kind not in self.tasks:
            self.tasks[kind] = self.bar.add_task(what)
        self.bar.update(self.tasks[kind], description=what, completed=done, total=total)
        tenth = 10 * done // max(1, total)
        if not self.bar.console.is_terminal and tenth > self.shown.get(kind, 0):
            self.shown[kind] = tenth
            self.bar.console.print(f"{what} ({done} of {total})")


def _made() -> dict[str, Any]:
    command = shlex.join(["polarjax", *sys.argv[1:]])
    return {"command": command, "finished": now(), **environment()}


def _try_places(args: argparse.Namespace, mesh: Mesh | None, shapes: Any) -> None:
    work = Path(args.work) if args.work else None
    try_places(args.out, work, shapes, overwrite=args.overwrite, mesh=mesh)


def _save(args: argparse.Namespace, found: Calibration | Recovered) -> None:
    try:
        found.save(args.out, {"made": _made()}, overwrite=args.overwrite)
    except OSError as error:
        kept = "nothing of the training is kept: --work FOLDER would have kept it"
        if args.work:
            kept = (
                f"the training is kept in {args.work}: the same command, with another "
                "--out if need be, goes on from there"
            )
        raise OSError(f"{error}; {kept}") from error


def _calibrate(args: argparse.Namespace) -> None:
    distributed.start_from(args)
    check_destination(args.out, args.overwrite)  # before the work, not after
    mesh = choose_mesh(args, args.batch)
    params, console = load(args.checkpoint, mesh=mesh), Console()
    training = RouterTraining(
        args.density,
        batch=args.batch,
        loss=args.loss,
        sparse=args.sparse,
        head_rank=args.head_rank,
        neuron_rank=args.neuron_rank,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    _try_places(args, mesh, router_shapes(params.config, training))
    terms = None
    if args.max_drop is not None:
        terms = Terms(
            args.max_drop,
            args.confidence,
            args.mode,
            args.decode_batch,
            args.decode_context,
            not args.fixed,
        )
    with counting_bar(console) as bar:
        found = calibrate(
            *(params, _texts(args), training),
            passes=args.passes,
            terms=terms,
            target_recall=args.target_recall,
            progress=_Bar(bar),
            **_common(args),
        )
    _save(args, found)
    _show(console, found.params, found.recall, found.perplexity, args.mode)
    for batch, facts in found.facts.get("neurons", {}).items():
        console.print(
            f"batch {batch}: {facts['density']:.3f} of the neurons are read, the union "
            f"of the active is {facts['union']:.3f}, recall {min(facts['recall']):.3f} "
            "or more"
        )
    if found.contract:
        console.print(str(found.contract))
    console.print(f"adapter written to {args.out}")
    _warn(found)


def _recover(args: argparse.Namespace) -> None:
    distributed.start_from(args)
    check_destination(args.out, args.overwrite)
    mesh = choose_mesh(args, args.batch)
    params = load(args.checkpoint, adapter=args.adapter, mesh=mesh)
    console = Console()
    if args.density is not None:
        params = with_density(params, args.density)
    recovery = Recovery(
        batch=args.batch,
        rank=args.rank,
        prompts=args.prompts,
        learning_rate=args.learning_rate,
        routers=args.routers,
        router_learning_rate=args.router_learning_rate,
        remat=args.remat,
        seed=args.seed,
    )
    check_model(params, recovery)
    _try_places(args, mesh, trained_shapes(params, recovery))
    with counting_bar(console) as bar:
        found = recover_on_text(
            *(params, _texts(args), recovery),
            passes=args.passes,
            patience=args.patience,
            progress=_Bar(bar),
            **_common(args),
        )
    _save(args, found)
    _show(console, found.params, found.recall, found.perplexity, args.mode)
    table = Table("text", "without", "with", title="KL from dense, nats a token")
    for name, before in found.before.items():
        table.add_row(name, f"{before:.4f}", f"{found.after[name]:.4f}")
    console.print(table)
    new = found.facts["parameters"]
    console.print(f"{new:,} new parameters; adapter written to {args.out}")
    _warn(found)


def _warn(found: Calibration | Recovered) -> None:
    if found.warning:
        print(f"warning: {found.warning}", file=sys.stderr)


def _show(
    console: Console,
    params: Params,
    recall: Mapping[str, Recall],
    quality: Mapping[str, Mapping[str, Perplexity]],
    mode: str,
) -> None:
    table = Table(
        *("text", "recall", "of chance", "norm kept"),
        title="Of the heads that count most, over sparse layers",
    )
    for name, found in recall.items():
        means = found.card()["mean"]
        table.add_row(name, *(f"{means[x]:.3f}" for x in ("routers", "chance", "kept")))
    console.print(table)
    table = Table(
        *("text", "policy", "density", "perplexity", "/ dense (95 % interval)"),
        title=f"Perplexity of held-out text, mode {mode}",
    )
    for name, found in quality.items():
        for label, p in found.items():
            ratio, low, high = p.ratio(found["Dense"])
            dense = label == "Dense"
            shown = "1" if dense else f"{ratio:.4f} ({low:.4f} to {high:.4f})"
            numbers = f"{p.density:.3f}", f"{p.value:.3f}"
            table.add_row(name if dense else "", label, *numbers, shown)
        table.add_section()
    console.print(table)
