"""The sparse policies: learned routers, true norms, and chance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import needed_neurons
from polarjax.config import ModelConfig
from polarjax.mesh.cut import TP, axis_size, mesh_of
from polarjax.params import Params, Tree
from polarjax.policies.budgets import (
    Density,
    HeadBudget,
    adaptive_budget,
    check_density,
    count,
    in_parts,
    static_density,
)
from polarjax.policies.budgets import head_budget as make_budget
from polarjax.policies.neurons import needed_of_share, neuron_counts
from polarjax.policies.routers import append_rows, head_scores
from polarjax.policies.updates import merge_updates
from polarjax.settings import draw_key

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Polar:
    """Heads by a learned router per sequence, neurons by one for the batch.

    The method of "Polar Sparsity" (arXiv 2505.14884), sections 4.1 and 4.2.

    Attributes:
      density: fraction of the KV groups to read, one number or one per request; None
        for the adapter's own budgets.
      neuron_density: fraction of the MLP neurons that the batch reads from layer 1 on
        (ReLU models whose adapter has neuron routers); None for the adapter's own
        budgets at this batch size, or all where it has none; 1 for all.
      adaptive: let each sequence read, at each step, the groups whose scores pass the
        adapter's thresholds, instead of a fixed number; without a density. An adapter
        whose budgets are means asks for it by itself.
      balanced: over how many devices the work is even: KV groups and neurons stand in
        so many equal parts, each of which gets as much of the budget, rounded up, and
        spends it on its own best. Another model than 1 (the best of all, whatever
        device they are on), wherever it runs. On a mesh a multiple of its "tp".
      budget: set by `bind`.
      neuron_budget: neurons that each layer reads, set by `bind`; 0 for all.
      head_routers: the second matrices [k, rank] of layers that have them, set by
        `bind`.
      neuron_routers: the second matrices [f, r] by layer, set by `bind`.
      score_rows: set by `bind`.
      kv_heads: k of the model, set by `bind`.
    """

    density: Density = dataclasses.field(default=None, metadata=_static)
    neuron_density: float | None = dataclasses.field(default=None, metadata=_static)
    adaptive: bool = dataclasses.field(default=False, metadata=_static)
    balanced: int = dataclasses.field(default=1, metadata=_static)
    budget: HeadBudget | None = None
    neuron_budget: tuple[int, ...] = dataclasses.field(default=(), metadata=_static)
    head_routers: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    neuron_routers: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    score_rows: tuple[int, ...] = dataclasses.field(default=(), metadata=_static)
    kv_heads: int = dataclasses.field(default=0, metadata=_static)

    wants_norms = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", static_density(self.density))

    def bind(self, params: Params, batch: int) -> tuple[Tree, Polar]:
        """Append the router rows; see `SelectionPolicy.bind`."""
        config = params.config
        if self.adaptive and self.density is not None:
            raise ValueError("pass either a density or adaptive=True, not both")
        parts, tp = self.balanced, axis_size(mesh_of(params.weights), TP)
        if parts > 1 and parts % tp:
            raise ValueError(
                f"selection is balanced over {parts} devices, but the model is cut "
                f"over {tp}: pass balanced={tp}"
            )
        if self.adaptive or (self.density is None and config.adaptive):
            if parts > 1:
                raise ValueError(
                    "thresholds choose among all KV groups: a balanced selection needs "
                    "a density, or an adapter with fixed budgets"
                )
            budget = adaptive_budget(config, batch)
        else:
            budget = make_budget(config, self.density, batch, parts)
        # A request at density 1 is promised its exact MLP, so the batch's is dense. An
        # adapter may leave all heads to all requests: none has asked for that promise.
        wants_dense = False
        if self.density is not None:
            all_heads = np.asarray(budget.counts) == config.kv_heads
            wants_dense = all_heads.all(axis=0).any()
        counts = (in_parts(n, parts) for n in self._neuron_counts(config, batch))
        neuron_budget = tuple(
            0 if n == config.neurons or wants_dense else n for n in counts
        )
        by_neurons = [i for i, n in enumerate(neuron_budget) if n]
        sparse = [i for i, limit in enumerate(budget.limits) if limit is not None]
        weights, rows = append_rows(merge_updates(params), sparse, by_neurons)
        head_routers = {
            i: params.routers[f"layers_{i}"]["heads"]["up"]
            for i in sparse
            if "up" in params.routers[f"layers_{i}"]["heads"]
        }
        neuron_routers = {
            i: params.routers[f"layers_{i}"]["neurons"]["up"].astype(params.dtype)
            for i in by_neurons
        }
        return weights, Polar(
            balanced=parts,
            budget=budget,
            neuron_budget=neuron_budget,
            head_routers=head_routers,
            neuron_routers=neuron_routers,
            score_rows=rows,
            kv_heads=config.kv_heads,
        )

    def _neuron_counts(self, config: ModelConfig, batch: int) -> tuple[int, ...]:
        """Neurons that each layer reads, unless a request wants them all."""
        if self.neuron_density is None:
            return neuron_counts(config, batch)
        n = count(check_density(self.neuron_density), config.neurons)
        if config.activation != "relu":
            raise ValueError(
                f"neuron sparsity needs a ReLU MLP, the model's is "
                f"{config.activation}: leave neuron_density out"
            )
        return (config.neurons, *(n,) * (config.layers - 1))

    def heads(self, layer, scores, norms, implementation=None):
        """The groups with the highest router scores."""
        del norms
        assert self.budget is not None
        ranking = None
        if scores is not None and self.budget.limits[layer] is not None:
            up = self.head_routers.get(layer)
            ranking = head_scores(scores, up, self.kv_heads)
        return self.budget.choose(layer, ranking, implementation)

    def neurons(self, layer, scores, live, implementation=None, share=None):
        """The neurons that the live batch is least likely to do without.

        The paper's sum of positive scores cannot tell apart neurons of which no
        sequence is sure.
        """
        if not self.neuron_budget[layer]:
            return None
        n, up = self.neuron_budget[layer], self.neuron_routers[layer]
        if share is not None or self.balanced > 1:
            parts = self.balanced
            return needed_of_share(scores, up, live, n, parts, share, implementation)
        return needed_neurons(scores, up, live, n, implementation=implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle:
    """The groups whose true output is largest: what a perfect router would pick.

    For measurement: it computes dense attention to know the norms. Neurons are dense.

    Attributes:
      density: as in `Polar`.
      budget: set by `bind`.
    """

    density: Density = dataclasses.field(default=None, metadata=_static)
    budget: HeadBudget | None = None

    wants_norms = True
    score_rows = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", static_density(self.density))

    def bind(self, params: Params, batch: int) -> tuple[Tree, Oracle]:
        """Only the budget, and recovery's updates; see `SelectionPolicy.bind`."""
        budget = make_budget(params.config, self.density, batch)
        return merge_updates(params).weights, Oracle(budget=budget)

    def heads(self, layer, scores, norms, implementation=None):
        """The groups with the largest output norms."""
        del scores
        assert self.budget is not None
        return self.budget.choose(layer, norms, implementation)

    def neurons(self, layer, scores, live, implementation=None, share=None) -> None:
        """Every neuron."""
        del layer, scores, live, implementation, share


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Random:
    """Groups by chance, drawn once per layer and request: the floor for a router.

    Attributes:
      density: as in `Polar`.
      seed: of the draw.
      budget: set by `bind`.
      ranking: float32[layers, b, k], set by `bind`.
    """

    density: Density = dataclasses.field(default=None, metadata=_static)
    seed: int = dataclasses.field(default=0, metadata=_static)
    budget: HeadBudget | None = None
    ranking: jax.Array | None = None

    wants_norms = False
    score_rows = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", static_density(self.density))

    def bind(self, params: Params, batch: int) -> tuple[Tree, Random]:
        """Draw; see `SelectionPolicy.bind`."""
        config = params.config
        if self.density is None and config.adaptive:
            # As many groups on average: a draw passes with the chance to be read.
            passing = [1 - n / config.kv_heads for n in config.budgets]
            budget = adaptive_budget(config, batch, passing)
        else:
            budget = make_budget(config, self.density, batch)
        ranking = random_ranking(config, batch, self.seed)
        return merge_updates(params).weights, Random(budget=budget, ranking=ranking)

    def heads(self, layer, scores, norms, implementation=None):
        """The groups that chance ranked first."""
        del scores, norms
        assert self.budget is not None and self.ranking is not None
        return self.budget.choose(layer, self.ranking[layer], implementation)

    def neurons(self, layer, scores, live, implementation=None, share=None) -> None:
        """Every neuron."""
        del layer, scores, live, implementation, share


def random_ranking(config: ModelConfig, batch: int, seed: int) -> jax.Array:
    """float32[layers, b, k], uniform in [0, 1); row i does not depend on b."""

    def draw(request: jax.Array) -> jax.Array:
        key = jax.random.fold_in(draw_key(seed), request)
        return jax.random.uniform(key, (config.layers, config.kv_heads), jnp.float32)

    return jax.vmap(draw, out_axes=1)(jnp.arange(batch))
