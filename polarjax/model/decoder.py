"""The decoder-only transformer, over whole prompts and one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from pallas_kernels import Implementation, put
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.mesh.cut import local_config
from polarjax.mesh.share import Share, add_up, gather_logits, place
from polarjax.model.attention import Gates, Prefix
from polarjax.model.layer import Layer
from polarjax.model.linear import linear
from polarjax.model.norms import Norm
from polarjax.model.positions import LEARNED_OFFSET
from polarjax.params import Tree
from polarjax.policy import SelectionPolicy

# Of a prompt's, computed at once: more are no faster on an H100, and what they need is
# a gigabyte or two.
BLOCK_TOKENS = 16_384

Observe = Callable[[int, jax.Array, jax.Array, jax.Array], Any]
"""(layer, attention's input [b, t, m], head outputs [b, t, h, d], MLP's input
[b, t, m]) -> anything. Both inputs are what a norm puts out, that of layer 0 in a model
of `norm_after` apart."""


class Embed(nn.Module):
    """Token and learned position tables, with OPT's projections where it has them."""

    config: ModelConfig
    dtype: jnp.dtype
    share: Share | None = None

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal(0.02)
        shape = (c.vocab_size, c.embed_dim)
        self.tokens = self.param("tokens", normal, shape, self.dtype)
        if not c.tied_embeddings:
            self.head = self.param("head", normal, shape, self.dtype)
        if c.rope is None:
            rows = c.context + LEARNED_OFFSET
            self.positions = self.param("positions", normal, (rows, c.dim), self.dtype)
        if c.embed_dim != c.dim:
            shape = (c.dim, c.embed_dim)
            self.project_in = self.param("project_in", normal, shape, self.dtype)
            self.project_out = self.param(
                "project_out", normal, shape[::-1], self.dtype
            )

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Token ids int32[...] at positions int32[...] to [..., m]."""
        x = self._look_up(tokens)
        if self.config.embed_dim != self.config.dim:
            x = linear(x, self.project_in).astype(x.dtype)
        if self.config.rope is None:
            x = x + jnp.take(self.positions, positions + LEARNED_OFFSET, axis=0)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., m] to float32[..., v of the device]."""
        if self.config.embed_dim != self.config.dim:
            x = linear(x, self.project_out).astype(x.dtype)
        return linear(x, self.tokens if self.config.tied_embeddings else self.head)

    def _look_up(self, tokens: jax.Array) -> jax.Array:
        if not (self.share and self.share.cuts_vocabulary):
            return jnp.take(self.tokens, tokens, axis=0)
        # Each device has some rows; the sum has one term that is not zero.
        own = tokens - place(self.share) * self.config.vocab_size
        mine = (own >= 0) & (own < self.config.vocab_size)
        x = jnp.take(self.tokens, own, axis=0, mode="clip")
        return add_up(jnp.where(mine[..., None], x, 0), self.share)


class Decoder(nn.Module):
    """OPT, LLaMA and their kin.

    Attributes:
      config: what the model is.
      dtype: of weights and activations.
      score_rows: per layer, rows that a policy appended to the QKV matrix.
      implementation: of the decode kernels; None chooses by device.
      share: of one device of several that run the model together; its `config` is
        then that of what it has.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    score_rows: tuple[int, ...] = ()
    implementation: Implementation | None = None
    share: Share | None = None

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c, self.dtype, self.share)
        self.layers = [
            Layer(c, i, self.dtype, rows, self.implementation, self.share)
            for i, rows in enumerate(self.score_rows or (0,) * c.layers)
        ]
        if c.final_norm:
            self.final_norm = Norm(c, c.dim, self.dtype)

    def _forward(self, tokens: jax.Array, observe: Observe | None):
        b, t = tokens.shape
        x = self.embed(tokens, jnp.broadcast_to(jnp.arange(t), (b, t)))
        keys, values, observed = [], [], []
        for i, layer in enumerate(self.layers):
            x, k, v, *seen = layer.prefill(x)
            keys.append(k)
            values.append(v)
            if observe:
                observed.append(observe(i, *seen))
        return x, keys, values, observed

    def __call__(
        self, tokens: jax.Array, observe: Observe | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """Logits of every position, dense.

        Args:
          tokens: int32[b, t], padded at the end with any id.
          observe: called in each layer; the layer's activations are freed after it.

        Returns:
          float32[b, t, v], and what `observe` returned, by layer.
        """
        x, _, _, observed = self._forward(tokens, observe)
        return self.logits(x), observed

    def observe(self, tokens: jax.Array, observe: Observe) -> list[Any]:
        """As `__call__`, without the logits."""
        return self._forward(tokens, observe)[3]

    def states(
        self, tokens: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Dense: what `logits` takes [b, t, m]; keys and values, for `Prefix`.

        Args:
          tokens: int32[b, t].
        """
        x, keys, values, _ = self._forward(tokens, None)
        return x, tuple(keys), tuple(values)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, capacity: int
    ) -> tuple[jax.Array, KVCache]:
        """Read ragged prompts, dense.

        Args:
          tokens: int32[b, t], padded at the end with any id.
          lengths: int32[b], tokens of each prompt, at least 1.
          capacity: positions of the cache, s, at least t.

        Returns:
          Logits after each prompt's last token, float32[b, v], and the cache.
        """
        rows = jnp.arange(tokens.shape[0])
        cache = KVCache.empty(self.config, tokens.shape[0], capacity, self.dtype)
        return self.read(tokens, lengths, rows, cache)

    def read(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        rows: jax.Array,
        cache: KVCache,
        most: int = BLOCK_TOKENS,
    ) -> tuple[jax.Array, KVCache]:
        """Read ragged prompts into some rows of a cache, dense.

        Args:
          tokens: int32[r, t], padded at the end with any id.
          lengths: int32[r], tokens of each prompt, at least 1.
          rows: int32[r], distinct, where each goes; what lies beyond the cache goes
            nowhere.
          cache: [b, k, s, d], s at least the longest length; donate it.
          most: tokens that are computed at once, attention apart.

        Returns:
          Logits after each prompt's last token, float32[r, v], and the cache.
        """
        x = self.embed(
            tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        )

        def store(whole: jax.Array, part: jax.Array) -> jax.Array:
            part = part[:, : cache.capacity].swapaxes(1, 2).astype(whole.dtype)
            at = rows, slice(None), slice(part.shape[2])
            return put(whole, at, part, unique=True)

        keys, values = [], []
        for i, layer in enumerate(self.layers):
            x, k, v = layer.read(x, lengths, most, i == self.config.layers - 1)
            keys.append(store(cache.keys[i], k))
            values.append(store(cache.values[i], v))
        held = put(cache.lengths, rows, lengths.astype(jnp.int32), unique=True)
        return self.logits(x[:, 0]), KVCache(tuple(keys), tuple(values), held)

    def masked(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        policy: SelectionPolicy,
        prefix: Prefix | None = None,
        gates: Gates | None = None,
        observe: Observe | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, jax.Array, list[Any]]:
        """Whole sequences with every position sparse, as a masked dense model.

        Position i of the batch asks the policy what step i of decoding would ask, so
        that both choose the same; the layers compute everything and mask.

        Args:
          tokens: int32[b, t], padded at the end with any id.
          lengths: int32[b], tokens of each sequence; padding has no say in what the
            batch chooses.
          policy: bound to the weights.
          prefix: positions that are read dense, as a prompt is; None for none.
          gates: for training: what each group's output counts; None for 1 where it is
            read, else 0.
          observe: called in each layer, with head outputs before they are masked.
          remat: for training: whether to compute each layer again in the backward
            pass, and keep its input alone.

        Returns:
          [b, t, m], for `logits`; bool[layers, b, t, k], the model's KV groups read;
          and what `observe` returned, by layer.
        """
        b, t = tokens.shape
        x = self.embed(tokens, jnp.broadcast_to(jnp.arange(t), (b, t)))
        live = jnp.arange(t) < lengths[:, None]
        reads, observed = [], []
        for i, layer in enumerate(self.layers):

            def apply(layer: Layer, x: jax.Array, i: int = i) -> tuple[Any, ...]:
                x, read, *seen = layer.masked(x, live, policy, prefix, gates)
                return x, read, observe(i, *seen) if observe else None

            x, read, found = (nn.remat(apply) if remat else apply)(layer, x)
            reads.append(read)
            observed.append(found)
        return x, jnp.stack(reads), observed if observe else []

    def logits(self, x: jax.Array) -> jax.Array:
        """The last layer's output [..., m] to float32[..., v]."""
        return gather_logits(self.own_logits(x), self.share)

    def own_logits(self, x: jax.Array) -> jax.Array:
        """Those of the device's part of the vocabulary, as `Share` has it."""
        return self.embed.logits(self.final_norm(x) if self.config.final_norm else x)

    def decode(
        self,
        token: jax.Array,
        cache: KVCache,
        policy: SelectionPolicy,
        live: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """Read one more token of each sequence, with the heads the policy picks.

        Args:
          token: int32[b].
          cache: what came before; donate it.
          policy: bound to the weights.
          live: bool[b], the sequences that go on; None for all. The others' cache
            stays as it is and their logits mean nothing.

        Returns:
          Logits float32[b, v], of a share its `own_logits`; the cache;
          int32[layers, b], KV groups read.
        """
        if live is None:
            live = jnp.ones(token.shape, bool)
        x = self.embed(token, cache.lengths)
        keys, values, reads, parts = [], [], [], None
        for layer, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            x, parts, k, v, read = layer.decode(
                *(x, parts, k, v, cache.lengths, live, policy)
            )
            keys.append(k)
            values.append(v)
            reads.append(read)
        lengths = cache.lengths + live.astype(jnp.int32)
        if parts is not None:
            x = x + parts.sum(axis=0).astype(x.dtype)
        logits = self.own_logits(x)
        return logits, KVCache(tuple(keys), tuple(values), lengths), jnp.stack(reads)


def make_decoder(
    config: ModelConfig,
    weights: Tree,
    score_rows: tuple[int, ...] = (),
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
    cuts_scores: bool = True,
) -> Decoder:
    """The model, or what one device of a mesh runs of it, in `over_mesh`.

    Args:
      config: of the whole model.
      weights: that it will run with, of whose dtype activations are.
      score_rows: see `Decoder`.
      implementation: see `Decoder`.
      mesh: that the model is cut over; None for one device.
      cuts_scores: see `Share`.
    """
    share = Share.of(config, mesh)
    if share:
        share = dataclasses.replace(share, cuts_scores=cuts_scores)
        config = local_config(config, share.tp)
    dtype = weights["embed"]["tokens"].dtype
    return Decoder(config, dtype, score_rows, implementation, share)


def run(model: Decoder, weights: Tree, method: str, *args: Any) -> Any:
    """Call a method of the decoder with the weights that users hold.

    Args:
      model: the module, which has no weights of its own.
      weights: its parameters.
      method: "prefill", "decode", "masked", "logits", "observe", ... or "__call__".
      *args: of the method.
    """
    return model.apply({"params": weights}, *args, method=method)


def weight_shapes(config: ModelConfig, dtype=jnp.float32) -> Tree:
    """The weights a model has, as a tree of `jax.ShapeDtypeStruct`.

    Args:
      config: of the model.
      dtype: of the weights.
    """
    # Layers differ in no shape, and to trace thousands takes a minute.
    one = dataclasses.replace(
        config.architecture,
        layers=1,
        windows=config.windows[:1],
        rotary=config.rotary[:1],
    )

    def init(tokens: jax.Array) -> Any:  # the key made inside: no device is touched
        return Decoder(one, dtype).init(jax.random.key(0), tokens)

    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    layer = shapes.pop("layers_0")
    for i in range(config.layers):
        shapes[f"layers_{i}"] = jax.tree.map(lambda leaf: leaf, layer)
    return shapes


def check_weights(weights: Tree, config: ModelConfig) -> None:
    """Raise unless a model of this configuration has these weights.

    Args:
      weights: nested dict of arrays.
      config: of the model.

    Raises:
      ValueError: naming the first that differs, or is of another dtype.
    """
    other = "its weights are not those of its config.json"
    if config.layers > len(weights):  # before a tree of that many is made
        raise ValueError(f"{other}, which says {config.layers} layers")
    want = weight_shapes(config)
    names, needed = (
        {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
        for tree in (weights, want)
    )
    if missing := sorted(needed - names):
        raise ValueError(f"{other}, which needs {missing[0]}")
    if jax.tree.structure(want) != jax.tree.structure(weights):
        extra = sorted(names - needed) or ["another tree"]
        raise ValueError(f"{other}, which has no place for {extra[0]}")
    leaves = jax.tree.leaves(weights)
    dtype = leaves[0].dtype
    for (where, shape), leaf in zip(
        jax.tree.leaves_with_path(want), leaves, strict=True
    ):
        name = jax.tree_util.keystr(where)
        if shape.shape != leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {leaf.dtype}{list(leaf.shape)}, its config.json needs "
                f"{list(shape.shape)}"
            )
        if leaf.dtype != dtype:
            raise ValueError(f"{name} is {leaf.dtype}, but others are {dtype}")
