"""What a batch's true union of active neurons asks of the rule that ranks neurons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from polarjax.policy import NeuronBudgets


def union_rankings() -> Mapping[str, Callable[[jax.Array], jax.Array]]:
    """Rules that rank neurons for a batch, by name.

    Each takes scores [groups, b, f] to a ranking [groups, f]. "sum" adds the positive
    scores, as the paper does: all neurons that no row is sure of are alike to it. "max"
    is the union by threshold: a neuron is in if any row's score is above a common one.
    "noisy_or" adds softplus(score), which is -log of the chance that no row needs the
    neuron, were the scores log odds of independent events. It is what `Polar` does: on
    books-OPT "sum" needs 0.86, 0.86 and 0.79 of the neurons for batches of 1, 8 and 64
    where the others need 0.32, 0.64 and 0.79.
    """
    return {
        "sum": lambda scores: jnp.maximum(scores, 0).sum(axis=1),
        "max": lambda scores: scores.max(axis=1),
        "noisy_or": lambda scores: jax.nn.softplus(scores).sum(axis=1),
    }


@dataclasses.dataclass(frozen=True)
class UnionRecall:
    """Recall of the true union of active neurons, at every number of neurons kept.

    Attributes:
      batches: batch sizes, ascending.
      counts: int64[c], numbers of neurons: multiples of a step, and all f.
      recall: by rule, float64[parts, batches, layers - 1, c]; a part of the text has
        sequences of its own, so that parts are independent samples.
      union: float64[batches, layers - 1], mean size of the true union, from layer 1 on.
    """

    batches: tuple[int, ...]
    counts: np.ndarray
    recall: Mapping[str, np.ndarray]
    union: np.ndarray

    def budgets(
        self, recall: float = 0.99, confidence: float = 0.999, rule: str = "noisy_or"
    ) -> NeuronBudgets:
        """The smallest counts that reach a recall, not by luck.

        Not the mean over the parts of the text must reach it but the lower end of the
        one-sided Student interval for one more part: so much margin as parts differ.
        With an interval for the mean alone, books-OPT missed 99 % on WikiText-2 by
        0.2 points for single tokens.

        Args:
          recall: of the true union, mean over batches, in each layer.
          confidence: of the interval.
          rule: that ranks neurons, see `union_rankings`.

        Returns:
          As `polarjax.policy.Learned.neuron_budgets`; layer 0 reads all.

        Raises:
          ValueError: if recall or confidence is out of range.
        """
        if not 0 < recall <= 1 or not 0.5 <= confidence < 1:
            raise ValueError(
                f"recall {recall} must be above 0 and at most 1, confidence "
                f"{confidence} from 0.5 to below 1"
            )
        found = self.recall[rule]
        parts = len(found)
        error = found.std(axis=0, ddof=1) * math.sqrt(1 + 1 / parts)
        low = found.mean(axis=0) - stats.t.ppf(confidence, parts - 1) * error
        # All neurons always suffice: the recall is 1 there, without a spread.
        needed = self.counts[(low >= recall).argmax(axis=-1)]
        f = int(self.counts[-1])
        return tuple(
            (b, (f, *map(int, row)))
            for b, row in zip(self.batches, needed, strict=True)
        )

    def reached(self, budgets: NeuronBudgets, rule: str = "noisy_or") -> np.ndarray:
        """Mean recall at given budgets, of these batch sizes.

        Args:
          budgets: as `polarjax.policy.Learned.neuron_budgets`. A count that was not
            measured stands for the next smaller one that was.
          rule: that ranks neurons.

        Returns:
          float64[batches, layers - 1].
        """
        kept = np.array([counts[1:] for _, counts in budgets])
        place = np.searchsorted(self.counts, kept, side="right") - 1
        mean = self.recall[rule].mean(axis=0)
        at = np.take_along_axis(mean, np.maximum(place, 0)[..., None], axis=-1)[..., 0]
        return np.where(place < 0, 0.0, at)
