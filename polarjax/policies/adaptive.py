"""Each token reads the heads whose router scores pass a threshold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.policies.budgets import asked_groups, check_density, count, neuron_counts
from polarjax.policies.routed import bind_routers
from polarjax.policy import Learned, Load, Policy, Reads
from polarjax.storage.quoted import quoted

_setting = {"static": True, "setting": True}
_static = {"static": True}


class OfAdapter(Policy):
    """A policy of an adapter, with the fields `learned`, `flexible` and `batch`."""

    def of(self, learned: Learned) -> Policy:
        """With the model's adapter, where it has none of its own."""
        own = self.learned.routers or self.learned.budgets
        return self if own else self._with(learned=learned)

    def flexing(self) -> Policy:
        """Ready for the densities that requests ask for."""
        return self._with(flexible=True)

    def sized(self, batch: int) -> Policy:
        """The neuron budgets of so many requests."""
        this: Any = self
        return self._with(batch=batch) if this.batch is None else self

    def _with(self, **fields: Any) -> Any:
        this: Any = self
        return dataclasses.replace(this, **fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adaptive(OfAdapter):
    """Heads whose learned scores pass the adapter's thresholds, one at the least.

    A request that asks for a density gets as many heads as that, whatever they score.

    Attributes:
      neuron_density: fraction of the MLP neurons that the batch reads from layer 1 on;
        None for the adapter's own budgets, 1 for all.
      flexible: whether requests may ask for densities of their own.
      batch: requests that the adapter's neuron budgets are taken for; None for as many
        as it has budgets for at most.
      asks: the questions that it answers.
      learned: of an adapter; empty for that of the model.
    """

    neuron_density: float | None = dataclasses.field(default=None, metadata=_setting)
    flexible: bool = dataclasses.field(default=False, metadata=_static)
    batch: int | None = dataclasses.field(default=None, metadata=_static)
    asks: tuple[str, ...] = dataclasses.field(
        default=("groups", "neurons"), metadata=_static
    )
    learned: Learned = dataclasses.field(default_factory=Learned, repr=False)

    def bind(self, params: Params) -> tuple[Tree, Policy]:
        """Append the router rows; see `Policy.bind`."""
        check_asks(self.asks)
        params = with_policy(params, self)
        config, learned = params.config, params.policy.learned
        thresholds = check_thresholds(learned)
        budgets = learned.budgets
        if "groups" not in self.asks:
            budgets, thresholds = (config.kv_heads,) * config.layers, ()
        return bind_routers(
            params,
            budgets,
            wanted_neurons(self, config, learned),
            flexible=self.flexible,
            thresholds=thresholds,
        )

    def reads(self, config: ModelConfig, load: Load) -> Reads:
        """What the budgets of its own adapter say, which are means over tokens."""
        groups = asked_groups(config, load)
        if groups is None:
            groups = tuple(map(float, self.learned.budgets))
        if "groups" not in self.asks:
            groups = (float(config.kv_heads),) * config.layers
        counts = wanted_neurons(self.sized(load.batch), config, self.learned)
        return Reads(groups, tuple(n / config.neurons for n in counts))


def check_asks(asks: tuple[str, ...]) -> None:
    """Raise unless these are questions that a policy of an adapter answers.

    Raises:
      ValueError: naming the first that is none.
    """
    if not isinstance(asks, tuple):
        raise ValueError(f"asks must be a tuple of names, got {quoted(asks)}")
    unknown = [name for name in asks if name not in ("groups", "neurons")]
    if unknown:
        raise ValueError(
            f'asks may name "groups" and "neurons", got {quoted(unknown[0])}'
        )


def check_thresholds(learned: Learned) -> tuple[float, ...]:
    """An adapter's thresholds.

    Raises:
      ValueError: if it has none.
    """
    if not learned.thresholds:
        raise ValueError(
            "an adaptive policy needs the thresholds that `polarjax calibrate` finds: "
            "load the model with an adapter that has them"
        )
    return learned.thresholds


def with_policy(params: Params, policy: Policy) -> Params:
    """The model with a policy's own adapter, where it has one."""
    if not policy.learned.routers and not policy.learned.budgets:
        return params
    return dataclasses.replace(params, policy=policy)


def wanted_neurons(
    policy: Any, config: ModelConfig, learned: Learned
) -> tuple[int, ...]:
    """Neurons that the batch reads in each layer.

    Args:
      policy: with the fields `neuron_density`, `batch` and `asks` of `Polar`.
      config: what the model is.
      learned: of the adapter.

    Raises:
      ValueError: if a density is asked of a model whose MLP is no ReLU's.
    """
    if "neurons" not in policy.asks:
        return (config.neurons,) * config.layers
    if policy.neuron_density is None:
        largest = max((b for b, _ in learned.neuron_budgets), default=1)
        return neuron_counts(config, learned, policy.batch or largest)
    n = count(check_density(policy.neuron_density, "neuron_density"), config.neurons)
    if config.activation != "relu":
        raise ValueError(
            f"neuron sparsity needs a ReLU MLP, the model's is "
            f"{config.activation}: leave neuron_density out"
        )
    return (config.neurons, *(n,) * (config.layers - 1))
