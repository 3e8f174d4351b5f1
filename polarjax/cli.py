"""The console script `polarjax`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks import arguments, decode
from polarjax import calibrate_cli, demo, distributed, evaluate_cli, plan_cli
from polarjax.compile_cache import use_compile_cache
from polarjax.console import (
    POLICIES,
    add_any_model,
    add_mesh_arguments,
    choose_mesh,
    fraction,
    make_policy,
)
from polarjax.demo import plain
from polarjax.generation import Tokenizer, generate
from polarjax.generation.memory import MEMORY_FRACTION
from polarjax.hub import load
from polarjax.sparsity import Polar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Args:
      argv: arguments, None for those of the process.

    Returns:
      Exit code: 0, or 1 after an error that was printed as one line.
    """
    args = _parser().parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    if not args.no_compile_cache:
        use_compile_cache()
    try:
        with distributed.together():
            args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polarjax",
        description="Batched decoding made cheaper by contextual sparsity. Make a "
        "checkpoint first: `python -m convert SRC DST`. Where a name is no path here, "
        "it is an id of the Hugging Face hub: org/name, org/name@revision or "
        "org/name/file.gguf (pip install huggingface_hub); such a model is converted "
        "on its first use.",
    )
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="do not keep compiled programs in ~/.cache/polarjax/xla (XDG_CACHE_HOME; "
        "JAX_COMPILATION_CACHE_DIR for another place, POLARJAX_NO_COMPILE_CACHE=1 for "
        "never)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text, epilog, checkpoint=True):
        new = commands.add_parser(
            name,
            help=text.replace("%", "%%"),  # argparse formats it
            description=text,
            epilog="example: " + epilog,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        new.set_defaults(run=run)
        if checkpoint:
            new.add_argument(
                "checkpoint", help="folder that convert wrote, or id of the hub"
            )
        return new

    new = command(
        *("generate", _generate, "Continue prompts, sparsely with an adapter."),
        'polarjax generate checkpoints/smollm2-135m "Once upon a time" --adapter '
        "smollm2-135m --density 2/3",
    )
    add = new.add_argument
    add("prompts", nargs="+", help="texts to continue")
    add("--adapter", help="folder of routers, name of one that ships, or id")
    add_any_model(add)
    add("--density", type=fraction, help="fraction of KV groups to read, in (0, 1]")
    add("--policy", choices=["dense", *POLICIES], help="instead of the default")
    add("--max-new-tokens", type=int, default=64, help="most tokens to add")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is all")
    add("--top-p", type=float, default=1.0, help="probability mass to draw from")
    add("--seed", type=int, default=0, help="request i gets this + i")
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
    distributed.add_arguments(new)

    calibrate_cli.add_commands(command)
    evaluate_cli.add_commands(command)
    plan_cli.add_commands(command)

    add = command(
        "demo",
        _demo,
        "Dense and sparse continuations side by side, and what sparsity saved.",
        "polarjax demo checkpoints/smollm2-135m --adapter smollm2-135m-1pct "
        "smollm2-135m",
    ).add_argument
    add(
        "--adapter",
        nargs="+",
        required=True,
        help="folders of routers, names of those that ship, or ids of the hub",
    )
    add_any_model(add)
    add("--max-new-tokens", type=int, default=32, help="tokens per prompt")

    arguments.add_arguments(
        command(
            *("bench", _bench, arguments.DESCRIPTION, arguments.EXAMPLE),
            checkpoint=False,
        ).add_argument
    )
    return parser


def _generate(args: argparse.Namespace) -> None:
    distributed.start_from(args)
    if args.balanced and (args.policy not in (None, "polar") or not args.tp):
        raise ValueError("--balanced is of the policy polar, and goes with --tp")
    params = load(
        args.checkpoint,
        adapter=args.adapter,
        mesh=choose_mesh(args),
        any_model=args.any_model,
    )
    prompts: list = args.prompts
    if args.chat:
        tokenizer = Tokenizer.require(params.config, "--chat")
        texts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompts]
        # The template writes the special tokens itself.
        prompts = [tokenizer.encode(text, special=False) for text in texts]
    policy, density = None, args.density
    if args.policy:
        policy, density = make_policy(args.policy, density), None
    if args.balanced:
        policy, density = Polar(args.density, balanced=args.tp), None
    out = generate(
        params,
        prompts,
        max_new_tokens=args.max_new_tokens,
        density=density,
        policy=policy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        memory_fraction=args.memory_fraction,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(out), indent=2))
        return
    console = Console()
    for prompt, text in zip(args.prompts, out.texts or out.tokens, strict=True):
        console.rule(align="left")
        console.print(f"[bold]{plain(prompt)}[/bold]{plain(str(text))}")
    console.rule(align="left")
    console.print(plain(str(out.stats)), style="dim")


def _demo(args: argparse.Namespace) -> None:
    demo.show(args.checkpoint, args.adapter, args.max_new_tokens, args.any_model)


def _bench(args: argparse.Namespace) -> None:
    args.command = ["polarjax", *args.given]
    decode.run(args)


if __name__ == "__main__":
    sys.exit(main())
