"""What the devices run to score a batch: prefill, steps that are watched, a mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from polarjax.cache import PagedCache
from polarjax.engine.places import CACHE, ROWS, cache_places
from polarjax.mesh.cut import field_specs
from polarjax.model import Decoder, extend, whole
from polarjax.model import logits as logits_of
from polarjax.policy import Policy, Tree

# Positions of which the logits are in memory at once.
_CHUNK = 128


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
    weights: Tree, contexts: jax.Array, lengths: jax.Array, *, model: Decoder
) -> PagedCache:
    """Read contexts, dense.

    Args:
      weights: the original ones.
      contexts: int32[c, t], padded at the end.
      lengths: int32[c]; 0 for none.
      model: without score rows, as the weights.
    """
    share = model.share

    def read(weights: Tree, contexts: jax.Array, lengths: jax.Array) -> PagedCache:
        rows, room = contexts.shape
        empty = PagedCache.empty(share.own, rows, room, model.dtype)
        return extend(model, weights, contexts, lengths, empty, fresh=True).cache

    specs = share.weight_specs(weights), ROWS, ROWS
    return share.over(read, specs, CACHE)(weights, contexts, lengths)


@functools.partial(jax.jit, static_argnames=("capacity", "mesh"))
def copy_contexts(
    cache: PagedCache, rows: jax.Array, capacity: int, mesh: Mesh | None = None
) -> PagedCache:
    """Give each row a copy of its context's cache.

    Args:
      cache: of the contexts, [c, k, t, d].
      rows: int32[b], the context of each row, on whichever device it is.
      capacity: positions of the new cache.
      mesh: that both caches are cut over; None for one device.
    """
    found = cache.copies(rows, capacity)
    if mesh is None:
        return found
    return jax.lax.with_sharding_constraint(found, cache_places(found, mesh))


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
      cache: of what comes before.
      tokens: int32[b, n + 1].
      counts: int32[b], how many of the n each row scores.
      model: with the policy's score rows.
      kind: class of the policy, see `polarjax.engine.programs.SlotData`.

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
            logits, cache, read = decode_step(
                model, weights, policy, tokens[:, i], cache, live
            )
            found, best = score(logits, tokens[:, i + 1])
            nll = nll.at[:, i].set(jnp.where(live, found, 0))
            return cache, nll, greedy.at[:, i].set(best), use + read

        use = jnp.zeros((model.config.layers, model.config.kv_heads), jnp.int32)
        first = cache, jnp.zeros((b, n)), jnp.zeros((b, n), bool), use
        # As many steps as the longest row needs, not as many as the arrays have room
        # for; as many on every device, for they speak to each other in each.
        steps = share.largest(counts.max())
        return jax.lax.fori_loop(0, steps, step, first)[1:]

    args = weights, policy, cache, tokens, counts
    specs = share.weight_specs(weights), field_specs(policy), CACHE, ROWS, ROWS
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
        x, read = made.x, made.read
        live = jnp.arange(n) < counts[:, None]
        use = (read & live[None, ..., None]).sum(axis=(1, 2), dtype=jnp.int32)

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
    counts = live.astype(jnp.int32)
    found = extend(model, weights, token[:, None], counts, cache, policy=policy)
    every = jnp.stack([one.every for one in found.read])
    logits = model.share.gather_logits(found.logits)
    read = model.share.add_up_batch(every.sum(axis=1, dtype=jnp.int32))
    return logits, found.cache, read


def score(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods float32[...] of targets int32[...], and if each is best.

    Args:
      logits: float32[..., v].
      targets: int32[...].
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return nll, jnp.argmax(logits, axis=-1) == targets
