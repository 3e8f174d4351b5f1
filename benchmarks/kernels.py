"""Times the kernels at the shapes of real models, beside what the memory can give.

    python -m benchmarks.kernels [--shapes NAME ...] [--out FILE.json] [--toy]

Decoding is bound by the bytes it reads. Each row has its time, the bytes it must read
and their rate as a fraction of R, the best read rate seen in the same run: that of a
streaming sum in jax, or of torch's dense attention on the same shape if it is higher
(for shapes that are not attention: on any shape).
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import CASES, TOY_CASES, Attention, Mlp, Select
from benchmarks.report import REPOSITORY, Result, best_rates, commit, write
from pallas_kernels import (
    Implementation,
    gathered_mlp,
    select_head_attention,
    top_heads,
    union_neurons,
)
from pallas_kernels.tuning.timing import (
    Chain,
    calls_to_time,
    make_chain,
    median_ms,
    normal,
    sets_to_rotate,
)
from polarjax.planning.bandwidth import read_bandwidth
from polarjax.storage.writing import try_file

# Positions of a page of the engine's cache.
PAGE = 64
# A row to be, and what compiles its calls.
Row = tuple[Result, Callable[[], Chain]]
# Of our implementations, those to time.
Names = Sequence[Implementation]


def ours() -> Names:
    """Our compiled implementations on a GPU, the plain XLA one elsewhere."""
    if jax.default_backend() != "gpu":
        return ["xla"]
    names = get_args(Implementation)
    return [n for n in names if n != "xla" and not n.endswith("_interpret")]


def and_xla(names: Names) -> Names:
    """For kernels that only XLA and Triton have: what there is to time of them."""
    return [*(n for n in names if n == "triton"), "xla"]


def caches(count: int, shape: tuple[int, ...], dtype) -> list[tuple]:
    """Pairs of keys and values."""
    return [
        (normal(2 * i, shape, dtype), normal(2 * i + 1, shape, dtype))
        for i in range(count)
    ]


def rotate(sets: list[tuple], small: list[tuple]) -> list[tuple]:
    """Arguments of each call: big arrays used in turn, small ones of its own."""
    return [(*sets[i % len(sets)], *some) for i, some in enumerate(small)]


def attention(name: str, case: Attention, dtype, names: Names) -> Iterator[Row]:
    """Ours at each count of groups, then the library's dense attention.

    Ours over shuffled pages of 64 positions.
    """
    b, h, k, s, d = case.b, case.h, case.k, case.s, case.d
    itemsize = jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    q = normal(0, (b, h, d), dtype)
    sets = sets_to_rotate(case.bytes(min(case.groups), itemsize))
    pairs = caches(sets, (b, k, s, d), dtype)

    def lengths() -> jax.Array:
        return jnp.asarray(rng.permutation(case.lengths()))

    def heads(n: int) -> tuple[jax.Array, ...]:
        if n == k:
            return ()
        return (jnp.asarray(rng.random((b, k)).argsort()[:, :n].astype(np.int32)),)

    def attend(q, keys, values, table, lengths, heads=None, *, implementation):
        return select_head_attention(
            q,
            keys,
            values,
            lengths,
            heads,
            table=table,
            implementation=implementation,
        )

    # Which numbers are where does not matter.
    page = PAGE if s % PAGE == 0 else s
    shape = (b * s // page, k, page, d)
    pairs = [(x.reshape(shape), y.reshape(shape)) for x, y in pairs]
    for implementation in names:
        for n in case.groups:
            nbytes = case.bytes(n, itemsize)
            small = []
            for _ in range(max(calls_to_time(nbytes), len(pairs))):
                table = rng.permutation(b * s // page).reshape(b, -1).astype(np.int32)
                small.append((jnp.asarray(table), lengths(), *heads(n)))
            function = functools.partial(attend, implementation=implementation)
            yield (
                Result("attention", name, implementation, n, k, nbytes),
                functools.partial(make_chain, function, q, rotate(pairs, small)),
            )

    # The library wants [b, s, k, d].
    nbytes = case.bytes(k, itemsize)
    pairs = jax.tree.map(lambda cache: cache.reshape(b, s, k, d), pairs)
    pairs = pairs[: sets_to_rotate(nbytes)]
    backends: tuple[Literal["xla", "cudnn"], ...] = ("xla", "cudnn")
    for backend in backends:

        def library(q, keys, values, lengths, *, backend: Literal["xla", "cudnn"]):
            out = jax.nn.dot_product_attention(
                q[:, None],
                keys,
                values,
                key_value_seq_lengths=lengths,
                implementation=backend,
            )
            return out[:, 0]

        small = [(lengths(),) for _ in range(max(calls_to_time(nbytes), len(pairs)))]
        function = functools.partial(library, backend=backend)
        yield (
            Result("attention", name, f"jax.nn {backend}", k, k, nbytes),
            functools.partial(make_chain, function, q, rotate(pairs, small)),
        )


def mlp(name: str, case: Mlp, dtype, names: Names) -> Iterator[Row]:
    """Ours at each density, and XLA's dense product."""
    b, m, f = case.b, case.m, case.f
    itemsize = jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    x = normal(0, (b, m), dtype)
    sets = sets_to_rotate(case.bytes(case.neurons(min(case.densities)), itemsize))
    matrices = ("up", "down", *(("gate",) if case.gated else ()))

    def layer(place: int) -> tuple[dict[str, jax.Array]]:
        # Scaled so that a chain of layers does not overflow.
        scale = {"up": m**-0.5, "gate": m**-0.5, "down": f**-0.5}
        weights = {
            matrix: normal(3 * place + i, (f, m), dtype, scale[matrix])
            for i, matrix in enumerate(matrices)
        }
        if not case.gated:
            weights |= {"up_bias": jnp.ones(f, dtype), "down_bias": jnp.ones(m, dtype)}
        return (weights,)

    layers = [layer(place) for place in range(sets)]

    def feed(x, weights, neurons=None, *, implementation):
        return gathered_mlp(
            x,
            weights,
            neurons,
            activation="silu" if case.gated else "relu",
            implementation=implementation,
        )

    def pick(n: int) -> tuple[jax.Array, ...]:
        if n == f:
            return ()
        return (jnp.asarray(np.sort(rng.permutation(f)[:n]).astype(np.int32)),)

    gathering = and_xla(names)[0]
    rows = [(case.neurons(density), gathering) for density in case.densities]
    for n, implementation in dict.fromkeys([*rows, (f, "xla")]):
        nbytes = case.bytes(n, itemsize)
        calls = max(calls_to_time(nbytes), len(layers))
        function = functools.partial(feed, implementation=implementation)
        arguments = rotate(layers, [pick(n) for _ in range(calls)])
        yield (
            Result("mlp", name, implementation, n, f, nbytes),
            functools.partial(make_chain, function, x, arguments),
        )


def select(name: str, case: Select, names: Names) -> Iterator[Row]:
    """The function that turns scores into a selection."""
    arguments = [
        (normal(i, (case.b, case.c), jnp.float32),)
        for i in range(calls_to_time(case.bytes()))
    ]
    live = jnp.ones(case.b, bool)

    # Each call waits for the one before, through a comparison that is always true.
    def union(chosen, scores, *, implementation):
        waited = live & (chosen[0] >= 0)
        return union_neurons(scores, waited, case.n, implementation=implementation)

    def top(chosen, scores, *, implementation):
        waited = jnp.where(chosen[:, :1] >= 0, scores, 0.0)
        return top_heads(waited, case.n, implementation=implementation)

    function, shape = (union, (case.n,)) if case.union else (top, (case.b, case.n))
    start = jnp.zeros(shape, jnp.int32)
    for implementation in and_xla(names):
        call = functools.partial(function, implementation=implementation)
        yield (
            Result("select", name, implementation, case.n, case.c, case.bytes()),
            functools.partial(make_chain, call, start, arguments),
        )


def rows(
    name: str, case: Attention | Mlp | Select, dtype, names: Names
) -> Iterator[Row]:
    """What there is to time at one shape."""
    if isinstance(case, Select):
        return select(name, case, names)
    if isinstance(case, Mlp):
        return mlp(name, case, dtype, names)
    return attention(name, case, dtype, names)


def torch_results(
    cases: Mapping[str, Attention | Mlp | Select],
) -> tuple[str | None, list[Result]]:
    """Torch's version and its dense rows, without rates; measured by a process."""
    timed = [name for name, case in cases.items() if not isinstance(case, Select)]
    if not timed:
        return None, []
    if find_spec("torch") is None:
        print("no rows of torch's: it is not installed", flush=True)
        return None, []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torch_baseline", "--shapes", *timed],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    if report["error"]:
        print(f"no rows of torch's: {report['error']}", flush=True)
    results = []
    for row in report["results"]:
        case = cases[row["shape"]]
        assert not isinstance(case, Select)
        kernel = "attention" if isinstance(case, Attention) else "mlp"
        of = case.k if isinstance(case, Attention) else case.f
        results.append(Result(kernel, of=of, read=of, bytes=case.bytes(of), **row))
    return report["torch"], results


def measure(rows: Iterable[Row], pool: Executor) -> Iterator[Result]:
    """Time the rows of one shape: all are compiled, side by side, then run in turn."""
    pending = [(result, pool.submit(build)) for result, build in rows]
    wait([future for _, future in pending])  # compiling may use the device too
    while pending:
        result, future = pending.pop(0)  # and its arrays are let go
        try:
            result.ms = median_ms(future.result())
        except Exception as error:  # what a kernel refuses is itself a result
            traceback.print_exception(error)
            lines = str(error).splitlines() or [""]
            result.error = f"{type(error).__name__}: {lines[0]}"
        yield result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Time the kernels."
    )
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--no-torch", action="store_true", help="no rows of torch's")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=get_args(Implementation),
        help="which of ours (default: all that are compiled here)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="programs compiled at once (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file to write, row by row (default: benchmarks/results/"
        "DATE-DEVICE-COMMIT-kernels.json; with --toy none)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[*CASES],
        default=[*CASES],
        metavar="NAME",
        help=f"some of {', '.join(CASES)} (default: all)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cases = TOY_CASES if args.toy else {name: CASES[name] for name in args.shapes}
    version, results = None, []
    if not (args.toy or args.no_torch):  # before jax takes the device
        version, results = torch_results(cases)
    device = jax.devices()[0]
    dtype = jnp.dtype(jnp.float32 if args.toy else jnp.bfloat16)
    names = args.implementations or ours()
    stream = read_bandwidth(device)
    rates = best_rates(cases, results, stream)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "torch": version,
        "dtype": dtype.name,
        "stream_gb_s": stream / 1e9,
        "r_gb_s": {name: rate / 1e9 for name, rate in rates.items()},
        "shapes": {name: dataclasses.asdict(case) for name, case in cases.items()},
    }
    path = args.out
    if path is None and not args.toy:
        slug = re.sub(r"\W+", "-", device.device_kind.lower())
        file = f"{report['date']}-{slug}-{report['commit']}-kernels.json"
        path = REPOSITORY / "benchmarks" / "results" / file
    if path:
        try_file(path)  # before the work, not after
    print(f"{device.device_kind}, jax {jax.__version__}, {dtype.name}")
    print(f"the memory can be read at {stream / 1e9:.1f} GB/s (streaming sum)")
    for result in results:
        print(result.finish(rates[result.shape], stream), flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for place, (name, case) in enumerate(cases.items(), 1):
            print(f"[{place}/{len(cases)}] {name}: {case}", flush=True)
            for result in measure(rows(name, case, dtype, names), pool):
                results.append(result.finish(rates[name], stream))
                print(result, flush=True)
                if path:
                    write(path, report, results)
    if path:
        print(f"written to {path}; next: python -m benchmarks.roofline {path}")


if __name__ == "__main__":
    main()
