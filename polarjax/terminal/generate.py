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

SLOTS = 64

GENERATE = (
    "Continue prompts, sparsely with an adapter. With --input and --output those of a "
    "file, any number of them: stopped work goes on where it stopped when the same "
    "command is given again, and a prompt that fails fails alone."
)
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
    add("prompts", nargs="*", metavar="PROMPT", help="text to continue")
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
    _add_files(parser)
    processes.add_arguments(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """The options of work on a file of prompts."""
    add = parser.add_argument_group(
        "a file of prompts",
        'Each line of --input is a JSON object: "prompt" (a text, or token ids) or '
        '"messages" (of a conversation), an "id" if you like, and what differs from '
        "the options: max_new_tokens, density, temperature, top_k, top_p, seed, stop, "
        "stop_ids, min_p, repetition_penalty, presence_penalty, frequency_penalty, "
        "logit_bias, allowed_token_ids, min_tokens, ignore_eos, n, logprobs, "
        "prompt_logprobs, echo. Each line of --output has the id (else the index), "
        "text, tokens, finish_reason and prompt_tokens (with n: choices, a list of n "
        "answers), and the logprobs that were asked for; or the id and an error.",
    ).add_argument
    add("--input", metavar="FILE", help="prompts, as JSON lines")
    add(
        "--output",
        metavar="FILE",
        help="results, as JSON lines, in the same order; in a folder that is there",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an --output that is there, and work on it that was stopped",
    )
    add("--logprobs", action="store_true", help="write that of each token too")
    add(
        "--slots",
        type=int,
        default=SLOTS,
        metavar="N",
        help="prompts that are continued at once",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its answer: a longer prompt fails, a longer "
        "answer ends there (default: as many as the file needs)",
    )


_OF_FILES = "output overwrite logprobs slots context"


def check_generate(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing.

    Raises:
      ValueError: naming it.
    """
    if args.policy == "dense":
        refuse(args, "density", "with --policy dense, which reads all")
    if args.policy == "adaptive":
        refuse(args, "density", "with --policy adaptive, which goes by thresholds")
    if args.input is None:
        refuse(args, _OF_FILES, "without --input")
        if not args.prompts:
            raise ValueError("there is no prompt: pass one or more, or an --input")
        if args.temperature == 0:
            refuse(args, "top-k top-p seed", "at --temperature 0, which draws nothing")
    else:
        refuse(args, "json", "with --input, whose results are JSON anyway")
        if args.prompts:
            raise ValueError("pass prompts or an --input, not both")
        if args.output is None:
            raise ValueError("--input needs an --output, where the results go")
        if args.coordinator is not None:
            raise ValueError(
                "--input is work of one process: leave --coordinator out, and give "
                "each process a file of its own"
            )
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
