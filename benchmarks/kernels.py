"""Times the two kernels at the shapes of real models, beside what memory can give.

    python -m benchmarks.kernels [--shapes NAME ...] [--out FILE.json] [--toy]

Decoding is bound by the bytes it reads, so each line has its time, the bytes it has to
read and the fraction of the read bandwidth measured in the same run.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation, gathered_mlp, select_head_attention
from pallas_kernels._backend import default_implementation
from polarjax.generation.stats import read_bandwidth

# b, h, k, s, d, and the heads or KV groups to read; all of them is dense.
ATTENTION = {
    "opt-66b": (64, 72, 72, 1920, 128, (72, 36, 21, 7)),
    "llama-2-7b": (16, 32, 32, 4096, 128, (32, 16, 8)),
    "llama-3.1-8b": (64, 32, 8, 4096, 128, (8, 5, 4, 2)),
    "llama-3.1-70b": (16, 64, 8, 8192, 128, (8, 5)),
}
# b, m, f; ReLU with biases, at these fractions of the neurons.
MLP = {
    "opt-66b-mlp": (64, 9216, 36864),
    "opt-6.7b-mlp": (16, 4096, 16384),
    "opt-6.7b-mlp-b1": (1, 4096, 16384),
}
MLP_DENSITIES = (1.0, 0.5, 0.3, 0.1)

TOY_ATTENTION = {"toy": (2, 4, 2, 64, 64, (2, 1))}
TOY_MLP = {"toy-mlp": (2, 64, 256)}

# Calls in one jit, so that no dispatch lies between them, each on other inputs; the
# big ones add up to more than any L2 cache, so that none is served from it.
CALLS = 16
ROTATED_BYTES = 256 * 1024**2
# Jitted loops in flight before the clock is read, and how often it is read.
IN_FLIGHT = 4
REPEATS = 5


@dataclasses.dataclass
class Result:
    """One line of the table.

    Attributes:
        shape: name of the model's shape.
        what: the function timed.
        read: KV groups or neurons read, per sequence or batch.
        of: how many there are.
        bytes: what one call has to read.
        ms: median time of one call; None if it could not run.
        gb_s: bytes over time, in 10^9 bytes per second.
        of_bandwidth: gb_s as a fraction of the read bandwidth measured in this run.
        error: why it could not run.
    """

    shape: str
    what: str
    read: int
    of: int
    bytes: int
    ms: float | None = None
    gb_s: float | None = None
    of_bandwidth: float | None = None
    error: str = ""


def median_ms(function, shared, varied) -> float:
    """Median milliseconds of one call of function(*shared[i], *varied[j]).

    The calls stand in a loop: side by side, XLA would read what they share only once.

    Args:
        function: what to time.
        shared: tuples of big arrays, used in turn.
        varied: one tuple of small arrays per round, so that no two are equal.
    """

    @jax.jit
    def calls(shared, varied):
        def round_of_calls(_, small):
            return None, [function(*big, *small) for big in shared]

        return jax.lax.scan(round_of_calls, None, varied)[1]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *varied)
    jax.block_until_ready(calls(shared, stacked))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([calls(shared, stacked) for _ in range(IN_FLIGHT)])
        seconds = time.perf_counter() - start
        times.append(seconds / (IN_FLIGHT * len(varied) * len(shared)) * 1e3)
    return statistics.median(times)


def run(result: Result, peak: float, function, shared, varied) -> Result:
    """Time one line and print it."""
    try:
        result.ms = median_ms(function, shared, varied)
    except Exception as error:  # what a library kernel refuses is itself a result
        lines = str(error).splitlines() or [""]
        result.error = f"{type(error).__name__}: {lines[0]}"
    else:
        result.gb_s = result.bytes / result.ms * 1e-6
        result.of_bandwidth = result.gb_s * 1e9 / peak
    line = f"{result.shape:16} {result.what:21} {result.read:6}/{result.of:<6}"
    line += f" {result.bytes / 1e6:9.1f} MB"
    if result.ms is None:
        print(f"{line}  {result.error}", flush=True)
    else:
        line += f" {result.ms:9.4f} ms {result.gb_s:8.1f} GB/s"
        print(f"{line} {result.of_bandwidth:6.1%}", flush=True)
    return result


def copies(nbytes: int) -> int:
    """How many sets of inputs that are read nbytes each to rotate."""
    return min(CALLS, -(-ROTATED_BYTES // nbytes))


def attention(name: str, shape, dtype, peak: float) -> list[Result]:
    """Our kernel at each count of groups, then the library's dense attention."""
    b, h, k, s, d, counts = shape
    rng = np.random.default_rng(0)
    group_bytes = 2 * b * s * d * jnp.dtype(dtype).itemsize
    lengths = jnp.full(b, s, jnp.int32)
    results = []

    def arrays(count, *shape):
        keys = jax.random.split(jax.random.key(0), count)
        normal = jax.jit(functools.partial(jax.random.normal, shape=shape, dtype=dtype))
        return [normal(key) for key in keys]

    queries = arrays(CALLS, b, h, d)
    caches = arrays(2 * copies(min(counts) * group_bytes), b, k, s, d)
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    for n in counts:
        result = Result(name, "select_head_attention", n, k, n * group_bytes)
        if n == k:
            varied = [(q,) for q in queries]
        else:
            picks = np.argsort(rng.random((CALLS, b, k)))[..., :n].astype(np.int32)
            varied = [
                (q, jnp.asarray(pick)) for q, pick in zip(queries, picks, strict=True)
            ]

        def ours(k_cache, v_cache, q, heads=None):
            return select_head_attention(q, k_cache, v_cache, lengths, heads)

        results.append(run(result, peak, ours, pairs, varied))

    # The library wants [b, s, k, d]: other caches, not copies made in the call.
    del caches, pairs
    caches = arrays(2 * copies(k * group_bytes), b, s, k, d)
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    backends: tuple[Literal["xla", "cudnn"], ...] = ("xla", "cudnn")
    for backend in backends:

        def library(keys, values, q, backend: Literal["xla", "cudnn"] = backend):
            return jax.nn.dot_product_attention(
                q[:, None],
                keys,
                values,
                key_value_seq_lengths=lengths,
                implementation=backend,
            )

        result = Result(name, f"jax.nn.dot.../{backend}", k, k, k * group_bytes)
        results.append(run(result, peak, library, pairs, [(q,) for q in queries]))
    return results


def mlp(name: str, shape, dtype, peak: float) -> list[Result]:
    """Our kernel at each density, and XLA's dense product."""
    b, m, f = shape
    rng = np.random.default_rng(0)
    neuron_bytes = 2 * m * jnp.dtype(dtype).itemsize
    counts = [max(1, int(density * f)) for density in MLP_DENSITIES]
    keys = jax.random.split(jax.random.key(0), copies(min(counts) * neuron_bytes) + 1)

    @jax.jit
    def layer(key):
        up, down = jax.random.split(key)
        return {
            "up": jax.random.normal(up, (f, m), dtype),
            "down": jax.random.normal(down, (f, m), dtype),
            "up_bias": jnp.ones(f, dtype),
            "down_bias": jnp.ones(m, dtype),
        }

    layers = [(layer(key),) for key in keys[1:]]
    kernel = default_implementation()  # dense too, which by itself goes to XLA
    inputs = list(jax.random.normal(keys[0], (CALLS, b, m), dtype))

    def ours(weights, x, neurons=None, implementation: Implementation = kernel):
        return gathered_mlp(
            x, weights, neurons, activation="relu", implementation=implementation
        )

    results = []
    for n in counts:
        result = Result(name, "gathered_mlp", n, f, n * neuron_bytes)
        if n == f:
            varied = [(x,) for x in inputs]
        else:
            picks = [np.sort(rng.permutation(f)[:n]) for _ in inputs]
            varied = [
                (x, jnp.asarray(pick, jnp.int32))
                for x, pick in zip(inputs, picks, strict=True)
            ]
        results.append(run(result, peak, ours, layers, varied))
    dense = functools.partial(ours, implementation="xla")
    result = Result(name, "gathered_mlp/xla", f, f, f * neuron_bytes)
    results.append(run(result, peak, dense, layers, [(x,) for x in inputs]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Time the kernels."
    )
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--out", help="JSON file to write")
    names = [*ATTENTION, *MLP]
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some of {', '.join(names)} (default: all)",
    )
    args = parser.parse_args()
    attentions, mlps = (TOY_ATTENTION, TOY_MLP) if args.toy else (ATTENTION, MLP)
    chosen = [*attentions, *mlps] if args.toy else args.shapes
    device = jax.devices()[0].device_kind
    dtype = jnp.float32 if args.toy else jnp.bfloat16
    peak = read_bandwidth(jax.devices()[0])
    print(f"{device}, jax {jax.__version__}, {jnp.dtype(dtype).name}")
    print(f"the memory can be read at {peak / 1e9:.1f} GB/s")
    results = []
    for name in chosen:
        if name in attentions:
            results += attention(name, attentions[name], dtype, peak)
        else:
            results += mlp(name, mlps[name], dtype, peak)
    if args.out:
        report = {
            "device": device,
            "jax": jax.__version__,
            "dtype": jnp.dtype(dtype).name,
            "bandwidth_gb_s": peak / 1e9,
            "results": [dataclasses.asdict(result) for result in results],
        }
        with open(args.out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
