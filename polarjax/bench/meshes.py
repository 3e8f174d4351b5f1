"""Decode steps over a mesh: arrays made where they lie, and what devices send.

A step over several devices is done when the busiest is, and no layer's sums are there
before it: its floor counts, layer by layer, what the busiest of those that share the
model reads, and then what each sends, in rings, over the link between them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from polarjax.mesh.cut import DP, TP, make_mesh, over_mesh

CALLS = 8  # all-reduces that are timed at once


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a model is timed.

    Attributes:
      tp: devices that share it.
      dp: copies of it, which share the batch.
      link: bytes per second that each sends to the others; None on one device.
      measured: whether that was measured, or said by the user.
    """

    tp: int = 1
    dp: int = 1
    link: float | None = None
    measured: bool = False

    @classmethod
    def of(cls, tp: int, dp: int, link_gb_s: float | None) -> "Devices":
        """Of such a mesh, the link measured unless it is given in GB per second."""
        if tp * dp == 1:
            return cls()
        if link_gb_s:
            return cls(tp, dp, link_gb_s * 1e9)
        return cls(tp, dp, link_rate(make_mesh(tp, dp)), measured=True)

    @property
    def mesh(self) -> Mesh | None:
        """None for one device, where nothing is cut."""
        return None if self.count == 1 else make_mesh(self.tp, self.dp)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.tp * self.dp


def link_rate(mesh: Mesh) -> float:
    """Bytes per second that a device sends while a large array is summed over several.

    In a ring of n each sends 2 (n - 1) / n of it.

    Args:
      mesh: over whose "tp" is summed, or over "dp" where that is 1.
    """
    axis = TP if mesh.shape[TP] > 1 else DP
    n, platform = mesh.shape[axis], mesh.devices.flat[0].platform
    size = 2**30 if platform == "gpu" else 2**24
    # Of zeros, which stay what they are however often they are summed.
    add = jax.jit(
        over_mesh(lambda x: lax.psum(x, axis), mesh, P(), P()), donate_argnums=0
    )
    x = jnp.zeros(size // 4, jnp.float32, device=NamedSharding(mesh, P()))
    x, seconds = jax.block_until_ready(add(x)), []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(CALLS):
            x = add(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - begin) / CALLS)
    return 2 * (n - 1) / n * size / min(seconds)


def drawn_apart(
    draw: Callable[[jax.Array], jax.Array], where: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    """A function of a key by which each device draws its part, and nobody the whole.

    Args:
      draw: from a key to what one device has.
      where: the axes of the mesh along which the parts differ.
    """

    def own(key: jax.Array) -> jax.Array:
        for axis in filter(None, where.spec):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        return draw(key)

    assert isinstance(where.mesh, Mesh)
    return over_mesh(own, where.mesh, P(), where.spec)


def of_one(tree: Any) -> Any:
    """Arrays as `jax.ShapeDtypeStruct` of what one device has of them."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return jax.tree.map(shape, tree)
