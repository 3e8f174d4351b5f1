"""What `make demo` shows: one model, dense and sparse, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from polarjax.evaluation import perplexity, window_items
from polarjax.generation import Output, Stats, Tokenizer, generate
from polarjax.hub import find_adapter, load
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sparsity import Polar, read_card

PROMPTS = (
    "Once upon a time, in a village by the sea,",
    "The capital of France is",
    "Water boils at 100 degrees because",
    "Three things to pack for a long walk are",
)


def show(checkpoint: str | Path, adapter: str | Path, max_new_tokens: int) -> None:
    """Print dense and sparse continuations, and what sparsity saved and cost.

    Args:
      checkpoint: folder of the model.
      adapter: folder of routers, or the name of one that ships.
      max_new_tokens: tokens per prompt, at least 2.

    Raises:
      ValueError: if there are fewer, or the model cannot be loaded.
    """
    if max_new_tokens < 2:
        raise ValueError(
            "the demo needs 2 new tokens: the first one is dense prefill's"
        )
    console = Console()
    params = load(checkpoint, adapter=adapter)
    card = read_card(find_adapter(adapter))
    prompts = list(PROMPTS)
    policies: dict[str, SelectionPolicy] = {"Dense": Dense(), "Polar": Polar()}
    outputs: dict[str, Output] = {}
    for name, policy in policies.items():
        with console.status(f"{name}: compiling, then continuing four prompts"):
            outputs[name] = generate(
                params, prompts, policy=policy, max_new_tokens=max_new_tokens
            )
    table = Table("prompt", "dense", "sparse", show_lines=True)
    texts = (outputs[name].texts or [] for name in ("Dense", "Polar"))
    for row in zip(prompts, *texts, strict=True):
        table.add_row(*map(plain, row))
    console.print(table)

    text = Path(__file__).with_name("demo.txt")
    tokenizer = Tokenizer.require(params.config, "the demo")
    tokens = np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    with console.status("perplexity of a short text"):
        found = perplexity(params, window_items(tokens, 128, 32), policies, batch=8)
    dense, sparse = outputs["Dense"].stats, outputs["Polar"].stats
    table = Table("", "dense", "sparse")

    def line(label: str, show, *values) -> None:
        table.add_row(label, *(show(x) for x in values))

    line("density, mean over layers", "{:.3f}".format, *map(_mean, (dense, sparse)))
    line("KV read per token", _kilobytes, *map(_per_token, (dense, sparse)))
    line("KV saved", "{:.1%}".format, *map(_saved, (dense, sparse)))
    line(
        *("tokens/s, all prompts", "{:,.1f}".format),
        *(dense.tokens_per_second, sparse.tokens_per_second),
    )
    line(
        *("floor / time", "{:.2f}".format),
        *(dense.floor_fraction, sparse.floor_fraction),
    )
    ratio, low, high = found["Polar"].ratio(found["Dense"])
    line("perplexity", "{:.2f}".format, *(p.value for p in found.values()))
    table.add_row("  / dense (95 %)", "1", f"{ratio:.3f} ({low:.3f} to {high:.3f})")
    console.print(table)
    console.print(
        f"Routers trained on {card.get('tokens', 0):,} tokens. The floor is the bytes "
        "that must be read by the bandwidth measured here "
        f"({dense.bandwidth / 1e9:,.1f} GB/s). At this size weights, not the KV cache, "
        "are most of the bytes: sparsity pays with long contexts and big batches on a "
        "GPU.",
        style="dim",
    )


def _mean(stats: Stats) -> float:
    return float(np.mean(stats.density))


def _per_token(stats: Stats) -> float:
    return stats.kv_bytes / max(1, stats.new_tokens)


def _saved(stats: Stats) -> float:
    return 1 - stats.kv_bytes / stats.kv_bytes_dense


def _kilobytes(value: float) -> str:
    return f"{value / 1e3:,.0f} kB"


def plain(text: str) -> str:
    """Text that rich shall not read as markup."""
    return text.replace("[", r"\[")
