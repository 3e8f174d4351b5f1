"""From what was measured to what is said of it: values, intervals, tests, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polarjax.evaluation.damage import Damage
from polarjax.evaluation.measure import Measured
from polarjax.evaluation.statistics import (
    Interval,
    difference_interval,
    fraction_interval,
    mcnemar,
    mean_interval,
    share_interval,
    within,
)
from polarjax.evaluation.tasks import Row, grade

FORMAT = 1
"""Of the files with results."""

_LARGEST = float(np.log(np.finfo(np.float64).max))

DENSE = "Dense"
"""The label of the policy that everything is paired with."""


def task_result(rows: Sequence[Row], found: Mapping[str, Measured]) -> dict[str, Any]:
    """What a task says of each policy.

    Args:
      rows: of the task.
      found: by policy, Dense among them.
    """
    target = rows[0].label is None
    answers = {k: grade(rows, m.nll, m.greedy) for k, m in found.items()}
    dense = answers[DENSE]
    results = {}
    for label, mine in answers.items():
        measured, per_byte = found[label], mine.right_per_byte
        result = {
            "accuracy": _bounds(share_interval(mine.right)),
            "accuracy_per_byte": None,
            "target_perplexity": None,
            "against_dense": None,
        }
        against: dict[str, Any] = {
            "accuracy": _bounds(difference_interval(mine.right, dense.right)),
            "accuracy_per_byte": None,
            "mcnemar_p": mcnemar(mine.right, dense.right),
            "mcnemar_p_per_byte": None,
            "gained": int((mine.right & ~dense.right).sum()),
            "lost": int((dense.right & ~mine.right).sum()),
            "target_perplexity_ratio": None,
        }
        if per_byte is not None and dense.right_per_byte is not None:
            result["accuracy_per_byte"] = _bounds(share_interval(per_byte))
            pair = per_byte, dense.right_per_byte
            against["accuracy_per_byte"] = _bounds(difference_interval(*pair))
            against["mcnemar_p_per_byte"] = mcnemar(*pair)
        if target:  # each target is one item, whatever its tokens: as lm-eval has it
            change = measured.nll - found[DENSE].nll
            # No token is more probable than certain: no perplexity is below 1.
            result["target_perplexity"] = _exp(within(mean_interval(measured.nll), 0))
            against["target_perplexity_ratio"] = _exp(mean_interval(change))
        if label != DENSE:
            result["against_dense"] = against
        results[label] = {
            **result,
            **_cost(measured),
            "right": mine.right.astype(int).tolist(),
            "right_per_byte": None
            if per_byte is None
            else per_byte.astype(int).tolist(),
            "nll": _rounded(measured.nll),
        }
    return {
        "kind": "target" if target else "choice",
        "ids": [row.id for row in rows],
        "results": results,
    }


def perplexity_result(
    facts: Mapping[str, Any], scored: Sequence[int], found: Mapping[str, Measured]
) -> dict[str, Any]:
    """What a text says of each policy.

    Args:
      facts: of the text and its windows; with "words" and "bytes", perplexities per
        word and byte are told too.
      scored: tokens of each window.
      found: by policy, Dense among them.
    """
    tokens, results = np.array(scored), {}
    dense = found[DENSE].nll / tokens
    for label, measured in found.items():
        mine = measured.nll / tokens  # per token
        mean = within(mean_interval(mine, tokens), 0)
        result: dict[str, Any] = {"perplexity": _exp(mean), "against_dense": None}
        if label != DENSE:
            ratio = _exp(mean_interval(mine - dense, tokens))
            result["against_dense"] = {"ratio": ratio}
        if "words" in facts:
            # The same sum, divided by words or bytes instead of tokens.
            for unit in ("word", "byte"):
                share = tokens.sum() / facts[f"{unit}s"]
                per_unit = Interval(*(share * x for x in mean))
                result[f"{unit}_perplexity"] = _exp(per_unit)
            bits = Interval(*(x / np.log(2) for x in per_unit))
            result["bits_per_byte"] = _bounds(bits)
        results[label] = {**result, **_cost(measured), "nll": _rounded(measured.nll)}
    return {**facts, "scored": list(scored), "results": results}


def damage_result(damage: Mapping[str, Damage], new_tokens: int) -> dict[str, Any]:
    """What the generated texts say of each sparse policy.

    Args:
      damage: by policy.
      new_tokens: of each text.
    """
    return {
        "results": {
            label: {
                "identical": _bounds(share_interval(d.same == new_tokens)),
                "tokens_until_divergence": _bounds(_tokens(d.same, new_tokens)),
                "kl": _bounds(within(mean_interval(d.kl.mean(axis=1)), 0)),
                "agreement": _bounds(fraction_interval(d.agree.mean(axis=1))),
                "density": d.density,
                "divergence": d.same.tolist(),
                "kl_per_token": [_rounded(row) for row in d.kl],
            }
            for label, d in damage.items()
        }
    }


def _tokens(same: np.ndarray, new_tokens: int) -> Interval:
    """Mean of tokens before the first that differs: from 1 to all of them."""
    further = fraction_interval((same - 1) / (new_tokens - 1))
    return Interval(*(1 + (new_tokens - 1) * x for x in further))


def _cost(measured: Measured) -> dict[str, Any]:
    return {
        "density": measured.density,
        "neuron_density": measured.neuron_density,
        "positions": measured.positions,
        "seconds": measured.seconds,
        "tokens_per_second": measured.positions / measured.seconds,
        "use": [_rounded(row) for row in measured.use / measured.positions],
    }


def _rounded(values: np.ndarray) -> list[float]:
    """As precise as float32 sums are: what is not known need not be stored."""
    return [round(float(value), 6) for value in values]


def _exp(interval: Interval) -> list[float | None]:
    """Exponentials; null for what a float cannot hold, and for bounds at infinity."""
    known = [np.isfinite(x) and x < _LARGEST for x in interval]
    return [
        float(np.exp(x)) if fits else None
        for x, fits in zip(interval, known, strict=True)
    ]


def _bounds(interval: Interval) -> list[float | None]:
    """JSON has no infinity: a bound that is not known is null."""
    return [float(x) if np.isfinite(x) else None for x in interval]
