"""One layer: attention, then MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Implementation, gathering
from polarjax.config import ModelConfig
from polarjax.mesh.share import Share
from polarjax.model.attention import Attention, Gates, Prefix
from polarjax.model.causal import long_attention
from polarjax.model.mlp import MLP
from polarjax.model.norms import Norm
from polarjax.policy import SelectionPolicy


class Layer(nn.Module):
    """Attention, then MLP, each added to the residual stream.

    What they read is normalised (pre-norm), or their sums are (post-norm).
    """

    config: ModelConfig
    layer: int
    dtype: jnp.dtype
    score_rows: int = 0
    implementation: Implementation | None = None
    share: Share | None = None

    def setup(self) -> None:
        c = self.config
        self.attention_norm = Norm(c, c.dim, self.dtype)
        self.attention = Attention(
            *(c, self.layer, self.dtype, self.score_rows, self.implementation),
            share=self.share,
        )
        self.mlp_norm = Norm(c, c.dim, self.dtype)
        self.mlp = MLP(c, self.dtype, self.implementation, self.share)

    def before(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        """What a half of the layer reads of the residual stream."""
        return x if self.config.norm_after else norm(x)

    def after(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        """The residual stream once a half has been added."""
        return norm(x) if self.config.norm_after else x

    def prefill(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[b, t, m] to the same; also keys, values, and what `Observe` is shown."""
        u = self.before(self.attention_norm, x)
        o, k, v = self.attention.prefill(u)
        y = self.after(self.attention_norm, x + self.attention.output(o))
        z = self.before(self.mlp_norm, y)
        return self.after(self.mlp_norm, y + self.mlp(z)), k, v, u, o, z

    def read(
        self, x: jax.Array, lengths: jax.Array, most: int, last: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `prefill`, with nothing observed and all but attention in blocks.

        Args:
          x: [b, t, m].
          lengths: int32[b]. Blocks of padding alone are left out.
          most: tokens in a block.
          last: whether no layer follows: only the last tokens then go on.

        Returns:
          [b, t, m], or [b, 1, m] after the last layer; keys and values [b, t, k, d].
        """
        longest = lengths.max()
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        size = max(1, most // x.shape[0])

        def project(layer: Layer, x: jax.Array, positions: jax.Array):
            u = layer.before(layer.attention_norm, x)
            return layer.attention.project(u, positions)[:3]

        def add(layer: Layer, x: jax.Array, o: jax.Array) -> tuple[jax.Array]:
            y = layer.after(layer.attention_norm, x + layer.attention.output(o))
            z = layer.before(layer.mlp_norm, y)
            return (layer.after(layer.mlp_norm, y + layer.mlp(z)),)

        q, k, v = _in_blocks(self, project, (x, positions), longest, size)
        o = long_attention(q, k, v, self.config.window(self.layer))
        if last:
            x, o = (
                jax.vmap(lambda row, n: row[n - 1][None])(a, lengths) for a in (x, o)
            )
        (x,) = _in_blocks(self, add, (x, o), longest, size)
        return x, k, v

    def masked(
        self,
        x: jax.Array,
        live: jax.Array,
        policy: SelectionPolicy,
        prefix: Prefix | None = None,
        gates: Gates | None = None,
    ) -> tuple[jax.Array, ...]:
        """[b, t, m] to the same; also bool[b, t, k], the model's KV groups read.

        And what `Observe` is shown, head outputs before they are masked.
        """
        u = self.before(self.attention_norm, x)
        kept, o, scores, read = self.attention.masked(u, policy, prefix, gates)

        def choose(_, scores: jax.Array | None, live: jax.Array) -> jax.Array | None:
            return policy.neurons(self.layer, scores, live, "xla", self.share)

        t = jnp.arange(x.shape[1])
        neurons = jax.vmap(choose, (0, 1, 1))(t, scores, live)
        y = self.after(self.attention_norm, x + self.attention.output(kept))
        z = self.before(self.mlp_norm, y)
        return self.after(self.mlp_norm, y + self.mlp(z, neurons)), read, u, o, z

    def decode(
        self,
        x: jax.Array,
        parts: jax.Array | None,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        live: jax.Array,
        policy: SelectionPolicy,
    ) -> tuple[Any, ...]:
        """One new token of each sequence.

        What is added to the residual stream is handed on as parts of a sum: who
        normalises the stream adds them up on the way.

        Args:
          x: [b, m], the residual stream.
          parts: float32[p, b, m], whose sum the layer before adds to it, or None.
          keys: as in `Attention.decode`, as are the others.
          values: [b, k, s, d].
          lengths: int32[b].
          live: bool[b].
          policy: bound.

        Returns:
          As x and `parts`; the new keys and values; int32[b], KV groups read.
        """
        post = self.config.norm_after
        kernel = gathering(self.implementation)
        if parts is not None:
            x, u = self.attention_norm.add(x, parts, kernel)
        else:
            u = self.before(self.attention_norm, x)
        o, keys, values, scores, reads = self.attention.decode(
            u, keys, values, lengths, live, policy
        )
        neurons = policy.neurons(self.layer, scores, live, kernel, self.share)
        norm = self.attention_norm if post else self.mlp_norm
        x, z = norm.add(x, self.attention.output_parts(o), kernel)
        parts = self.mlp.decode(z, neurons)
        if post:  # what was normalised is the stream
            x, parts = self.mlp_norm.add(z, parts, kernel)[1], None
        return x, parts, keys, values, reads


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
