"""The console script `polarjax`.

What is needed to answer `--help` or a misspelt option is imported here, what a command
works with when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from polarjax.storage.siblings import check_ours
from polarjax.terminal import calibrate, evaluate, generate, plan
from polarjax.terminal.common import Fill, Parser

_ABOUT = (
    "Batched decoding made cheaper by contextual sparsity. Make a checkpoint first: "
    "`polarjax convert SRC DST`. Where a name is no path here, it is an id of the "
    "Hugging Face hub: org/name, org/name@revision or org/name/file.gguf (pip install "
    "huggingface_hub); such a model is converted on its first use."
)
# As a shell says of a process that a signal ended.
_BROKEN_PIPE, _INTERRUPTED = 128 + 13, 128 + 2

Work = Callable[[argparse.Namespace], int | None]


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the console script's commands.

    Attributes:
      name: that it is called by.
      text: what it does; the first sentence stands in the list of commands.
      example: of a call.
      fill: adds its arguments to a parser.
      load: imports what does the work, and returns it: a function of the arguments
        that returns the exit status, None for 0.
      check: raises ValueError where an option changes nothing.
    """

    name: str
    text: str
    example: str
    fill: Fill
    load: Callable[[], Work]
    check: Callable[[argparse.Namespace], None] = lambda args: None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script.

    Args:
      argv: arguments, None for those of the process.

    Returns:
      Exit code: 0, or 1 after an error that was printed as one line. An interrupt ends
      the process, if the arguments are its own.
    """
    args, own = argparse.Namespace(), argv is None
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = _parser()
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        args.given = argv
        args.command.check(args)
        status = _run(args, own)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):  # `polarjax ... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _BROKEN_PIPE
        from polarjax.terminal.output import one_line

        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if own:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
        work = getattr(args, "work", None)
        there = work and os.path.exists(work)
        kept = f": the same command goes on from {work}" if there else ""
        print(f"interrupted{kept}", file=sys.stderr)
        status = _INTERRUPTED
    if own and status == _INTERRUPTED:
        _end(status)
    return status


def _end(status: int) -> None:
    """Leave without Python's farewell: XLA's threads may be compiling still."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that is closed
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _ending_at_once(own: bool) -> Iterator[None]:
    """Let an interrupt end the process where nothing has been done yet.

    An exception would be lost there, or told as another: extensions that are being
    loaded call Python, and swallow what it raises.

    Args:
      own: whether the process is ours to end.
    """
    before = signal.getsignal(signal.SIGINT)
    if not own or before is not signal.default_int_handler:
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(args: argparse.Namespace, own: bool) -> int:
    check_ours("pallas_kernels")
    with _ending_at_once(own):
        from polarjax.cli.compile_cache import use_compile_cache
        from polarjax.mesh import processes
        from polarjax.terminal.output import print_whatever_the_encoding

        work = args.command.load()
    print_whatever_the_encoding()
    if not args.no_compile_cache:
        use_compile_cache()
    with processes.together():
        status = work(args) or 0
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


def _generate() -> Work:
    from polarjax.cli import generate

    return generate.run_generate


def _demo() -> Work:
    from polarjax.cli import demo

    def show(args: argparse.Namespace) -> None:
        demo.show(args.checkpoint, args.adapter, args.max_new_tokens, args.any_model)

    return show


def _calibrate() -> Work:
    from polarjax.cli import calibrate

    return calibrate.run_calibrate


def _recover() -> Work:
    from polarjax.cli import calibrate

    return calibrate.run_recover


def _eval() -> Work:
    from polarjax.cli import evaluate

    return evaluate.run_eval


def _lm_eval() -> Work:
    from polarjax.cli import evaluate

    return evaluate.run_lm_eval


def _report() -> Work:
    from polarjax.cli import evaluate

    return evaluate.run_report


def _plan() -> Work:
    from polarjax.cli import plan

    return plan.run_plan


def _fill_convert(parser: argparse.ArgumentParser) -> None:
    check_ours("convert")
    from convert import arguments

    arguments.add_arguments(parser)


def _check_convert(args: argparse.Namespace) -> None:
    from convert import arguments

    arguments.check(args.parser, args)


def _convert() -> Work:
    from polarjax.cli import convert

    return convert.run


def _fill_bench(parser: argparse.ArgumentParser) -> None:
    from polarjax.bench import arguments, serve_arguments

    parser.description = arguments.DESCRIPTION
    arguments.add_command(parser.add_argument)
    commands = parser.add_subparsers(title="another command", metavar="COMMAND")
    new = commands.add_parser(
        "serve",
        help="play a load of requests: `polarjax bench serve --help`",
        description=serve_arguments.DESCRIPTION,
        epilog="example: " + serve_arguments.EXAMPLE,
        fill=serve_arguments.add_serve,
    )
    serve = Command(
        "bench serve",
        serve_arguments.DESCRIPTION,
        serve_arguments.EXAMPLE,
        serve_arguments.add_serve,
        _serve,
        serve_arguments.check_serve,
    )
    new.set_defaults(command=serve)


def _bench() -> Work:
    from polarjax.bench import decode

    def run(args: argparse.Namespace) -> None:
        decode.run(args, ["polarjax", *args.given])

    return run


def _serve() -> Work:
    from polarjax.bench import serving

    def run(args: argparse.Namespace) -> None:
        serving.run(args, ["polarjax", *args.given])

    return run


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
