"""The console script `polarjax`."""

from __future__ import annotations

import argparse
import dataclasses
import fractions
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import polarjax.calibration as calibration
from polarjax.evaluation import Perplexity, decode_perplexity
from polarjax.generation import Output, Tokenizer, generate
from polarjax.hub import find_adapter, load
from polarjax.params import Params
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sparsity import Oracle, Polar, Random, read_card, save_adapter
from polarjax.training import token_blocks

_POLICIES = {"polar": Polar, "oracle": Oracle, "random": Random}
_DEMO_PROMPTS = (
    "Once upon a time, in a village by the sea,",
    "The capital of France is",
    "Water boils at 100 degrees because",
    "Three things to pack for a long walk are",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Args:
      argv: arguments, None for those of the process.

    Returns:
      Exit code: 0, or 1 after an error that was printed as one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def fraction(text: str) -> float:
    """A number such as 0.5 or 2/3."""
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"{text!r} is no number such as 0.5 or 2/3"
        raise argparse.ArgumentTypeError(message) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polarjax",
        description="Batched decoding made cheaper by contextual sparsity. Make a "
        "checkpoint first: `python -m convert SRC DST`.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text, epilog):
        new = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="example: " + epilog,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        new.set_defaults(run=run)
        new.add_argument("checkpoint", help="folder that convert wrote")
        return new

    add = command(
        *("generate", _generate, "Continue prompts, sparsely with an adapter."),
        'polarjax generate checkpoints/smollm2-135m "Once upon a time" --adapter '
        "smollm2-135m --density 2/3",
    ).add_argument
    add("prompts", nargs="+", help="texts to continue")
    add("--adapter", help="folder of routers, or the name of one that ships")
    add("--density", type=fraction, help="fraction of KV groups to read, in (0, 1]")
    add("--policy", choices=["dense", *_POLICIES], help="instead of the default")
    add("--max-new-tokens", type=int, default=64, help="most tokens to add")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 is all")
    add("--top-p", type=float, default=1.0, help="probability mass to draw from")
    add("--seed", type=int, default=0, help="request i gets this + i")
    add("--stop", action="append", default=[], help="end a text here; repeatable")
    add("--chat", action="store_true", help="prompts are questions to a chat model")
    add("--json", action="store_true", help="print the result as JSON")

    add = command(
        "calibrate",
        _calibrate,
        "Train head routers on a text, measure them on what follows it, save them.",
        "polarjax calibrate checkpoints/smollm2-135m --text books.txt --tokens 400000 "
        "--out adapters/mine",
    ).add_argument
    add("--text", required=True, help="UTF-8 text file, .gz too")
    add("--out", required=True, help="folder of the adapter to make")
    add("--tokens", type=int, default=400_000, help="tokens to train on")
    add("--density", type=fraction, default=2 / 3, help="fraction of KV groups to keep")
    add("--context", type=int, default=512, help="tokens per sequence")
    add("--batch", type=int, default=1, help="sequences per optimiser step")
    add("--learning-rate", type=float, default=2e-2, help="peak of AdamW's")
    add("--held-out", type=int, default=4096, help="tokens to measure on")
    add("--overwrite", action="store_true", help="replace an adapter that is there")

    add = command(
        "eval",
        _eval,
        "Perplexity of policies, through the decode step that generate uses.",
        "polarjax eval checkpoints/smollm2-135m --adapter smollm2-135m --text book.txt "
        "--policies dense,polar,oracle,random",
    ).add_argument
    add("--text", required=True, help="UTF-8 text file, .gz too")
    add("--adapter", help="folder of routers, or the name of one that ships")
    add("--policies", default="dense,polar", help="of dense, polar, oracle, random")
    add("--densities", default="", help="such as 1/3,2/3; empty: the adapter's budgets")
    add("--tokens", type=int, default=4096, help="from the start of the text")
    add("--window", type=int, default=256, help="tokens per window")
    add("--prefix", type=int, default=64, help="tokens of each window read dense")
    add("--batch", type=int, default=16, help="windows decoded together")
    add("--out", help="write the results to this JSON file")

    add = command(
        "demo",
        _demo,
        "Dense and sparse continuations side by side, and what sparsity saved.",
        "polarjax demo checkpoints/smollm2-135m --adapter smollm2-135m",
    ).add_argument
    add("--adapter", required=True, help="folder of routers, or the name of one")
    add("--max-new-tokens", type=int, default=32, help="tokens per prompt")
    return parser


def _generate(args: argparse.Namespace) -> None:
    params = load(args.checkpoint, adapter=args.adapter)
    prompts: list = args.prompts
    if args.chat:
        tokenizer = Tokenizer.load(params.config)
        if tokenizer is None:
            raise ValueError("--chat needs a tokenizer, this checkpoint has none")
        texts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompts]
        # The template writes the special tokens itself.
        prompts = [tokenizer.encode(text, special=False) for text in texts]
    policy, density = None, args.density
    if args.policy:
        policy, density = _policy(args.policy, density), None
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
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(out), indent=2))
        return
    console = Console()
    for prompt, text in zip(args.prompts, out.texts or out.tokens, strict=True):
        console.rule(align="left")
        console.print(f"[bold]{_plain(prompt)}[/bold]{_plain(str(text))}")
    console.rule(align="left")
    console.print(_plain(str(out.stats)), style="dim")


def _policy(name: str, density: float | None) -> SelectionPolicy:
    if name == "dense":
        return Dense()
    if name not in _POLICIES:
        raise ValueError(
            f"no policy {name!r}: there are dense, {', '.join(sorted(_POLICIES))}"
        )
    return _POLICIES[name](density)


def _calibrate(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} exists: choose another, or pass --overwrite")
    params, console = load(args.checkpoint), Console()
    steps = max(1, args.tokens // (args.context * args.batch))
    with _bar(console) as bar:
        task = bar.add_task("training", total=steps)

        def progress(p) -> None:
            text = f"training: loss {p.loss:.4f}, recall {p.recall:.3f}"
            bar.update(task, completed=p.step, description=text)

        result = calibration.calibrate(
            params,
            args.text,
            tokens=args.tokens,
            density=args.density,
            context=args.context,
            batch=args.batch,
            learning_rate=args.learning_rate,
            held_out=args.held_out,
            progress=progress,
            report=lambda stage: bar.update(task, description=stage),
        )
    save_adapter(out, result.params, result.card(), overwrite=args.overwrite)
    table = Table("layer", "recall", "chance", title="Recall on held-out text")
    for i, (found, chance) in enumerate(zip(result.recall, result.chance, strict=True)):
        table.add_row(str(i + 1), f"{found:.3f}", f"{chance:.3f}")
    table.add_section()
    means = (f"{x.mean():.3f}" for x in (result.recall, result.chance))
    table.add_row("mean", *means)
    console.print(table)
    console.print(_perplexity_table(result.perplexity))
    console.print(f"adapter written to {out}")


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _perplexity_table(results: dict[str, Perplexity]) -> Table:
    baseline = results.get("Dense")
    table = Table("policy", "density", "perplexity", title="Perplexity, decoded")
    if baseline:
        table.add_column("/ dense (95 % interval)")
    for name, p in results.items():
        row = [name, f"{p.density:.3f}", f"{p.value:.3f}"]
        if baseline:
            ratio, low, high = p.ratio(baseline)
            same = p is baseline
            row.append("1" if same else f"{ratio:.4f} ({low:.4f} to {high:.4f})")
        table.add_row(*row)
    return table


def _eval(args: argparse.Namespace) -> None:
    params = load(args.checkpoint, adapter=args.adapter)
    densities = [fraction(x) for x in args.densities.split(",") if x] or [None]
    policies = {
        name.capitalize() + (f" {d:.3f}" if d else ""): _policy(name, d)
        for name in args.policies.split(",")
        for d in (densities if name != "dense" else [None])
    }
    tokens = _text_tokens(params, args.text, args.tokens)
    results = {
        label: decode_perplexity(
            params,
            tokens,
            policy,
            window=args.window,
            prefix=args.prefix,
            batch=args.batch,
        )
        for label, policy in policies.items()
    }
    Console().print(_perplexity_table(results))
    if args.out:
        record = {
            "command": sys.argv[1:],
            "model_hash": params.config.model_hash,
            "adapter": read_card(find_adapter(args.adapter)) if args.adapter else None,
            "mode": "decode",
            "window": args.window,
            "prefix": args.prefix,
            "batch": args.batch,
            "results": {
                name: {
                    "perplexity": p.value,
                    "density": p.density,
                    "scored_per_window": p.scored,
                    "nll": p.nll.tolist(),
                }
                for name, p in results.items()
            },
        }
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _text_tokens(params: Params, text: str | Path, tokens: int) -> np.ndarray:
    tokenizer = Tokenizer.load(params.config)
    if tokenizer is None:
        raise ValueError("a text needs a tokenizer, this checkpoint has none")
    return next(token_blocks(text, tokenizer, tokens, limit=1))


def _demo(args: argparse.Namespace) -> None:
    console = Console()
    params = load(args.checkpoint, adapter=args.adapter)
    card = read_card(find_adapter(args.adapter))
    settings = {"max_new_tokens": args.max_new_tokens}
    prompts = list(_DEMO_PROMPTS)
    outputs: dict[str, Output] = {}
    for name, policy in (("Dense", Dense()), ("Polar", Polar())):
        outputs[name] = generate(params, prompts, policy=policy, **settings)
    table = Table("prompt", "dense", "sparse", show_lines=True)
    texts = (outputs[name].texts or [] for name in ("Dense", "Polar"))
    for row in zip(prompts, *texts, strict=True):
        table.add_row(*map(_plain, row))
    console.print(table)

    text = Path(__file__).with_name("demo.txt")
    tokenizer = Tokenizer.load(params.config)
    assert tokenizer is not None  # the texts above needed it
    tokens = np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    perplexity = {
        name: decode_perplexity(params, tokens, policy, window=128, prefix=32, batch=8)
        for name, policy in (("Dense", Dense()), ("Polar", Polar()))
    }
    dense, sparse = outputs["Dense"].stats, outputs["Polar"].stats
    table = Table("", "dense", "sparse")

    def line(label: str, show, *values) -> None:
        table.add_row(label, *(show(x) for x in values))

    line("density, mean over layers", "{:.3f}".format, *map(_mean, (dense, sparse)))
    line("KV read per token", _kilobytes, *map(_per_token, (dense, sparse)))
    line("KV saved", "{:.1%}".format, *map(_saved, (dense, sparse)))
    line(
        *("tokens/s, all prompts", "{:,.1f}".format),
        *(dense.tokens_per_second, sparse.tokens_per_second),
    )
    line(
        *("floor / time", "{:.2f}".format),
        *(dense.floor_fraction, sparse.floor_fraction),
    )
    ratio, low, high = perplexity["Polar"].ratio(perplexity["Dense"])
    line("perplexity", "{:.2f}".format, *(p.value for p in perplexity.values()))
    table.add_row("  / dense (95 %)", "1", f"{ratio:.3f} ({low:.3f} to {high:.3f})")
    console.print(table)
    console.print(
        f"Routers trained on {card.get('tokens', 0):,} tokens. The floor is the bytes "
        "that must be read by the bandwidth measured here "
        f"({dense.bandwidth / 1e9:,.1f} GB/s). At this size weights, not the KV cache, "
        "are most of the bytes: sparsity pays with long contexts and big batches on a "
        "GPU.",
        style="dim",
    )


def _mean(stats) -> float:
    return float(np.mean(stats.density))


def _per_token(stats) -> float:
    return stats.kv_bytes / max(1, stats.new_tokens)


def _saved(stats) -> float:
    return 1 - stats.kv_bytes / stats.kv_bytes_dense


def _kilobytes(value: float) -> str:
    return f"{value / 1e3:,.0f} kB"


def _plain(text: str) -> str:
    """Text that rich shall not read as markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
