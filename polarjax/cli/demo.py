"""What `make demo` shows: one model, dense and sparse, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from polarjax.engine import Stats, Tokenizer
from polarjax.engine.generate import generate
from polarjax.engine.output import Output
from polarjax.evaluation import Perplexity, perplexity, window_items
from polarjax.loading import find_adapter, load
from polarjax.params import Params
from polarjax.policies import load_adapter, named, read_card
from polarjax.policy import Dense, Policy
from polarjax.terminal.output import make_console

PROMPTS = (
    "Once upon a time, in a village by the sea,",
    "The capital of France is",
    "Water boils at 100 degrees because",
    "Three things to pack for a long walk are",
)


def show(
    checkpoint: str | Path,
    adapters: Sequence[str | Path],
    max_new_tokens: int,
    any_model: bool = False,
) -> None:
    """Print dense and sparse continuations, and what sparsity saved and cost.

    Args:
      checkpoint: folder of the model.
      adapters: folders of routers, or names of those that ship.
      max_new_tokens: tokens per prompt, at least 2.
      any_model: whether to take adapters that were learned on other weights.

    Raises:
      ValueError: if there are fewer, or the model cannot be loaded.
    """
    if max_new_tokens < 2:
        raise ValueError(
            "the demo needs 2 new tokens: the first one is dense prefill's"
        )
    console = make_console()
    dense = load(checkpoint)
    models = [load_adapter(dense, find_adapter(x), any_model) for x in adapters]
    names = ["dense", *map(str, adapters)]
    runs: list[tuple[Params, Policy]] = [(dense, Dense())]
    runs += [(params, named("polar")) for params in models]
    outputs: list[Output] = []
    for name, (params, policy) in zip(names, runs, strict=True):
        with console.status(Text(f"{name}: compiling, then continuing four prompts")):
            outputs.append(
                generate(
                    params, list(PROMPTS), policy=policy, max_new_tokens=max_new_tokens
                )
            )
    console.print(_continued(names, outputs))
    text = Path(__file__).with_name("demo.txt")
    tokenizer = Tokenizer.require(dense.config, "the demo")
    tokens = np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    windows = window_items(tokens, 128, 32)
    found: list[Perplexity] = []
    for name, (params, policy) in zip(names, runs, strict=True):
        with console.status(Text(f"{name}: perplexity of a short text")):
            found += perplexity(params, windows, {name: policy}, batch=8).values()
    console.print(_compared(names, outputs, found))
    for name in adapters:
        card = read_card(find_adapter(name))
        promise = card.get("contract", {}).get("verdict")
        learned = f"{name}: learned from {card.get('tokens', 0):,} tokens"
        said = f"{learned}; {promise}" if promise else learned
        console.print(said + ".", style="dim")
    console.print(
        "The floor is the bytes that must be read by the bandwidth measured here "
        f"({outputs[0].stats.bandwidth / 1e9:,.1f} GB/s). At this size weights, "
        "not the KV cache, are most of the bytes: sparsity pays with long contexts and "
        "big batches on a GPU.",
        style="dim",
    )


def _continued(names: Sequence[str], outputs: Sequence[Output]) -> Table:
    """What each model wrote behind each prompt."""
    headers = [Column(name, overflow="fold") for name in names]
    table = Table("prompt", *headers, show_lines=True)
    texts = (output.texts or [] for output in outputs)
    for row in zip(PROMPTS, *texts, strict=True):
        table.add_row(*row)
    return table


def _compared(
    names: Sequence[str], outputs: Sequence[Output], found: Sequence[Perplexity]
) -> Table:
    """What sparsity saved, and what it cost in perplexity."""
    table = Table("", *names)

    def line(label: str, show: Callable[[Stats], str]) -> None:
        table.add_row(label, *(show(output.stats) for output in outputs))

    line("density, mean over layers", lambda s: f"{np.mean(s.density):.3f}")
    line(
        "KV read per token",
        lambda s: f"{s.kv_bytes / max(1, s.new_tokens) / 1e3:,.0f} kB",
    )
    line("KV saved", lambda s: f"{1 - s.kv_bytes / s.kv_bytes_dense:.1%}")
    line("tokens/s, all prompts", lambda s: f"{s.tokens_per_second:,.1f}")
    line("floor / time", lambda s: f"{s.floor_fraction:.2f}")
    table.add_row("perplexity", *(f"{p.value:.2f}" for p in found))
    ratios = [p.ratio(found[0]) for p in found]
    shown = [f"{ratio:.3f} ({low:.3f} to {high:.3f})" for ratio, low, high in ratios]
    table.add_row("  / dense (95 %)", "1", *shown[1:])
    return table
