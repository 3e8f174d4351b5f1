"""`polarjax calibrate` and `recover`: adapters from text."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from polarjax.calibration.calibrate import Calibration, Terms, Texts, calibrate
from polarjax.calibration.recover import Recovered, recover
from polarjax.cli.common import choose_mesh
from polarjax.evaluation import Perplexity, Recall
from polarjax.evaluation.record import environment, now
from polarjax.loading import load
from polarjax.mesh import processes
from polarjax.params import Params
from polarjax.policies import with_density
from polarjax.storage.folder import CARD_FILE, check_destination
from polarjax.terminal.output import counting_bar, make_console
from polarjax.training import Recovery, RouterTraining, Source
from polarjax.training.outcome import try_places
from polarjax.training.recovery import check_model, trained_shapes
from polarjax.training.train import router_shapes


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


def run_calibrate(args: argparse.Namespace) -> None:
    """Run `polarjax calibrate`, of the arguments that its parser describes."""
    processes.start_from(args)
    # Before the work, not after.
    check_destination(args.out, args.overwrite, CARD_FILE)
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
    terms, texts = None, _texts(args)
    if args.max_drop is not None:
        terms = Terms(
            args.max_drop,
            args.confidence,
            args.mode,
            args.decode_batch,
            args.decode_context,
            not args.fixed,
        )
    mesh = choose_mesh(args, args.batch)
    params, console = load(args.checkpoint, mesh=mesh), make_console()
    _try_places(args, mesh, router_shapes(params.config, training))
    with counting_bar(console) as bar:
        found = calibrate(
            params,
            texts,
            training,
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


def run_recover(args: argparse.Namespace) -> None:
    """Run `polarjax recover`, of the arguments that its parser describes."""
    processes.start_from(args)
    check_destination(args.out, args.overwrite, CARD_FILE)
    texts = _texts(args)
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
    mesh = choose_mesh(args, args.batch)
    params = load(
        args.checkpoint, adapter=args.adapter, mesh=mesh, any_model=args.any_model
    )
    console = make_console()
    if args.density is not None:
        params = with_density(params, args.density)
    check_model(params, recovery)
    _try_places(args, mesh, trained_shapes(params, recovery))
    with counting_bar(console) as bar:
        found = recover(
            params,
            texts,
            recovery,
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
        "text",
        "recall",
        "of chance",
        "norm kept",
        title="Of the heads that count most, over sparse layers",
    )
    for name, found in recall.items():
        means = found.card()["mean"]
        table.add_row(name, *(f"{means[x]:.3f}" for x in ("routers", "chance", "kept")))
    console.print(table)
    table = Table(
        "text",
        "policy",
        "density",
        "perplexity",
        "/ dense (95 % interval)",
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
