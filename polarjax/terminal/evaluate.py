"""The arguments of `polarjax eval`, `lm-eval` and `report`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from polarjax.terminal import processes
from polarjax.terminal.choices import IMPLEMENTATIONS, MODES, PERPLEXITIES, POLICIES
from polarjax.terminal.common import (
    add_any_model,
    add_checkpoint,
    add_mesh_arguments,
    fraction,
    refuse,
)

EVAL = (
    "Quality of policies on tasks, on a text and in what the model writes, each paired "
    "with dense and with a 95 % interval. Stopped work goes on where it stopped when "
    "the same command is given again."
)
EVAL_EXAMPLE = (
    "polarjax eval checkpoints/smollm2-135m --adapter smollm2-135m --tasks "
    "arc_easy.jsonl --text book.txt --generation 64 --policies polar,oracle,random"
)
LM_EVAL = (
    "Tasks of EleutherAI's lm-eval (pip install 'polarjax[eval]'), each paired with "
    "dense. Without a network set HF_HUB_OFFLINE=1: tasks whose data is on disk run. "
    "Unlike eval it starts anew when it was stopped."
)
LM_EVAL_EXAMPLE = (
    "polarjax lm-eval checkpoints/smollm2-135m --adapter smollm2-135m --tasks "
    "arc_easy,mmlu_* --limit 100 --out lm-eval.json"
)
REPORT = "One page, Markdown and HTML with plots, of results that eval wrote."
REPORT_EXAMPLE = "polarjax report results/*.json --out report"


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `eval`."""
    add = parser.add_argument
    add_checkpoint(add)
    add("--tasks", nargs="+", default=[], help="JSONL files of rows to get right")
    add("--limit", type=int, help="most rows of each task; default all")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    add_any_model(add)
    _add_policies(add)
    _add_scoring(add)
    add("--text", help="UTF-8 text file, .gz too: perplexity, recall, generation")
    add("--tokens", type=int, help="most, from the start of the text; default all")
    add(
        "--perplexity",
        nargs="+",
        choices=PERPLEXITIES,
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
    processes.add_arguments(parser)


def check_eval(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if args.text is None:
        read = "tokens perplexity window prefix stride"
        refuse(args, read, "without --text, of which it is")
    if not args.tasks:
        refuse(args, "limit", "without --tasks, of which it is")
    if "strided" not in args.perplexity:
        refuse(args, "stride", "without --perplexity strided")
    if set(args.perplexity) == {"words"}:
        refuse(args, "prefix", "with --perplexity words, which reads nothing dense")
    if not args.generation:
        refuse(args, "prompts prompt-tokens", "without --generation")


def add_lm_eval(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `lm-eval`."""
    add = parser.add_argument
    add_checkpoint(add)
    add("--tasks", required=True, help="names, groups, tags or patterns, with commas")
    add("--include-path", help="folder with YAML files of more tasks")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    add_any_model(add)
    _add_policies(add)
    _add_scoring(add)
    add("--num-fewshot", type=int, help="examples before each question")
    add("--limit", type=float, help="rows of each task, or below 1 a fraction of them")
    add("--chat", action="store_true", help="put questions as the chat template has it")
    add("--out", help="JSON file to write")
    add("--overwrite", action="store_true", help="replace the file that is there")


def check_lm_eval(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if not args.out:
        refuse(args, "overwrite", "without --out, the file that it replaces")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `report`."""
    add = parser.add_argument
    add("results", nargs="+", help="JSON files of polarjax eval")
    add("--out", default="report", help="folder to write")


def _add_policies(add: Callable[..., Any]) -> None:
    add(
        "--policies",
        default="dense,polar",
        help=f"of {', '.join(POLICIES)}; dense is always there",
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
        choices=MODES,
        default="decode",
        help="decode: contexts are read dense, what is scored is decoded token by "
        "token, as generate does; kernel: all tokens are decoded; mask: a masked dense "
        "model",
    )
    add("--batch", type=int, default=16, help="rows computed together")
    add_mesh_arguments(add, "rows of a batch")
    add(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="of the kernels; default: by device",
    )
