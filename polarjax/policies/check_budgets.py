"""Budgets of an adapter: KV groups that each layer reads, and by what thresholds."""

from __future__ import annotations

import math
import reprlib

from polarjax.config import ModelConfig
from polarjax.policies.neurons import check_neuron_budgets


def check_budgets(config: ModelConfig) -> None:
    """Raise unless a model's budgets and thresholds fit it.

    Args:
      config: of the model, with `budgets`, `adaptive`, `thresholds` and
        `neuron_budgets`.

    Raises:
      ValueError: naming what does not, and what would be right.
    """
    k, budgets = config.kv_heads, config.budgets
    right = all(type(n) in (int, float) and 1 <= n <= k for n in budgets)
    if len(budgets) != config.layers or not right or budgets[0] != k:
        raise ValueError(
            f"the adapter has budgets {reprlib.repr(budgets)}: they must be "
            f"{config.layers} numbers from 1 to {k}, the first of them {k}, as layer 0 "
            "is dense"
        )
    thresholds = config.thresholds
    finite = all(-math.inf < score < math.inf for score in thresholds)
    if config.adaptive and not thresholds:
        raise ValueError(
            "the adapter's budgets are means over tokens, which need thresholds: it "
            "has none"
        )
    if not config.adaptive and any(type(n) is not int for n in budgets):
        raise ValueError(
            f"the adapter has budgets {reprlib.repr(budgets)}: what is no whole number "
            'must be a mean over tokens, with "adaptive": true'
        )
    if thresholds and not (finite and len(thresholds) == config.layers):
        raise ValueError(
            f"the adapter has thresholds {reprlib.repr(thresholds)}: they must be "
            f"{config.layers} finite numbers"
        )
    check_neuron_budgets(config)
