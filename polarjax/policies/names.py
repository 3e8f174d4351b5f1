"""The policies by name, for commands."""

from __future__ import annotations

from polarjax.policies.adaptive import Adaptive
from polarjax.policies.oracle import Oracle
from polarjax.policies.polar import Polar
from polarjax.policies.random import Random
from polarjax.policy import Dense, Policy
from polarjax.storage.quoted import quoted

NAMES = ("dense", "polar", "adaptive", "oracle", "random")


def named(
    name: str,
    density: float | None = None,
    neuron_density: float | None = None,
    balanced: int = 1,
) -> Policy:
    """A policy, not yet bound.

    Args:
      name: one of `NAMES`.
      density: of KV groups; None for the adapter's budgets.
      neuron_density: of MLP neurons, for "polar" and "adaptive"; None for the
        adapter's own budgets, or all where it has none.
      balanced: over how many devices the work of "polar" is even.

    Raises:
      ValueError: if there is no such policy, or it does not take what is given.
    """
    if name not in NAMES:
        others = ", ".join(sorted(NAMES[1:]))
        raise ValueError(f"no policy {quoted(name)}: there are dense, {others}")
    if name in ("dense", "adaptive") and density is not None:
        how = "reads all" if name == "dense" else "goes by thresholds"
        raise ValueError(f"the policy {name} takes no density: it {how}")
    if name not in ("polar", "adaptive") and neuron_density is not None:
        raise ValueError(f"the policy {name} takes no density of neurons")
    match name:
        case "polar":
            return Polar(density, neuron_density, balanced)
        case "adaptive":
            return Adaptive(neuron_density)
        case "oracle":
            return Oracle(density)
        case "random":
            return Random(density)
    return Dense()
