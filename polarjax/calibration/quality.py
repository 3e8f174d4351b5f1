"""What budgets are worth on held-out text, by domain: for cards and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from polarjax.evaluation import (
    Continuation,
    Mode,
    Perplexity,
    Recall,
    perplexity,
    router_recall,
)
from polarjax.evaluation.measure import Progress
from polarjax.mesh.cut import model_shapes, whole_routers
from polarjax.params import Params, taught
from polarjax.planning.cost import step_cost
from polarjax.policies import named
from polarjax.policy import Dense, Policy, Reads

# More perplexity than this, relative to dense, is said. The adapters that ship lose up
# to 0.12, on what the model itself writes.
_MUCH = 0.15


def measure_recall(
    params: Params, held_out: Mapping[str, np.ndarray]
) -> dict[str, Recall]:
    """By domain, of the routers at the budgets."""
    return {
        name: router_recall(params, held[:, None]) for name, held in held_out.items()
    }


def measure_quality(
    params: Params,
    held_out: Mapping[str, np.ndarray],
    mode: Mode,
    progress: Progress | None = None,
    batch: int = 16,
) -> dict[str, dict[str, Perplexity]]:
    """By domain, perplexity of the model's budgets beside dense, oracle and chance.

    Budgets that are means over tokens have no oracle: how many groups a token needs is
    more than its norms tell.
    """
    say = progress or (lambda *_: None)
    policies: dict[str, Policy] = {"Dense": Dense()}
    learned = params.policy.learned
    if not learned.adaptive:
        policies["Oracle"] = named("oracle")
    policies |= {"Polar": named("polar"), "Random": named("random")}
    if learned.thresholds and not learned.adaptive:
        policies["Adaptive"] = named("adaptive")
    return {
        name: perplexity(
            params,
            windows(held),
            policies,
            mode=mode,
            batch=batch,
            name=name,
            progress=lambda what, *counts, name=name: say(f"{name}: {what}", *counts),
        )
        for name, held in held_out.items()
    }


def windows(blocks: np.ndarray) -> list[Continuation]:
    """Each block as a window, of which the first 64 tokens, or half, are not scored."""
    length = blocks.shape[1]
    scored = length - min(64, length // 2)
    return [
        Continuation(tuple(map(int, block)), scored, f"window {i}")
        for i, block in enumerate(blocks)
    ]


def much_lost(
    quality: Mapping[str, Mapping[str, Perplexity]], allowed: float | None = None
) -> str | None:
    """That the budgets cost much quality, on the text that loses most; None if not.

    Args:
      quality: by domain and policy, "Polar" and "Dense" among them.
      allowed: relative increase of perplexity that was asked for; None if nothing was.
    """
    losses = {
        name: found["Polar"].value / found["Dense"].value - 1
        for name, found in quality.items()
    }
    name = max(losses, key=lambda name: losses[name])
    if losses[name] <= max(_MUCH, allowed or _MUCH):
        return None
    return f"perplexity of {name} is {losses[name]:.0%} above the dense model's"


def cost_and_warning(params: Params, warning: str | None) -> dict[str, Any]:
    """What a card says of an adapter's cost: a speed-up only if quality is kept.

    Args:
      params: the model with routers and budgets.
      warning: that it is not, or None.
    """
    cost = cost_card(params)
    if warning:
        del cost["expected_speedup"]
        return {"warning": warning, "cost": cost}
    return {"cost": cost}


def cost_card(params: Params, batch: int = 16, context: int = 2048) -> dict[str, Any]:
    """What a decode step of the budgets reads beside dense, as JSON values.

    The speed-up is that of memory's floor: no step is faster, and few as fast.
    """
    config, budgets = params.config, params.policy.learned.budgets
    shapes = model_shapes(params.weights, config)
    whole = dataclasses.replace(params, weights=shapes)
    cost = step_cost(taught(whole, whole_routers(params)), batch=batch, context=context)
    everything = Reads.everything(config)
    dense = cost.bytes_read(everything)
    sparse = cost.bytes_read(Reads(budgets, everything.neurons))
    return {
        "batch": batch,
        "context": context,
        "density": round(sum(budgets) / config.kv_heads / config.layers, 5),
        "step_bytes": sparse,
        "step_bytes_dense": dense,
        "bytes_saved": dense - sparse,
        "expected_speedup": round(dense / sparse, 4),
    }


def quality_card(quality: Mapping[str, Mapping[str, Perplexity]]) -> dict[str, Any]:
    """Perplexities as JSON values, each beside dense with a 95 % interval."""
    return {
        domain: {
            name: {
                "perplexity": round(p.value, 4),
                "ratio_to_dense": [round(x, 5) for x in p.ratio(found["Dense"])],
                "density": round(p.density, 4),
                "windows": len(p.nll),
                "tokens": int(p.scored.sum()),
            }
            for name, p in found.items()
        }
        for domain, found in quality.items()
    }
