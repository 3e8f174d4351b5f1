"""How many KV groups and neurons are read: densities, and the budgets of adapters."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.policy import Groups, Learned, Load
from polarjax.storage.quoted import quoted

Density = float | Sequence[float] | None

# Counts between two measured batch sizes are rounded up to this (the paper's step).
NEURON_STEP = 128
# A density of 1/3 of three is one, whichever way it was rounded.
_SLACK = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadBudget:
    """How many KV groups each request reads: its own density, or the policy's budgets.

    Attributes:
      counts: by layer, int32[], KV groups that a request reads which asks for no
        density; float32[], their mean, with thresholds. To cut them out of one array
        was a kernel of its own in every layer.
      thresholds: by layer, float32[], the score from which on such a request reads a
        group instead, one at the least; () for the fixed counts.
      kv_heads: KV groups of the model, k.
      limits: by layer, the most that any request may read, which is compiled into the
        step; None where every request reads every group.
      flexible: whether requests may ask for densities of their own.
      parts: equal parts of the groups, each of which spends as much of a budget,
        rounded up, on its own best.
    """

    counts: tuple[jax.Array, ...]
    thresholds: tuple[jax.Array, ...]
    kv_heads: int = dataclasses.field(metadata={"static": True})
    limits: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    flexible: bool = dataclasses.field(metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def of(
        cls,
        kv_heads: int,
        budgets: Sequence[float],
        thresholds: Sequence[float] = (),
        *,
        flexible: bool,
        parts: int = 1,
    ) -> HeadBudget:
        """From budgets by layer.

        Args:
          kv_heads: KV groups of the model, k.
          budgets: KV groups by layer; means, with thresholds.
          thresholds: by layer; () for fixed budgets.
          flexible: whether requests may ask for densities of their own: then every
            layer but the first is ready to select.
          parts: equal parts of the groups, each of which spends as much of a budget.
        """

        def limit(layer: int, n: float) -> int | None:
            if layer and flexible and kv_heads > 1:
                return kv_heads
            if thresholds:
                return None if n == kv_heads else kv_heads
            whole = in_parts(int(n), parts)
            return None if whole == kv_heads else whole

        limits = tuple(limit(i, n) for i, n in enumerate(budgets))
        empty = cls((), (), kv_heads, limits, flexible, parts)
        return empty.having(budgets, thresholds)

    def having(
        self, budgets: Sequence[float], thresholds: Sequence[float] = ()
    ) -> HeadBudget:
        """The same, with other budgets as data: no program is compiled anew."""

        def number(n: float) -> jax.Array:
            whole = in_parts(math.ceil(n), self.parts)
            return jnp.float32(n) if thresholds else jnp.int32(whole)

        with jax.ensure_compile_time_eval():  # also where training binds in a jit
            return dataclasses.replace(
                self,
                counts=tuple(map(number, budgets)),
                thresholds=tuple(jnp.float32(x) for x in thresholds),
            )

    def means(self) -> tuple[float, ...]:
        """By layer, KV groups that a request reads which asks for no density."""
        return tuple(map(float, jax.device_get(self.counts)))

    def choose(
        self, layer: int, scores: jax.Array, density: jax.Array, pick: Any
    ) -> Groups | None:
        """The best groups of each request within its budget; None for every group.

        Args:
          layer: from 0.
          scores: float32[b, k], larger is better.
          density: float32[b], as in `polarjax.policy.Seen`; unused unless flexible.
          pick: `polarjax.model.Pick`.
        """
        limit, k = self.limits[layer], self.kv_heads
        if limit is None:
            return None
        index = pick.top(scores, limit, self.parts)
        own = self.counts[layer]
        if self.thresholds:
            own = jnp.minimum(pick.above(scores, self.thresholds[layer]), limit)
        if self.flexible:  # else it would be computed in every layer for nothing
            asked = jnp.floor(density * k + _SLACK).astype(jnp.int32)
            asked = in_parts(jnp.clip(asked, 1, limit), self.parts)
            own = jnp.where(density > 0, asked, own)
        return Groups(index, jnp.broadcast_to(own, density.shape).astype(jnp.int32))


def count(density: float, total: int) -> int:
    """How many of `total` heads (or neurons) a density keeps, at least 1."""
    return max(1, math.floor(density * total + _SLACK))


def asked_groups(config: ModelConfig, load: Load) -> tuple[float, ...] | None:
    """KV groups by layer of requests that ask for a density; None if they do not."""
    if load.density is None:
        return None
    k = float(config.kv_heads)
    return (k, *(load.density * k,) * (config.layers - 1))


def in_parts(n: Any, parts: int) -> Any:
    """The least number not below n of which equal parts have as many each."""
    return -(-n // parts) * parts


def check_parts(kv_heads: int, parts: int) -> None:
    """Raise unless KV groups stand in equal parts.

    Raises:
      ValueError: naming both numbers.
    """
    if parts < 1 or kv_heads % parts:
        raise ValueError(f"{kv_heads} KV groups do not divide into {parts} equal parts")


# Of any model one group at least is read; what is 0 in float32 would ask for nothing.
_LEAST_DENSITY = 2.0**-20


def check_density(density: Any, name: str = "density") -> float:
    """Raise unless a density is a number in (0, 1].

    Args:
      density: as it was set.
      name: of the setting.

    Raises:
      ValueError: naming the value.
    """
    if isinstance(density, np.ndarray | jax.Array):
        density = density.tolist()
    number = isinstance(density, int | float | np.number)
    if not number or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(
            f"{name} must be a number above 0 and at most 1, got {quoted(density)}"
        )
    return max(float(density), _LEAST_DENSITY)


def check_densities(density: Density, batch: int) -> np.ndarray:
    """What each request asked for, float32[b]; 0 for the policy's own budgets.

    Args:
      density: one number, one per request, or None.
      batch: requests, b.

    Raises:
      ValueError: if one is outside (0, 1], or there is not one per request.
    """
    if density is None:
        return np.zeros(batch, np.float32)
    if isinstance(density, np.ndarray | jax.Array):
        density = density.tolist()
    many = density if isinstance(density, list | tuple) else [density] * batch
    if len(many) != batch:
        raise ValueError(f"density has {len(many)} values for {batch} prompts")
    return np.array([check_density(d) for d in many], np.float32)


def uniform_budgets(config: ModelConfig, density: float) -> tuple[int, ...]:
    """KV groups by layer that a density keeps; layer 0's attention is always dense."""
    n = count(check_density(density), config.kv_heads)
    return (config.kv_heads, *(n,) * (config.layers - 1))


def fixed_budgets(
    config: ModelConfig, learned: Learned, density: float | None
) -> tuple[int, ...]:
    """KV groups that every request reads in each layer.

    Args:
      config: what the model is.
      learned: of the adapter.
      density: fraction of the KV groups to read from layer 1 on; None for the
        adapter's own budgets.

    Raises:
      ValueError: if a density is outside (0, 1], if there is neither density nor
        adapter, or if the adapter's budgets are means.
    """
    if density is not None:
        return uniform_budgets(config, density)
    if not learned.budgets:
        raise ValueError(
            "no density given and no adapter loaded that brings its own: pass "
            "generate density= (--density), or an Engine policy= with one, such as "
            "Polar(0.5); or load with adapter= (--adapter)"
        )
    if learned.adaptive:
        raise ValueError(
            f"the adapter's budgets {learned.budgets} are means over tokens: pass a "
            "density to read the same number of groups for each"
        )
    return tuple(int(n) for n in learned.budgets)


def neuron_counts(config: ModelConfig, learned: Learned, batch: int) -> tuple[int, ...]:
    """MLP neurons that each layer reads for a batch, by the adapter's own budgets.

    Between two measured batch sizes the count is interpolated over the logarithm of
    the batch size and rounded up to 128. Nothing is extrapolated: a batch below the
    smallest measured one reads what that one does (its union is no larger), a batch
    above the largest reads all neurons (nothing is known of its union, which grows).

    Args:
      config: what the model is.
      learned: of the adapter; without neuron budgets every neuron is read.
      batch: number of requests, b.

    Returns:
      A number from 1 to f for each layer.

    Raises:
      ValueError: if the budgets do not fit the model.
    """
    check_neuron_budgets(config, learned)
    f = config.neurons
    everything = (f,) * config.layers
    smaller = [entry for entry in learned.neuron_budgets if entry[0] <= batch]
    larger = [entry for entry in learned.neuron_budgets if entry[0] >= batch]
    if not larger:
        return everything
    high, counts_high = larger[0]
    low, counts_low = smaller[-1] if smaller else larger[0]
    if low == high:
        return counts_high
    weight = math.log(batch / low) / math.log(high / low)
    return tuple(
        round_up(a + weight * (b - a), NEURON_STEP, f)
        for a, b in zip(counts_low, counts_high, strict=True)
    )


def round_up(count: float, step: int, neurons: int) -> int:
    """The next multiple of `step`, at most all neurons."""
    return min(neurons, math.ceil(count / step - 1e-9) * step)  # of a float, perhaps


def check_budgets(config: ModelConfig, learned: Learned) -> None:
    """Raise unless an adapter's budgets and thresholds fit a model.

    Args:
      config: what the model is.
      learned: of the adapter.

    Raises:
      ValueError: naming what does not, and what would be right.
    """
    k, budgets = config.kv_heads, learned.budgets
    right = all(type(n) in (int, float) and 1 <= n <= k for n in budgets)
    if len(budgets) != config.layers or not right or budgets[0] != k:
        raise ValueError(
            f"the adapter has budgets {reprlib.repr(budgets)}: they must be "
            f"{config.layers} numbers from 1 to {k}, the first of them {k}, as layer 0 "
            "is dense"
        )
    thresholds = learned.thresholds
    finite = all(-math.inf < score < math.inf for score in thresholds)
    if learned.adaptive and not thresholds:
        raise ValueError(
            "the adapter's budgets are means over tokens, which need thresholds: it "
            "has none"
        )
    if not learned.adaptive and any(type(n) is not int for n in budgets):
        raise ValueError(
            f"the adapter has budgets {reprlib.repr(budgets)}: what is no whole number "
            'must be a mean over tokens, with "adaptive": true'
        )
    if thresholds and not (finite and len(thresholds) == config.layers):
        raise ValueError(
            f"the adapter has thresholds {reprlib.repr(thresholds)}: they must be "
            f"{config.layers} finite numbers"
        )
    check_neuron_budgets(config, learned)


def check_neuron_budgets(config: ModelConfig, learned: Learned) -> None:
    """Raise unless an adapter's neuron budgets, if it has any, fit a model.

    Args:
      config: what the model is.
      learned: of the adapter.

    Raises:
      ValueError: naming the first that does not.
    """
    f, last = config.neurons, 0
    if learned.neuron_budgets and config.activation != "relu":
        raise ValueError(
            f"neuron budgets need a ReLU MLP, the model's is {config.activation}"
        )
    for batch, counts in learned.neuron_budgets:
        if type(batch) is not int or batch <= last:
            raise ValueError(
                f"neuron budgets for batch {batch!r} after {last}: batch sizes must be "
                "whole numbers from 1 that grow"
            )
        right = all(type(n) is int and 1 <= n <= f for n in counts)
        if len(counts) != config.layers or not right or counts[0] != f:
            raise ValueError(
                f"neuron budgets {reprlib.repr(counts)} for batch {batch}: they must "
                f"be {config.layers} numbers from 1 to {f}, the first of them {f}, as "
                "layer 0 is dense"
            )
        last = batch
