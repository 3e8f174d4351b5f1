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

from pallas_kernels.tables import file_name, mlp_dense_above
from polarjax.config import ModelConfig
from polarjax.params import Params
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.planning.cost import StepCost, step_cost
from polarjax.policy import Dense, Load, Policy, Reads, check_policy


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

    def seconds(self, reads: Reads) -> float:
        """Of a step that reads so much."""
        heads = sum(n < self.cost.kv_heads for n in reads.groups)
        neurons = sum(density < 1 for density in reads.neurons)
        launches = heads * self.overhead.heads_us + neurons * self.overhead.neurons_us
        read = float(self.cost.bytes_read(reads))
        mlps = zip(reads.neuron_density, self.cost.neurons, strict=True)
        read += sum((1 - d) * n for d, n in mlps if d > self.dense_above)
        return read / self.bandwidth + launches * 1e-6


def settle(
    params: Params, policy: Policy | None, load: Load, densities: bool
) -> tuple[Policy, tuple[str, ...]]:
    """The policy of an engine, without the axes that would make its steps slower.

    What the user asked for is done as it was asked, and a note says if it is predicted
    to be slower than dense. Where no overheads were measured, nothing is turned off.

    Args:
      params: the model.
      policy: that the user asked for, not yet bound; None for the model's own.
      load: what the engine is made for.
      densities: whether requests may ask for densities of their own.

    Returns:
      A policy, not yet bound, and notes for `Stats`.
    """
    asked, config = policy is not None, params.config
    if policy is not None:
        check_policy(policy)
    else:
        policy = params.policy
        if any(policy.learned.numbers().values()) and not params.routers:
            policy = Dense()  # budgets, and nothing that could choose
    policy = policy.of(params.policy.learned).sized(load.batch)
    policy = policy.flexing() if densities else policy
    devices = list(params.weights["embed"]["tokens"].devices())
    overheads = shipped(devices[0].device_kind) if len(devices) == 1 else ()
    if not overheads or not policy.asks:
        return policy, ()
    prediction = Prediction(
        step_cost(params, batch=load.batch, context=load.context),
        read_bandwidth(devices[0]),
        nearest(overheads, load.batch),
        _dense_above(params, load.batch),
    )
    if not asked:
        return _best_axes(prediction, config, policy, load)
    planned = policy.reads(config, load)
    if planned is None:
        return policy, ()
    sparse = prediction.seconds(planned)
    dense = prediction.seconds(Reads.everything(config))
    if sparse <= dense:
        return policy, ()
    note = (
        "slower than dense, as predicted from bytes and measured overheads: by "
        f"{(sparse - dense) * 1e3:.3f} ms a step ({sparse / dense - 1:.1%})"
    )
    return policy, (note,)


def _best_axes(
    prediction: Prediction, config: ModelConfig, policy: Policy, load: Load
) -> tuple[Policy, tuple[str, ...]]:
    """The policy that answers those questions that pay, and what is turned off."""
    subsets = [
        tuple(name for i, name in enumerate(policy.asks) if not off & 1 << i)
        for off in range(1 << len(policy.asks))
    ]

    def seconds(asks: tuple[str, ...]) -> float:
        planned = policy.asking(asks).reads(config, load)
        return prediction.seconds(planned or Reads.everything(config))

    best = min(subsets, key=seconds)  # of equals, what the adapter has
    notes = []
    for name in policy.asks:
        with_it = tuple(x for x in policy.asks if x in best or x == name)
        slower = seconds(with_it) - seconds(best)
        if name not in best:
            words = {"groups": "heads"}.get(name, name)
            notes.append(
                f"all {words} are read, although the adapter has budgets: selecting "
                f"them is predicted to cost {slower * 1e3:.3f} ms a step more than it "
                f"saves ({slower / seconds(best):.1%})"
            )
    return policy.asking(best), tuple(notes)


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
