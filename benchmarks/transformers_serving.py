"""Plays a load with `transformers`' continuous batching, as `polarjax bench serve`.

    python -m benchmarks.transformers_serving --shape llama-3.1-8b --load reasoning
        --compile-levels 0 1 2 3 --json serving.json

The same lengths and token ids, each request with its own number of new tokens, no end
token, random weights of the same shape. The attention that is in use is printed, and
another than the one asked for is an error: `transformers` falls back to slower ones
without a word. torch alone is on the device; README.md says what to install.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import flash_attention
from benchmarks.against_transformers import is_timed
from benchmarks.transformers_manager import (
    ATTENTIONS,
    cb_config,
    check_attention,
    fields,
    memory_percent,
    play,
    random_model,
    served,
)
from polarjax import ModelConfig
from polarjax.bench import latencies, serve_results
from polarjax.bench.loads import Ask, arrivals, make_load, sizes
from polarjax.bench.serve_arguments import add_load, check_load
from polarjax.bench.serve_results import Result, Runs
from polarjax.bench.shapes import MODELS, TOY_MODELS, parse_model
from polarjax.evaluation.record import commit, now
from polarjax.planning.sizes import at_least, positive
from polarjax.terminal.common import Parser, fraction
from polarjax.terminal.output import counting_bar, make_console

SHAPES = [name for name in (*MODELS, *TOY_MODELS) if is_timed(name)]
_MOST_REQUESTS = 1024  # at once, of its own accord
# What is written down of what transformers has settled on.
_SETTLED = (
    "num_blocks",
    "max_batch_tokens",
    "max_memory_percent",
    "max_requests_per_batch",
    "max_blocks_per_request",
    "allow_block_sharing",
    "use_async_batching",
    "use_cuda_graph",
    "varlen_compile_config",
    "decode_compile_config",
    "scheduler_type",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the benchmark's arguments."""
    add = parser.add_argument
    add(
        "--shape",
        required=True,
        choices=SHAPES,
        metavar="NAME",
        help=f"random weights of the shape of {', '.join(SHAPES)}; the toys run on a "
        "CPU too, the others in bfloat16 on a GPU",
    )
    add_load(parser)
    add("--context", type=int, help="most tokens of a request; what is longer is cut")
    add(
        "--attention",
        nargs="+",
        choices=ATTENTIONS,
        default=[ATTENTIONS[0]],
        metavar="NAME",
        help=f"{', '.join(ATTENTIONS)}; of several, one after the other",
    )
    add(
        "--compile-levels",
        type=int,
        nargs="+",
        choices=range(4),
        default=[0],
        metavar="N",
        help="default_compile_level of its configuration, 0 (its own default) to 3; of "
        "several, one after the other",
    )
    add("--block-size", type=int, default=256, help="tokens of a block of its cache")
    add(
        "--slots",
        type=int,
        help="requests that are continued at once, at most (default: all of the load, "
        "as its generate_batch has it)",
    )
    add(
        "--memory-fraction",
        type=fraction,
        help="of the device that weights and cache may fill (default: its own, 0.9 of "
        "what the weights leave). polarjax fills 0.95 of its --memory-fraction",
    )
    add(
        "--warmup",
        type=int,
        metavar="N",
        help="requests of the load that are played before, with other ids (default: "
        "all, as it compiles for the shapes that it meets; 0 for none)",
    )
    add("--json", type=Path, metavar="FILE", help="as of `polarjax bench serve`")


def check(args: argparse.Namespace) -> None:
    """Raise if an argument is out of range.

    Raises:
      ValueError: naming it.
    """
    check_load(args)
    for name in ("requests", "block-size"):
        positive(f"--{name}", getattr(args, name.replace("-", "_")))
    for name in ("max-output", "max-concurrency", "context", "slots"):
        number = getattr(args, name.replace("-", "_"))
        if number is not None:
            positive(f"--{name}", number)
    at_least("--seed", args.seed, 0)
    if args.warmup is not None:
        at_least("--warmup", args.warmup, 0)
    share = args.memory_fraction
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"--memory-fraction must be in (0, 1], got {share}")
    config = shape_config(args)
    if args.context and args.context > config.context:
        raise ValueError(
            f"--context is {args.context}, beyond the model's of {config.context}"
        )


def shape_config(args: argparse.Namespace) -> ModelConfig:
    """What the model is."""
    found = parse_model(args.shape)
    assert found
    return found[0]


def choose_load(args: argparse.Namespace, drawing: int = 0) -> list[Ask]:
    """The load that `polarjax bench serve` has for the same arguments.

    Args:
      args: of the command.
      drawing: of the ids. Each play has ids of its own, as prefixes are cached.
    """
    config = shape_config(args)
    return make_load(
        args.load,
        args.requests,
        config.vocab_size,
        args.context or config.context,
        most_new_tokens=args.max_output,
        special={*config.bos_ids, *config.eos_ids},
        seed=args.seed,
        drawing=drawing,
    )


def measure(
    model: Any, attention: str, level: int, args: argparse.Namespace, libraries: Any
) -> Iterator[Result]:
    """Play the load at each of the rates, on one manager.

    Args:
      model: on its device.
      attention: one of `ATTENTIONS`.
      level: of compiling.
      args: of the command.
      libraries: torch and transformers.
    """
    torch, transformers = libraries
    cuda = torch.cuda.is_available()
    settings = cb_config(
        fields(transformers),
        level,
        args.block_size,
        min(args.slots or args.requests, _MOST_REQUESTS),
        sizes(choose_load(args)).longest,
        cuda,
    )
    if args.memory_fraction is not None and cuda:
        settings["max_memory_percent"] = memory_percent(torch, args.memory_fraction)
    console = make_console()
    with served(model, attention, settings, transformers) as manager:
        used = model.config._attn_implementation
        found = settled(manager.continuous_batching_config)
        console.print(f"attention {used}, compile level {level}: {found}")
        warmup = args.requests if args.warmup is None else args.warmup
        if warmup:
            load = choose_load(args, len(args.rate))[:warmup]
            play(manager, load, [0.0] * len(load))
        for drawing, rate in enumerate(args.rate):
            load = choose_load(args, drawing)
            due = arrivals(len(load), rate, args.seed)
            with counting_bar(make_console(stderr=True)) as bar:
                task = bar.add_task(f"{attention}, level {level}", total=len(load))
                traces = play(
                    manager,
                    load,
                    due,
                    args.max_concurrency,
                    lambda bar=bar, task=task: bar.advance(task),
                )
            check_attention(model.config._attn_implementation, attention)
            yield Result(
                how=f"transformers, {used}, compile level {level}",
                policy="dense",
                density=None,
                rate=None if rate == math.inf else rate,
                most_open=args.max_concurrency,
                slots=found["max_requests_per_batch"],
                served=latencies.summarise(traces, dict(args.goodput or ())),
                reached=None,
                compilations=None,
                settings={**settings, **found},
            )


def settled(config: Any) -> dict[str, Any]:
    """What transformers has settled on, as JSON has it."""
    found = {name: getattr(config, name) for name in _SETTLED}
    plain = (bool, int, float, str, tuple, type(None))
    return {n: x if isinstance(x, plain) else repr(x) for n, x in found.items()}


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Measure every attention at every level of compiling.

    Args:
      args: of the command.
      command: that was given, for the record.

    Returns:
      How many of them failed; why was printed.

    Raises:
      ImportError: if a library is missing.
      ValueError: if the device cannot do what is asked.
    """
    if missing := [n for n in ("torch", "transformers") if find_spec(n) is None]:
        raise ImportError(
            f"this needs {' and '.join(missing)}: see benchmarks/README.md"
        )
    torch: Any = importlib.import_module("torch")
    cuda = torch.cuda.is_available()
    if not cuda and args.shape not in TOY_MODELS:
        raise ValueError(
            f"--shape {args.shape} needs a GPU that torch sees through CUDA; on a CPU "
            f"there are {', '.join(set(SHAPES) & set(TOY_MODELS))}"
        )
    if not cuda and {*args.attention} != {"sdpa"}:
        raise ValueError("FlashAttention needs a GPU: on a CPU take --attention sdpa")
    with contextlib.ExitStack() as stack:
        if "flash_attention_3" in args.attention:
            stack.enter_context(flash_attention.under_its_name())
        transformers: Any = importlib.import_module("transformers")
        stack.enter_context(torch.no_grad())
        runs = Runs(about_run(args, command, torch, transformers), args.json)
        model = random_model(shape_config(args), torch, transformers)
        failed = 0
        for attention, level in itertools.product(args.attention, args.compile_levels):
            try:
                for result in measure(
                    model, attention, level, args, (torch, transformers)
                ):
                    runs.add(result)
            except (RuntimeError, ValueError, ImportError) as error:
                failed += 1
                print(f"error: {attention}, level {level}: {error}", file=sys.stderr)
            torch._dynamo.reset()
    console = make_console()
    console.print(serve_results.table(runs.results))
    console.print("times in ms, by the timestamps of its own thread")
    if runs.path and runs.results:
        console.print(f"written to {runs.path}")
    return failed


def about_run(
    args: argparse.Namespace, command: Sequence[str], torch: Any, transformers: Any
) -> dict[str, Any]:
    """What a file says of a run: device, versions, load."""
    cuda = torch.cuda.is_available()
    load = dataclasses.asdict(sizes(choose_load(args)))
    return {
        "command": shlex.join(command),
        "date": now(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flash_attention_3": flash_attention.wheel(),
        },
        "devices": 1,
        "model": args.shape,
        "dtype": "bfloat16" if cuda else "float32",
        "memory_fraction": args.memory_fraction,
        "context": args.context,
        "load": {"name": args.load, "seed": args.seed, **load},
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.transformers_serving",
        description="Serve a load with transformers' continuous batching, and measure "
        "what `polarjax bench serve` measures.",
        epilog="example: python -m benchmarks.transformers_serving --shape toy-llama "
        "--attention sdpa --requests 8 --max-output 16",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        check(args)
        command = ["python", "-m", "benchmarks.transformers_serving", *given]
        return 1 if run(args, command) else 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
