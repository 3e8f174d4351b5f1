"""Times torch's dense attention and MLP at the same shapes, for the tables to compare.

    python -m benchmarks.torch_baseline [--shapes NAME ...]

Prints one JSON object. `benchmarks.kernels` runs it as a process of its own, so that
torch and jax never share the device's memory. Without CUDA it says so in `error` and
has no results.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cases import ATTENTION, CASES, MLP, Attention, Mlp

# By name: torch is no dependency, and where it is missing its types are unknown.
torch: Any = importlib.import_module("torch")
sdp: Any = importlib.import_module("torch.nn.attention")
functional: Any = torch.nn.functional

ROTATED_BYTES = 512 * 1024**2
GRAPH_SECONDS = 1e-3
IN_FLIGHT = 4
REPEATS = 5


def median_ms(function: Callable, start, sets: list[tuple], calls: int) -> float:
    """Median milliseconds of one call, from CUDA graphs of calls on rotated inputs.

    Each call takes the result of the one before, as in `pallas_kernels.tuning.timing`.
    """

    def all_calls():
        value = start
        for index in range(calls):
            value = function(value, *sets[index % len(sets)])
        return value

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up where it will be captured
        all_calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(IN_FLIGHT):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / (IN_FLIGHT * calls))
    return statistics.median(times)


def counts(nbytes: int) -> tuple[int, int]:
    """How many sets of inputs to rotate, and how many calls to put into one graph."""
    sets = min(32, -(-ROTATED_BYTES // nbytes))
    calls = int(min(max(GRAPH_SECONDS * 5e12 / nbytes, 4), 32))
    return sets, max(sets, calls)


def normal(*shape: int, scale: float = 1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def attention(case: Attention) -> Iterator[tuple]:
    """Yields (what, function, start, sets, calls) of each backend of SDPA."""
    sets, calls = counts(case.bytes(case.k))
    shape = (case.b, case.k, case.s, case.d)
    caches = [(normal(*shape), normal(*shape)) for _ in range(sets)]
    q = normal(case.b, case.h, 1, case.d)
    backends = {
        "flash": sdp.SDPBackend.FLASH_ATTENTION,
        "cudnn": sdp.SDPBackend.CUDNN_ATTENTION,
        "default": None,
    }
    for name, backend in backends.items():

        def sdpa(q, keys, values, backend=backend):
            chosen = sdp.sdpa_kernel(backend) if backend else contextlib.nullcontext()
            with chosen:
                return functional.scaled_dot_product_attention(
                    q, keys, values, enable_gqa=case.h != case.k
                )

        yield f"torch SDPA {name}", sdpa, q, caches, calls


def mlp(case: Mlp) -> Iterator[tuple]:
    """Yields (what, function, start, sets, calls) of the layer as torch users write it.

    The weights lie as `torch.nn.Linear` has them: [f, m] in, [m, f] out.
    """
    m, f = case.m, case.f
    sets, calls = counts(case.bytes(f))
    shapes = [(f, m), (m, f), *([(f, m)] if case.gated else [])]
    layers = [
        tuple(normal(*shape, scale=shape[1] ** -0.5) for shape in shapes)
        for _ in range(sets)
    ]
    up_bias, down_bias = normal(f), normal(m)

    def plain(x, up, down):
        hidden = functional.relu(functional.linear(x, up, up_bias))
        return functional.linear(hidden, down, down_bias)

    def gated(x, up, down, gate):
        hidden = functional.silu(functional.linear(x, gate))
        return functional.linear(hidden * functional.linear(x, up), down)

    function = gated if case.gated else plain
    yield "torch linear", function, normal(case.b, m), layers, calls


def measure(names: list[str]) -> list[dict]:
    """One row per shape and backend; what a backend refuses is its error."""
    rows = []
    for name in names:
        case = CASES[name]
        if isinstance(case, Attention):
            if case.ragged:  # its dense time is that of the full lengths
                continue
            timed = attention(case)
        else:
            assert isinstance(case, Mlp)
            timed = mlp(case)
        for what, function, start, sets, calls in timed:
            row = {"shape": name, "what": what, "ms": None, "error": ""}
            try:
                row["ms"] = median_ms(function, start, sets, calls)
            except Exception as error:  # what a library refuses is itself a result
                lines = str(error).splitlines() or [""]
                row["error"] = f"{type(error).__name__}: {lines[0]}"
            rows.append(row)
            shown = row["error"] if row["ms"] is None else f"{row['ms']:.4f} ms"
            print(f"{name:20} {what:20} {shown}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_baseline",
        description="Time torch's dense attention and MLP.",
    )
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
    report: dict = {"torch": torch.__version__, "results": [], "error": ""}
    if not torch.cuda.is_available():
        report["error"] = "torch sees no CUDA device"
    else:
        with torch.inference_mode():
            report["results"] = measure(args.shapes)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
