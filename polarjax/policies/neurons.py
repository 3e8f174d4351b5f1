"""Neuron budgets: how many MLP neurons a batch of a given size reads in each layer."""

from __future__ import annotations

import math
import reprlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import needed_totals, union_neurons
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share, add_up_batch, gather, place

# Counts between two measured batch sizes are rounded up to this (the paper's step).
NEURON_STEP = 128


def round_up(count: float, step: int, neurons: int) -> int:
    """The next multiple of `step`, at most all neurons."""
    return min(neurons, math.ceil(count / step - 1e-9) * step)  # of a float, perhaps


def neuron_counts(config: ModelConfig, batch: int) -> tuple[int, ...]:
    """MLP neurons that each layer reads for a batch, by the adapter's own budgets.

    Between two measured batch sizes the count is interpolated over the logarithm of
    the batch size and rounded up to 128. Nothing is extrapolated: a batch below the
    smallest measured one reads what that one does (its union is no larger), a batch
    above the largest reads all neurons (nothing is known of its union, which grows).

    Args:
      config: of the model, with `neuron_budgets`; without them every neuron is read.
      batch: number of requests, b.

    Returns:
      A number from 1 to f for each layer.

    Raises:
      ValueError: if the budgets do not fit the model.
    """
    check_neuron_budgets(config)
    f = config.neurons
    everything = (f,) * config.layers
    smaller = [entry for entry in config.neuron_budgets if entry[0] <= batch]
    larger = [entry for entry in config.neuron_budgets if entry[0] >= batch]
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


def check_neuron_budgets(config: ModelConfig) -> None:
    """Raise unless a model's neuron budgets, if it has any, fit it.

    Args:
      config: of the model, with `neuron_budgets`.

    Raises:
      ValueError: naming the first that does not.
    """
    f, last = config.neurons, 0
    if config.neuron_budgets and config.activation != "relu":
        raise ValueError(
            f"neuron budgets need a ReLU MLP, the model's is {config.activation}"
        )
    for batch, counts in config.neuron_budgets:
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


def needed_of_share(
    hidden: jax.Array,
    up: jax.Array,
    live: jax.Array,
    n: int,
    parts: int,
    share: Share | None,
    implementation: Any = None,
) -> jax.Array:
    """Of the neurons that `needed_neurons` finds for the whole batch, a device's own.

    Args:
      hidden: as there, of the device's part of the batch.
      up: as there, of the device's neurons, [f, r].
      live: as there, of its part of the batch.
      n: how many neurons of the whole model to keep.
      parts: of the model's neurons, each of which keeps n / parts; 1 for the best of
        all, which the devices have to tell each other.
      share: of the device; None for the whole model.
      implementation: of the selection.

    Returns:
      int32[n of the device], numbers among its neurons, ascending. With one part their
      number differs by device: it is then min(n, f), and f stands where one has fewer.
    """
    f = len(up)
    own = add_up_batch(needed_totals(hidden, up, live), share)

    def best(totals: jax.Array, n: int) -> jax.Array:
        # The sum of a batch of one is what it is.
        one = jnp.ones(1, bool)
        return union_neurons(totals[None], one, n, implementation=implementation)

    if parts > 1:
        mine = parts // (share.tp if share else 1)
        each = f // mine
        found = [best(own[i : i + each], n // parts) + i for i in range(0, f, each)]
        return jnp.concatenate(found)
    chosen = best(gather(own, share), n) - place(share) * f
    chosen = jnp.where(chosen < 0, f, chosen)  # below 0 would count from the end
    kept = jnp.zeros(f, bool).at[chosen].set(True, mode="drop")
    return jnp.nonzero(kept, size=min(n, f), fill_value=f)[0].astype(jnp.int32)
