"""Self-attention over a KV cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import (
    Implementation,
    partial_product,
    rotate,
    split_heads,
)
from polarjax.cache import PagedCache, Pieces
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share
from polarjax.model.causal import causal_attention, spanned_attention
from polarjax.model.linear import linear
from polarjax.model.module import Module
from polarjax.model.norms import Norm
from polarjax.model.pick import Pick, pages_read
from polarjax.model.positions import angles
from polarjax.policy import (
    Groups,
    Policy,
    Seen,
    check_channels,
    check_groups,
    check_pages,
    groups_read,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Positions at the start of each sequence that are read dense, as prompts are.

    Attributes:
      lengths: int32[b], how many.
      keys: by layer, [b, t, k, d], what those positions left for later ones, if that
        was other weights' work; () if it is the same model's.
      values: likewise.
    """

    lengths: jax.Array
    keys: tuple[jax.Array, ...] = ()
    values: tuple[jax.Array, ...] = ()


Gates = Callable[[int, jax.Array, jax.Array], jax.Array]
"""(layer, attention's input [b, t, m], groups read bool[b, t, k]) -> [b, t, k]."""


class Attention(Module):
    """Multi-head, multi-query or grouped-query attention.

    Attributes:
      config: of the model.
      layer: from 0.
      dtype: of the weights.
      share: of the device.
      score_rows: further rows of the QKV matrix, the policy's: what they yield is
        handed to it.
      implementation: of the decode kernel.
    """

    config: ModelConfig
    layer: int
    dtype: jnp.dtype
    share: Share
    score_rows: int = 0
    implementation: Implementation | None = None

    def setup(self) -> None:
        c = self.config
        zeros = nn.initializers.zeros
        # Devices share the rows that a policy appends, as the model's own.
        cut = self.share.tp if self.share.cuts_scores else 1
        added = -(-self.score_rows // cut)
        rows = (c.heads + 2 * c.kv_heads) * c.head_dim + added
        # All matrices head-major: what belongs to a head is a block of rows.
        self.qkv = self.param("qkv", _normal, (rows, c.dim), self.dtype)
        self.out = self.param("out", _normal, (c.heads * c.head_dim, c.dim), self.dtype)
        # Router rows bring biases of their own.
        if c.qkv_bias or self.score_rows:
            self.qkv_bias = self.param("qkv_bias", zeros, (rows,), self.dtype)
        if c.out_bias:
            self.out_bias = self.param("out_bias", zeros, (c.dim,), self.dtype)
        if c.qk_norm:
            self.q_norm, self.k_norm = (Norm(c, c.head_dim, self.dtype) for _ in "qk")

    def project(
        self, u: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries, keys and values, normalised and rotated as the model has it; scores.

        Args:
          u: [b, t, m], the layer's input as attention reads it.
          positions: int32[b, t].

        Returns:
          q [b, t, h, d]; k and v [b, t, k, d]; scores float32[b, t, r] or None.
        """
        c, (b, t, _) = self.config, u.shape
        # Scores stay as exact as they are summed.
        dtype = jnp.float32 if self.score_rows else u.dtype
        y = linear(u, self.qkv, self._qkv_bias(), dtype)
        end_q = c.heads * c.head_dim
        end_k = end_q + c.kv_heads * c.head_dim
        end_v = end_k + c.kv_heads * c.head_dim
        q, k, v = (
            part.astype(u.dtype).reshape(b, t, -1, c.head_dim)
            for part in (y[..., :end_q], y[..., end_q:end_k], y[..., end_k:end_v])
        )
        scores = y[..., end_v:] if self.score_rows else None
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope := c.rope_of(self.layer):
            turn = angles(positions, rope, c.head_dim, c.context)
            cos, sin = (x[:, :, None] for x in turn)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v, self._all_scores(scores)

    def project_one(
        self, u: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """As `project`, of one token of each sequence.

        Args:
          u: [b, m].
          positions: int32[b].

        Returns:
          q [b, h, d]; k and v [b, k, d]; scores float32[b, r] or None.
        """
        c, kernel = self.config, self.implementation
        parts = partial_product(u, self.qkv, self._qkv_bias(), implementation=kernel)
        rope = c.rope_of(self.layer)
        turn = angles(positions, rope, c.head_dim, c.context) if rope else None
        split = functools.partial(
            split_heads,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            dtype=u.dtype,
            implementation=kernel,
        )
        if not c.qk_norm:
            q, k, v, scores = split(parts, *(turn or (None, None)))
            return q, k, v, self._all_scores(scores)
        q, k, v, scores = split(parts, None, None)
        q, k = self.q_norm(q), self.k_norm(k)
        if turn:
            cos, sin = (x[:, None] for x in turn)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v, self._all_scores(scores)

    def _all_scores(self, scores: jax.Array | None) -> jax.Array | None:
        share = self.share
        if scores is None or share.alone or not share.cuts_scores:
            return scores
        return share.gather(scores)[..., : self.score_rows]

    def _qkv_bias(self) -> jax.Array | None:
        return self.qkv_bias if self.config.qkv_bias or self.score_rows else None

    def output(self, o: jax.Array) -> jax.Array:
        """Head outputs [..., h, d] to the residual stream [..., m]."""
        flat = o.reshape(*o.shape[:-2], -1)
        dtype = o.dtype if self.share.alone else jnp.float32
        y = linear(flat, self.out.T, self._out_bias(), dtype)
        return self.share.add_up(y).astype(o.dtype)

    def thin_output(self, o: jax.Array, policy: Policy, pick: Pick) -> jax.Array:
        """Head outputs [..., h, d], 0 where the policy leaves them out of `output`."""
        flat = o.reshape(*o.shape[:-2], -1)
        return thinned(policy, self.layer, "out", flat, pick).reshape(o.shape)

    def output_parts(self, o: jax.Array) -> jax.Array:
        """`output` of [b, h, d] as parts of a sum, float32[p, b, m]."""
        parts = partial_product(
            o.reshape(o.shape[0], -1),
            self.out,
            self._out_bias(),
            axis=0,
            implementation=self.implementation,
        )
        return self.share.add_up_parts(parts)

    def _out_bias(self) -> jax.Array | None:
        return self.share.on_first(self.out_bias) if self.config.out_bias else None

    def whole(
        self, seen: Seen, policy: Policy, prefix: Prefix | None, gates: Gates | None
    ) -> tuple[Seen, WholeAttention]:
        """Causal attention of whole sequences, every position sparse.

        What decoding computes, every position at once and nothing saved: what a
        position does not read is masked. Padding at the end is never seen.

        Args:
          seen: with u, [b, t, m] as all fields have an axis of positions.
          policy: bound to the weights.
          prefix: positions that are read dense, as a prompt is; None for none.
          gates: what each group's output counts; None for 1 where it is read, else 0.

        Returns:
          What is seen now, and the results.
        """
        c, (b, t, _) = self.config, seen.u.shape
        pick = Pick(self.share, "xla")
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        u = thinned(policy, self.layer, "qkv", seen.u, pick)
        q, k, v, scores = self.project(u, positions)
        before = None
        if prefix is not None:
            before = positions < prefix.lengths[:, None]
            if prefix.keys:
                mine = before[..., None, None]
                k = jnp.where(mine, prefix.keys[self.layer], k)
                v = jnp.where(mine, prefix.values[self.layer], v)
        seen = dataclasses.replace(seen, q=q, scores=scores)
        window = c.window(self.layer)
        if summary := policy.wants.summary:
            seen = dataclasses.replace(
                seen, summary=summaries(k, policy.wants.span, summary)
            )
        spans = self._spans(seen, policy, pick)
        if spans is None:
            o = causal_attention(q, k, v, window)
        else:
            spans = spans if before is None else spans | before[..., None, None]
            o = spanned_attention(q, k, v, spans, policy.wants.span, window)
        if policy.wants.norms:
            norms = self.share.add_up_groups(head_norms(o, c.kv_heads))
            seen = dataclasses.replace(seen, norms=norms)

        def choose(seen: Seen) -> Groups | None:
            chosen = policy.groups(self.layer, seen, pick)
            check_groups(chosen, policy, len(seen.live), self._groups)
            return chosen

        # A policy answers for one position of each sequence.
        chosen = jax.vmap(choose, (positions_of(seen),))(seen)
        read = jnp.ones((b, t, self._groups), bool)
        if chosen is not None:
            read = jax.vmap(lambda c: groups_read(c, b, self._groups), 0, 1)(chosen)
            read = read if before is None else read | before[..., None]
        grouped = o.reshape(b, t, c.kv_heads, -1)
        if gates is None:
            own = self.share.own_groups(read)
            kept = grouped if chosen is None else jnp.where(own[..., None], grouped, 0)
        else:
            own = self.share.own_groups(gates(self.layer, seen.u, read))
            kept = grouped * own[..., None].astype(o.dtype)
        return seen, WholeAttention(kept.reshape(o.shape), o, read, k, v)

    def _spans(self, seen: Seen, policy: Policy, pick: Pick) -> jax.Array | None:
        """Which spans each position reads, bool[b, t, k or 1, spans]; None for all."""
        spans = -(-seen.u.shape[1] // policy.wants.span)

        def choose(seen: Seen) -> jax.Array | None:
            chosen = policy.pages(self.layer, seen, pick)
            check_pages(chosen, policy, len(seen.live), self._groups)
            return None if chosen is None else pages_read(chosen, spans)

        return jax.vmap(choose, (positions_of(seen),), 1)(seen)

    @property
    def _groups(self) -> int:
        """KV groups of the whole model."""
        return self.share.whole.kv_heads

    def read(
        self, u: jax.Array, place: jax.Array, pieces: Pieces, cache: PagedCache
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of parts of prompts, dense.

        Args:
          u: [n, m], the layer's input as attention reads it.
          place: int32[n], positions.
          pieces: whose they are.
          cache: of what comes before.

        Returns:
          Head outputs [n, h, d], and the cache with keys and values written.
        """
        q, k, v, _ = self.project(u[None], place[None])
        return cache.attend_pieces(
            self.layer,
            q[0],
            k[0],
            v[0],
            pieces,
            self.config.window(self.layer),
            self.implementation,
        )

    def step(
        self, seen: Seen, cache: PagedCache, policy: Policy
    ) -> tuple[jax.Array, PagedCache, Seen, Read]:
        """Attention of one new token of each sequence, to what the policy picks.

        Args:
          seen: with u.
          cache: of what comes before.
          policy: bound to the weights.

        Returns:
          Head outputs [b, h, d], the cache, what is seen now, and what was read.
        """
        c, b, live = self.config, len(seen.live), seen.live
        pick = Pick(self.share, self.implementation)
        if policy.wants.summary:
            raise NotImplementedError(
                f"{type(policy).__name__} selects pages, which no kernel of decoding "
                "reads yet: measure it in mode mask"
            )
        no_channels(policy, self.layer, "qkv", seen.u, pick)
        q, k, v, scores = self.project_one(seen.u, cache.lengths)
        seen = dataclasses.replace(seen, q=q, scores=scores)
        attend = functools.partial(
            PagedCache.attend,
            live=live,
            window=c.window(self.layer),
            implementation=self.implementation,
        )
        if policy.wants.norms:
            # Every group is computed once to be measured, before any is chosen.
            o, cache = attend(cache, self.layer, q, k, v)
            norms = self.share.add_up_groups(head_norms(o, c.kv_heads))
            seen, k, v = dataclasses.replace(seen, norms=norms), None, None
        chosen = policy.groups(self.layer, seen, pick)
        check_groups(chosen, policy, b, self._groups)
        pages = policy.pages(self.layer, seen, pick)
        check_pages(pages, policy, b, self._groups)
        every = groups_read(chosen, b, self._groups) & live[:, None]
        count = jnp.full(b, self._groups)
        if chosen is not None:
            count = jnp.clip(chosen.count, 0, chosen.index.shape[1])
        own = chosen
        if not self.share.alone and chosen is not None:
            mine = self.share.own_groups(every)
            # The chosen ones first, in their order.
            index = pick.top(mine.astype(jnp.float32), c.kv_heads)
            own = Groups(index, mine.sum(axis=1, dtype=jnp.int32))
        here = jnp.full(b, c.kv_heads) if own is None else own.count
        o, cache = attend(cache, self.layer, q, k, v, groups=own, pages=pages)
        read = Read(
            groups=jnp.where(live, count, 0),
            every=every,
            here=jnp.where(live, here, 0).sum(),
        )
        return o, cache, seen, read


class Read(NamedTuple):
    """What one layer's attention read in a step.

    Attributes:
      groups: int32[b], how many of the model's KV groups.
      every: bool[b, k], which of them.
      here: int32[], KV groups that this device read, of all its sequences.
    """

    groups: jax.Array
    every: jax.Array
    here: jax.Array


class WholeAttention(NamedTuple):
    """What attention made of whole sequences.

    Attributes:
      kept: [b, t, h, d], head outputs, masked.
      outputs: [b, t, h, d], as they were.
      read: bool[b, t, k], the model's KV groups that each position reads.
      keys: [b, t, k, d].
      values: [b, t, k, d].
    """

    kept: jax.Array
    outputs: jax.Array
    read: jax.Array
    keys: jax.Array
    values: jax.Array


def positions_of(seen: Seen) -> Any:
    """For `jax.vmap`: which axes of a whole sequence's record are its positions."""
    axes = {name: 1 for name in ("live", "lengths", "u", "scores", "q", "norms")}
    axes |= {"z": 1, "gate": 1}
    before = None if seen.before is None else positions_of(seen.before)
    there = {n: 1 for n in axes if getattr(seen, n) is not None}
    fields = {f.name: None for f in dataclasses.fields(Seen)}
    made: Any = Seen
    return made(**fields | there | {"before": before})


def thinned(
    policy: Policy, layer: int, matrix: str, x: jax.Array, pick: Pick
) -> jax.Array:
    """The inputs of a product, 0 where the policy leaves them out.

    Args:
      policy: bound.
      layer: from 0.
      matrix: "qkv", "out", "up" (and the gate) or "down".
      x: [..., inputs].
      pick: of the device.
    """
    chosen = policy.channels(layer, matrix, x, pick)
    check_channels(chosen, policy, x.shape[-1])
    if chosen is None:
        return x
    size = jnp.abs(x.astype(jnp.float32))
    size = size if chosen.scale is None else size * chosen.scale
    return jnp.where(size > chosen.tau, x, 0)


def no_channels(
    policy: Policy, layer: int, matrix: str, x: jax.Array, pick: Pick
) -> None:
    """Raise if a policy selects channels, for which there is no kernel yet.

    Args:
      policy: bound.
      layer: from 0.
      matrix: as in `thinned`.
      x: [b, inputs].
      pick: of the device.
    """
    chosen = policy.channels(layer, matrix, x, pick)
    check_channels(chosen, policy, x.shape[-1])
    if chosen is not None:
        raise NotImplementedError(
            f"{type(policy).__name__} selects input channels, which no kernel of "
            "decoding reads alone yet: measure it in mode mask"
        )


def summaries(
    keys: jax.Array, span: int, summary: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """What a policy keeps of each span of keys, [b, spans, k, u, w].

    Args:
      keys: [b, t, k, d]; the last span is filled up with its last key's copies, as
        nobody asks for a span that is not whole.
      span: positions of each.
      summary: how a span is summed up, keys [..., span, d] to [..., u, w].
    """
    b, t, k, d = keys.shape
    filled = jnp.pad(keys, ((0, 0), (0, -t % span), (0, 0), (0, 0)), mode="edge")
    return summary(filled.reshape(b, -1, span, k, d).swapaxes(2, 3))


def head_norms(o: jax.Array, kv_heads: int) -> jax.Array:
    """L2 norm of each KV group's output, the quantity that routers predict.

    Args:
      o: [..., h, d], head outputs before the output projection.
      kv_heads: k of the device, whose norms `Share.add_up_groups` makes the model's.

    Returns:
      float32[..., k].
    """
    groups = o.astype(jnp.float32).reshape(*o.shape[:-2], kv_heads, -1)
    return jnp.sqrt((groups * groups).sum(-1))


_normal = nn.initializers.normal(0.02)
