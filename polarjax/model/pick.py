"""How a policy's rankings become choices: on this device, or together with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import (
    Implementation,
    needed_neurons,
    needed_totals,
    top_heads,
    union_neurons,
)
from polarjax.mesh.share import Share
from polarjax.policy import Pages, Rows


@dataclasses.dataclass(frozen=True)
class Pick:
    """Ranks and counts for a policy, which needs to know neither kernels nor devices.

    Attributes:
      share: what this device has of the model.
      implementation: of the selection kernels; None for the default backend's own.
    """

    share: Share
    implementation: Implementation | None = None

    def top(self, scores: jax.Array, n: int, parts: int = 1) -> jax.Array:
        """The best KV groups of each sequence, best first.

        Args:
          scores: float32[b, k], larger is better.
          n: how many, at most k.
          parts: equal parts of the groups, of each of which n / parts are taken: the
            best of each, then the second best, and so on.

        Returns:
          int32[b, n].
        """
        if parts == 1:
            return top_heads(scores, n, implementation=self.implementation)
        b, k = scores.shape
        rows, each = scores.reshape(b * parts, -1), n // parts
        chosen = top_heads(rows, each, implementation=self.implementation)
        first = jnp.arange(parts, dtype=jnp.int32) * (k // parts)
        chosen = chosen.reshape(b, parts, each) + first[:, None]
        return chosen.swapaxes(1, 2).reshape(b, n)

    def above(self, scores: jax.Array, least: jax.Array) -> jax.Array:
        """How many KV groups score at least so much, but one at the least, int32[b].

        Args:
          scores: float32[b, k].
          least: float32[].
        """
        passing = (scores >= least).sum(axis=1, dtype=jnp.int32)
        return jnp.maximum(passing, 1)

    def needed(
        self,
        hidden: jax.Array,
        up: jax.Array,
        live: jax.Array,
        n: int,
        parts: int = 1,
    ) -> Rows:
        """The neurons that the live batch is least likely to do without.

        Args:
          hidden: float32[b, r] of a router's first matrix; on a mesh of the device's
            part of the batch.
          up: [f, r], the router's second matrix; on a mesh of the device's neurons.
          live: bool[b].
          n: how many neurons of the whole model.
          parts: equal parts of the model's neurons, each of which keeps n / parts; 1
            for the best of all, which the devices have to tell each other.

        Returns:
          Numbers among the device's neurons, ascending. With one part their number
          differs by device: there are then min(n, f), and f stands where one has
          fewer.
        """
        if self.share.alone and parts == 1:
            kernel = self.implementation
            return Rows(needed_neurons(hidden, up, live, n, implementation=kernel))
        f, share = len(up), self.share
        own = share.add_up_batch(needed_totals(hidden, up, live))
        if parts > 1:
            mine = parts // share.tp
            each = f // mine
            firsts = range(0, f, each)
            found = [self._best(own[i : i + each], n // parts) + i for i in firsts]
            return Rows(jnp.concatenate(found))
        chosen = self._best(share.gather(own), n) - share.number() * f
        chosen = jnp.where(chosen < 0, f, chosen)  # below 0 would count from the end
        kept = jnp.zeros(f, bool).at[chosen].set(True, mode="drop")
        index = jnp.nonzero(kept, size=min(n, f), fill_value=f)[0]
        return Rows(index.astype(jnp.int32))

    def _best(self, totals: jax.Array, n: int) -> jax.Array:
        # The sum of a batch of one is what it is.
        one = jnp.ones(1, bool)
        return union_neurons(totals[None], one, n, implementation=self.implementation)

    def rows(self, sizes: jax.Array, n: int, least: jax.Array | float = 0.0) -> Rows:
        """The largest rows for the whole batch, of those of at least some size.

        Args:
          sizes: float32[f], larger is better.
          n: most of them.
          least: float32[].
        """
        order = jnp.argsort(-sizes, stable=True)[:n].astype(jnp.int32)
        return Rows(order, (sizes[order] >= least).sum(dtype=jnp.int32))

    def pages(
        self,
        scores: jax.Array,
        count: jax.Array,
        lengths: jax.Array,
        span: int,
        always: Sequence[int] = (1, 2),
    ) -> Pages:
        """The best spans of each sequence and KV group.

        Args:
          scores: float32[b, k, spans], larger is better; of spans that are not whole,
            or not there, anything.
          count: int32[b], how many of the spans that are there.
          lengths: int32[b], positions in the cache.
          span: positions of a span.
          always: how many of the first, and of the newest, are read in any case; they
            count too.
        """
        first, newest = always
        number = jnp.arange(scores.shape[-1])
        there = -(-lengths // span)[:, None]  # [b, 1]
        kept = (number < first) | (number >= there - newest)
        ranked = jnp.where(kept[:, None], jnp.inf, scores)
        ranked = jnp.where((number < there)[:, None], ranked, -jnp.inf)
        order = jnp.argsort(-ranked, axis=-1, stable=True).astype(jnp.int32)
        count = jnp.clip(count, 1, there[:, 0]).astype(jnp.int32)
        return Pages(order, jnp.broadcast_to(count[:, None], order.shape[:2]))


def pages_read(chosen: Pages, spans: int) -> jax.Array:
    """Which spans an answer of `Policy.pages` stands for, bool[b, k or 1, spans]."""
    active = jnp.arange(chosen.index.shape[-1]) < chosen.count[..., None]
    read = jnp.zeros((*chosen.count.shape, spans), bool)
    b, k = (jnp.arange(n) for n in chosen.count.shape)
    at = b[:, None, None], k[:, None], chosen.index
    return read.at[at].max(active, mode="drop")
