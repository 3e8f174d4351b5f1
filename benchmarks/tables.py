"""What the scripts have in common that print a file of results as a table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def print_table(
    table: Callable[[Path], str],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    writer: str,
) -> int:
    """Print the table of a file that the command line names.

    Args:
      table: from a file's path to Markdown; ValueError and OSError are told.
      argv: arguments, None for the process' own.
      prog: name of the command.
      description: what it does.
      writer: what writes such files.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("file", type=Path, help=f"that {writer} wrote")
    try:
        print(table(parser.parse_args(argv).file))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
