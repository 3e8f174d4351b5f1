"""The arguments of `polarjax bench serve`. No jax, no numpy: `--help` is here."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from polarjax.bench.shapes import MODELS, TOY_MODELS
from polarjax.terminal.choices import LATENCIES, LOADS
from polarjax.terminal.common import add_any_model, fraction, refuse

DESCRIPTION = (
    "Play a load of requests against an engine and measure what its clients see: "
    "time to the first token (TTFT), time per output token after it (TPOT), gaps "
    "between chunks of tokens (ITL), latency to the last token (E2EL), throughput, and "
    "the density that the decode steps reached. The model is a checkpoint or, with "
    "--shape, random weights of a known shape: times depend on shapes alone. Every "
    "answer has the length that the load gives it. Warming up is left out of all "
    "figures, and what is compiled meanwhile is told."
)
EXAMPLE = (
    "polarjax bench serve --shape llama-3.1-8b --load reasoning --requests 256 --rate "
    "inf 4 16 --density 1 1/2 --static --json serving.json; on any machine, in "
    "seconds: polarjax bench serve --shape toy-llama --requests 8 --slots 4 "
    "--max-output 16"
)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `bench serve`."""
    _add_model(parser)
    add_load(parser)
    _add_engine(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What serves."""
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder that convert wrote, or id of the hub")
    add(
        "--shape",
        choices=[*MODELS, *TOY_MODELS],
        metavar="NAME",
        help="instead of a checkpoint random weights, in bfloat16, of the shape of "
        f"{', '.join(MODELS)}; or, in float32, {', '.join(TOY_MODELS)}, which are "
        "there to try this out",
    )
    add(
        "--adapter",
        help="of the checkpoint: folder of routers, name of one that ships, or id; "
        "without one, routers by chance",
    )
    add_any_model(add)
    add("--head-rank", type=int, default=0, help="of random head routers; 0 is linear")
    add(
        "--density",
        type=fraction,
        nargs="+",
        metavar="D",
        help="fraction of the KV groups that all requests ask for, in (0, 1]; of "
        "several, an engine after the other (default: 1, which is dense; with "
        "--adapter, its own budgets)",
    )
    add("--tp", type=int, default=1, metavar="N", help="devices that share the model")
    add(
        "--dp",
        type=int,
        default=1,
        metavar="M",
        help="copies of the model, which share the requests",
    )


def add_load(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments that say what is asked for, and when."""
    add = parser.add_argument
    add(
        "--load",
        choices=LOADS,
        default=LOADS[0],
        help="chat: prompts of 231 tokens on average and answers of 204, of very "
        "different lengths. uniform: both from 100 to 1,024. reasoning: answers of "
        "2,600 on average. long: prompts from 2,048 to 8,192. shared-prefix: chat "
        "after one of 32 system prompts of 2,048 tokens",
    )
    add("--requests", type=int, default=256, help="of the load")
    add("--max-output", type=int, metavar="N", help="most tokens of an answer")
    add("--seed", type=int, default=0, help="of lengths, token ids and arrivals")
    add(
        "--rate",
        type=request_rate,
        nargs="+",
        metavar="R",
        default=[math.inf],
        help="requests per second that arrive as a Poisson process; inf for all at "
        "once; of several, one after the other on the same engine",
    )
    add(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="requests that are open at once, at most; the client holds others back, "
        "and they count from when they are sent",
    )
    add(
        "--goodput",
        type=limit,
        nargs="+",
        metavar="WHAT:MS",
        help="count requests that keep within limits in milliseconds, such as ttft:200 "
        f"tpot:20 ({', '.join(LATENCIES)})",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """How it is served, and where the results go."""
    add = parser.add_argument
    add("--slots", type=int, default=64, help="requests that are continued at once")
    add(
        "--prefill-tokens",
        type=int,
        metavar="N",
        help="prompt tokens that one program reads (default: the engine's own)",
    )
    add(
        "--context",
        type=int,
        help="most tokens of a request; what is longer is cut (default: those of the "
        "longest request, as far as the model goes)",
    )
    add(
        "--static",
        action="store_true",
        help="play the load in static batches of --slots too: polarjax.generate, one "
        "batch to its end and then the next",
    )
    add(
        "--warmup",
        type=int,
        metavar="N",
        help="requests of the load that are played before, with short answers "
        "(default: twice the slots; 0 for none)",
    )
    add(
        "--memory-fraction",
        type=fraction,
        help="of the device that jax may take, XLA_PYTHON_CLIENT_MEM_FRACTION (jax's "
        "own default: 0.75)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the results there, behind those of earlier runs if there are any",
    )


def request_rate(text: str) -> float:
    """Requests per second from text such as 4, 0.5 or inf."""
    try:
        rate = math.inf if text == "inf" else fraction(text)
    except argparse.ArgumentTypeError:
        rate = 0.0
    if not rate > 0:
        message = f"{text!r} is no rate such as 4 or 0.5 requests a second, nor inf"
        raise argparse.ArgumentTypeError(message)
    return rate


def limit(text: str) -> tuple[str, float]:
    """A latency and its limit in milliseconds from text such as ttft:200."""
    name, _, number = text.partition(":")
    try:
        most = float(number)
    except ValueError:
        most = 0.0
    if name not in LATENCIES or not 0 < most < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no limit such as ttft:200, in milliseconds: there are "
            f"{', '.join(LATENCIES)}"
        )
    return name, most


def check_serve(args: argparse.Namespace) -> None:
    """Raise if an option changes nothing, or there is no model.

    Raises:
      ValueError: naming the option.
    """
    given = list(getattr(args, "given", ["bench", "serve"]))
    before = given[given.index("bench") + 1 : given.index("serve")]
    if before:
        raise ValueError(
            f"{before[0]} before serve is of `polarjax bench`, which times steps, and "
            "has no effect on serving: leave it out, or write it after serve"
        )
    if bool(args.checkpoint) == bool(args.shape):
        raise ValueError(
            "name what serves: either a checkpoint or --shape, such as --shape "
            f"{next(iter(TOY_MODELS))}"
        )
    if args.shape:
        refuse(args, "adapter", "with --shape, whose weights and routers are random")
    if args.adapter:
        refuse(args, "head-rank", "with --adapter, which brings its routers")
    else:
        refuse(args, "any-model", "without --adapter")
    if args.static and math.inf not in args.rate:
        raise ValueError(
            "--static plays the load all at once, with which nothing is to be compared "
            "here: add inf to --rate, or leave it out"
        )
    check_load(args)


def check_load(args: argparse.Namespace) -> None:
    """Raise if something of `add_load` is said twice.

    Raises:
      ValueError: naming the option.
    """
    if len({*args.rate}) < len(args.rate):
        raise ValueError("--rate has a number twice: leave one out")
    names = [name for name, _ in args.goodput or ()]
    if len({*names}) < len(names):
        raise ValueError("--goodput has a latency twice: leave one out")
