"""How fast a device's memory can be read: what every floor is computed with."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp


@functools.cache
def read_bandwidth(device: Any) -> float:
    """Bytes per second at which this device's memory can be read.

    The best of a streaming sum, sums of rows, and a matrix-vector product: which one
    XLA makes the fastest differs by device and version.

    Args:
      device: a `jax.Device`. It is measured once per process, with a buffer larger
        than its caches.
    """
    size, passes, calls = (2**31, 8, 8) if device.platform == "gpu" else (2**28, 4, 1)
    memory = device.memory_stats() or {}
    if "bytes_limit" in memory:  # never take the last of a full device
        free = memory["bytes_limit"] - memory["bytes_in_use"]
        size = max(2**24, min(size, free // 4))
    columns = 2**13
    values = jnp.ones((size // (4 * columns), columns), jnp.float32, device=device)
    # Each pass depends on the one before, else one would do for all.
    ways = (
        lambda values, last: (values * last).sum() / values.size,
        lambda values, last: (values * last).sum(axis=1).max() / columns,
        lambda values, last: (values @ jnp.full(columns, last)).max() / columns,
    )
    return max(_rate(one, values, passes, calls) for one in ways)


def _rate(one: Any, values: jax.Array, passes: int, calls: int) -> float:
    """Bytes per second of so many passes a call, and so many calls."""

    @jax.jit
    def read(values: jax.Array) -> jax.Array:
        def step(last, _):
            return one(values, last), None

        return jax.lax.scan(step, jnp.float32(1), length=passes)[0]

    def seconds(calls: int) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready([read(values) for _ in range(calls)])
            times.append(time.perf_counter() - start)
        return min(times)

    read(values).block_until_ready()
    taken, done = seconds(calls), calls
    if calls > 1:
        # To begin and to wait takes a GPU as long as to read 1 GB: one call's goes.
        taken, done = taken - seconds(1), calls - 1
    return done * passes * values.nbytes / taken
