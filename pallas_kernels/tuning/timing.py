"""Times a function on the device, without what the host adds."""

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Sets of inputs that add up to this much, used in turn, are never found in a cache:
# the largest L2 of today's GPUs is 126 MB.
_ROTATED_BYTES = 512 * 1024**2
_MAX_SETS = 32
# The calls of one program last about this long, at a bandwidth few GPUs exceed: many
# enough that its first and last do not count.
_JIT_SECONDS = 6e-4
_BANDWIDTH = 5e12
_MIN_CALLS = 4


@dataclasses.dataclass(frozen=True)
class Chain:
    """Compiled calls of a function, and what they are called with."""

    program: Callable[[Any, Sequence[tuple]], Any]
    start: Any
    arguments: Sequence[tuple]


def sets_to_rotate(nbytes: int) -> int:
    """How many sets of inputs to use in turn, where one call reads nbytes of its."""
    return min(_MAX_SETS, -(-_ROTATED_BYTES // nbytes))


def calls_to_time(nbytes: int) -> int:
    """How many calls that read nbytes each belong into one chain."""
    wanted = -(-int(_JIT_SECONDS * _BANDWIDTH) // nbytes)
    return min(max(wanted, _MIN_CALLS), _MAX_SETS)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(
    seed: int | jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0
) -> jax.Array:
    """Normal noise, made on the device."""
    noise = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return (noise * scale).astype(dtype)


def make_chain(
    function: Callable[..., Any], start: Any, arguments: Sequence[tuple]
) -> Chain:
    """Compile the calls `value = function(value, *arguments[i])` as one program.

    No dispatch lies between them, and each takes the result of the one before, as the
    layers of a model do: no call runs beside another. Several chains may be compiled
    at once, by threads.

    Args:
        function: what to time; returns what it takes first, in shape and dtype.
        start: what the first call takes, any pytree of arrays.
        arguments: one tuple of pytrees per call. Give each call its own small arrays,
            else what depends on them alone is computed once for all calls.
    """
    once = jax.jit(function)  # traced and lowered once, however many calls

    def calls(value: Any, arguments: Sequence[tuple]) -> Any:
        for some in arguments:
            value = once(value, *some)
        return value

    arguments = list(arguments)
    program = jax.jit(calls).lower(start, arguments).compile()
    return Chain(program, start, arguments)


def median_ms(chain: Chain, *, repeats: int = 5) -> float:
    """Median milliseconds of one call of a chain, from its first kernel to its last.

    On a GPU the kernels' own clock stamps are used, with all gaps between kernels:
    dispatching a program takes the host 0.1 to 0.2 ms, which a short chain does not
    hide. Elsewhere, the host's clock.

    Args:
        chain: from `make_chain`.
        repeats: runs of the whole chain.
    """

    def run() -> None:
        jax.block_until_ready(chain.program(chain.start, chain.arguments))

    run()
    clock = _gpu_seconds if jax.default_backend() == "gpu" else _host_seconds
    return statistics.median(clock(run, repeats)) / len(chain.arguments) * 1e3


def _host_seconds(run: Callable[[], None], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def _gpu_seconds(run: Callable[[], None], repeats: int) -> list[float]:
    """From the start of the first kernel to the end of the last, of each run."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        [file] = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        events = sorted(
            (event.start_ns, event.start_ns + event.duration_ns)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
    each, rest = divmod(len(events), repeats)
    if rest or not each:
        raise RuntimeError(
            f"the profiler saw {len(events)} kernels in {repeats} equal runs; is the "
            "GPU's profiling interface (CUPTI) installed and free?"
        )
    runs = [events[i : i + each] for i in range(0, len(events), each)]
    return [(max(end for _, end in run) - run[0][0]) * 1e-9 for run in runs]
