"""Polar Sparsity: fixed budgets of heads for each request, of neurons for the batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from polarjax.config import ModelConfig
from polarjax.mesh.cut import TP, axis_size, mesh_of
from polarjax.params import Params, Tree
from polarjax.policies.adaptive import (
    Adaptive,
    OfAdapter,
    check_asks,
    wanted_neurons,
    with_policy,
)
from polarjax.policies.budgets import (
    asked_groups,
    check_density,
    check_parts,
    count,
    fixed_budgets,
    in_parts,
)
from polarjax.policies.routed import bind_routers
from polarjax.policy import Learned, Load, Policy, Reads
from polarjax.storage.quoted import quoted

_setting = {"static": True, "setting": True}
_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Polar(OfAdapter):
    """Heads by a learned router per sequence, neurons by one for the batch.

    The method of "Polar Sparsity" (arXiv 2505.14884), sections 4.1 and 4.2. Bound to
    an adapter whose budgets are means, and without a density, it is `Adaptive`.

    Attributes:
      density: fraction of the KV groups to read from layer 1 on; None for the
        adapter's own budgets. Requests that ask for a density of their own get that.
      neuron_density: fraction of the MLP neurons that the batch reads from layer 1 on
        (ReLU models whose adapter has neuron routers); None for the adapter's own
        budgets at this batch size, or all where it has none; 1 for all.
      balanced: over how many devices the work is even: KV groups and neurons stand in
        so many equal parts, each of which gets as much of the budget, rounded up, and
        spends it on its own best. Another model than 1 (the best of all, whatever
        device they are on), wherever it runs. On a mesh a multiple of its "tp".
      flexible: whether requests may ask for densities of their own.
      batch: requests that the adapter's neuron budgets are taken for; None for as many
        as it has budgets for at most.
      asks: the questions that it answers.
      learned: of an adapter; empty for that of the model.
    """

    density: float | None = dataclasses.field(default=None, metadata=_setting)
    neuron_density: float | None = dataclasses.field(default=None, metadata=_setting)
    balanced: int = dataclasses.field(default=1, metadata=_setting)
    flexible: bool = dataclasses.field(default=False, metadata=_static)
    batch: int | None = dataclasses.field(default=None, metadata=_static)
    asks: tuple[str, ...] = dataclasses.field(
        default=("groups", "neurons"), metadata=_static
    )
    learned: Learned = dataclasses.field(default_factory=Learned, repr=False)

    def bind(self, params: Params) -> tuple[Tree, Policy]:
        """Append the router rows; see `Policy.bind`."""
        check_asks(self.asks)
        for name, value in (
            ("balanced", self.balanced),
            ("batch", 1 if self.batch is None else self.batch),
        ):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"{name} must be a positive integer, got {quoted(value)}"
                )
        params = with_policy(params, self)
        config, learned = params.config, params.policy.learned
        tp = axis_size(mesh_of(params.weights), TP)
        if self.balanced > 1 and self.balanced % tp:
            raise ValueError(
                f"selection is balanced over {self.balanced} devices, but the model "
                f"is cut over {tp}: pass balanced={tp}"
            )
        if self._by_thresholds(learned):
            if self.balanced > 1:
                raise ValueError(
                    "thresholds choose among all KV groups: a balanced selection needs "
                    "a density, or an adapter with fixed budgets"
                )
            return self._adaptive().bind(params)
        check_parts(config.kv_heads, self.balanced)
        return bind_routers(
            params,
            self._budgets(config, learned),
            self._neuron_counts(config, learned),
            flexible=self.flexible,
            parts=self.balanced,
        )

    def reads(self, config: ModelConfig, load: Load) -> Reads:
        """What the budgets of its own adapter say, or its densities."""
        if self._by_thresholds(self.learned):
            return self._adaptive().reads(config, load)
        f = config.neurons
        sized: Any = self.sized(load.batch)
        counts = sized._neuron_counts(config, self.learned)
        groups = asked_groups(config, load)
        if groups is None:
            groups = tuple(map(float, self._budgets(config, self.learned)))
        return Reads(groups, tuple(n / f for n in counts))

    def _by_thresholds(self, learned: Learned) -> bool:
        return self.density is None and learned.adaptive and "groups" in self.asks

    def _adaptive(self) -> Adaptive:
        return Adaptive(
            neuron_density=self.neuron_density,
            flexible=self.flexible,
            batch=self.batch,
            asks=self.asks,
            learned=self.learned,
        )

    def _budgets(self, config: ModelConfig, learned: Learned) -> tuple[int, ...]:
        own = self.density is not None or bool(learned.budgets)
        if "groups" not in self.asks or (self.flexible and not own):
            return (config.kv_heads,) * config.layers  # but what a request asks for
        return fixed_budgets(config, learned, self.density)

    def _neuron_counts(self, config: ModelConfig, learned: Learned) -> tuple[int, ...]:
        wanted, k = wanted_neurons(self, config, learned), config.kv_heads
        if self.density is None:
            return wanted
        # A request at density 1 is promised its exact MLP. An adapter may leave all
        # heads to all requests: none has asked for that promise.
        groups = in_parts(count(check_density(self.density), k), self.balanced)
        return (config.neurons,) * config.layers if groups == k else wanted
