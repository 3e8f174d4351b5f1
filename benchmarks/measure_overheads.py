"""Measures what selecting heads and neurons costs on this machine's GPU.

    python -m benchmarks.measure_overheads [--batches N ...] [--out FILE.json] [--toy]

Three decode steps of one model at a short context, each as an engine compiles it:
dense, half of the heads, half of the neurons. What a sparse step takes beyond dense,
less what its bytes explain, is the overhead of a layer that selects; `generate` turns
an adapter's axis off where that is more than what it saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import polarjax
from pallas_kernels.tables import file_name
from polarjax.bench.random_weights import draw
from polarjax.bench.rounds import times
from polarjax.bench.shapes import opt
from polarjax.bench.steps import make_state, make_step, steps_in
from polarjax.config import ModelConfig
from polarjax.evaluation.record import commit
from polarjax.params import Params
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.planning.cost import step_cost
from polarjax.planning.crossover import Measured, Overhead, fit
from polarjax.planning.plan import abstract_params
from polarjax.policies import named, with_density
from polarjax.policy import Dense, Policy, Reads
from polarjax.storage.writing import try_file, write_file

REPEATS, CAPACITY = 7, 128


def model(layers: int = 8, dim: int = 4096, heads: int = 32) -> ModelConfig:
    """Layers of OPT-6.7B, which have both kinds of sparsity."""
    return opt(layers, dim, heads, vocab=512)


def measure(
    config: ModelConfig, batch: int, dtype: Any, bandwidth: float, rank: int = 1024
) -> Overhead:
    """Overheads for a batch.

    Args:
      config: of a ReLU model; its weights are drawn.
      batch: sequences.
      dtype: of the weights.
      bandwidth: bytes per second of the device's memory.
      rank: of the neuron routers.
    """
    shapes = abstract_params(config, dtype, 64, min(rank, config.dim))
    params = with_density(draw(shapes, 0), 1.0)
    context = CAPACITY - steps_in(CAPACITY) // 2  # the mean of the steps
    cost = step_cost(params, batch=batch, context=context)
    k, layers = config.kv_heads, config.layers
    everything, half = (k,) * layers, (k, *(k // 2,) * (layers - 1))
    neurons = (1.0, *(0.5,) * (layers - 1))
    # The budgets of `params` are all heads: the last one selects neurons alone.
    policies = Dense(), named("polar", 0.5), named("polar", None, 0.5)
    dense, heads, mlps = (_seconds(params, policy, batch) for policy in policies)
    return fit(
        batch,
        Measured(dense, cost.bytes_read(Reads(everything))),
        Measured(heads, cost.bytes_read(Reads(half)), layers - 1),
        Measured(mlps, cost.bytes_read(Reads(everything, neurons)), layers - 1),
        bandwidth,
    )


def _seconds(params: Params, policy: Policy, batch: int) -> float:
    """Of one decode step, the median of rounds."""
    own = policy.of(params.policy.learned).sized(batch)
    weights, bound = own.bind(params)
    step = make_step(params, weights, bound)
    state = make_state(params, batch, CAPACITY)
    _, [seconds], _ = times([step], state, CAPACITY, REPEATS)
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure_overheads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="table to write (default: this device's, in the package; none for --toy)",
    )
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.toy:
        print(
            f"error: it needs a GPU, and the device here is {device.device_kind!r}; "
            "--toy tries the command on a CPU",
            file=sys.stderr,
        )
        return 1
    config = model(2, 64, 4) if args.toy else model()
    dtype = jnp.float32 if args.toy else jnp.bfloat16
    bandwidth = read_bandwidth(device)
    print(f"{device.device_kind}, jax {jax.__version__}, {bandwidth / 1e9:.0f} GB/s")
    packaged = Path(polarjax.__file__).parent / "planning" / "overheads"
    packaged /= file_name(device.device_kind)
    out = args.out or (None if args.toy else packaged)
    if out is not None:
        try_file(out)  # before the work, not after
    found = []
    for batch in args.batches:
        found.append(measure(config, batch, dtype, bandwidth))
        print(
            f"batch {batch}: {found[-1].heads_us:.1f} us a layer for heads, "
            f"{found[-1].neurons_us:.1f} us for neurons",
            flush=True,
        )
    if out is None:
        print("nothing written: no --out")
        return 0
    record: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "commit": commit(),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "model": f"{config.layers} layers, m {config.dim}, h {config.heads}, "
        f"f {config.neurons}, {jnp.dtype(dtype).name}",
        "overheads": [dataclasses.asdict(overhead) for overhead in found],
    }
    write_file(out, json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
