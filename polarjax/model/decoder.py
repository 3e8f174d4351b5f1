"""The decoder-only transformer: whole sequences, or new tokens behind a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from pallas_kernels import Implementation
from polarjax.cache import PagedCache, Pieces
from polarjax.config import ModelConfig
from polarjax.mesh.cut import mesh_of
from polarjax.mesh.share import Share
from polarjax.model.attention import Gates, Prefix, Read
from polarjax.model.layer import Layer
from polarjax.model.linear import linear
from polarjax.model.module import Module
from polarjax.model.norms import Norm
from polarjax.model.positions import LEARNED_OFFSET
from polarjax.params import Tree
from polarjax.policy import Dense, Policy, Seen

Observe = Callable[[int, jax.Array, jax.Array, jax.Array], Any]
"""(layer, attention's input [b, t, m], head outputs [b, t, h, d], MLP's input
[b, t, m]) -> anything. Both inputs are what a norm puts out, that of layer 0 in a model
of `norm_after` apart."""


class Whole(NamedTuple):
    """What whole sequences come to.

    Attributes:
      x: [b, t, m], for `Decoder.logits`.
      read: bool[layers, b, t, k], the model's KV groups that each position reads.
      observed: what `observe` returned, by layer.
      keys: by layer, [b, t, k, d], for `Prefix`; () with `remat`.
      values: likewise.
    """

    x: jax.Array
    read: jax.Array
    observed: list[Any]
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Step(NamedTuple):
    """What one new token of each sequence comes to.

    Attributes:
      logits: float32[b, v], of a share its `own_logits`.
      cache: with the tokens.
      read: by layer, what attention read.
    """

    logits: jax.Array
    cache: PagedCache
    read: tuple[Read, ...]


class Reading(NamedTuple):
    """What is known once parts of prompts have been read, of n tokens.

    Attributes:
      logits: float32[r, v], after the last token of each piece; of a share its
        `own_logits`.
      cache: with the tokens, in whose lengths they count.
      x: [n, m], the residual stream before the last layer.
      o: [n, h, d], head outputs of the last layer, of the device's own heads.
    """

    logits: jax.Array
    cache: PagedCache
    x: jax.Array
    o: jax.Array


class Embed(Module):
    """Token and learned position tables, with OPT's projections where it has them."""

    config: ModelConfig
    dtype: jnp.dtype
    share: Share

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
        if not self.share.cuts_vocabulary:
            return jnp.take(self.tokens, tokens, axis=0)
        # Each device has some rows; the sum has one term that is not zero.
        own = tokens - self.share.number() * self.config.vocab_size
        mine = (own >= 0) & (own < self.config.vocab_size)
        x = jnp.take(self.tokens, own, axis=0, mode="clip")
        return self.share.add_up(jnp.where(mine[..., None], x, 0))


class Decoder(Module):
    """OPT, LLaMA and their kin.

    Attributes:
      config: what the model is, the whole of it.
      dtype: of weights and activations.
      score_rows: per layer, rows that a policy appended to the QKV matrix.
      implementation: of the decode kernels; None chooses by device.
      mesh: that it is cut over; the methods are then of one device's weights and
        arrays, inside `Share.over`. None for one device.
      cuts_scores: whether a policy's rows of the QKV matrix are cut over the mesh too.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    score_rows: tuple[int, ...] = ()
    implementation: Implementation | None = None
    mesh: Mesh | None = None
    cuts_scores: bool = True

    @property
    def share(self) -> Share:
        """What one device has of it."""
        return Share(self.config, self.mesh, self.cuts_scores)

    def learning(self, score_rows: tuple[int, ...]) -> Decoder:
        """The model with rows that a policy appended to what one device has.

        Args:
          score_rows: of a policy that was bound inside `Share.over`, as a training
            binds it anew in each step.
        """
        return self.clone(score_rows=score_rows, cuts_scores=False)

    def setup(self) -> None:
        share = self.share
        c = share.own
        self.embed = Embed(c, self.dtype, share)
        self.layers = [
            Layer(c, i, self.dtype, share, rows, self.implementation)
            for i, rows in enumerate(self.score_rows or (0,) * c.layers)
        ]
        if c.final_norm:
            self.final_norm = Norm(c, c.dim, self.dtype)

    def whole(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        policy: Policy | None = None,
        density: jax.Array | None = None,
        prefix: Prefix | None = None,
        gates: Gates | None = None,
        observe: Observe | None = None,
        remat: bool = False,
    ) -> Whole:
        """Whole sequences at once, with every position sparse: a masked dense model.

        Position i of the batch asks the policy what step i of decoding would ask, so
        that both choose the same; the layers compute everything and mask.

        Args:
          tokens: int32[b, t], padded at the end with any id.
          lengths: int32[b], tokens of each sequence; padding has no say in what the
            batch chooses. None for t of each.
          policy: bound to the weights; None for `Dense()`.
          density: float32[b], as in `Seen`; None for the policy's own.
          prefix: positions that are read dense, as a prompt is; None for none.
          gates: for training: what each group's output counts; None for 1 where it is
            read, else 0.
          observe: called in each layer, with head outputs before they are masked; the
            layer's activations are freed after it.
          remat: for training: whether to compute each layer again in the backward
            pass, and keep its input alone.
        """
        b, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        x = self.embed(tokens, positions)
        live = (
            jnp.ones((b, t), bool) if lengths is None else positions < lengths[:, None]
        )
        density = jnp.zeros(b) if density is None else density
        start = Seen(live, density, positions + 1, self.share.slots(b))
        ask = policy or Dense()
        read, observed, keys, values = [], [], [], []
        seen: Seen | None = None
        for i, layer in enumerate(self.layers):

            def apply(layer: Layer, x: jax.Array, below: Seen | None, i: int = i):
                first = dataclasses.replace(start, before=below)
                x, seen, made = layer.whole(x, first, ask, prefix, gates)
                found = observe(i, seen.u, made.outputs, seen.z) if observe else None
                states = () if remat else (made.keys, made.values)
                return x, without_before(seen), made.read, found, states

            x, seen, groups, found, states = (nn.remat(apply) if remat else apply)(
                layer, x, seen
            )
            read.append(groups)
            observed.append(found)
            if states:
                keys.append(states[0])
                values.append(states[1])
        return Whole(
            x,
            jnp.stack(read),
            observed if observe else [],
            tuple(keys),
            tuple(values),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits float32[b, t, v] of whole sequences, for which every weight is needed.

        Args:
          tokens: int32[b, t].
        """
        return self.logits(self.whole(tokens).x)

    def extend(
        self,
        token: jax.Array,
        live: jax.Array,
        cache: PagedCache,
        policy: Policy | None = None,
        density: jax.Array | None = None,
        slot: jax.Array | None = None,
    ) -> Step:
        """Read one new token of each sequence as the policy says, behind the cache's.

        Args:
          token: int32[b].
          live: bool[b]; False for sequences that have ended, whose cache stays as it
            is.
          cache: of what comes before; donate it.
          policy: bound to the weights; None for `Dense()`.
          density: float32[b], as in `Seen`; None for the policy's own.
          slot: int32[b], as in `Seen`; None for each row's number in the batch.
        """
        b = len(token)
        density = jnp.zeros(b) if density is None else density
        slot = self.share.slots(b) if slot is None else slot
        start = Seen(live, density, cache.lengths + 1, slot)
        ask = policy or Dense()
        x = self.embed(token, cache.lengths)
        seen, parts, read = None, None, []
        for layer in self.layers:
            first = dataclasses.replace(start, before=seen)
            x, parts, seen, cache, one = layer.step(x, parts, first, cache, ask)
            seen = without_before(seen)
            read.append(one)
        if parts is not None:
            x = x + parts.sum(axis=0).astype(x.dtype)
        cache = cache.grown(live.astype(jnp.int32))
        return Step(self.own_logits(x), cache, tuple(read))

    def read(self, tokens: jax.Array, pieces: Pieces, cache: PagedCache) -> Reading:
        """Read parts of prompts, dense, each behind what the cache has of its sequence.

        Args:
          tokens: int32[n], those of all parts.
          pieces: whose they are.
          cache: of pages; donate it.
        """
        _, place = pieces.places(len(tokens))
        x = self.embed(tokens, place)
        for layer in self.layers[:-1]:
            o, cache = layer.read(x, place, pieces, cache)
            x = layer.finish(x, o)
        # Of the last layer's rest only what is asked for is computed.
        o, cache = self.layers[-1].read(x, place, pieces, cache)
        logits = self.last_logits(x[pieces.ends], o[pieces.ends])
        # Those of no piece stay as they are.
        to = jnp.where(pieces.counts > 0, pieces.slots, len(cache.lengths))
        after = pieces.firsts + pieces.counts
        lengths = cache.lengths.at[to].set(after, mode="drop")
        cache = dataclasses.replace(cache, lengths=lengths)
        return Reading(logits, cache, x, o)

    def last_logits(self, x: jax.Array, o: jax.Array) -> jax.Array:
        """Logits of some of the tokens of a `Reading`, of a share its `own_logits`.

        Args:
          x: [n, m], rows of the reading's.
          o: [n, h, d], likewise.

        Returns:
          float32[n, v].
        """
        return self.own_logits(self.layers[-1].finish(x, o))

    def logits(self, x: jax.Array) -> jax.Array:
        """The last layer's output [..., m] to float32[..., v]."""
        return self.share.gather_logits(self.own_logits(x))

    def own_logits(self, x: jax.Array) -> jax.Array:
        """Those of the device's part of the vocabulary, as `Share` has it."""
        return self.embed.logits(self.final_norm(x) if self.config.final_norm else x)


def make_decoder(
    config: ModelConfig,
    weights: Tree,
    score_rows: tuple[int, ...] = (),
    implementation: Implementation | None = None,
) -> Decoder:
    """The model, as its weights have it: the static argument of compiled programs.

    Args:
      config: of the model; its `architecture` for a program that others of the same
        one shall share.
      weights: that it will run with, where they are: on a mesh, if they are cut over
        one. Activations are of their dtype.
      score_rows: of each layer, rows that a policy appended to its QKV matrix; () for
        none.
      implementation: of the kernels; None chooses by device.
    """
    dtype = weights["embed"]["tokens"].dtype
    return Decoder(config, dtype, score_rows, implementation, mesh_of(weights))


def whole(model: Decoder, weights: Tree, tokens: jax.Array, **options: Any) -> Whole:
    """`Decoder.whole` of a model with the weights that users hold.

    Args:
      model: the module, which has no weights of its own.
      weights: its parameters.
      tokens: int32[b, t].
      **options: further arguments of the method.
    """
    variables = {"params": weights}
    return cast(Whole, model.apply(variables, tokens, method=Decoder.whole, **options))


def extend(
    model: Decoder,
    weights: Tree,
    token: jax.Array,
    live: jax.Array,
    cache: PagedCache,
    **options: Any,
) -> Step:
    """`Decoder.extend` of a model with the weights that users hold; see `whole`."""
    variables = {"params": weights}
    found = model.apply(variables, token, live, cache, method=Decoder.extend, **options)
    return cast(Step, found)


def read(
    model: Decoder, weights: Tree, tokens: jax.Array, pieces: Pieces, cache: PagedCache
) -> Reading:
    """`Decoder.read` of a model with the weights that users hold; see `whole`."""
    found = model.apply({"params": weights}, tokens, pieces, cache, method=Decoder.read)
    return cast(Reading, found)


def last_logits(model: Decoder, weights: Tree, x: jax.Array, o: jax.Array) -> jax.Array:
    """`Decoder.last_logits` of a model with the weights that users hold."""
    found = model.apply({"params": weights}, x, o, method=Decoder.last_logits)
    return cast(jax.Array, found)


def logits(model: Decoder, weights: Tree, x: jax.Array) -> jax.Array:
    """`Decoder.logits` of a model with the weights that users hold; see `whole`."""
    found = model.apply({"params": weights}, x, method=Decoder.logits)
    return cast(jax.Array, found)


def without_before(seen: Seen) -> Seen:
    """A layer's record without that of the layer below it."""
    return dataclasses.replace(seen, before=None)


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
    shapes = jax.tree.map(lambda leaf: leaf, _traced_shapes(one, jnp.dtype(dtype)))
    layer = shapes.pop("layers_0")
    for i in range(config.layers):
        shapes[f"layers_{i}"] = jax.tree.map(lambda leaf: leaf, layer)
    return shapes


@functools.lru_cache(maxsize=16)
def _traced_shapes(config: ModelConfig, dtype: jnp.dtype) -> Tree:
    def init(tokens: jax.Array) -> Any:  # the key made inside: no device is touched
        return Decoder(config, dtype).init(jax.random.key(0), tokens)

    return jax.eval_shape(init, jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


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
