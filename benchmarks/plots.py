"""Draws what the decode benchmark measured, beside its results.

python -m benchmarks.plots [RESULT.json]
"""

import argparse
from pathlib import Path

from benchmarks.readme import newest
from polarjax.bench.plots import draw


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description="Draw the decode benchmark."
    )
    parser.add_argument(
        "results", type=Path, nargs="?", help="JSON file (default: the newest)"
    )
    args = parser.parse_args(argv)
    written = draw(args.results or newest("bench"))
    for path in written:
        print(f"written to {path}")
    if not written:
        print("nothing to draw: it needs several batches, contexts, or profiles")


if __name__ == "__main__":
    main()
