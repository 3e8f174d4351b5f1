"""The command `python -m convert`, also installed as `polarjax-convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from convert.core import DTYPES, convert
from convert.export import export
from convert.verify import TOLERANCE, libraries, read_prompts, verify

_EXAMPLES = """\
examples:
  a folder of Hugging Face's kind (config.json, *.safetensors, tokenizer.json):
    python -m convert ~/models/Llama-3.2-1B checkpoints/llama-1b
  from the hub itself, through its cache (pip install huggingface_hub):
    python -m convert HuggingFaceTB/SmolLM2-360M checkpoints/smollm2-360m
  a GGUF file; its quantised weights become bfloat16:
    python -m convert SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
  full precision, in place of an older conversion:
    python -m convert ~/models/opt-125m checkpoints/opt --dtype float32 --overwrite
  the way back, with what `polarjax recover` has learned:
    python -m convert --to-hf checkpoints/smollm2 hf/smollm2 --adapter adapters/mine
  is it the same model? converts if DST is not there, and compares with transformers:
    python -m convert ~/models/Llama-3.2-1B checkpoints/llama-1b --verify
  the same with texts of your own, one a line; the exit status is for scripts:
    python -m convert SRC DST --verify --prompts texts.txt && echo the same

Then, in Python: polarjax.load("checkpoints/smollm2")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: of the command line; None for the process's own.

    Returns:
      The exit status: 0, or 1 after an error (one line on stderr), or if --verify finds
      another model than the source.
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
        help="a Hugging Face folder with safetensors, a .gguf file, or an id of the "
        "hub: org/name, org/name@revision or org/name/file.gguf; with --to-hf a "
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
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="take the adapter although it was learned on other weights",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run prompts through transformers and through DST, which is made first if "
        "it is not there, both in float32 and with the weights rounded as in DST. The "
        f"exit status is 0 if the logits agree to a relative error of {TOLERANCE:g} "
        "and all most probable tokens, the configuration and the tokenizer are the "
        "same, else 1. Needs torch, transformers and memory for the model in float32",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="with --verify: texts, one a line, in place of the built-in ones",
    )
    options = parser.parse_args(arguments)
    _check(parser, options)
    try:
        prompts = read_prompts(options.prompts) if options.prompts else None
        if options.verify:
            libraries()  # before a conversion that may take long
        if not (options.verify and _there(options)):
            _convert(options)
        return _verify(options, prompts) if options.verify else 0
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing incomplete is left", file=sys.stderr)
        return 130


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with 2 if options contradict each other."""
    if options.adapter and not options.to_hf:
        parser.error("--adapter goes with --to-hf alone")
    if options.any_model and not options.adapter:
        parser.error("--any-model goes with --adapter")
    if options.overwrite and options.to_hf:
        parser.error(
            "--overwrite replaces polarjax checkpoints alone, no folder of "
            "another kind: remove DST yourself"
        )
    if options.prompts and not options.verify:
        parser.error("--prompts goes with --verify alone")
    if options.verify and options.to_hf:
        parser.error(
            "--verify compares a checkpoint with what it was made of: to check the way "
            "back, verify afterwards with SRC and DST exchanged"
        )
    if options.verify and options.dtype and _there(options):
        parser.error("--dtype is of a conversion, but DST is there (--overwrite?)")


def _there(options: argparse.Namespace) -> bool:
    return Path(options.destination).exists() and not options.overwrite


def _convert(options: argparse.Namespace) -> None:
    places, dtype = (options.source, options.destination), options.dtype
    if options.to_hf:
        config = export(
            *places,
            adapter=options.adapter,
            dtype=dtype,
            any_model=options.any_model,
        )
    else:
        dtype = dtype or "bfloat16"
        config = convert(*places, dtype=dtype, overwrite=options.overwrite)
    print(
        f"{options.destination}: {config.family}, {config.layers} layers, "
        f"{config.heads} heads in {config.kv_heads} KV groups, model dim {config.dim}, "
        f"vocabulary {config.vocab_size}" + (f", {dtype}" if dtype else "")
    )


def _verify(options: argparse.Namespace, prompts: list[str] | None) -> int:
    found = verify(options.source, options.destination, prompts)
    console = Console()
    console.print(found.table())
    for note in found.notes:
        print(f"note: {note}")
    if found.uncrossed:
        console.print(
            f"note: no prompt is longer than the sliding window of {found.uncrossed:,} "
            "tokens; give one that is (--prompts)"
        )
    console.print("the same model" if found.agrees else "NOT the same model")
    return 0 if found.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
