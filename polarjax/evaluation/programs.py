"""What the devices run to score a batch: prefill, forced decode steps, a mask."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import put
from polarjax.cache import PagedCache, Pieces
from polarjax.engine.places import PAGES, ROWS
from polarjax.mesh.cut import field_specs
from polarjax.model import Decoder, extend, read, whole
from polarjax.model import logits as logits_of
from polarjax.planning.memory import PAGE
from polarjax.policy import Policy, Tree

# Positions of which the logits are in memory at once.
_CHUNK = 128
_TOKENS = 2048  # of contexts, that are read at once


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
    weights: Tree, contexts: jax.Array, lengths: jax.Array, *, model: Decoder
) -> PagedCache:
    """Read contexts into pages, dense, as an engine reads prompts.

    Args:
      weights: the original ones.
      contexts: int32[c, t], padded at the end; t is 0 where there is nothing to read.
      lengths: int32[c]; 0 for none.
      model: without score rows, as the weights.

    Returns:
      What `fork` goes on from. On a mesh each part of the batch has contexts of its
      own, in pages of its own.
    """
    share = model.share

    def read_all(weights: Tree, contexts: jax.Array, lengths: jax.Array) -> PagedCache:
        c, t = contexts.shape
        each = -(-t // PAGE)
        cache = PagedCache.pool(share.own, c, t, 1 + c * each, PAGE, model.dtype)
        if not t:
            return cache
        table = 1 + jnp.arange(c * each, dtype=jnp.int32).reshape(c, each)
        size = min(_TOKENS, c * t)

        def block(i: jax.Array, cache: PagedCache) -> PagedCache:
            pieces = Pieces.among(lengths, i * size, size)
            tokens = contexts[pieces.places(size)]
            return read(model, weights, tokens, pieces, cache).cache

        # As many on every device, for they speak to each other in each.
        blocks = (share.largest(lengths.sum()) + size - 1) // size
        cache = dataclasses.replace(cache, table=table)
        return jax.lax.fori_loop(0, blocks, block, cache)

    specs = share.weight_specs(weights), ROWS, ROWS
    return share.over(read_all, specs, PAGES)(weights, contexts, lengths)


@functools.partial(jax.jit, static_argnames=("room", "model"))
def fork(
    cache: PagedCache, rows: jax.Array, *, room: int, model: Decoder
) -> PagedCache:
    """Let each row go on from its context.

    Rows share the full pages of a context. Of the page that it ends in each has a copy
    of its own, and behind that pages for what comes.

    Args:
      cache: of `prefill`.
      rows: int32[b], the context of each row, on a mesh among those of its part.
      room: positions that each row may add.
      model: that has read the contexts.
    """

    def apart(cache: PagedCache, rows: jax.Array) -> PagedCache:
        (c, shared), b = cache.table.shape, len(rows)
        own = -(-(room + (PAGE - 1 if shared else 0)) // PAGE)
        lengths = cache.lengths[rows]
        full = lengths // PAGE
        first = 1 + c * shared + own * jnp.arange(b, dtype=jnp.int32)
        # Entry by entry: a page of the context, or which of the row's own.
        theirs = jnp.pad(cache.table, ((0, 0), (0, own)))[rows]
        mine = jnp.arange(shared + own, dtype=jnp.int32) - full[:, None]
        table = jnp.where(mine < 0, theirs, first[:, None] + mine)
        table = jnp.where(mine < own, table, 0)
        last = jnp.take_along_axis(theirs, full[:, None], axis=1)[:, 0]

        def grow(pages: jax.Array) -> jax.Array:
            more = jnp.pad(pages, ((0, b * own), *((0, 0),) * 3))
            return put(more, (first,), pages[last], unique=True)

        layers = jax.tree.map(grow, cache.apart())
        return PagedCache.of_layers(layers, lengths, table)

    return model.share.over(apart, (PAGES, ROWS), PAGES)(cache, rows)


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def decode(
    weights: Tree,
    policy: Policy,
    cache: PagedCache,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    model: Decoder,
    kind: type | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Teacher-forced decoding: token i is read, then token i + 1 is scored.

    Args:
      weights: bound.
      policy: bound.
      cache: of `fork`.
      tokens: int32[b, n + 1].
      counts: int32[b], how many of the n each row scores.
      model: with the policy's score rows.
      kind: class of the policy, see `polarjax.engine.steps.decode`.

    Returns:
      Negative log-likelihoods float32[b, n]; whether each token was the most probable,
      bool[b, n]; int32[layers, k], how often each KV group was read.
    """
    del kind
    share = model.share

    def follow(weights, policy, cache, tokens, counts):
        b, n = tokens.shape[0], tokens.shape[1] - 1

        def step(i: jax.Array, carry: tuple) -> tuple:
            cache, nll, greedy, use = carry
            live = i < counts
            logits, cache, groups = decode_step(
                model, weights, policy, tokens[:, i], cache, live
            )
            found, best = score(logits, tokens[:, i + 1])
            nll = nll.at[:, i].set(jnp.where(live, found, 0))
            return cache, nll, greedy.at[:, i].set(best), use + groups

        use = jnp.zeros((model.config.layers, model.config.kv_heads), jnp.int32)
        first = cache, jnp.zeros((b, n)), jnp.zeros((b, n), bool), use
        # As many steps as the longest row needs, not as many as the arrays have room
        # for; as many on every device, for they speak to each other in each.
        steps = share.largest(counts.max())
        return jax.lax.fori_loop(0, steps, step, first)[1:]

    args = weights, policy, cache, tokens, counts
    specs = share.weight_specs(weights), field_specs(policy), PAGES, ROWS, ROWS
    return share.over(follow, specs, (ROWS, ROWS, P()))(*args)


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def mask(
    weights: Tree,
    policy: Policy,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    model: Decoder,
    kind: type | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `decode` from an empty cache, by a masked dense model."""
    del kind
    share = model.share

    def follow(weights, policy, tokens, counts):
        b, n = tokens.shape[0], tokens.shape[1] - 1
        made = whole(model, weights, tokens[:, :-1], lengths=counts, policy=policy)
        x, groups = made.x, made.read
        live = jnp.arange(n) < counts[:, None]
        use = (groups & live[None, ..., None]).sum(axis=(1, 2), dtype=jnp.int32)

        def chunks(array: jax.Array) -> jax.Array:
            # [b, n, ...] -> [n / 128, b, 128, ...]
            size = min(n, _CHUNK)
            rest = ((0, 0), (0, -n % size), *((0, 0),) * (array.ndim - 2))
            cut = jnp.pad(array, rest).reshape(b, -1, size, *array.shape[2:])
            return cut.swapaxes(0, 1)

        def part(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return score(logits_of(model, weights, args[0]), args[1])

        nll, greedy = (
            out.swapaxes(0, 1).reshape(b, -1)[:, :n]
            for out in jax.lax.map(part, (chunks(x), chunks(tokens[:, 1:])))
        )
        return jnp.where(live, nll, 0), greedy, share.add_up_batch(use)

    args = weights, policy, tokens, counts
    specs = share.weight_specs(weights), field_specs(policy), ROWS, ROWS
    return share.over(follow, specs, (ROWS, ROWS, P()))(*args)


def decode_step(
    model: Decoder,
    weights: Tree,
    policy: Policy,
    token: jax.Array,
    cache: PagedCache,
    live: jax.Array,
) -> tuple[jax.Array, PagedCache, jax.Array]:
    """One decode step that also counts what it reads.

    Args:
      model: built with the policy's score rows.
      weights: bound.
      policy: bound.
      token: int32[b].
      cache: what came before.
      live: bool[b].

    Returns:
      Logits float32[b, v], the cache, and int32[layers, k], how many live rows of the
      whole batch read each of the model's KV groups.
    """
    found = extend(model, weights, token, live, cache, policy=policy)
    every = jnp.stack([one.every for one in found.read])
    logits = model.share.gather_logits(found.logits)
    groups = model.share.add_up_batch(every.sum(axis=1, dtype=jnp.int32))
    return logits, found.cache, groups


def score(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods float32[...] of targets int32[...], and if each is best.

    Args:
      logits: float32[..., v].
      targets: int32[...].
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return nll, jnp.argmax(logits, axis=-1) == targets
