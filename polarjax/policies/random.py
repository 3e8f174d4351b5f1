"""Heads by chance: the floor for a router."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.policies.adaptive import with_policy
from polarjax.policies.budgets import HeadBudget, fixed_budgets
from polarjax.policies.updates import merge_updates
from polarjax.policy import Groups, Learned, Load, Policy, Seen
from polarjax.settings import draw_key
from polarjax.storage.quoted import quoted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """Groups by chance, drawn once per layer and request.

    Attributes:
      density: fraction of the KV groups to read from layer 1 on; None for the
        adapter's own budgets.
      seed: of the draw.
      learned: of an adapter, for its budgets; empty for that of the model.
      budget: KV groups that each request reads, set by `bind`.
    """

    density: float | None = dataclasses.field(
        default=None, metadata={"static": True, "setting": True}
    )
    seed: int = dataclasses.field(default=0, metadata={"static": True, "setting": True})
    learned: Learned = dataclasses.field(default_factory=Learned, repr=False)
    budget: HeadBudget | None = dataclasses.field(default=None, repr=False)

    flexible = True

    def bind(self, params: Params) -> tuple[Tree, Policy]:
        """Only the budgets, and recovery's updates; see `Policy.bind`."""
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed must be an integer from 0 to 2**32 - 1, got {quoted(self.seed)}"
            )
        params = with_policy(params, self)
        config, learned = params.config, params.policy.learned
        k, passing = config.kv_heads, ()
        if self.density is None and learned.adaptive:
            # As many groups on average: a draw passes with the chance to be read.
            budgets, passing = learned.budgets, [1 - n / k for n in learned.budgets]
        else:
            budgets = fixed_budgets(config, learned, self.density)
        budget = HeadBudget.of(k, budgets, passing, flexible=True)
        return merge_updates(params).weights, Random(seed=self.seed, budget=budget)

    def groups(self, layer: int, seen: Seen, pick) -> Groups | None:
        """The groups that chance ranked first."""
        assert self.budget is not None
        layers, k = len(self.budget.limits), self.budget.kv_heads
        drawn = draw(self.seed, seen.slot, layers, k)[:, layer]
        return self.budget.choose(layer, drawn, seen.density, pick)

    def budgeted(
        self, budgets: Sequence[float], thresholds: Sequence[float] = ()
    ) -> Random:
        """The same policy with other budgets; see `Policy.budgeted`."""
        assert self.budget is not None and not thresholds
        return dataclasses.replace(self, budget=self.budget.having(budgets))

    def reads(self, config: ModelConfig, load: Load) -> None:
        """Nothing that is planned: it measures what chance is worth."""


def draw(seed: int, slot: jax.Array, layers: int, k: int) -> jax.Array:
    """float32[b, layers, k], uniform in [0, 1); of a row's number alone.

    Args:
      seed: of the draw.
      slot: int32[b], number of each row.
      layers: of the model.
      k: KV groups.
    """

    def one(slot: jax.Array) -> jax.Array:
        key = jax.random.fold_in(draw_key(seed), slot)
        return jax.random.uniform(key, (layers, k), jnp.float32)

    return jax.vmap(one)(slot)
