"""Times whole decode steps on random weights of real shapes, beside their floor.

    python -m benchmarks.decode [--models NAME ...] [--out FILE.json] [--toy]

The step is the one that `polarjax.generate` compiles. Its floor is the bytes it must
read (weights, routers, and the KV of the groups that are on) over the read bandwidth
measured in the same run.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp

import polarjax
from polarjax.cache import KVCache
from polarjax.generation.loop import State, decode_chunk
from polarjax.generation.requests import make_sampling
from polarjax.generation.stats import kv_rows, read_bandwidth, step_weight_bytes
from polarjax.model import weight_shapes

STEPS = 16  # a chunk, as in generate
REPEATS = 5


def llama(layers, dim, heads, kv_heads, neurons, vocab) -> polarjax.ModelConfig:
    return polarjax.ModelConfig(
        family="llama",
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim // heads,
        neurons=neurons,
        context=2**17,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=polarjax.Rope(5e5),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        embed_dim=dim,
    )


def opt(layers, dim, heads) -> polarjax.ModelConfig:
    return dataclasses.replace(
        llama(layers, dim, heads, heads, 4 * dim, 50272),
        family="opt",
        context=2048,
        norm="layer",
        activation="relu",
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch of equally long sequences, and (head, neuron) densities."""

    config: polarjax.ModelConfig
    batch: int
    context: int
    densities: tuple[tuple[float, float | None], ...]


CASES = {
    "llama-2-7b": Case(
        llama(32, 4096, 32, 32, 11008, 32000), 16, 2048, ((0.5, None), (0.25, None))
    ),
    "llama-3.1-8b": Case(
        llama(32, 4096, 32, 8, 14336, 128256), 64, 4096, ((0.625, None), (0.5, None))
    ),
    "opt-6.7b": Case(opt(32, 4096, 32), 48, 1920, ((0.5, None), (0.5, 0.58))),
}
TOY = {
    "toy-llama": Case(llama(2, 64, 4, 2, 96, 500), 2, 128, ((0.5, None),)),
    "toy-opt": Case(opt(2, 64, 4), 2, 128, ((0.5, None), (0.5, 0.5))),
}
NEURON_RANK = 1024


def random_params(
    config: polarjax.ModelConfig, dtype, head_rank: int = 0
) -> polarjax.Params:
    """Weights and routers of the right shapes, made on the device.

    Args:
      config: of the model.
      dtype: of everything.
      head_rank: of the head routers' quadratic form; 0 for none.
    """
    shapes = weight_shapes(config, dtype)
    k, m, f = config.kv_heads, config.dim, config.neurons
    rank = min(NEURON_RANK, m)
    spec = jax.ShapeDtypeStruct
    router = {"heads": {"weight": spec((k, m), dtype), "bias": spec((k,), dtype)}}
    if head_rank:
        router["heads"] |= {
            "down": spec((head_rank, m), dtype),
            "up": spec((k, head_rank), dtype),
        }
    if config.activation == "relu":
        router["neurons"] = {
            "down": spec((rank, m), dtype),
            "up": spec((f, rank), dtype),
        }
    routers = {f"layers_{i}": router for i in range(1, config.layers)}
    leaves, tree = jax.tree.flatten((shapes, routers))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    make = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype),
        static_argnums=1,
    )
    drawn = [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    weights, routers = jax.tree.unflatten(tree, drawn)
    return polarjax.Params(weights, routers, config)


def measure(params, case: Case, policy) -> tuple[float, float]:
    """Milliseconds of one decode step (median of chunks), and the bytes it reads."""
    config = params.config
    weights, bound = policy.bind(params, case.batch)
    # Chunks end where the context does, so that the KV read is that of the context.
    start = case.context - STEPS * (REPEATS + 1)
    shape = (case.batch, config.kv_heads, case.context, config.head_dim)
    noise = jax.jit(lambda key: jax.random.normal(key, shape, params.dtype))
    keys = jax.random.split(jax.random.key(1), 2 * config.layers)
    cache = KVCache(
        keys=tuple(map(noise, keys[::2])),
        values=tuple(map(noise, keys[1::2])),
        lengths=jnp.full(case.batch, start, jnp.int32),
    )
    full = jnp.full(case.batch, 10**6, jnp.int32)
    go_on = jnp.ones(case.batch, bool)
    live = jnp.ones(case.batch, bool)  # the state is donated: no buffer twice
    state = State(cache, jnp.zeros(case.batch, jnp.int32), live, full)
    del cache
    sampling = make_sampling(config, case.batch, 0.0, 0, 1.0, 0)
    times, rows = [], 0.0
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        state, drawn = decode_chunk(
            *(weights, bound, state, go_on, sampling, jnp.array([-1])),
            config=config,
            steps=STEPS,
            implementation=None,
        )
        jax.block_until_ready(state)
        times.append(time.perf_counter() - begin)
        rows = kv_rows(drawn, config)[0] / STEPS
    kv_bytes = rows * 2 * config.head_dim * params.dtype.itemsize
    # The first chunk compiled. Its bytes differ little from the last one's.
    milliseconds = statistics.median(times[1:]) / STEPS * 1e3
    return milliseconds, step_weight_bytes(weights, config, bound) + kv_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description="Time whole decode steps."
    )
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        *("--models",),
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        help="which models (default: all)",
    )
    parser.add_argument(
        *("--head-rank",),
        type=int,
        default=0,
        help="of a quadratic form in the head routers (default: %(default)s, none)",
    )
    args = parser.parse_args()
    cases = TOY if args.toy else {name: CASES[name] for name in args.models}
    dtype = jnp.float32 if args.toy else jnp.bfloat16
    device = jax.devices()[0]
    bandwidth = read_bandwidth(device)
    print(f"{device.device_kind}, jax {jax.__version__}, {jnp.dtype(dtype).name}")
    print(f"the memory can be read at {bandwidth / 1e9:.1f} GB/s")
    results = []
    for name, case in cases.items():
        params = random_params(case.config, dtype, args.head_rank)
        policies: dict[str, polarjax.SelectionPolicy] = {"dense": polarjax.Dense()}
        for heads, neurons in case.densities:
            label = f"heads {heads}" + (f", neurons {neurons}" if neurons else "")
            policies[label] = polarjax.Polar(heads, neurons)
        dense_ms = 0.0
        for label, policy in policies.items():
            ms, read = measure(params, case, policy)
            dense_ms = dense_ms or ms
            floor_ms = read / bandwidth * 1e3
            row = {
                "model": name,
                "batch": case.batch,
                "context": case.context,
                "policy": label,
                "ms": ms,
                "bytes": read,
                "floor_ms": floor_ms,
                "tokens_per_second": case.batch / ms * 1e3,
                "over_dense": dense_ms / ms,
            }
            results.append(row)
            print(
                f"{name:13} b {case.batch:3} s {case.context:5} {label:24} "
                f"{ms:8.3f} ms, floor {floor_ms:8.3f} ms ({floor_ms / ms:5.1%}), "
                f"{row['tokens_per_second']:9,.0f} tokens/s, {dense_ms / ms:.2f}x",
                flush=True,
            )
        del params
    if args.out:
        report = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "dtype": jnp.dtype(dtype).name,
            "head_rank": args.head_rank,
            "bandwidth_gb_s": bandwidth / 1e9,
            "results": results,
        }
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
