"""Spans whose keys can matter: the bound of Quest (arXiv 2406.10774)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from polarjax.policy import Pages, Policy, Seen, Wants

_setting = {"static": True, "setting": True}


def bounds(keys: jax.Array) -> jax.Array:
    """Keys [..., span, d] to the least and the largest of each channel, [..., 2, d]."""
    return jnp.stack([keys.min(axis=-2), keys.max(axis=-2)], axis=-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest(Policy):
    """The spans with the largest score that a key of theirs could have.

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
        """The bounds of each span's keys."""
        return Wants(summary=bounds, span=self.span)

    def pages(self, layer: int, seen: Seen, pick) -> Pages | None:
        """By the bound of each query head, as a log of a sum over the group."""
        if layer < self.dense_layers:
            return None
        b, _, k, _, d = seen.summary.shape
        q = seen.q.reshape(b, k, -1, d).astype(jnp.float32)
        low, high = (seen.summary[:, :, :, i].astype(jnp.float32) for i in (0, 1))
        bound = jnp.einsum("bkgd,bpkd->bkgp", jnp.maximum(q, 0), high)
        bound += jnp.einsum("bkgd,bpkd->bkgp", jnp.minimum(q, 0), low)
        scores = jax.nn.logsumexp(bound / d**0.5, axis=2)
        there = -(-seen.lengths // self.span)
        count = jnp.maximum(self.least, jnp.ceil(self.share * there))
        return pick.pages(scores, count, seen.lengths, self.span)
