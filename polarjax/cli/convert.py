"""What `polarjax convert` does, also where the module `convert` is run."""

from __future__ import annotations

import argparse
import sys

from convert.arguments import is_there
from convert.core import convert
from convert.export import check_destination, export
from convert.verify import libraries, read_prompts, verify
from polarjax.loading import load
from polarjax.terminal.output import make_console, one_line


def run(options: argparse.Namespace) -> int:
    """Convert, or convert back, and compare if asked to.

    Args:
      options: that `convert.arguments` describes, checked.

    Returns:
      The exit status: 0, or 1 after an error (one line on stderr), or if --verify finds
      another model than the source.
    """
    try:
        prompts = read_prompts(options.prompts) if options.prompts else None
        if options.verify:
            libraries()  # before a conversion that may take long
        if not (options.verify and is_there(options)):
            _convert(options)
        return _verify(options, prompts) if options.verify else 0
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing incomplete is left", file=sys.stderr)
        return 130


def _convert(options: argparse.Namespace) -> None:
    dtype = options.dtype
    if options.to_hf:
        check_destination(options.destination, dtype)
        params = load(
            options.source, adapter=options.adapter, any_model=options.any_model
        )
        config = export(params, options.destination, dtype=dtype)
    else:
        dtype = dtype or "bfloat16"
        config = convert(
            options.source,
            options.destination,
            dtype=dtype,
            context=options.context,
            overwrite=options.overwrite,
        )
    print(
        f"{options.destination}: {config.family}, {config.layers} layers, "
        f"{config.heads} heads in {config.kv_heads} KV groups, model dim {config.dim}, "
        f"vocabulary {config.vocab_size}, context {config.context}"
        + (f", {dtype}" if dtype else "")
    )


def _verify(options: argparse.Namespace, prompts: list[str] | None) -> int:
    found = verify(
        options.source, options.destination, prompts, context=options.context
    )
    console = make_console()
    console.print(found.table())
    for note in found.notes:
        console.print(f"note: {note}")
    if found.uncrossed:
        console.print(
            f"note: no prompt is longer than the sliding window of {found.uncrossed:,} "
            "tokens; give one that is (--prompts)"
        )
    console.print("the same model" if found.agrees else "NOT the same model")
    return 0 if found.agrees else 1
