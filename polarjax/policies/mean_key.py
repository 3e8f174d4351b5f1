"""Spans whose mean key matters to a query."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from polarjax.policy import Pages, Policy, Seen, Wants

_setting = {"static": True, "setting": True}


def mean_key(keys: jax.Array) -> jax.Array:
    """Keys [..., span, d] to their mean, float32[..., 1, d]."""
    return keys.astype(jnp.float32).mean(axis=-2, keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanKey(Policy):
    """The spans with most attention, as if every key were the mean of its span.

    Attributes:
      share: fraction of the spans so far that each KV group reads.
      span: positions of a span, 16 or 64.
      least: spans that are read at the least: the first, the two newest, the best.
      dense_layers: so many first layers read every span.
    """

    share: float = dataclasses.field(default=0.25, metadata=_setting)
    span: int = dataclasses.field(default=64, metadata=_setting)
    least: int = dataclasses.field(default=4, metadata=_setting)
    dense_layers: int = dataclasses.field(default=1, metadata=_setting)

    @property
    def wants(self) -> Wants:
        """The mean of each span's keys."""
        return Wants(summary=mean_key, span=self.span)

    def pages(self, layer: int, seen: Seen, pick) -> Pages | None:
        """By the softmax over spans of query and mean key, summed over a group."""
        if layer < self.dense_layers:
            return None
        b, spans, k, _, d = seen.summary.shape
        q = seen.q.reshape(b, k, -1, d).astype(jnp.float32)
        scores = jnp.einsum("bkgd,bpkd->bkgp", q, seen.summary[:, :, :, 0]) / d**0.5
        whole = jnp.arange(spans) < (seen.lengths // self.span)[:, None]
        weights = jax.nn.softmax(scores, axis=-1, where=whole[:, None, None])
        there = -(-seen.lengths // self.span)
        count = jnp.maximum(self.least, jnp.ceil(self.share * there))
        return pick.pages(weights.sum(axis=2), count, seen.lengths, self.span)
