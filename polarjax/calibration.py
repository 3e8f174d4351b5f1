"""`polarjax.calibrate`: text in, trained routers and what they are worth out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.evaluation import Perplexity, perplexity, router_recall, window_items
from polarjax.generation import Tokenizer
from polarjax.params import Params
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sparsity import Oracle, Polar, Random
from polarjax.sparsity.select import check_density
from polarjax.training import Progress, RouterTraining, token_blocks, train_routers

WINDOW, PREFIX = 256, 64


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Trained routers and their quality on held-out text.

    Attributes:
      params: the model with the routers and budgets.
      recall: float64[layers - 1], of the routers, from layer 1 on.
      chance: the same of random scores.
      perplexity: by policy name (Dense, Oracle, Polar, Random), decoded at the budget.
      settings: what it was trained with.
    """

    params: Params
    recall: np.ndarray
    chance: np.ndarray
    perplexity: dict[str, Perplexity]
    settings: dict[str, Any]

    def card(self) -> dict[str, Any]:
        """What an adapter's card says of its training, as JSON values."""
        dense = self.perplexity["Dense"]
        return {
            **self.settings,
            "recall": [round(float(x), 4) for x in self.recall],
            "recall_of_chance": [round(float(x), 4) for x in self.chance],
            "perplexity": {
                name: {
                    "value": round(p.value, 4),
                    "ratio_to_dense": [round(x, 4) for x in p.ratio(dense)],
                    "density": round(p.density, 4),
                }
                for name, p in self.perplexity.items()
            },
            "perplexity_of": (
                f"{len(dense.nll)} windows of {WINDOW} held-out tokens, decoded one by "
                f"one after a dense prefix of {PREFIX}; ratios with 95 % intervals"
            ),
        }


def calibrate(
    params: Params,
    text: str | Path,
    *,
    tokens: int = 400_000,
    density: float = 2 / 3,
    context: int = 512,
    batch: int = 1,
    learning_rate: float = 2e-2,
    held_out: int = 4096,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Calibration:
    """Train every layer's head router on a text and measure them on what follows it.

    Args:
      params: the model, with a tokenizer.
      text: file of UTF-8 text, plain or gzipped.
      tokens: to train on; the paper's number is the default.
      density: fraction of KV groups that the routers shall pick.
      context: tokens per sequence.
      batch: sequences per optimiser step.
      learning_rate: peak of AdamW's.
      held_out: tokens after the training text, for recall and perplexity.
      progress: called after each training step.
      report: called with the name of each further stage.

    Returns:
      The routers and their quality beside Dense, Oracle and Random.

    Raises:
      FileNotFoundError: if there is no such text.
      ValueError: if the text is too short, or a setting is out of range.
    """
    say = report or (lambda _: None)
    config = params.config
    tokenizer = Tokenizer.require(config, "calibration")
    check_density(density)
    context = min(context, config.context)
    if context < 2 or batch < 1 or held_out < max(WINDOW, context * batch):
        raise ValueError(
            f"context {context}, batch {batch}, held_out {held_out}: held_out must be "
            f"at least {WINDOW} and one batch of context tokens"
        )
    steps = max(1, tokens // (context * batch))
    held_steps = held_out // (context * batch)
    batches = _batches(token_blocks(text, tokenizer, context), batch)
    training = RouterTraining(density, steps, learning_rate)
    trained = train_routers(params, batches, training, progress)
    held = list(itertools.islice(batches, held_steps))
    if len(held) < held_steps:
        missing = (held_steps - len(held)) * batch * context
        raise ValueError(
            f"{text} ends {missing} tokens too early "
            f"for {held_out} held-out tokens: lower the number of tokens to train on"
        )
    say("recall on held-out text")
    recall, chance = router_recall(trained, held)
    held_tokens = np.concatenate([block for part in held for block in part])
    policies: dict[str, SelectionPolicy] = {
        "Dense": Dense(),
        "Oracle": Oracle(),
        "Polar": Polar(),
        "Random": Random(),
    }
    say(f"perplexity of {', '.join(policies)} on held-out text")
    windows = window_items(held_tokens, WINDOW, PREFIX)
    found = perplexity(trained, windows, policies)
    settings = {
        "text": Path(text).name,
        "tokens": steps * context * batch,
        "held_out_tokens": len(held_tokens),
        "density": round(float(density), 6),
        "context": context,
        "batch": batch,
        "learning_rate": learning_rate,
        "weight_decay": training.weight_decay,
        "weights_dtype": str(params.dtype),
    }
    return Calibration(trained, recall, chance, found, settings)


def _batches(blocks: Iterator[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    while len(rows := list(itertools.islice(blocks, batch))) == batch:
        yield np.stack(rows)
