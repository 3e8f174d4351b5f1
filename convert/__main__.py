"""The command `python -m convert`, also installed as `polarjax-convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convert.arguments import add_arguments, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: of the command line; None for the process's own.

    Returns:
      The exit status: 0, or 1 after an error (one line on stderr), or if --verify finds
      another model than the source.
    """
    parser = argparse.ArgumentParser(prog="python -m convert")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    check(parser, options)
    from polarjax.cli.convert import run  # which loads jax

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
