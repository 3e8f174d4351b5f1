"""`polarjax generate --input --output`: a file of prompts, and one of results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polarjax import __version__
from polarjax.cli.common import choose_mesh
from polarjax.engine import Tokenizer
from polarjax.engine.checks import Settings, settings_of
from polarjax.engine.engine import Engine
from polarjax.engine.offline import Counted, continue_lines
from polarjax.engine.progress import token_bar
from polarjax.engine.prompt_lines import Line, Reader, Survey, read_lines, survey
from polarjax.evaluation.record import model
from polarjax.loading import find_adapter, load, read_config
from polarjax.params import Params
from polarjax.planning.sizes import bucket, positive
from polarjax.policies import named
from polarjax.policy import Load, Policy
from polarjax.storage.files import check_file
from polarjax.storage.line_file import LineFile, check_new, files_of
from polarjax.terminal.output import bytes_bar, make_console


def continue_file(args: argparse.Namespace) -> None:
    """Run the command, with an input and an output.

    Args:
      args: that `polarjax.terminal.generate` describes.

    Raises:
      ValueError: as `load` and `Engine`; if the results would be written over the
        prompts; or if a line of the input is no request.
      FileExistsError: if there is an output already, or work on another one.
      FileNotFoundError: if the output's folder is not there.
    """
    _check_apart(args.input, args.output)
    check_new(args.output, args.overwrite)
    slots = positive("--slots", args.slots)
    config = read_config(args.checkpoint)
    context = config.context
    if args.context is not None:
        context = min(positive("--context", args.context), context)
    tokenizer = Tokenizer.load(config)
    reader = Reader(config, tokenizer, _defaults(args), args.chat)
    settings_of(config, tokenizer, 1, _asked(reader.defaults))
    found = _survey(args.input, reader, context)
    adapter = find_adapter(args.adapter) if args.adapter else None
    mesh, other = choose_mesh(args), args.any_model
    params = load(args.checkpoint, adapter=adapter, mesh=mesh, any_model=other)
    policy = _policy(args, params)
    with Engine(
        params,
        policy=policy,
        slots=min(slots, bucket(found.requests, 1)),
        context=min(bucket(found.tokens), context),
        load=Load(min(slots, found.requests), found.mean, reader.defaults.density),
        densities=found.densities,
        memory_fraction=args.memory_fraction,
        variants=found.variants,
        logprobs=found.logprobs,
        prompt_logprobs=found.prompt_logprobs,
    ) as engine:
        facts = {
            "input": found.sha256,
            "polarjax": __version__,
            "model": _model(params, adapter),
            "policy": _describe(engine.policy),
            "chat": args.chat,
            "context": args.context,
            "logprobs": args.logprobs,
            "settings": _asked(reader.defaults),
        }
        with LineFile(args.output, facts, args.overwrite) as file:
            args.work = str(file.partial)  # that is named when it is interrupted
            _go_on(args, engine, reader, file, found)
            file.finish()


def _check_apart(source: str, output: str) -> None:
    """Raise if the prompts are in a file that work on the output writes or deletes.

    Args:
      source: path of the prompts; links are followed, as they are of the output.
      output: path of the results.

    Raises:
      ValueError: naming both.
    """
    for file in files_of(output):
        if not (os.path.exists(source) and os.path.exists(file)):
            continue  # a source that is not there is named where it is read
        if os.path.samefile(source, file):
            raise ValueError(
                f"--input {source} is {file}, which work on --output {output} writes: "
                "the prompts would be lost; choose another --output"
            )


def _survey(path: str, reader: Reader, context: int) -> Survey:
    """Read the input once: texts become tokens, which may take a while."""
    size = check_file(Path(path))
    with bytes_bar("reading", make_console(stderr=True), shown=True) as bar:
        task = bar.add_task("prompts", total=size)
        return survey(
            path, reader, context, lambda read: bar.update(task, completed=read)
        )


def _go_on(
    args: argparse.Namespace,
    engine: Engine,
    reader: Reader,
    file: LineFile,
    found: Survey,
) -> None:
    """Continue the prompts that have no result yet."""
    lines, start = read_lines(args.input), time.perf_counter()
    _skip(lines, file)
    if file.done:
        print(f"going on after {file.done} of {found.count} prompts", file=sys.stderr)
    with token_bar(found.count, file.done) as bar:

        def tell(counted: Counted) -> None:
            bar(file.done + counted.prompts, found.count, counted.tokens)

        counted = continue_lines(
            engine, lines, reader, file.write, logprobs=args.logprobs, tell=tell
        )
    seconds = time.perf_counter() - start
    failed = f", {counted.failed} of them failed" if counted.failed else ""
    print(
        f"{counted.prompts} prompts{failed}: {counted.tokens} tokens in {seconds:.1f} "
        f"s, {counted.tokens / seconds:,.1f} tokens/s; written to {args.output}",
        file=sys.stderr,
    )


def _skip(lines: Iterator[Line], file: LineFile) -> None:
    """Pass the lines that have a result, and make sure that it is theirs.

    Raises:
      ValueError: if not: somebody has changed what was there.
    """
    for number, text in enumerate(file, 1):
        line = next(lines, None)
        try:
            result = json.loads(text)
            same = line is not None and line.label.items() <= result.items()
            same &= not result.keys().isdisjoint(("text", "choices", "error"))
        except (ValueError, AttributeError, TypeError, RecursionError):
            same = False
        if not same:
            raise ValueError(
                f"{file.partial} is damaged in line {number}: delete it or "
                "--overwrite it, to begin anew"
            )


def _defaults(args: argparse.Namespace) -> Settings:
    """What lines get that say nothing else."""
    return Settings(
        max_new_tokens=args.max_new_tokens,
        density=None if args.policy or args.balanced else args.density,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def _asked(settings: Settings) -> dict[str, Any]:
    """Settings by name, as `settings_of` takes them and JSON has them."""
    return {**vars(settings), "stop": list(settings.stop)}


def _policy(args: argparse.Namespace, params: Params) -> Policy | None:
    """What the options ask for; None for what the model came with."""
    if args.policy:
        return named(args.policy, args.density)
    if args.balanced:
        return named("polar", args.density, balanced=args.tp)
    if args.density is not None:
        return params.policy if params.routers else named("polar")
    return None


def _describe(policy: Policy) -> dict[str, Any]:
    kind = type(policy).__name__.lower()
    return {"policy": kind, "asks": list(policy.asks), **policy.settings()}


def _model(params: Params, adapter: Any) -> dict[str, Any]:
    """Which weights they are: over how many devices, or by what name, matters not."""
    facts = model(params, adapter)
    del facts["mesh"]
    if facts["adapter"]:
        del facts["adapter"]["name"]
    return facts
