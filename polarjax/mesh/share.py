"""What one device does for a model that several run together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from polarjax.config import ModelConfig
from polarjax.mesh.cut import (
    DP,
    TP,
    axis_size,
    local_config,
    over_mesh,
    router_specs,
    shard_groups,
    weight_specs,
)
from polarjax.params import Tree


@dataclasses.dataclass(frozen=True)
class Share:
    """How a model is cut over devices, and how they speak to each other.

    What is called inside `over` is of one device's arrays, and speaks to the others
    along the axes "tp" and "dp". Of a model on one device nothing changes anything.

    Attributes:
      whole: the model.
      mesh: that it is cut over; None for one device, which has all.
      cuts_scores: whether the rows that a policy appends to the QKV matrix are cut
        too, as where it is bound to a model on a mesh. A training binds anew in each
        step what one device has.
    """

    whole: ModelConfig
    mesh: Mesh | None = None
    cuts_scores: bool = True

    @property
    def alone(self) -> bool:
        """Whether there is no mesh. One of a single device is one all the same."""
        return self.mesh is None

    @property
    def tp(self) -> int:
        """Devices that share the model."""
        return axis_size(self.mesh, TP)

    @property
    def dp(self) -> int:
        """Parts of the batch."""
        return axis_size(self.mesh, DP)

    @property
    def own(self) -> ModelConfig:
        """The model that one device runs."""
        return self.whole if self.alone else local_config(self.whole, self.tp)

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether embedding and head are cut too."""
        return self.own.vocab_size != self.whole.vocab_size

    def over(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """A function of one device's share, over the shares of all.

        Args:
          function: of arrays as one device has them.
          in_specs: how arguments are cut, a pytree as they are, or a prefix of one.
          out_specs: how what it returns is cut.
        """
        return over_mesh(function, self.mesh, in_specs, out_specs)

    def weight_specs(self, weights: Tree) -> Any:
        """How the model's weights are cut, for `over`."""
        return None if self.mesh is None else weight_specs(weights, self.tp)

    def router_specs(self, routers: Tree) -> Any:
        """How its routers are cut, for `over`."""
        return None if self.mesh is None else router_specs(routers, self.tp)

    def batch_spec(self, batch: int) -> PartitionSpec:
        """Rows along "dp" where it divides them; else each part has them all."""
        return PartitionSpec() if batch % self.dp else PartitionSpec(DP)

    def number(self) -> jax.Array | int:
        """Number of this device along "tp"."""
        return 0 if self.mesh is None else lax.axis_index(TP)

    def slots(self, batch: int) -> jax.Array:
        """Number of each of this device's rows among those of all, int32[b].

        Args:
          batch: rows that this device has, b.
        """
        first = 0 if self.dp == 1 else lax.axis_index(DP) * batch
        return first + jnp.arange(batch, dtype=jnp.int32)

    def add_up(self, x: jax.Array) -> jax.Array:
        """The sum of what the devices have."""
        return x if self.tp == 1 else lax.psum(x, TP)

    def add_up_parts(self, parts: jax.Array) -> jax.Array:
        """[p, b, m] to as many, or to one, with the same sum over all devices."""
        if self.mesh is None:
            return parts
        return self.add_up(parts.sum(axis=0, keepdims=True))

    def add_up_batch(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of the batch."""
        return x if self.dp == 1 else lax.psum(x, DP)

    def batch_mean(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """The mean over all parts of the batch, of those elements `where` it is true.

        Its gradient, taken inside, is as many times too large as there are parts, each
        for its own: their mean is that of the whole.
        """
        if self.dp == 1:
            return x.mean(where=where)
        counted = jnp.broadcast_to(True if where is None else where, x.shape)
        total = jnp.sum(x, where=counted), counted.sum(dtype=jnp.float32)
        total, count = lax.psum(total, DP)
        return total / count

    def mean_of_parts(self, tree: Any) -> Any:
        """The mean over the parts of the batch of what each has."""
        return tree if self.dp == 1 else lax.pmean(tree, DP)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest of what the parts of the batch have."""
        return x if self.dp == 1 else lax.pmax(x, DP)

    def gather(self, x: jax.Array) -> jax.Array:
        """What the devices have, behind one another along the last axis."""
        if self.tp == 1:  # copies of the model: nobody to ask
            return x
        return lax.all_gather(x, TP, axis=x.ndim - 1, tiled=True)

    def gather_logits(self, own: jax.Array) -> jax.Array:
        """[..., v] from the part of the vocabulary that each device has."""
        return self.gather(own) if self.cuts_vocabulary else own

    def on_first(self, bias: jax.Array | None) -> jax.Array | None:
        """A bias of what is summed over devices, on one of them alone."""
        if self.mesh is None or bias is None:
            return bias
        return jnp.where(self.number() == 0, bias, jnp.zeros_like(bias))

    def own_groups(self, chosen: jax.Array) -> jax.Array:
        """What is said of this device's KV groups, such as whether they are chosen.

        Args:
          chosen: [..., k], of the model's.
        """
        if self.mesh is None:
            return chosen
        return jnp.take(chosen, self._groups()[self.number()], axis=-1)

    def add_up_groups(self, norms: jax.Array) -> jax.Array:
        """L2 norms of the model's KV groups, from those of every device's.

        Args:
          norms: float32[..., k of the device].
        """
        if self.mesh is None:
            return norms
        table, shape = self._groups(), (*norms.shape[:-1], self.whole.kv_heads)
        squares = jnp.zeros(shape, norms.dtype)
        squares = squares.at[..., table[self.number()]].add(jnp.square(norms))
        return jnp.sqrt(self.add_up(squares))

    def _groups(self) -> jax.Array:
        """Which KV group of the model each device's are, [tp, k of a device]."""
        return jnp.asarray(np.array(shard_groups(self.whole, self.tp), np.int32))
