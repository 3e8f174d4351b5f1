"""What the engine promises, measured on this machine: run on any GPU, or as a toy.

    python -m benchmarks.engine_promises step prefill prefix --output promises.json
    python -m benchmarks.engine_promises step invariant --shape toy-llama

Weights are random, of a known shape: times depend on shapes alone, and that answers
are equal does not depend on what they say. Each promise is a line of JSON: what was
found, what is wanted, and whether it holds. What is wanted of times is wanted of one
H200 at the whole size, and elsewhere `holds` is null. The promises, for the shape of
LLaMA-3.1-8B in bfloat16:

* step: a decode step of 64 requests at 4,096 positions takes at most 1.05 times what it
  took over contiguous caches, 12.53 ms, and at half of the heads 1.06 times 8.94 ms;
  with half of the rows at each density it is within 3 % of the mean of the two. The
  device does nothing for at most 2 % of the time, in these steps and amid chats.
* prefill: 8 prompts of 2,048 tokens are read at 0.90 of the 43,043 tokens a second of
  contiguous caches, from their arrival to the last one's first token. The
  programs alone, back to back, are timed beside it.
* prefix: the first token of a prompt of 4,096 tokens comes 8 times sooner when all but
  the last piece of it is cached.
* invariant: 50 copies of each of 20 prompts, at two densities in turn, 128 tokens each,
  amid other traffic and in random order: one answer for each prompt and density, tokens
  and log-probabilities to the last bit.
* preempt: requests get the same answers on 40 % of the pages that all slots need as on
  all; the time that goes into swapping is under 3 %.
* soak: six minutes of chats, a tenth of them cancelled at random moments: no page is
  lost, and the last minute has 0.98 of the tokens of the second.
* ready: the constructor returns after at most 90 s, and 20 s with the programs in JAX's
  persistent compile cache.

All share one engine, but for `preempt`, which makes a second with fewer pages, and
`ready`, whose engines have processes of their own and which therefore is first. Sizes
are chosen for two minutes each on a GPU, `soak` apart. After an engine is ready nothing
may be compiled: `compilations` counts that. Latencies at rates of arrival are measured
by `polarjax bench serve --rate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.promises import ready, sameness, soak, speed
from benchmarks.promises.common import Bench
from benchmarks.promises.sizes import TOY, Sizes, Wanted, check_sizes
from polarjax.bench import counts
from polarjax.bench.rows import read_runs, write_json
from polarjax.bench.shapes import MODELS, TOY_MODELS
from polarjax.evaluation.record import environment, now
from polarjax.planning.sizes import at_least, positive
from polarjax.storage.writing import try_file
from polarjax.terminal.common import Parser

WHOLE = "llama-3.1-8b"  # the shape that times are promised for
COMPILED = Wanted("compilations", most=0, timed=False)
MEASURED: dict[str, tuple[Callable[[Bench], dict[str, Any]], tuple[Wanted, ...]]] = {
    "step": (speed.step, speed.STEP),
    "prefill": (speed.prefill, speed.PREFILL),
    "prefix": (speed.prefix, speed.PREFIX),
    "invariant": (sameness.invariant, sameness.INVARIANT),
    "preempt": (sameness.preempt, sameness.PREEMPT),
    "soak": (soak.soak, soak.SOAK),
}
NAMES = ("ready", *MEASURED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the benchmark's arguments."""
    add = parser.add_argument
    add(
        "promises",
        nargs="+",
        choices=NAMES,
        metavar="PROMISE",
        help=f"one or more of {', '.join(NAMES)}; measured in this order",
    )
    add(
        "--shape",
        choices=(*MODELS, *TOY_MODELS),
        default=WHOLE,
        metavar="NAME",
        help=f"of the random weights: {', '.join((*MODELS, *TOY_MODELS))}; a toy is "
        "measured in seconds, at small sizes, and its times say nothing",
    )
    add("--slots", type=int, help="of the engine; 64 by default, 4 of a toy")
    add(
        "--positions",
        type=int,
        help="of each request while steps are timed; the engine's context is a little "
        "more. 4096 by default, 320 of a toy",
    )
    add(
        "--prefill-tokens",
        type=int,
        metavar="N",
        help="prompt tokens that one program reads (default: the engine's own)",
    )
    add("--repeats", type=int, help="of what is timed several times; 5, of a toy 2")
    add("--minutes", type=float, help="of soak; 6 by default, 0.05 of a toy")
    add("--seed", type=int, default=0, help="of prompts and loads")
    add(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="keep the results there, behind those that it has",
    )


def sizes_of(args: argparse.Namespace) -> Sizes:
    """How much is to be measured.

    Raises:
      ValueError: if a number is out of range, or the shape has no room.
    """
    sizes = TOY if args.shape in TOY_MODELS else Sizes()
    names = ("slots", "positions", "prefill_tokens", "repeats", "minutes")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    for name, number in given.items():
        if name != "minutes":
            positive(f"--{name.replace('_', '-')}", number)
        elif not 0 < number < math.inf:
            raise ValueError(f"--minutes must be above 0, and finite, got {number}")
    at_least("--seed", args.seed, 0)
    sizes = dataclasses.replace(sizes, **given)
    check_sizes(args.shape, sizes, args.promises)
    return sizes


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file.

    Raises:
      ValueError: if it is no file of this benchmark.
    """
    return read_runs(path, "engine", "benchmarks.engine_promises")


def measure(args: argparse.Namespace, command: Sequence[str]) -> bool:
    """Measure promises, print each and write it down.

    Args:
      args: of the command.
      command: that was given, for the record.

    Returns:
      Whether all hold that are promised here.

    Raises:
      ValueError: if an argument does not fit.
    """
    sizes, results = sizes_of(args), list[dict[str, Any]]()
    earlier: list[dict[str, Any]] = []
    if args.output:  # what cannot be written or continued is told before the work
        try_file(args.output)
        if args.output.exists():
            earlier = read(args.output)
    whole = args.shape == WHOLE and (sizes.slots, sizes.positions) == (64, 4096)

    def keep(name: str, wanted: Sequence[Wanted], found: dict[str, Any]) -> None:
        # Not before the processes of `ready` have had the device for themselves.
        about = {"command": shlex.join(command), "date": now(), **environment()}
        about |= {"model": args.shape, **dataclasses.asdict(sizes)}
        timed = whole and "H200" in about["device"]
        result = {
            "promise": name,
            "found": found,
            "wanted": [
                {
                    "figure": each.figure,
                    "wanted": str(each),
                    "holds": each.holds(found[each.figure])
                    if timed or not each.timed
                    else None,
                }
                for each in (*wanted, COMPILED)
            ],
        }
        print(json.dumps(result), flush=True)
        results.append(result)
        if args.output:
            runs = [*earlier, {**about, "results": results}]
            write_json(args.output, {"engine": runs})

    if "ready" in args.promises:
        keep("ready", ready.READY, ready.ready(args.shape, sizes))
    if others := [name for name in MEASURED if name in args.promises]:
        bench = Bench(args.shape, sizes, args.seed)
        jax.block_until_ready(bench.params)
        for name in others:
            function, wanted = MEASURED[name]
            keep(name, wanted, timed_alone(bench, function))
        bench.close()
    return not any(
        each["holds"] is False for result in results for each in result["wanted"]
    )


def timed_alone(
    bench: Bench, function: Callable[[Bench], dict[str, Any]]
) -> dict[str, Any]:
    """What a measurement finds, what is compiled meanwhile, and how long all took."""
    start = time.perf_counter()
    _ = bench.engine
    built = bench.built
    with counts.compilations() as compiled:
        found = function(bench)
    built = bench.built - built
    return {
        **found,
        "compilations": compiled.count - built,
        "measured_seconds": time.perf_counter() - start,
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="python -m benchmarks.engine_promises",
        description="Measure what the engine promises. The status is 1 if something "
        "does not hold.",
        epilog="example: python -m benchmarks.engine_promises step prefix --output "
        "promises.json; on any machine: python -m benchmarks.engine_promises step "
        "--shape toy-llama",
    )
    add_arguments(parser)
    command = ["python", "-m", "benchmarks.engine_promises", *argv]
    try:
        return 0 if measure(parser.parse_args(argv), command) else 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
