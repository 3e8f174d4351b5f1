"""Self-attention over a KV cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import (
    Implementation,
    append_and_attend,
    gathering,
    partial_product,
    rotate,
    select_head_attention,
    split_heads,
    top_heads,
)
from polarjax.config import ModelConfig
from polarjax.mesh.share import (
    Share,
    add_up,
    add_up_groups,
    add_up_parts,
    gather,
    once,
    own_groups,
)
from polarjax.model.causal import causal_attention
from polarjax.model.linear import linear
from polarjax.model.norms import Norm
from polarjax.model.positions import angles
from polarjax.policy import SelectionPolicy, groups_read


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


class Attention(nn.Module):
    """Multi-head, multi-query or grouped-query attention.

    Attributes:
      config: of the model.
      layer: from 0.
      dtype: of the weights.
      score_rows: further rows of the QKV matrix, the policy's: what they yield is
        handed to it.
      implementation: of the decode kernel.
      share: of one device of several.
    """

    config: ModelConfig
    layer: int
    dtype: jnp.dtype
    score_rows: int = 0
    implementation: Implementation | None = None
    share: Share | None = None

    def setup(self) -> None:
        c = self.config
        zeros = nn.initializers.zeros
        # Devices share the rows that a policy appends, as the model's own.
        cut = self.share.tp if self.share and self.share.cuts_scores else 1
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
        c, kernel = self.config, gathering(self.implementation)
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
        if scores is None or self.share is None or not self.share.cuts_scores:
            return scores
        return gather(scores, self.share)[..., : self.score_rows]

    def _qkv_bias(self) -> jax.Array | None:
        return self.qkv_bias if self.config.qkv_bias or self.score_rows else None

    def output(self, o: jax.Array) -> jax.Array:
        """Head outputs [..., h, d] to the residual stream [..., m]."""
        flat = o.reshape(*o.shape[:-2], -1)
        dtype = jnp.float32 if self.share else o.dtype
        y = linear(flat, self.out.T, self._out_bias(), dtype)
        return add_up(y, self.share).astype(o.dtype)

    def output_parts(self, o: jax.Array) -> jax.Array:
        """`output` of [b, h, d] as parts of a sum, float32[p, b, m]."""
        parts = partial_product(
            *(o.reshape(o.shape[0], -1), self.out, self._out_bias()),
            axis=0,
            implementation=gathering(self.implementation),
        )
        return add_up_parts(parts, self.share)

    def _out_bias(self) -> jax.Array | None:
        return once(self.out_bias, self.share) if self.config.out_bias else None

    def prefill(self, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Causal attention of whole sequences; padding at the end is never seen.

        Args:
          u: [b, t, m], the layer's input as attention reads it.

        Returns:
          Head outputs [b, t, h, d], keys and values [b, t, k, d].
        """
        b, t, _ = u.shape
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        q, k, v, _ = self.project(u, positions)
        return causal_attention(q, k, v, self.config.window(self.layer)), k, v

    def masked(
        self,
        u: jax.Array,
        policy: SelectionPolicy,
        prefix: Prefix | None = None,
        gates: Gates | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """As `prefill`, with outputs of 0 where the policy picks no group.

        What decoding computes, every position at once and nothing saved.

        Args:
          u: [b, t, m], the layer's input as attention reads it.
          policy: bound to the weights.
          prefix: positions that are read dense, as a prompt is.
          gates: what each group's output counts; None for 1 where it is read, else 0.

        Returns:
          Head outputs [b, t, h, d], masked, and as they were; scores float32[b, t, r]
          or None; bool[b, t, k], the model's KV groups that each position reads.
        """
        c, (b, t, _) = self.config, u.shape
        groups = self.share.kv_heads if self.share else c.kv_heads
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        q, k, v, scores = self.project(u, positions)
        before = None
        if prefix is not None:
            before = (positions < prefix.lengths[:, None])[..., None]
            if prefix.keys:
                k = jnp.where(before[..., None], prefix.keys[self.layer], k)
                v = jnp.where(before[..., None], prefix.values[self.layer], v)
        o = causal_attention(q, k, v, c.window(self.layer))
        norms = None
        if policy.wants_norms:
            norms = head_norms(o, c.kv_heads, self.share)

        def choose(_, scores: jax.Array | None, norms: jax.Array | None) -> jax.Array:
            chosen = policy.heads(self.layer, scores, norms, "xla")
            return groups_read(chosen, b, groups)

        # A policy answers for one position of each sequence.
        read = jax.vmap(choose, (0, 1, 1), 1)(jnp.arange(t), scores, norms)
        read = read if before is None else read | before
        grouped = o.reshape(b, t, c.kv_heads, -1)
        if gates is None:
            own = own_groups(read, self.share)
            kept = jnp.where(own[..., None], grouped, 0)
        else:
            own = own_groups(gates(self.layer, u, read), self.share)
            kept = grouped * own[..., None].astype(o.dtype)
        return kept.reshape(o.shape), o, scores, read

    def decode(
        self,
        u: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        live: jax.Array,
        policy: SelectionPolicy,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """Attention of one new token per sequence, to the KV groups the policy picks.

        The keys and values of all heads are written, whatever is read.

        Args:
          u: [b, m], the layer's input as attention reads it.
          keys: [b, k, s, d], this layer's cache.
          values: [b, k, s, d].
          lengths: int32[b], tokens in the cache before this one.
          live: bool[b]; the others read nothing.
          policy: bound to the weights.

        Returns:
          Head outputs [b, h, d]; the new keys and values; scores float32[b, r] or
          None; int32[b], the number of KV groups read.
        """
        c, b = self.config, u.shape[0]
        q, k, v, scores = self.project_one(u, lengths)
        k, v = k.astype(keys.dtype), v.astype(values.dtype)
        # Finished rows may be full: they read and write nothing.
        visible = jnp.where(live, lengths + 1, 0)
        options = {
            "window": c.window(self.layer),
            "implementation": self.implementation,
        }
        append = functools.partial(append_and_attend, **options)
        norms = None
        if policy.wants_norms:
            # Every group is computed once to be measured, before any is chosen.
            o, keys, values = append(q, k, v, keys, values, visible)
            norms = head_norms(o, c.kv_heads, self.share)
        kernel = gathering(self.implementation)
        chosen = policy.heads(self.layer, scores, norms, kernel)
        heads, n_active = (None, None) if chosen is None else chosen
        groups = self.share.kv_heads if self.share else c.kv_heads
        reads = jnp.full(b, groups, jnp.int32) if n_active is None else n_active
        if self.share and chosen is not None:
            mine = own_groups(groups_read(chosen, b, groups), self.share)
            n_active = mine.sum(axis=1, dtype=jnp.int32)
            # The chosen ones first, in their order.
            ranking = mine.astype(jnp.float32)
            heads = top_heads(ranking, c.kv_heads, implementation=kernel)
        if self.share:
            own = jnp.full(b, c.kv_heads, jnp.int32) if n_active is None else n_active
            self.sow("shares", "reads", jnp.where(live, own, 0).sum())
        if policy.wants_norms:
            o = select_head_attention(
                q, keys, values, visible, heads, n_active, **options
            )
        else:
            o, keys, values = append(q, k, v, keys, values, visible, heads, n_active)
        return o, keys, values, scores, jnp.where(live, reads, 0)


def head_norms(o: jax.Array, kv_heads: int, share: Share | None = None) -> jax.Array:
    """L2 norm of each KV group's output, the quantity that routers predict.

    Args:
      o: [..., h, d], head outputs before the output projection.
      kv_heads: k of the device.
      share: of the device; None for the whole model.

    Returns:
      float32[..., k of the model].
    """
    groups = o.astype(jnp.float32).reshape(*o.shape[:-2], kv_heads, -1)
    return add_up_groups(jnp.sqrt((groups * groups).sum(-1)), share)


_normal = nn.initializers.normal(0.02)
