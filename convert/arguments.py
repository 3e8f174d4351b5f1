"""The arguments of `polarjax convert` and `python -m convert`, which are the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from polarjax.terminal.common import add_any_model

DESCRIPTION = (
    "Convert an OPT, LLaMA, Mistral, Qwen or SmolLM checkpoint into the folder that "
    "polarjax.load reads. The folder appears whole or not at all; pickles (.bin, .pt) "
    "are never read. `polarjax convert` and `python -m convert` are the same."
)
EXAMPLES = """\
examples:
  a folder of Hugging Face's kind (config.json, *.safetensors, tokenizer.json):
    polarjax convert ~/models/Llama-3.2-1B checkpoints/llama-1b
  from the hub itself, through its cache (pip install huggingface_hub):
    polarjax convert HuggingFaceTB/SmolLM2-360M checkpoints/smollm2-360m
  a GGUF file; its quantised weights become bfloat16:
    polarjax convert SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
  full precision, in place of an older conversion:
    polarjax convert ~/models/opt-125m checkpoints/opt --dtype float32 --overwrite
  for texts longer, or shorter, than the source says:
    polarjax convert ~/models/Qwen2.5-7B checkpoints/qwen --context 65536
  the way back, with what `polarjax recover` has learned:
    polarjax convert --to-hf checkpoints/smollm2 hf/smollm2 --adapter adapters/mine
  is it the same model? converts if DST is not there, and compares with transformers:
    polarjax convert ~/models/Llama-3.2-1B checkpoints/llama-1b --verify
  the same with texts of your own, one a line; the exit status is for scripts:
    polarjax convert SRC DST --verify --prompts texts.txt && echo the same

Then, in Python: polarjax.load("checkpoints/smollm2")
"""

# `tests/cli/test_arguments.py` holds these against the code that knows them.
DTYPES = ("bfloat16", "float16", "float32")
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the conversion's description, examples and arguments.

    Args:
      parser: of the command.
    """
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="a Hugging Face folder with safetensors, a .gguf file (of one in parts, "
        "any of them), or an id of the hub: org/name, org/name@revision or "
        "org/name/file.gguf; with --to-hf a polarjax checkpoint",
    )
    add("destination", metavar="DST", help="the folder to make")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights that are written (default: bfloat16; with --to-hf that of "
        "the checkpoint)",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help="longest text in tokens (default: what the source says, for YaRN its "
        "factor times the original context). Other positions than the model learned "
        "are for rotary ones alone",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace DST if it is a polarjax checkpoint",
    )
    add(
        "--to-hf",
        action="store_true",
        help="write a folder that transformers loads, from a polarjax checkpoint",
    )
    add(
        "--adapter",
        help="with --to-hf: whose updates the weights take in (folder, or name of one "
        "that ships)",
    )
    add_any_model(add)
    add(
        "--verify",
        action="store_true",
        help="run prompts through transformers and through DST, which is made first if "
        "it is not there, both in float32 and with the weights rounded as in DST. The "
        f"exit status is 0 if the logits agree to a relative error of {TOLERANCE:g} "
        "and all most probable tokens, the configuration and the tokenizer are the "
        "same, else 1. Needs torch, transformers and memory for the model in float32",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="with --verify: texts, one a line, in place of the built-in ones",
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with 2 if options contradict each other, or change nothing."""
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
    if options.context is not None and options.to_hf:
        parser.error("--context is of the conversion to a polarjax checkpoint")
    if options.verify and options.dtype and is_there(options):
        parser.error("--dtype is of a conversion, but DST is there (--overwrite?)")


def is_there(options: argparse.Namespace) -> bool:
    """Whether there is a folder at DST that is to stay."""
    return Path(options.destination).exists() and not options.overwrite
