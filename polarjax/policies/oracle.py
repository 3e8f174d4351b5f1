"""The heads that a perfect router would pick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.policies.adaptive import with_policy
from polarjax.policies.budgets import HeadBudget, fixed_budgets
from polarjax.policies.updates import merge_updates
from polarjax.policy import Groups, Learned, Load, Policy, Seen, Wants


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Policy):
    """The groups whose true output is largest.

    For measurement: it computes dense attention to know the norms. Neurons are dense.

    Attributes:
      density: fraction of the KV groups to read from layer 1 on; None for the
        adapter's own budgets.
      learned: of an adapter, for its budgets; empty for that of the model.
      budget: KV groups that each request reads, set by `bind`.
    """

    density: float | None = dataclasses.field(
        default=None, metadata={"static": True, "setting": True}
    )
    learned: Learned = dataclasses.field(default_factory=Learned, repr=False)
    budget: HeadBudget | None = dataclasses.field(default=None, repr=False)

    wants = Wants(norms=True)
    flexible = True

    def bind(self, params: Params) -> tuple[Tree, Policy]:
        """Only the budgets, and recovery's updates; see `Policy.bind`."""
        params = with_policy(params, self)
        config = params.config
        budgets = fixed_budgets(config, params.policy.learned, self.density)
        budget = HeadBudget.of(config.kv_heads, budgets, flexible=True)
        return merge_updates(params).weights, Oracle(budget=budget)

    def groups(self, layer: int, seen: Seen, pick) -> Groups | None:
        """The groups with the largest output norms."""
        assert self.budget is not None
        return self.budget.choose(layer, seen.norms, seen.density, pick)

    def budgeted(
        self, budgets: Sequence[float], thresholds: Sequence[float] = ()
    ) -> Oracle:
        """The same policy with other budgets; see `Policy.budgeted`."""
        assert self.budget is not None and not thresholds
        return dataclasses.replace(self, budget=self.budget.having(budgets))

    def reads(self, config: ModelConfig, load: Load) -> None:
        """Nothing that could be planned: it reads all to know what it could leave."""
