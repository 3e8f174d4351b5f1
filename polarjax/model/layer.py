"""One layer: attention, then MLP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Implementation
from polarjax.cache import PagedCache, Pieces
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share
from polarjax.model.attention import (
    Attention,
    Gates,
    Prefix,
    Read,
    WholeAttention,
    no_channels,
    positions_of,
    thinned,
)
from polarjax.model.causal import long_attention
from polarjax.model.mlp import MLP
from polarjax.model.module import Module
from polarjax.model.norms import Norm
from polarjax.model.pick import Pick
from polarjax.policy import Policy, Rows, Seen, check_rows


class Layer(Module):
    """Attention, then MLP, each added to the residual stream.

    What they read is normalised (pre-norm), or their sums are (post-norm).
    """

    config: ModelConfig
    layer: int
    dtype: jnp.dtype
    share: Share
    score_rows: int = 0
    implementation: Implementation | None = None

    def setup(self) -> None:
        c, kernels = self.config, self.implementation
        self.attention_norm = Norm(c, c.dim, self.dtype, kernels)
        self.attention = Attention(
            c, self.layer, self.dtype, self.share, self.score_rows, kernels
        )
        self.mlp_norm = Norm(c, c.dim, self.dtype, kernels)
        self.mlp = MLP(c, self.dtype, self.share, kernels)

    def before(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        """What a half of the layer reads of the residual stream."""
        return x if self.config.norm_after else norm(x)

    def after(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        """The residual stream once a half has been added."""
        return norm(x) if self.config.norm_after else x

    def whole(
        self,
        x: jax.Array,
        seen: Seen,
        policy: Policy,
        prefix: Prefix | None = None,
        gates: Gates | None = None,
    ) -> tuple[jax.Array, Seen, WholeAttention]:
        """Whole sequences, every position sparse; see `Decoder.whole`.

        Args:
          x: [b, t, m], the residual stream.
          seen: as far as it is known before the layer.
          policy: bound.
          prefix: positions that are read dense, as a prompt is; None for none.
          gates: likewise.

        Returns:
          As x; what was seen; what attention made of it.
        """
        u = self.before(self.attention_norm, x)
        seen = dataclasses.replace(seen, u=u)
        seen, made = self.attention.whole(seen, policy, prefix, gates)
        pick = Pick(self.share, "xla")
        kept = self.attention.thin_output(made.kept, policy, pick)
        y = self.after(self.attention_norm, x + self.attention.output(kept))
        z = self.before(self.mlp_norm, y)
        seen = dataclasses.replace(seen, z=z)
        if policy.wants.gate:
            seen = dataclasses.replace(seen, gate=self.mlp.open_gate(z))

        def choose(seen: Seen) -> Rows | None:
            rows = policy.neurons(self.layer, seen, pick)
            check_rows(rows, policy)
            return rows

        rows = jax.vmap(choose, (positions_of(seen),))(seen)
        thin = functools.partial(thinned, policy, self.layer, pick=pick)
        y = self.after(self.mlp_norm, y + self.mlp.whole(z, rows, thin))
        return y, seen, made

    def chunk(
        self,
        x: jax.Array,
        counts: jax.Array,
        cache: PagedCache,
        prefill_tokens: int,
        last: bool,
        fresh: bool,
    ) -> tuple[jax.Array, PagedCache]:
        """Several new tokens of each sequence, dense.

        Args:
          x: [b, t, m], the residual stream.
          counts: int32[b], tokens that are new. Blocks of padding alone are left out.
          cache: of what comes before.
          prefill_tokens: tokens that are computed at once, attention apart.
          last: whether no layer follows: only the last tokens then go on.
          fresh: whether the cache has nothing of any of the sequences.

        Returns:
          [b, t, m], or [b, 1, m] after the last layer; and the cache.
        """
        longest = counts.max()
        size = max(1, prefill_tokens // x.shape[0])

        def add(layer: Layer, x: jax.Array, o: jax.Array) -> tuple[jax.Array]:
            y = layer.after(layer.attention_norm, x + layer.attention.output(o))
            z = layer.before(layer.mlp_norm, y)
            return (layer.after(layer.mlp_norm, y + layer.mlp(z)),)

        if fresh:
            o, cache = self._attend_fresh(x, longest, size, cache)
        else:
            u = self.before(self.attention_norm, x)
            o, cache = self.attention.chunk(u, counts, cache)
        if last:
            x, o = (
                jax.vmap(lambda row, n: row[n - 1][None])(a, counts) for a in (x, o)
            )
        (x,) = _in_blocks(self, add, (x, o), longest, size)
        return x, cache

    def _attend_fresh(
        self, x: jax.Array, longest: jax.Array, size: int, cache: PagedCache
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of sequences to themselves alone, by the fastest kernel for it."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])

        def project(layer: Layer, x: jax.Array, positions: jax.Array):
            u = layer.before(layer.attention_norm, x)
            return layer.attention.project(u, positions)[:3]

        q, k, v = _in_blocks(self, project, (x, positions), longest, size)
        o = long_attention(q, k, v, self.config.window(self.layer))
        return o, cache.write(self.layer, k, v)

    def read(
        self,
        x: jax.Array,
        place: jax.Array,
        pieces: Pieces,
        cache: PagedCache,
    ) -> tuple[jax.Array, PagedCache]:
        """Attention of parts of prompts, dense; `finish` is the rest of the layer.

        Args:
          x: [n, m], the residual stream.
          place: int32[n], positions.
          pieces: whose they are.
          cache: of what comes before.

        Returns:
          Head outputs [n, h, d], and the cache.
        """
        u = self.before(self.attention_norm, x)
        return self.attention.read(u, place, pieces, cache)

    def finish(self, x: jax.Array, o: jax.Array) -> jax.Array:
        """The residual stream after the layer, from what `read` yields.

        Args:
          x: [n, m], the residual stream before it.
          o: [n, h, d].
        """
        y = self.after(self.attention_norm, x + self.attention.output(o))
        z = self.before(self.mlp_norm, y)
        return self.after(self.mlp_norm, y + self.mlp(z))

    def step(
        self,
        x: jax.Array,
        parts: jax.Array | None,
        seen: Seen,
        cache: PagedCache,
        policy: Policy,
    ) -> tuple[jax.Array, jax.Array | None, Seen, PagedCache, Read]:
        """One new token of each sequence.

        What is added to the residual stream is handed on as parts of a sum: who
        normalises the stream adds them up on the way.

        Args:
          x: [b, m], the residual stream.
          parts: float32[p, b, m], whose sum the layer before adds to it, or None.
          seen: as far as it is known before the layer.
          cache: of what comes before.
          policy: bound.

        Returns:
          As x and `parts`; what was seen; the cache; what attention read.
        """
        post = self.config.norm_after
        if parts is not None:
            x, u = self.attention_norm.add(x, parts)
        else:
            u = self.before(self.attention_norm, x)
        seen = dataclasses.replace(seen, u=u)
        o, cache, seen, read = self.attention.step(seen, cache, policy)
        norm = self.attention_norm if post else self.mlp_norm
        parts = self.attention.output_parts(o)
        x, z = norm.add(x, parts)
        seen = dataclasses.replace(seen, z=z)
        pick = Pick(self.share, self.implementation)
        for matrix, inputs in (("out", o.reshape(len(o), -1)), ("up", z)):
            no_channels(policy, self.layer, matrix, inputs, pick)
        if policy.wants.gate:
            seen = dataclasses.replace(seen, gate=self.mlp.open_gate(z))
        neurons = policy.neurons(self.layer, seen, pick)
        check_rows(neurons, policy)
        parts = self.mlp.step(z, neurons)
        if post:  # what was normalised is the stream
            x, parts = self.mlp_norm.add(z, parts)[1], None
        return x, parts, seen, cache, read


def _in_blocks(
    layer: Layer,
    function: Callable[..., tuple[jax.Array, ...]],
    arrays: tuple[jax.Array, ...],
    longest: jax.Array,
    size: int,
) -> tuple[jax.Array, ...]:
    """A function of single positions, applied to `size` of them at a time.

    What it needs for itself is bounded so, however long the sequences.
    """
    t = arrays[0].shape[1]
    if t <= size:
        return function(layer, *arrays)

    def block(layer: Layer, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        # Slices are moved to where they fit, so that the last may overlap the one
        # before: both find the same.
        start = i * size
        cut = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays)
        return start, function(layer, *cut)

    def step(layer: Layer, carry: tuple) -> tuple:
        i, whole = carry
        start, parts = block(layer, i)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return i + 1, tuple(put(w, p, start) for w, p in zip(whole, parts, strict=True))

    shapes = jax.eval_shape(lambda: block(layer, jnp.int32(0))[1])
    whole = tuple(jnp.zeros((s.shape[0], t, *s.shape[2:]), s.dtype) for s in shapes)

    def more(_, carry: tuple) -> Any:
        return carry[0] * size < longest

    return nn.while_loop(more, step, layer, (jnp.int32(0), whole))[1]
