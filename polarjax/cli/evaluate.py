"""`polarjax eval`, `lm-eval` and `report`: quality in tables, files and on a page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from rich.table import Table

from polarjax.cli.common import choose_mesh, make_policies
from polarjax.evaluation import Settings, evaluate
from polarjax.evaluation.lm_eval import tasks as harness
from polarjax.evaluation.record import about
from polarjax.evaluation.report.page import make_report
from polarjax.evaluation.results import DENSE
from polarjax.loading import find_adapter, load
from polarjax.mesh import processes
from polarjax.policy import Policy
from polarjax.storage.writing import try_file, write_file
from polarjax.terminal.output import make_console, share_bar


def run_lm_eval(args: argparse.Namespace) -> None:
    """Run `polarjax lm-eval`, of the arguments that its parser describes."""
    out = Path(args.out) if args.out else None
    if out and out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or --overwrite it")
    if out:
        try_file(out)  # before the work, not after
    policies = _policies(args)
    mesh, other = choose_mesh(args), args.any_model
    params = load(args.checkpoint, adapter=args.adapter, mesh=mesh, any_model=other)
    console = make_console()
    with share_bar(make_console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        result = harness.run_lm_eval(
            params,
            {label: policy for label, policy in policies.items() if label != DENSE},
            args.tasks.split(","),
            harness.Asked(args.num_fewshot, args.limit, args.chat),
            mode=args.mode,
            batch=args.batch,
            include_path=args.include_path,
            implementation=args.implementation,
            progress=progress,
        )
    console.print(harness.table(result))
    console.print(f"lm-eval {result['lm_eval']}, mode {result['mode']}")
    if out:
        adapter = find_adapter(args.adapter) if args.adapter else None
        record = about(params, adapter, _command()) | result
        write_file(out, json.dumps(record, indent=1) + "\n")
        console.print(f"written to {out}")


def run_eval(args: argparse.Namespace) -> None:
    """Run `polarjax eval`, of the arguments that its parser describes."""
    processes.start_from(args)
    policies = _policies(args)
    adapter = find_adapter(args.adapter) if args.adapter else None
    mesh, other = choose_mesh(args), args.any_model
    params = load(args.checkpoint, adapter=adapter, mesh=mesh, any_model=other)
    settings = Settings(
        policies=policies,
        mode=args.mode,
        batch=args.batch,
        tasks=args.tasks,
        limit=args.limit,
        text=args.text,
        tokens=args.tokens,
        kinds=args.perplexity,
        window=args.window,
        prefix=args.prefix,
        stride=args.stride,
        new_tokens=args.generation,
        prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        implementation=args.implementation,
    )
    console = make_console()
    try:
        with share_bar(make_console(stderr=True)) as bar:
            result, path = evaluate(
                params,
                settings,
                out=args.out,
                overwrite=args.overwrite,
                adapter=adapter,
                command=_command(),
                progress=_Bars(bar),
            )
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from here")
        raise
    for table in tables(result):
        console.print(table)
    console.print(f"written to {path}; draw it: polarjax report {path}")


def _policies(args: argparse.Namespace) -> dict[str, Policy]:
    chosen = args.policies, args.densities, args.neuron_density, args.balanced
    return make_policies(*chosen)


def _command() -> list[str]:
    """As it was given, but for where files lie on this machine."""
    return [Path(x).name if Path(x).is_absolute() else x for x in sys.argv[1:]]


class _Bars:
    """A bar for compiling, one for measuring, one for generating."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.tasks = bar, {}

    def __call__(self, what: str, done: int, total: int) -> None:
        kind = what if what in ("compiling", "generating") else "scoring"
        if kind not in self.tasks:
            self.tasks[kind] = self.bar.add_task(what, total=total)
        text = what if what == kind else f"scoring {what}"
        self.bar.update(self.tasks[kind], completed=done, total=total, description=text)


def tables(result: dict[str, Any]) -> list[Table]:
    """What a result says, for a terminal.

    Args:
      result: of `evaluate`.
    """
    mode = result["setup"]["mode"]
    made = [_task(f"{k}, mode {mode}", v) for k, v in result["tasks"].items()]
    made += [
        _perplexity(f"perplexity ({kind}) of {v['file']}, mode {mode}", v)
        for kind, v in result["perplexity"].items()
    ]
    if result["generation"]:
        made.append(_generation(result["generation"]))
    if result["recall"]:
        made.append(_recall(result["recall"]))
    return made


def _task(title: str, task: dict[str, Any]) -> Table:
    target = task["kind"] == "target"
    second = "target_perplexity" if target else "accuracy_per_byte"
    name = "perplexity of the target" if target else "per byte"
    table = Table(title=f"{title}, {len(task['ids'])} rows")
    for column in ("policy", "density", "accuracy", "- dense", "McNemar p", name):
        table.add_column(column)
    table.add_column("/ dense" if target else "- dense")
    table.add_column("tokens/s", justify="right")
    for label, r in task["results"].items():
        against = r["against_dense"] or {}
        change = against.get(f"{second}_ratio" if target else second)
        table.add_row(
            label,
            _density(r),
            interval(r["accuracy"]),
            interval(against.get("accuracy"), "+.3f"),
            f"{against['mcnemar_p']:.3g}" if against else "",
            interval(r[second]),
            interval(change, ".3f" if target else "+.3f"),
            f"{r['tokens_per_second']:,.0f}",
        )
    return table


def _perplexity(title: str, found: dict[str, Any]) -> Table:
    text = f"{title}: {len(found['scored'])} windows of {found['window']}"
    text += f", the first {found['prefix']} not scored" if found["prefix"] else ""
    text += f", stride {found['stride']}" if found["stride"] else ""
    columns = ["policy", "density", "perplexity", "/ dense"]
    units = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    units = units if "words" in found else []
    table = Table(*columns, *(unit.replace("_", " ") for unit in units), title=text)
    table.add_column("tokens/s", justify="right")
    for label, r in found["results"].items():
        table.add_row(
            label,
            _density(r),
            interval(r["perplexity"]),
            interval((r["against_dense"] or {}).get("ratio"), ".4f"),
            *(interval(r[unit]) for unit in units),
            f"{r['tokens_per_second']:,.0f}",
        )
    return table


def _generation(found: dict[str, Any]) -> Table:
    title = f"{found['prompts']} prompts of {found['file']} continued by "
    table = Table(title=f"{title}{found['new_tokens']} tokens, beside dense")
    for column in (
        "policy",
        "density",
        "identical",
        f"tokens until they differ (of {found['new_tokens']})",
    ):
        table.add_column(column)
    table.add_column("KL per token, nats")
    table.add_column("same best token")
    for label, r in found["results"].items():
        table.add_row(
            label,
            f"{r['density']:.3f}",
            interval(r["identical"]),
            interval(r["tokens_until_divergence"], ".1f"),
            interval(r["kl"], ".4f"),
            interval(r["agreement"]),
        )
    return table


def _recall(found: dict[str, Any]) -> Table:
    table = Table("", "mean over layers", "worst layer", title="Recall of the routers")
    for name in ("routers", "chance"):
        values = found[name]
        mean = sum(values) / len(values)
        table.add_row(name, f"{mean:.3f}", f"{min(values):.3f}")
    return table


def _density(found: dict[str, Any]) -> str:
    neurons = found["neuron_density"]
    text = f"{found['density']:.3f}"
    return text if neurons == 1 else f"{text}, neurons {neurons:.3f}"


def interval(bounds: list[float | None] | None, form: str = ".3f") -> str:
    """A value with its bounds; empty where there is none."""
    if bounds is None:
        return ""
    value, low, high = ("?" if x is None else format(x, form) for x in bounds)
    return f"{value} ({low} to {high})"


def run_report(args: argparse.Namespace) -> None:
    """Run `polarjax report`, of the arguments that its parser describes."""
    print(f"written to {make_report(args.results, args.out)}")
