"""The console script `polarjax`.

What is needed to answer `--help` or a misspelt option is imported here, what a command
works with when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from polarjax.storage.siblings import check_ours
from polarjax.terminal import calibrate, evaluate, generate, plan
from polarjax.terminal.common import Fill, Parser

_ABOUT = (
    "Batched decoding made cheaper by contextual sparsity. Make a checkpoint first: "
    "`polarjax convert SRC DST`. Where a name is no path here, it is an id of the "
    "Hugging Face hub: org/name, org/name@revision or org/name/file.gguf (pip install "
    "huggingface_hub); such a model is converted on its first use."
)
_BROKEN_PIPE = 128 + 13  # as a shell says of a process that SIGPIPE ended


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the console script's commands.

    Attributes:
      name: that it is called by.
      text: what it does; the first sentence stands in the list of commands.
      example: of a call.
      fill: adds its arguments to a parser.
      run: does the work; returns the exit status, None for 0.
      check: raises ValueError where an option changes nothing.
    """

    name: str
    text: str
    example: str
    fill: Fill
    run: Callable[[argparse.Namespace], int | None]
    check: Callable[[argparse.Namespace], None] = lambda args: None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Args:
      argv: arguments, None for those of the process.

    Returns:
      Exit code: 0, or 1 after an error that was printed as one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = argparse.Namespace()
    try:
        args = parser.parse_args(argv)
        args.given = argv
        args.command.check(args)
        return _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):  # `polarjax ... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _BROKEN_PIPE
        from polarjax.terminal.output import one_line

        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        work = getattr(args, "work", None)
        kept = f": the same command goes on from {work}" if work else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    check_ours("pallas_kernels")
    from polarjax.cli.compile_cache import use_compile_cache
    from polarjax.mesh import processes
    from polarjax.terminal.output import print_whatever_the_encoding

    print_whatever_the_encoding()
    if not args.no_compile_cache:
        use_compile_cache()
    with processes.together():
        status = args.command.run(args) or 0
        sys.stdout.flush()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="polarjax", description=_ABOUT)
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="do not keep compiled programs in ~/.cache/polarjax/xla (XDG_CACHE_HOME; "
        "JAX_COMPILATION_CACHE_DIR for another place, POLARJAX_NO_COMPILE_CACHE=1 for "
        "never)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        first = command.text.partition(". ")[0].removesuffix(".") + "."
        new = commands.add_parser(
            command.name,
            help=first.replace("%", "%%"),  # argparse formats it
            description=command.text,
            epilog="example: " + command.example,
            fill=command.fill,
        )
        new.set_defaults(command=command)
    return parser


def _generate(args: argparse.Namespace) -> None:
    from polarjax.cli import generate

    generate.run_generate(args)


def _demo(args: argparse.Namespace) -> None:
    from polarjax.cli import demo

    demo.show(args.checkpoint, args.adapter, args.max_new_tokens, args.any_model)


def _calibrate(args: argparse.Namespace) -> None:
    from polarjax.cli import calibrate

    calibrate.run_calibrate(args)


def _recover(args: argparse.Namespace) -> None:
    from polarjax.cli import calibrate

    calibrate.run_recover(args)


def _eval(args: argparse.Namespace) -> None:
    from polarjax.cli import evaluate

    evaluate.run_eval(args)


def _lm_eval(args: argparse.Namespace) -> None:
    from polarjax.cli import evaluate

    evaluate.run_lm_eval(args)


def _report(args: argparse.Namespace) -> None:
    from polarjax.cli import evaluate

    evaluate.run_report(args)


def _plan(args: argparse.Namespace) -> None:
    from polarjax.cli import plan

    plan.run_plan(args)


def _fill_convert(parser: argparse.ArgumentParser) -> None:
    check_ours("convert")
    from convert import arguments

    arguments.add_arguments(parser)


def _check_convert(args: argparse.Namespace) -> None:
    from convert import arguments

    arguments.check(args.parser, args)


def _convert(args: argparse.Namespace) -> int:
    from polarjax.cli import convert

    return convert.run(args)


def _fill_bench(parser: argparse.ArgumentParser) -> None:
    from polarjax.bench import arguments

    parser.description = arguments.DESCRIPTION
    arguments.add_command(parser.add_argument)


def _bench(args: argparse.Namespace) -> None:
    from polarjax.bench import decode

    decode.run(args, ["polarjax", *args.given])


COMMANDS = (
    Command(
        "convert",
        "Make a checkpoint that polarjax loads from a published model. See also "
        "--verify and the way back, --to-hf.",
        "polarjax convert ~/models/Llama-3.2-1B checkpoints/llama-1b",
        _fill_convert,
        _convert,
        _check_convert,
    ),
    Command(
        "generate",
        generate.GENERATE,
        generate.GENERATE_EXAMPLE,
        generate.add_generate,
        _generate,
        generate.check_generate,
    ),
    Command(
        "calibrate",
        calibrate.CALIBRATE,
        calibrate.CALIBRATE_EXAMPLE,
        calibrate.add_calibrate,
        _calibrate,
        calibrate.check_calibrate,
    ),
    Command(
        "recover",
        calibrate.RECOVER,
        calibrate.RECOVER_EXAMPLE,
        calibrate.add_recover,
        _recover,
        calibrate.check_recover,
    ),
    Command(
        "eval",
        evaluate.EVAL,
        evaluate.EVAL_EXAMPLE,
        evaluate.add_eval,
        _eval,
        evaluate.check_eval,
    ),
    Command(
        "lm-eval",
        evaluate.LM_EVAL,
        evaluate.LM_EVAL_EXAMPLE,
        evaluate.add_lm_eval,
        _lm_eval,
        evaluate.check_lm_eval,
    ),
    Command(
        "report",
        evaluate.REPORT,
        evaluate.REPORT_EXAMPLE,
        evaluate.add_report,
        _report,
    ),
    Command(
        "plan",
        plan.PLAN,
        plan.PLAN_EXAMPLE,
        plan.add_plan,
        _plan,
        plan.check_plan,
    ),
    Command(
        "demo",
        generate.DEMO,
        generate.DEMO_EXAMPLE,
        generate.add_demo,
        _demo,
    ),
    Command(
        "bench",
        "Time decode steps beside the floor that the memory sets.",
        "polarjax bench --models llama-3.1-8b opt-66b:8 --batches 16 64 --contexts "
        "2048 --densities 1/2 5/8 --profile --out bench.json",
        _fill_bench,
        _bench,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
