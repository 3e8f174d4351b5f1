"""Scores many continuations batch by batch, and takes up work that was cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np

from polarjax.evaluation.batches import Batch, Continuation
from polarjax.evaluation.scoring import Scorer

Journal = MutableMapping[str, Any]
"""Batch by batch, what was found so far, as JSON values."""

Progress = Callable[[str, int, int], None]
"""progress(what is done now, units done, units in all)."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one policy yielded over all items.

    Attributes:
      nll: float64[items], negative log-likelihood of each one's scored tokens, in nats.
      greedy: bool[items], whether each of them was the most probable token.
      use: int64[layers, k], how often each KV group was read.
      positions: tokens computed sparsely.
      seconds: that this took, compilation apart.
      neuron_density: MLP neurons read / neurons there, mean over layers.
    """

    nll: np.ndarray
    greedy: np.ndarray
    use: np.ndarray
    positions: int
    seconds: float
    neuron_density: float = 1.0

    @property
    def density(self) -> float:
        """KV groups read / KV groups there, mean over layers."""
        return float(self.use.sum() / (self.positions * self.use.size))


def missing(batches: Sequence[Batch], name: str, journal: Journal) -> list[Batch]:
    """Those batches of a work that its journal does not have."""
    return [b for i, b in enumerate(batches) if f"{name}/{i}" not in journal]


def measure(
    scorer: Scorer,
    items: Sequence[Continuation],
    *,
    name: str = "",
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """Score items under every policy of a scorer.

    Args:
      scorer: with the policies.
      items: what to score.
      name: of the work, in the journal.
      journal: batches found there are not scored again; others are added to it.
      progress: called while programs compile, and after each batch.

    Returns:
      What was found, by policy.

    Raises:
      ValueError: if there is no item, or one is longer than the model's context.
    """
    if not items:
        raise ValueError(f"{name or 'this evaluation'} has nothing to score")
    journal = {} if journal is None else journal
    say = progress or (lambda *_: None)
    batches = scorer.plan(items)
    keys = [f"{name}/{i}" for i in range(len(batches))]
    scorer.compile(
        missing(batches, name, journal), lambda *counts: say("compiling", *counts)
    )
    total, done = sum(map(scorer.cost, batches)), 0
    for key, batch in zip(keys, batches, strict=True):
        if key not in journal:
            say("scoring", done, total)
            found = scorer.score(batch)
            journal[key] = {
                label: {
                    "nll": [float(nll.sum(dtype=np.float64)) for nll in scores.nll],
                    "greedy": [bool(greedy.all()) for greedy in scores.greedy],
                    "use": scores.use.tolist(),
                    "positions": scores.positions,
                    "seconds": scores.seconds,
                }
                for label, scores in found.items()
            }
        done += scorer.cost(batch)
        say("scoring", done, total)

    results = {}
    for label in scorer.labels:
        parts = [journal[key][label] for key in keys]
        nll, greedy = np.zeros(len(items)), np.zeros(len(items), bool)
        for batch, part in zip(batches, parts, strict=True):
            numbers = [row.item for row in batch.rows]
            nll[numbers], greedy[numbers] = part["nll"], part["greedy"]
        results[label] = Measured(
            nll,
            greedy,
            np.sum([part["use"] for part in parts], axis=0),
            sum(part["positions"] for part in parts),
            sum(part["seconds"] for part in parts),
            scorer.neuron_density(label),
        )
    for label, result in results.items():
        if not np.isfinite(result.nll).all():
            bad = items[int(np.flatnonzero(~np.isfinite(result.nll))[0])]
            raise ValueError(
                f"{label} yields no finite log-likelihood for {bad.name}: the model's "
                "weights are damaged, or its dtype has too small a range"
            )
    return results
