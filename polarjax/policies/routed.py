"""What the policies with learned routers become when they are bound to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from polarjax.config import ModelConfig
from polarjax.mesh.cut import TP
from polarjax.params import Params, Tree
from polarjax.policies.budgets import HeadBudget, asked_groups, in_parts
from polarjax.policies.routers import append_rows, head_scores
from polarjax.policies.updates import merge_updates
from polarjax.policy import Groups, Load, Policy, Reads, Rows, Seen, Wants

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed(Policy):
    """Heads by a learned router per sequence, neurons by one for the batch.

    Attributes:
      wants: the router rows in each QKV matrix.
      budget: KV groups that each request reads.
      parts: equal parts of the neurons, each of which keeps as many of its own.
      neuron_counts: by layer, neurons that the batch reads; 0 for all.
      neurons_there: neurons of the model in each layer.
      head_routers: by layer, the second matrices [k, rank] of routers that have them.
      neuron_routers: by layer, the second matrices [f, r].
    """

    wants: Wants = dataclasses.field(metadata=_static)
    budget: HeadBudget
    parts: int = dataclasses.field(metadata=_static)
    neuron_counts: tuple[int, ...] = dataclasses.field(metadata=_static)
    neurons_there: int = dataclasses.field(metadata=_static)
    head_routers: dict[int, jax.Array]
    neuron_routers: dict[int, jax.Array] = dataclasses.field(metadata={"cut": (TP,)})

    def groups(self, layer: int, seen: Seen, pick) -> Groups | None:
        """The groups with the highest router scores."""
        if self.budget.limits[layer] is None:
            return None
        up = self.head_routers.get(layer)
        scores = head_scores(seen.scores, up, self.budget.kv_heads)
        return self.budget.choose(layer, scores, seen.density, pick)

    def budgeted(
        self, budgets: Sequence[float], thresholds: Sequence[float] = ()
    ) -> Routed:
        """The same policy with other budgets; see `Policy.budgeted`."""
        return dataclasses.replace(self, budget=self.budget.having(budgets, thresholds))

    def neurons(self, layer: int, seen: Seen, pick) -> Rows | None:
        """The neurons that the live batch is least likely to do without.

        The paper's sum of positive scores cannot tell apart neurons of which no
        sequence is sure.
        """
        n = self.neuron_counts[layer]
        if not n:
            return None
        up = self.neuron_routers[layer]
        return pick.needed(seen.scores, up, seen.live, n, self.parts)

    def reads(self, config: ModelConfig, load: Load) -> Reads:
        """What the budgets say, as they were bound."""
        f = self.neurons_there
        groups = asked_groups(config, load) or self.budget.means()
        return Reads(groups, tuple((n or f) / f for n in self.neuron_counts))


def bind_routers(
    params: Params,
    budgets: tuple[float, ...],
    neuron_counts: tuple[int, ...],
    *,
    flexible: bool,
    thresholds: tuple[float, ...] = (),
    parts: int = 1,
) -> tuple[Tree, Routed]:
    """Append router rows to the weights, and make the policy that goes with them.

    Args:
      params: the model, with the policy whose routers are taken.
      budgets: KV groups by layer; means, with thresholds.
      neuron_counts: neurons by layer.
      flexible: whether requests may ask for densities of their own: then every layer
        but the first is ready to select, and ranks all of its groups.
      thresholds: by layer, of the router's scores; () for fixed budgets.
      parts: equal parts of groups and neurons.

    Raises:
      ValueError: if a layer that selects has no router.
    """
    config, routers = params.config, params.routers
    k, f = config.kv_heads, config.neurons
    budget = HeadBudget.of(k, budgets, thresholds, flexible=flexible, parts=parts)
    counts = tuple(in_parts(n, parts) for n in neuron_counts)
    counts = tuple(0 if n >= f else n for n in counts)
    by_heads = [i for i, most in enumerate(budget.limits) if most is not None]
    by_neurons = [i for i, n in enumerate(counts) if n]
    weights, rows = append_rows(merge_updates(params), by_heads, by_neurons)
    heads = {i: routers[f"layers_{i}"]["heads"] for i in by_heads}
    neurons = {i: routers[f"layers_{i}"]["neurons"]["up"] for i in by_neurons}
    return weights, Routed(
        wants=Wants(scores=rows),
        budget=budget,
        parts=parts,
        neuron_counts=counts,
        neurons_there=f,
        head_routers={i: part["up"] for i, part in heads.items() if "up" in part},
        neuron_routers={i: up.astype(params.dtype) for i, up in neurons.items()},
    )
