"""The command `python -m convert`, also installed as `polarjax-convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convert.core import DTYPES, convert
from convert.source import ConversionError

_EXAMPLES = """\
examples:
  a folder from the Hugging Face hub (config.json, *.safetensors, tokenizer.json):
    python -m convert ~/models/Llama-3.2-1B checkpoints/llama-1b
  a GGUF file; its quantised weights become bfloat16:
    python -m convert SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
  full precision, in place of an older conversion:
    python -m convert ~/models/opt-125m checkpoints/opt --dtype float32 --overwrite

Then, in Python: polarjax.load("checkpoints/smollm2")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: of the command line; None for the process's own.

    Returns:
      The exit status: 0, or 1 after an error (one line on stderr).
    """
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert an OPT or LLaMA checkpoint into the folder that "
        "polarjax.load reads. The folder appears whole or not at all; pickles "
        "(.bin, .pt) are never read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face folder with safetensors, or a .gguf file",
    )
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bfloat16",
        help="of the converted weights (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DST if it is a polarjax checkpoint",
    )
    options = parser.parse_args(arguments)
    try:
        config = convert(
            options.source,
            options.destination,
            dtype=options.dtype,
            overwrite=options.overwrite,
        )
    except (ConversionError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(
        f"{options.destination}: {config.family}, {config.layers} layers, "
        f"{config.heads} heads in {config.kv_heads} KV groups, model dim {config.dim}, "
        f"vocabulary {config.vocab_size}, {options.dtype}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
