"""Whether selecting heads, or neurons, is faster than reading them all.

A sparse axis saves bytes and costs launches: the selection, and kernels with less to do
each. A step's time is predicted as bytes / bandwidth, plus microseconds per layer that
`python -m benchmarks.measure_overheads` has measured on this kind of device.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.tables import file_name, mlp_dense_above
from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.planning.cost import StepCost, neuron_densities, step_cost
from polarjax.policies import Polar
from polarjax.policies.budgets import with_density
from polarjax.policies.neurons import neuron_counts
from polarjax.policy import SelectionPolicy


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What selection costs in a layer, whatever it saves, for a batch.

    Attributes:
      batch: at which it was measured.
      heads_us: microseconds of a layer that selects heads, beyond its bytes.
      neurons_us: of one that selects neurons.
    """

    batch: int
    heads_us: float
    neurons_us: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """A decode step.

    Attributes:
      seconds: it took.
      bytes: it had to read.
      layers: of it that select.
    """

    seconds: float
    bytes: float
    layers: int = 0

    def overhead_us(self, dense: Measured, bandwidth: float) -> float:
        """Microseconds per selecting layer that bytes do not explain, at least 0.

        Args:
          dense: the same step, with nothing selected.
          bandwidth: bytes per second.
        """
        saved = (dense.bytes - self.bytes) / bandwidth
        return max(0.0, (self.seconds - dense.seconds + saved) / self.layers * 1e6)


def fit(
    batch: int, dense: Measured, heads: Measured, neurons: Measured, bandwidth: float
) -> Overhead:
    """Overheads from three steps of one model at a short context.

    Args:
      batch: of all three.
      dense: nothing selected.
      heads: heads alone.
      neurons: neurons alone.
      bandwidth: bytes per second.
    """
    return Overhead(
        batch,
        heads.overhead_us(dense, bandwidth),
        neurons.overhead_us(dense, bandwidth),
    )


def parse(text: str, source: str) -> tuple[Overhead, ...]:
    """Read a table of overheads.

    Args:
      text: JSON: {"device": ..., "overheads": [{"batch": ..., "heads_us": ...,
        "neurons_us": ...}, ...], ...}.
      source: names it in errors.

    Raises:
      ValueError: if it is none.
    """
    try:
        found = tuple(Overhead(**entry) for entry in json.loads(text)["overheads"])
        numbers = [x for o in found for x in dataclasses.astuple(o)]
        right = found and all(math.isfinite(x) and x >= 0 for x in numbers)
        if not right or min(o.batch for o in found) < 1:
            raise ValueError("its numbers must be finite, none below 0, batches from 1")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{source} is no table of overheads: {error}") from None
    return found


@functools.cache
def shipped(device_kind: str) -> tuple[Overhead, ...]:
    """What was measured on a kind of device; empty if nothing was."""
    folder = importlib.resources.files("polarjax.planning") / "overheads"
    file = folder / file_name(device_kind)
    if not file.is_file():
        return ()
    return parse(file.read_text(encoding="utf-8"), str(file))


def nearest(overheads: Sequence[Overhead], batch: int) -> Overhead:
    """The one whose batch is nearest, by ratio."""
    return min(overheads, key=lambda o: abs(math.log(o.batch / batch)))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a decode step, without what dense and sparse steps have in common.

    Attributes:
      cost: byte model of the batch at its mean context.
      bandwidth: bytes per second.
      overhead: of selection.
      dense_above: fraction of the neurons above which the MLP reads them all, as it
        was measured to be faster so.
    """

    cost: StepCost
    bandwidth: float
    overhead: Overhead
    dense_above: float = 1.0

    def seconds(self, budgets: Sequence[float], densities: Sequence[float]) -> float:
        """Of a step.

        Args:
          budgets: KV groups that each sequence reads, by layer.
          densities: fraction of the neurons that the batch reads, by layer.
        """
        heads = sum(n < self.cost.kv_heads for n in budgets)
        neurons = sum(density < 1 for density in densities)
        launches = heads * self.overhead.heads_us + neurons * self.overhead.neurons_us
        read = self.cost.bytes_read(budgets, densities)
        mlps = zip(densities, self.cost.neurons, strict=True)
        read += sum((1 - d) * n for d, n in mlps if d > self.dense_above)
        return read / self.bandwidth + launches * 1e-6


def bind_where_it_pays(
    params: Params, policy: SelectionPolicy, asked: bool, batch: int, context: int
) -> tuple[Tree, SelectionPolicy, tuple[str, ...]]:
    """Bind a policy, without the sparse axes that would make the step slower.

    What the user asked for is done as it was asked, and a note says if it is predicted
    to be slower than dense. Where no overheads were measured, nothing is turned off.

    Args:
      params: the model.
      policy: not yet bound.
      asked: whether the user chose it, or a density; else the adapter's budgets count.
      batch: number of requests, b.
      context: tokens in the cache of each, a mean over the requests and their steps.

    Returns:
      As `SelectionPolicy.bind`, and notes for `Stats`.
    """
    config, notes = params.config, []
    devices = list(params.weights["embed"]["tokens"].devices())
    overheads = shipped(devices[0].device_kind) if len(devices) == 1 else ()
    budgeted = asked or bool(config.budgets)
    if not overheads or not isinstance(policy, Polar) or not budgeted:
        weights, bound = policy.bind(params, batch)
        return weights, bound, ()
    prediction = Prediction(
        step_cost(params, batch=batch, context=context),
        read_bandwidth(devices[0]),
        nearest(overheads, batch),
        _dense_above(params, batch),
    )
    everything = (config.kv_heads,) * config.layers, (1.0,) * config.layers
    if not asked:
        heads, neurons, notes = _axes(prediction, config, batch)
        # All groups in every layer, and still what recovery made of the weights.
        params = params if heads else with_density(params, 1.0)
        policy = policy if neurons else dataclasses.replace(policy, neuron_density=1.0)
    weights, bound = policy.bind(params, batch)
    if asked:
        sparse = prediction.seconds(*_reads(config, bound))
        dense = prediction.seconds(*everything)
        if sparse > dense:
            notes.append(
                "slower than dense, as predicted from bytes and measured overheads: by "
                f"{(sparse - dense) * 1e3:.3f} ms a step ({sparse / dense - 1:.1%})"
            )
    return weights, bound, tuple(notes)


def _axes(
    prediction: Prediction, config: ModelConfig, batch: int
) -> tuple[bool, bool, list[str]]:
    """Whether to select heads, whether neurons; and what is turned off, in words."""
    densities = [n / config.neurons for n in neuron_counts(config, batch)]
    everything = (config.kv_heads,) * config.layers, (1.0,) * config.layers
    by_heads, by_neurons = min(config.budgets) < config.kv_heads, min(densities) < 1

    def seconds(heads: bool, neurons: bool) -> float:
        return prediction.seconds(
            config.budgets if heads else everything[0],
            densities if neurons else everything[1],
        )

    # Of equals, what the adapter has.
    variants = [(True, True), (False, True), (True, False), (False, False)]
    heads, neurons = min(variants, key=lambda variant: seconds(*variant))
    notes = []
    for name, off, with_it in (
        ("heads", by_heads and not heads, (True, neurons)),
        ("neurons", by_neurons and not neurons, (heads, True)),
    ):
        if off:
            slower = seconds(*with_it) - seconds(heads, neurons)
            notes.append(
                f"all {name} are read, although the adapter has budgets: selecting "
                f"them is predicted to cost {slower * 1e3:.3f} ms a step more than it "
                f"saves ({slower / seconds(heads, neurons):.1%})"
            )
    # A budget of everything needs no turning off.
    return heads or not by_heads, neurons or not by_neurons, notes


def _dense_above(params: Params, batch: int) -> float:
    c = params.config
    found = mlp_dense_above(
        b=batch,
        m=c.dim,
        f=c.neurons,
        gated=c.gated_mlp,
        itemsize=params.dtype.itemsize,
    )
    return 1.0 if found is None else found


def _reads(config: ModelConfig, bound: Any) -> tuple[list[float], tuple[float, ...]]:
    """KV groups, and the fraction of the neurons, that bound Polar reads by layer."""
    if bound.budget.thresholds is not None:
        budgets = list(config.budgets)
    else:
        budgets = np.asarray(bound.budget.counts).mean(axis=1).tolist()
    return budgets, neuron_densities(config, bound)
