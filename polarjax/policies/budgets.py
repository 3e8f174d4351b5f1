"""Densities to budgets: how many KV groups each request reads in each layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation, top_heads
from polarjax.config import ModelConfig
from polarjax.params import Params

Density = float | Sequence[float] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadBudget:
    """KV groups to read, by layer and request.

    Attributes:
      counts: per layer, int32[b]. To cut them out of one array was a kernel of its own
        in every layer.
      limits: per layer, the largest count of the batch, which is compiled into the
        step; None where every request reads every group.
      thresholds: float32[layers]; a sequence then reads the groups that score at least
        as much, one at the least, and `counts` are not asked. None for fixed counts.
      parts: equal parts of the groups, of each of which as many are read.
    """

    counts: tuple[jax.Array, ...]
    limits: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    thresholds: jax.Array | None = None
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    def choose(
        self,
        layer: int,
        ranking: jax.Array | None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, jax.Array] | None:
        """The best groups of each request within its budget.

        Args:
          layer: from 0.
          ranking: float[b, k], larger is better.
          implementation: of the selection kernel.

        Returns:
          (indices int32[b, limit], n_active int32[b]), or None for every group.
        """
        limit = self.limits[layer]
        if limit is None:
            return None
        assert ranking is not None
        if self.parts > 1:
            chosen = self._best_of_parts(ranking, limit, implementation)
            return chosen, self.counts[layer]
        chosen = top_heads(ranking, limit, implementation=implementation)
        if self.thresholds is None:
            return chosen, self.counts[layer]
        above = (ranking >= self.thresholds[layer]).sum(axis=1, dtype=jnp.int32)
        return chosen, jnp.clip(above, 1, limit)

    def _best_of_parts(self, ranking: jax.Array, limit: int, implementation: Any):
        """The best of each part, then the second best, ..., int32[b, limit]."""
        b, k = ranking.shape
        parts, each = ranking.reshape(b * self.parts, -1), limit // self.parts
        chosen = top_heads(parts, each, implementation=implementation)
        first = jnp.arange(self.parts, dtype=jnp.int32) * (k // self.parts)
        chosen = chosen.reshape(b, self.parts, each) + first[:, None]
        return chosen.swapaxes(1, 2).reshape(b, limit)


def static_density(density: Any) -> Any:
    """A form that hashes, a tuple where there is one density per request.

    Anything odd is left for the check.
    """
    if isinstance(density, np.ndarray | jax.Array):
        density = density.tolist()
    return tuple(density) if isinstance(density, list | tuple) else density


def count(density: float, total: int) -> int:
    """How many of `total` heads (or neurons) a density keeps, at least 1."""
    return max(1, math.floor(density * total + 1e-4))


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


def check_density(density: Any) -> float:
    """Raise unless a density is a number in (0, 1].

    Raises:
      ValueError: naming the value.
    """
    number = isinstance(density, int | float | np.number)
    if not number or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(
            f"density must be a number above 0 and at most 1, got {density!r}"
        )
    return float(density)


def head_budget(
    config: ModelConfig, density: Density, batch: int, parts: int = 1
) -> HeadBudget:
    """Budgets for a batch. Layer 0's attention is always dense.

    Args:
      config: of the model.
      density: fraction of the KV groups to read from layer 1 on, one number or one
        per request; None for the adapter's own budgets.
      batch: number of requests, b.
      parts: equal parts of the groups, each of which gets as much of the budget,
        rounded up.

    Raises:
      ValueError: if a density is outside (0, 1], if there is not one per request, if
        there is neither density nor adapter, if the adapter's budgets are means, or if
        the groups do not divide into parts.
    """
    k = config.kv_heads
    check_parts(k, parts)
    if density is None:
        if not config.budgets:
            raise ValueError(
                "no density given and no adapter loaded that brings its own: pass "
                "density= (--density), or load with adapter= (--adapter)"
            )
        if config.adaptive:
            raise ValueError(
                f"the adapter's budgets {config.budgets} are means over tokens: pass a "
                "density to read the same number of groups for each"
            )
        table = np.repeat(np.array(config.budgets, np.int32)[:, None], batch, axis=1)
    else:
        density = static_density(density)
        densities = density if isinstance(density, tuple) else [density] * batch
        if len(densities) != batch:
            raise ValueError(f"{len(densities)} densities for {batch} prompts")
        counts = [count(check_density(d), k) for d in densities]
        table = np.array([[k] * batch, *[counts] * (config.layers - 1)], np.int32)
    table = in_parts(table, parts).astype(np.int32)
    limits = tuple(None if row.min() == k else int(row.max()) for row in table)
    with jax.ensure_compile_time_eval():  # known, also where training binds in a jit
        return HeadBudget(tuple(map(jnp.asarray, table)), limits, parts=parts)


def with_density(params: Params, density: float) -> Params:
    """The model with uniform budgets, and no thresholds, in place of its adapter's.

    Args:
      params: the model.
      density: fraction of the KV groups to read from layer 1 on.
    """
    k = params.config.kv_heads
    n = count(check_density(density), k)
    budgets = (k, *(n,) * (params.config.layers - 1))
    config = dataclasses.replace(
        params.config, budgets=budgets, adaptive=False, thresholds=()
    )
    return dataclasses.replace(params, config=config)


def adaptive_budget(
    config: ModelConfig, batch: int, thresholds: Sequence[float] | None = None
) -> HeadBudget:
    """As many groups as score above thresholds, at each step.

    Args:
      config: of the model.
      batch: number of requests, b.
      thresholds: by layer; None for the adapter's, which are of its routers' scores.

    Raises:
      ValueError: if the adapter brings no thresholds.
    """
    thresholds = config.thresholds if thresholds is None else thresholds
    if not thresholds:
        raise ValueError(
            "an adaptive policy needs the thresholds that `polarjax calibrate` finds: "
            "load the model with an adapter that has them"
        )
    k = config.kv_heads
    counts = np.repeat(np.ceil(config.budgets)[:, None], batch, axis=1)
    with jax.ensure_compile_time_eval():
        return HeadBudget(
            tuple(jnp.asarray(row, jnp.int32) for row in counts),
            tuple(None if n == k else k for n in config.budgets),
            jnp.asarray(thresholds, jnp.float32),
        )
