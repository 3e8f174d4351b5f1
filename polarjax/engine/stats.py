"""What a generation cost, beside the least it could have cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from polarjax.config import ModelConfig
from polarjax.engine.programs import Drawn
from polarjax.mesh.cut import DP, TP, axis_size, mesh_of
from polarjax.params import Params, Tree
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.planning.cost import kv_row_bytes, step_weight_bytes
from polarjax.policy import Load, Policy, Reads


@dataclasses.dataclass(frozen=True)
class Stats:
    """Measured times and counted bytes of one call of `generate`.

    Where requests that were added to the same engine go on meanwhile, steps, bytes,
    densities and tokens per second are of all of them.

    Attributes:
      policy: name of the selection policy.
      prompt_tokens: read by prefill, padding not counted.
      new_tokens: in the output, all requests together.
      steps: decode steps computed, those included that were sent before the host knew
        of the last request's end.
      compile_seconds: spent compiling; 0 when the programs were there already.
      prefill_seconds: wall time, first token of each request included.
      decode_seconds: wall time of all decode steps.
      tokens_per_second: tokens of the decode steps by `decode_seconds`.
      density: per layer, KV groups read / KV groups there, over live requests; empty
        where no decode step ran.
      neuron_density: per layer, MLP neurons read / neurons there.
      kv_bytes: KV bytes that the decode steps had to read.
      kv_bytes_dense: what they would have been at density 1.
      weight_bytes: per decode step.
      bandwidth: bytes per second that the memory of all devices in use can be read
        at, measured on one of them, once in this process.
      floor_seconds: (steps x weight_bytes + kv_bytes) / bandwidth.
      notes: what a reader of the numbers should know.
      imbalance: KV groups that the busiest of the devices that share the model reads in
        a layer / their mean, over layers and steps; 1 on one device, and where all
        read as many.
      swapped_bytes: KV bytes that this process has copied to its host's memory and back
        for requests that gave way to others.
      swap_seconds: that its thread spent on sending the devices to it. The copies
        themselves go on beside it.
    """

    policy: str
    prompt_tokens: int
    new_tokens: int
    steps: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    density: tuple[float, ...]
    neuron_density: tuple[float, ...]
    kv_bytes: float
    kv_bytes_dense: float
    weight_bytes: int
    bandwidth: float
    floor_seconds: float
    notes: tuple[str, ...] = ()
    imbalance: float = 1.0
    swapped_bytes: int = 0
    swap_seconds: float = 0.0

    @property
    def floor_fraction(self) -> float:
        """floor_seconds / decode_seconds: 1 is as fast as the memory allows."""
        return self.floor_seconds / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        """A few lines for people."""
        mean = f"{np.mean(self.density):.3f}" if self.density else "not measured"
        lines = [
            f"{self.policy}: {self.new_tokens} tokens in {self.steps} steps, "
            f"{self.tokens_per_second:,.1f} tokens/s "
            f"(decode {self.decode_seconds:.2f} s, floor {self.floor_seconds:.2f} s at "
            f"{self.bandwidth / 1e9:,.1f} GB/s; prefill {self.prefill_seconds:.2f} s; "
            f"compile {self.compile_seconds:.1f} s)",
            f"density {mean}, KV read {self.kv_bytes / 1e6:,.1f} MB of "
            f"{self.kv_bytes_dense / 1e6:,.1f} MB in all, weights "
            f"{self.weight_bytes / 1e6:,.1f} MB a step",
            *self.notes,
        ]
        return "\n".join(lines)


def seen_tokens(drawn: Drawn, config: ModelConfig) -> np.ndarray:
    """Tokens of each request that a layer's attention sees, int64[layers, b]."""
    windows = [config.window(i) or config.context for i in range(config.layers)]
    visible = np.asarray(drawn.visible, np.int64)
    return np.minimum(visible, np.array(windows)[:, None])


def imbalance(chunks: Sequence[Drawn]) -> float:
    """See `Stats`, of what some steps brought."""
    both = [busiest_reads(drawn) for drawn in chunks]
    busiest, mean = (sum(each) for each in zip(*both, strict=True))
    return float(busiest / mean) if mean else 1.0


def busiest_reads(drawn: Drawn) -> tuple[float, float]:
    """KV groups that the busiest of the devices that share the model read, and a mean.

    Args:
      drawn: what a decode step brought.

    Returns:
      Over layers and parts of the batch: the sums; 0 on one device.
    """
    if drawn.own is None:
        return 0.0, 0.0
    own = np.asarray(drawn.own, np.int64)  # [layers, dp, tp]
    return float(own.max(axis=2).sum()), float(own.mean(axis=2).sum())


def kv_rows(drawn: Drawn, config: ModelConfig) -> tuple[int, int]:
    """Keys (and as many values) that a decode step had to read.

    Args:
      drawn: what it brought.
      config: of the model.

    Returns:
      Over layers, groups and requests: those read, and what they would have
      been with every group.
    """
    seen = seen_tokens(drawn, config)
    read = (np.asarray(drawn.reads) * seen).sum()
    return int(read), int(config.kv_heads * seen.sum())


class Tally:
    """What decode steps read, added up.

    Args:
      config: of the model.

    Attributes:
      steps: taken.
      busy: of them, those that had a live request.
      slots: of the batch.
      decoded: tokens drawn that count.
      kv_read: keys (and as many values) that had to be read.
      kv_whole: what they would have been with every group.
      swapped_bytes: as in `Stats`.
      swap_seconds: likewise.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._reads = np.zeros(config.layers, np.int64)
        self._live = 0
        self._busiest = self._mean = 0.0
        self.steps = self.busy = self.slots = self.decoded = 0
        self.kv_read = self.kv_whole = 0
        self.swapped_bytes, self.swap_seconds = 0, 0.0

    def add(self, drawn: Drawn) -> None:
        """Count what a step brought.

        Args:
          drawn: of the step, on the host.
        """
        visible = np.asarray(drawn.visible)
        self.steps += 1
        self.slots = len(visible)
        self._reads += np.asarray(drawn.reads, np.int64).sum(axis=1)
        self._live += int((visible > 0).sum())
        self.busy += bool((visible > 0).any())
        read, whole = kv_rows(drawn, self._config)
        self.kv_read += read
        self.kv_whole += whole
        self.decoded += int(np.asarray(drawn.valid).sum())
        busiest, mean = busiest_reads(drawn)
        self._busiest += busiest
        self._mean += mean

    @property
    def density(self) -> tuple[float, ...]:
        """By layer, KV groups read / all, of live requests; () before any step."""
        if not self._live:
            return ()
        whole = self._live * self._config.kv_heads
        return tuple((self._reads / whole).tolist())

    @property
    def imbalance(self) -> float:
        """See `Stats`."""
        return float(self._busiest / self._mean) if self._mean else 1.0


def make_stats(
    params: Params,
    weights: Tree,
    policy: Policy,
    tally: Tally,
    seconds: Mapping[str, float],
    *,
    name: str,
    prompt_tokens: int,
    new_tokens: int,
    notes: Sequence[str] = (),
) -> Stats:
    """Count what the decode steps read, and set it beside what they took.

    Args:
      params: the model.
      weights: bound to the policy.
      policy: bound.
      tally: of the decode steps.
      seconds: spent on "compile", "prefill" and "decode".
      name: of the policy.
      prompt_tokens: of all requests.
      new_tokens: of all requests.
      notes: to begin with.
    """
    config = params.config
    row_bytes = kv_row_bytes(config, params.dtype)
    slots, steps, kv_read = max(tally.slots, 1), tally.steps, tally.kv_read
    planned = policy.reads(config, Load(slots, config.context))
    weight_bytes = step_weight_bytes(weights, config, policy, planned)
    devices = weights["embed"]["tokens"].devices()
    [here, *_] = weights["embed"]["tokens"].sharding.addressable_devices
    bandwidth = read_bandwidth(here) * len(devices)
    mesh = mesh_of(params.weights)
    weight_bytes *= axis_size(mesh, DP)
    neuron_density = (planned or Reads.everything(config)).neuron_density
    uneven = tally.imbalance
    said = (*notes, *_notes(name, policy, neuron_density, mesh, uneven))
    return Stats(
        policy=name,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        steps=steps,
        compile_seconds=seconds["compile"],
        prefill_seconds=seconds["prefill"],
        decode_seconds=seconds["decode"],
        tokens_per_second=tally.decoded / seconds["decode"] if tally.decoded else 0.0,
        density=tally.density,
        neuron_density=neuron_density,
        kv_bytes=kv_read * row_bytes,
        kv_bytes_dense=tally.kv_whole * row_bytes,
        weight_bytes=weight_bytes,
        bandwidth=bandwidth,
        floor_seconds=(steps * weight_bytes + kv_read * row_bytes) / bandwidth,
        notes=said,
        imbalance=uneven,
        swapped_bytes=tally.swapped_bytes,
        swap_seconds=tally.swap_seconds,
    )


def _notes(
    name: str,
    policy: Policy,
    neuron_density: Sequence[float],
    mesh: Mesh | None,
    uneven: float,
) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    if mesh is not None:
        notes.append(
            f"tp {mesh.shape[TP]} x dp {mesh.shape[DP]} = {mesh.size} devices: "
            "bytes and bandwidth are theirs together, the floor is without what they "
            "say to each other; in a layer the busiest of those that share the model "
            f"reads {uneven:.2f} times the mean of their KV groups"
        )
    if policy.wants.norms:
        notes.append(
            f"{name} computes dense attention first, to know the "
            "norms: its times are no measure of sparsity, its bytes are those it chose"
        )
    if min(neuron_density) < 1:
        notes.append(
            "neuron sparsity: the batch shares one set of neurons, so a request's "
            "result may depend on its batch-mates"
        )
    return notes
