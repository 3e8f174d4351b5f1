"""One layer: attention, then MLP."""

from __future__ import annotations

import dataclasses
import functools

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
