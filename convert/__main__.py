"""The command `python -m convert`, also installed as `polarjax-convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convert.core import DTYPES, convert
from convert.export import export

_EXAMPLES = """\
examples:
  a folder from the Hugging Face hub (config.json, *.safetensors, tokenizer.json):
    python -m convert ~/models/Llama-3.2-1B checkpoints/llama-1b
  a GGUF file; its quantised weights become bfloat16:
    python -m convert SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
  full precision, in place of an older conversion:
    python -m convert ~/models/opt-125m checkpoints/opt --dtype float32 --overwrite
  the way back, with what `polarjax recover` has learned:
    python -m convert --to-hf checkpoints/smollm2 hf/smollm2 --adapter adapters/mine

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
        description="Convert an OPT, LLaMA, Mistral, Qwen or SmolLM checkpoint into "
        "the folder that polarjax.load reads. The folder appears whole or not at all; "
        "pickles (.bin, .pt) are never read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face folder with safetensors, or a .gguf file; with --to-hf a "
        "polarjax checkpoint",
    )
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the weights that are written (default: bfloat16; with --to-hf that of "
        "the checkpoint)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DST if it is a polarjax checkpoint",
    )
    parser.add_argument(
        "--to-hf",
        action="store_true",
        help="write a folder that transformers loads, from a polarjax checkpoint",
    )
    parser.add_argument(
        "--adapter",
        help="with --to-hf: whose updates the weights take in (folder, or name of one "
        "that ships)",
    )
    options = parser.parse_args(arguments)
    if options.adapter and not options.to_hf:
        parser.error("--adapter goes with --to-hf alone")
    if options.overwrite and options.to_hf:
        parser.error(
            "--overwrite replaces polarjax checkpoints alone, no folder of "
            "another kind: remove DST yourself"
        )
    try:
        if options.to_hf:
            dtype = options.dtype
            config = export(
                *(options.source, options.destination),
                adapter=options.adapter,
                dtype=dtype,
            )
        else:
            dtype = options.dtype or "bfloat16"
            config = convert(
                *(options.source, options.destination),
                dtype=dtype,
                overwrite=options.overwrite,
            )
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(
        f"{options.destination}: {config.family}, {config.layers} layers, "
        f"{config.heads} heads in {config.kv_heads} KV groups, model dim {config.dim}, "
        f"vocabulary {config.vocab_size}" + (f", {dtype}" if dtype else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
