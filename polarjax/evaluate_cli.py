"""`polarjax eval`, `lm-eval` and `report`: quality in tables, files and on a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pallas_kernels import Implementation
from polarjax import distributed
from polarjax.console import (
    add_mesh_arguments,
    choose_mesh,
    fraction,
    make_policies,
    share_bar,
)
from polarjax.demo import plain
from polarjax.evaluation import Mode, Settings, evaluate, lm_eval
from polarjax.evaluation.record import about
from polarjax.evaluation.report import make_report
from polarjax.evaluation.results import DENSE
from polarjax.evaluation.run import Kind
from polarjax.hub import find_adapter, load
from polarjax.policy import SelectionPolicy
from polarjax.writing import try_file, write_file


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Give the console script these commands.

    Args:
      command: makes one, from its name, function, text and example.
    """
    parser = command(
        "eval",
        _eval,
        "Quality of policies on tasks, on a text and in what the model writes, each "
        "paired with dense and with a 95 % interval. Stopped work goes on where it "
        "stopped when the same command is given again.",
        "polarjax eval checkpoints/smollm2-135m --adapter smollm2-135m --tasks "
        "arc_easy.jsonl --text book.txt --generation 64 --policies polar,oracle,random",
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=[], help="JSONL files of rows to get right")
    add("--limit", type=int, help="most rows of each task; default all")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    _add_policies(add)
    _add_scoring(add)
    add("--text", help="UTF-8 text file, .gz too: perplexity, recall, generation")
    add("--tokens", type=int, help="most, from the start of the text; default all")
    add(
        "--perplexity",
        nargs="+",
        choices=get_args(Kind),
        default=["windows"],
        help="windows: that do not overlap; strided; words: as lm-eval has it, per "
        "word and byte, nothing read dense",
    )
    add("--window", type=int, help="tokens; default 2048, or the model's context")
    add(
        "--prefix",
        type=int,
        help="tokens of each window that are not scored; default 64 in mode decode, "
        "which reads them dense, else 1",
    )
    add("--stride", type=int, help="of strided windows; default half a window")
    add(
        "--generation",
        type=int,
        default=0,
        metavar="TOKENS",
        help="continue prompts from the text greedily by so many tokens, and compare "
        "with the dense continuations",
    )
    add("--prompts", type=int, default=64, help="at most, for --generation")
    add("--prompt-tokens", type=int, default=64, help="of each prompt")
    add(
        "--out",
        default="results",
        help="JSON file to write, or a folder in which it is named after its contents",
    )
    add("--overwrite", action="store_true", help="measure again what is there")
    distributed.add_arguments(parser)

    add = command(
        "lm-eval",
        _lm_eval,
        "Tasks of EleutherAI's lm-eval (pip install 'polarjax[eval]'), each paired "
        "with dense. Without a network set HF_HUB_OFFLINE=1: tasks whose data is on "
        "disk run. Unlike eval it starts anew when it was stopped.",
        "polarjax lm-eval checkpoints/smollm2-135m --adapter smollm2-135m --tasks "
        "arc_easy,mmlu_* --limit 100 --out lm-eval.json",
    ).add_argument
    add("--tasks", required=True, help="names, groups, tags or patterns, with commas")
    add("--include-path", help="folder with YAML files of more tasks")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    _add_policies(add)
    _add_scoring(add)
    add("--num-fewshot", type=int, help="examples before each question")
    add("--limit", type=float, help="rows of each task, or below 1 a fraction of them")
    add("--chat", action="store_true", help="put questions as the chat template has it")
    add("--out", help="JSON file to write")
    add("--overwrite", action="store_true", help="replace the file that is there")

    add = command(
        "report",
        _report,
        "One page, Markdown and HTML with plots, of results that eval wrote.",
        "polarjax report results/*.json --out report",
        checkpoint=False,
    ).add_argument
    add("results", nargs="+", help="JSON files of polarjax eval")
    add("--out", default="report", help="folder to write")


def _add_policies(add: Callable[..., Any]) -> None:
    add(
        "--policies",
        default="dense,polar",
        help="of dense, polar, adaptive, oracle, random; dense is always there",
    )
    add("--densities", default="", help="such as 1/3,2/3; empty: the adapter's budgets")
    add(
        "--neuron-density",
        type=fraction,
        help="fraction of the MLP neurons that polar reads, for ReLU models whose "
        "adapter has neuron routers; default its own budgets, or all",
    )
    add(
        "--balanced",
        type=int,
        metavar="N",
        help="beside polar, also the model that N devices run with even work: each of "
        "N equal parts of the KV groups and neurons reads its own best; a multiple of "
        "--tp, on as few devices as you have",
    )


def _add_scoring(add: Callable[..., Any]) -> None:
    add(
        "--mode",
        choices=get_args(Mode),
        default="decode",
        help="decode: contexts are read dense, what is scored is decoded token by "
        "token, as generate does; kernel: all tokens are decoded; mask: a masked dense "
        "model",
    )
    add("--batch", type=int, default=16, help="rows computed together")
    add_mesh_arguments(add, "rows of a batch")
    add(
        "--implementation",
        choices=[i for i in get_args(Implementation) if "interpret" not in i],
        help="of the kernels; default: by device",
    )


def _lm_eval(args: argparse.Namespace) -> None:
    out = Path(args.out) if args.out else None
    if out and out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or --overwrite it")
    if out:
        try_file(out)  # before the work, not after
    policies = _policies(args)
    params = load(args.checkpoint, adapter=args.adapter, mesh=choose_mesh(args))
    console = Console()
    with share_bar(console) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        result = lm_eval.run_lm_eval(
            params,
            {label: policy for label, policy in policies.items() if label != DENSE},
            args.tasks.split(","),
            mode=args.mode,
            batch=args.batch,
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.chat,
            implementation=args.implementation,
            progress=progress,
        )
    console.print(lm_eval.table(result))
    console.print(f"lm-eval {result['lm_eval']}, mode {result['mode']}")
    if out:
        adapter = find_adapter(args.adapter) if args.adapter else None
        record = about(params, adapter, _command()) | result
        write_file(out, json.dumps(record, indent=1) + "\n")
        console.print(f"written to {out}", soft_wrap=True)


def _eval(args: argparse.Namespace) -> None:
    distributed.start_from(args)
    policies = _policies(args)
    adapter = find_adapter(args.adapter) if args.adapter else None
    params = load(args.checkpoint, adapter=adapter, mesh=choose_mesh(args))
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
    console = Console()
    try:
        with share_bar(console) as bar:
            result, path = evaluate(
                *(params, settings),
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
    console.print(f"written to {path}; draw it: polarjax report {path}", soft_wrap=True)


def _policies(args: argparse.Namespace) -> dict[str, SelectionPolicy]:
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
    table = Table(title=plain(f"{title}, {len(task['ids'])} rows"))
    for column in ("policy", "density", "accuracy", "- dense", "McNemar p", name):
        table.add_column(column)
    table.add_column("/ dense" if target else "- dense")
    table.add_column("tokens/s", justify="right")
    for label, r in task["results"].items():
        against = r["against_dense"] or {}
        change = against.get(f"{second}_ratio" if target else second)
        table.add_row(
            *(label, _density(r), interval(r["accuracy"])),
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
            *(label, _density(r), interval(r["perplexity"])),
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
            *(label, f"{r['density']:.3f}", interval(r["identical"])),
            interval(r["tokens_until_divergence"], ".1f"),
            *(interval(r["kl"], ".4f"), interval(r["agreement"])),
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


def _report(args: argparse.Namespace) -> None:
    print(f"written to {make_report(args.results, args.out)}")
