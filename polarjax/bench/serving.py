"""`polarjax bench serve`: a load played against engines, and what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from polarjax import Dense, Engine, ModelConfig, Params
from polarjax.bench import counts, latencies, serve, serve_results
from polarjax.bench.loads import Ask, arrivals, make_load, sizes
from polarjax.bench.random_weights import load_model
from polarjax.bench.serve_results import Result, Runs
from polarjax.bench.shapes import TOY_MODELS, parse_model
from polarjax.engine import Tokenizer
from polarjax.evaluation.record import environment, now
from polarjax.loading import read_config
from polarjax.mesh.cut import check_tp, make_mesh
from polarjax.planning.memory import check_fraction
from polarjax.planning.sizes import at_least, positive
from polarjax.policies.budgets import check_density
from polarjax.policy import Policy
from polarjax.terminal.output import counting_bar, make_console

_PAGE = 64  # an engine's context is a multiple of it, if the model's is not less


@dataclasses.dataclass(frozen=True)
class Way:
    """What an engine reads.

    Attributes:
      label: in words.
      policy: of the engine; None for the model's own choice.
      density: that every request asks for; None for no such wish.
    """

    label: str
    policy: Policy | None = None
    density: float | None = None


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Run the command.

    Args:
      args: that `polarjax.bench.serve_arguments` describes.
      command: that was given, for the record.

    Raises:
      ValueError: if an argument does not fit.
    """
    check_numbers(args)
    config = model_config(args)
    size = sizes(choose_load(args, config))
    context = args.context or min(config.context, size.longest + -size.longest % _PAGE)
    context = min(context, config.context)
    if args.json:  # what cannot be written or continued is told before the work
        Runs({}, args.json)
    if args.memory_fraction is not None:
        # Read when jax takes the device, which is below.
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(args.memory_fraction)
    console = make_console()
    dtype = jnp.dtype("float32" if args.shape in TOY_MODELS else "bfloat16")
    mesh = make_mesh(args.tp, args.dp) if args.tp * args.dp > 1 else None
    about = {
        "command": shlex.join(command),
        "date": now(),
        **environment(),
        "devices": args.tp * args.dp,
        "model": args.shape or args.checkpoint,
        "dtype": dtype.name,
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        "context": context,
        "load": {"name": args.load, "seed": args.seed, **dataclasses.asdict(size)},
    }
    runs = Runs(about, args.json)
    cut = f", {size.cut} of them cut to the context" if size.cut else ""
    console.print(
        f"{about['model']} on {about['device']}, {dtype.name}, {args.slots} slots of "
        f"{context:,} tokens; {args.load}: {size.requests:,} requests{cut}, "
        f"{size.prompt_tokens:,} tokens of prompts, {size.new_tokens:,} of answers"
    )
    params = load_model(
        args.shape or args.checkpoint,
        args.adapter,
        dtype,
        args.head_rank,
        mesh,
        args.any_model,
    )
    for way in ways(params, args.density, bool(args.adapter)):
        for result in continuous(params, way, args, context):
            runs.add(result)
        if args.static:
            runs.add(static(params, way, args))
    console.print(serve_results.table(runs.results))
    console.print(
        "times in ms; queued: tokens/s until every request has its first token; ITL: "
        "gaps between a request's chunks of tokens"
    )
    for note in serve_results.notes(runs.results):
        console.print(f"note: {note}")
    if runs.path:
        console.print(f"written to {runs.path}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise if a number of the command is out of range.

    Raises:
      ValueError: naming it.
    """
    for name in ("requests", "slots", "tp", "dp"):
        positive(f"--{name}", getattr(args, name))
    for name in ("max-output", "max-concurrency", "context"):
        number = getattr(args, name.replace("-", "_"))
        if number is not None:
            positive(f"--{name}", number)
    at_least("--seed", args.seed, 0)
    at_least("--head-rank", args.head_rank, 0)
    if args.warmup is not None:
        at_least("--warmup", args.warmup, 0)
    for density in args.density or ():
        check_density(density)
    if args.memory_fraction is not None:
        check_fraction(args.memory_fraction)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """What the model is, before anything of it is made.

    Raises:
      ValueError: if it cannot be cut over the devices asked for, or has a smaller
        context.
    """
    found = parse_model(args.shape) if args.shape else None
    config = found[0] if found else read_config(args.checkpoint)
    check_tp(args.tp, config)
    if args.context and args.context > config.context:
        raise ValueError(
            f"--context is {args.context}, beyond the model's of {config.context}"
        )
    return config


def choose_load(
    args: argparse.Namespace, config: ModelConfig, drawing: int = 0
) -> list[Ask]:
    """The load, of ids that are no special tokens of the model.

    Args:
      args: of the command.
      config: what the model is.
      drawing: of the ids. What is played on one engine has ids of its own each time,
        so that nothing is found in a cache of prefixes which no user would find there.
    """
    tokenizer = Tokenizer.load(config)
    special = {*config.bos_ids, *config.eos_ids}
    special |= {*(tokenizer.pieces.special if tokenizer else ())}
    return make_load(
        args.load,
        args.requests,
        config.vocab_size,
        args.context or config.context,
        most_new_tokens=args.max_output,
        special=special,
        seed=args.seed,
        drawing=drawing,
    )


def ways(
    params: Params, densities: Sequence[float] | None, adapter: bool
) -> Iterator[Way]:
    """What is read, one engine after the other.

    Args:
      params: the model, with routers.
      densities: that were asked for; None for the adapter's own, or dense.
      adapter: whether the routers are an adapter's, whose updates may mend the weights.
    """
    if densities is None and adapter:
        yield Way("the adapter's own")
    for density in densities or ([] if adapter else [1.0]):
        if density < 1:
            yield Way(f"density {density:.3g}", params.policy, density)
        elif adapter:  # its weights, and nothing to be chosen
            yield Way("all groups, adapter", params.policy.asking(()))
        else:
            yield Way("dense", Dense())


def continuous(
    params: Params, way: Way, args: argparse.Namespace, context: int
) -> Iterator[Result]:
    """Play a load at each of the rates, on one engine.

    Args:
      params: the model.
      way: what is read.
      args: of the command.
      context: of the engine.
    """
    warmup = 2 * args.slots if args.warmup is None else args.warmup
    with Engine(
        params,
        policy=way.policy,
        slots=args.slots,
        context=context,
        prefill_tokens=args.prefill_tokens,
    ) as engine:
        if warmup:
            load = choose_load(args, params.config, len(args.rate))
            serve.warm(engine, load[:warmup], way.density)
        for drawing, rate in enumerate(args.rate):
            load = choose_load(args, params.config, drawing)
            due = arrivals(len(load), rate, args.seed)
            with (
                counting_bar(make_console(stderr=True)) as bar,
                counts.compilations() as compiled,
                counts.counted(engine) as reached,
            ):
                shown = "all at once" if rate == math.inf else f"{rate:g} requests/s"
                traces = serve.play(
                    engine,
                    load,
                    due,
                    density=way.density,
                    most_open=args.max_concurrency,
                    ended=_advance(bar, f"{way.label}, {shown}", len(load)),
                )
                found = reached()
            yield Result(
                how=serve_results.CONTINUOUS,
                policy=way.label,
                density=way.density,
                rate=None if rate == math.inf else rate,
                most_open=args.max_concurrency,
                slots=args.slots,
                served=latencies.summarise(traces, dict(args.goodput or ())),
                reached=found,
                compilations=compiled,
            )


def static(params: Params, way: Way, args: argparse.Namespace) -> Result:
    """Play a load in static batches of so many requests as there are slots.

    Args:
      params: the model.
      way: what is read.
      args: of the command.
    """
    load = choose_load(args, params.config)
    options: dict[str, Any] = {"density": way.density}
    if way.density is None:
        options = {"policy": way.policy}
    if args.warmup != 0:
        serve.warm_static(params, load, args.slots, options)
    with (
        counting_bar(make_console(stderr=True)) as bar,
        counts.compilations() as compiled,
    ):
        traces, stats = serve.play_static(
            params,
            load,
            args.slots,
            options=options,
            ended=_advance(bar, f"{way.label}, static batches", len(load)),
        )
    return Result(
        how=serve_results.STATIC,
        policy=way.label,
        density=way.density,
        rate=None,
        most_open=None,
        slots=args.slots,
        served=latencies.summarise(traces, dict(args.goodput or ())),
        reached=counts.reached_static(stats, load, args.slots),
        compilations=compiled,
    )


def _advance(bar: Any, text: str, total: int) -> Callable[[], None]:
    """Begin a line of a progress bar; what it returns says that one more is done."""
    task = bar.add_task(text, total=total)
    return lambda: bar.advance(task)
