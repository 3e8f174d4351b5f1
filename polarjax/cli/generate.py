"""`polarjax generate`: prompts and what a model makes of them."""

from __future__ import annotations

import argparse
import dataclasses
import json

from polarjax.cli.common import choose_mesh
from polarjax.cli.prompt_file import continue_file
from polarjax.engine import Tokenizer
from polarjax.engine.generate import generate
from polarjax.engine.templates import check_text
from polarjax.loading import load
from polarjax.mesh import processes
from polarjax.policies import named
from polarjax.terminal.output import make_console, rule, show_text


def run_generate(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
      args: that `polarjax.terminal.generate` describes.

    Raises:
      ValueError: as `load` and `generate`.
    """
    if args.input is not None:
        continue_file(args)
        return
    processes.start_from(args)
    params = load(
        args.checkpoint,
        adapter=args.adapter,
        mesh=choose_mesh(args),
        any_model=args.any_model,
    )
    prompts: list = args.prompts
    if args.chat:
        tokenizer = Tokenizer.require(params.config, "--chat")
        for i, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {i}")
        texts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompts]
        # The template writes the special tokens itself.
        prompts = [tokenizer.encode(text, special=False) for text in texts]
    policy, density = None, args.density
    if args.policy:
        policy, density = named(args.policy, density), None
    if args.balanced:
        policy, density = named("polar", args.density, balanced=args.tp), None
    out = generate(
        params,
        prompts,
        max_new_tokens=args.max_new_tokens,
        density=density,
        policy=policy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        memory_fraction=args.memory_fraction,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(out), indent=2))
        return
    console = make_console()
    for prompt, text in zip(args.prompts, out.texts or out.tokens, strict=True):
        rule(console)
        show_text(console, prompt, str(text))
    rule(console)
    console.print(str(out.stats), style="dim")
