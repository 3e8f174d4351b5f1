"""Measures what selecting heads and neurons costs on this machine's GPU.

    python -m polarjax.measure_overheads [--batches N ...] [--out FILE.json] [--toy]

Three decode steps of one model at a short context, each as `generate` compiles it:
dense, half of the heads, half of the neurons. What a sparse step takes beyond dense,
less what its bytes explain, is the overhead of a layer that selects; `generate` turns
an adapter's axis off where that is more than what it saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tuning.table import file_name
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.evaluation.record import commit
from polarjax.generation.crossover import Measured, Overhead, fit
from polarjax.generation.loop import State, decode_chunk
from polarjax.generation.requests import make_sampling
from polarjax.generation.stats import read_bandwidth
from polarjax.params import Params
from polarjax.planning import abstract_params
from polarjax.policy import Dense, SelectionPolicy
from polarjax.sparsity import Polar
from polarjax.sparsity.cost import step_cost
from polarjax.sparsity.select import with_density

STEPS, REPEATS, CAPACITY = 16, 7, 128


def model(layers: int = 8, dim: int = 4096, heads: int = 32) -> ModelConfig:
    """Layers of OPT-6.7B, which have both kinds of sparsity."""
    return ModelConfig(
        family="opt",
        vocab_size=512,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        neurons=4 * dim,
        context=2048,
        norm="layer",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
        embed_dim=dim,
    )


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
    params = with_density(jax.tree.map(_draw, shapes), 1.0)
    context = CAPACITY - STEPS // 2  # the mean of a chunk
    cost = step_cost(params, batch=batch, context=context)
    k, layers = config.kv_heads, config.layers
    everything, half = (k,) * layers, (k, *(k // 2,) * (layers - 1))
    neurons = (1.0, *(0.5,) * (layers - 1))
    # The budgets of `params` are all heads: the last one selects neurons alone.
    policies = Dense(), Polar(0.5), Polar(None, 0.5)
    dense, heads, mlps = (_seconds(params, policy, batch) for policy in policies)
    return fit(
        batch,
        Measured(dense, cost.bytes_read(everything)),
        Measured(heads, cost.bytes_read(half), layers - 1),
        Measured(mlps, cost.bytes_read(everything, neurons), layers - 1),
        bandwidth,
    )


def _draw(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return _normal(spec.shape, spec.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def _seconds(params: Params, policy: SelectionPolicy, batch: int) -> float:
    """Of one decode step, the median of chunks."""
    config = params.config
    weights, bound = policy.bind(params, batch)
    start = jnp.full(batch, CAPACITY - STEPS, jnp.int32)
    cache = KVCache.empty(config, batch, CAPACITY, params.dtype)
    state = State(
        dataclasses.replace(cache, lengths=start + 0),  # each is donated
        token=jnp.zeros(batch, jnp.int32),
        live=jnp.ones(batch, bool),
        remaining=jnp.full(batch, 10**6, jnp.int32),
    )
    del cache
    go_on, end_ids = jnp.ones(batch, bool), jnp.array([-1])
    sampling = make_sampling(config, batch, 0.0, 0, 1.0, 0)
    times = []
    for _ in range(REPEATS + 1):  # the first one compiles
        begin = time.perf_counter()
        state, _ = decode_chunk(
            *(weights, bound, state, go_on, sampling, end_ids),
            config=config.architecture,
            steps=STEPS,
            implementation=None,
        )
        jax.block_until_ready(state)
        times.append(time.perf_counter() - begin)
        state = dataclasses.replace(
            state, cache=dataclasses.replace(state.cache, lengths=start + 0)
        )
    return statistics.median(times[1:]) / STEPS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m polarjax.measure_overheads",
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
    found = []
    for batch in args.batches:
        found.append(measure(config, batch, dtype, bandwidth))
        print(
            f"batch {batch}: {found[-1].heads_us:.1f} us a layer for heads, "
            f"{found[-1].neurons_us:.1f} us for neurons",
            flush=True,
        )
    packaged = Path(__file__).parent / "overheads" / file_name(device.device_kind)
    out = args.out or (None if args.toy else packaged)
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
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
