"""The two compiled programs of generation: prefill, and a chunk of decode steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.generation.sampling import Sampling, sample
from polarjax.model import Decoder, run
from polarjax.params import Tree
from polarjax.policy import SelectionPolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch stands between steps.

    Attributes:
      cache: everything before `token`.
      token: int32[b], drawn and not yet read.
      live: bool[b], whether the request goes on.
      remaining: int32[b], tokens it may still draw.
    """

    cache: KVCache
    token: jax.Array
    live: jax.Array
    remaining: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one step, or stacked by a leading axis, a chunk of steps brought.

    Attributes:
      token: int32[b].
      logprob: float32[b].
      valid: bool[b], whether the token belongs to the output.
      reads: int32[layers, b], KV groups read.
      visible: int32[b], tokens in the cache of each live request, its newest included.
    """

    token: jax.Array
    logprob: jax.Array
    valid: jax.Array
    reads: jax.Array
    visible: jax.Array


def _advance(
    logits: jax.Array,
    cache: KVCache,
    live: jax.Array,
    remaining: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    token, logprob = sample(logits, sampling, cache.lengths)
    stops = (token[:, None] == stop_ids[None, :]).any(axis=1)
    # The best of NaN logits is token 0: no stop token, but an error for the host.
    stops &= ~jnp.isnan(logprob)
    valid = live & ~stops
    remaining = remaining - valid.astype(jnp.int32)
    state = State(cache, token, valid & (remaining > 0), remaining)
    return state, logprob, valid


@functools.partial(jax.jit, static_argnames=("config", "capacity", "implementation"))
def prefill(
    weights: Tree,
    tokens: jax.Array,
    lengths: jax.Array,
    remaining: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    capacity: int,
    implementation: Implementation | None,
) -> tuple[State, Drawn]:
    """Read the prompts, dense, and draw each request's first token.

    Args:
      weights: the original ones.
      tokens: int32[b, t].
      lengths: int32[b].
      remaining: int32[b], tokens each request may draw, at least 1.
      sampling: settings.
      stop_ids: int32[e], tokens that end a request.
      config: of the model.
      capacity: positions of the cache, s.
      implementation: of the kernels.
    """
    model = Decoder(config, _dtype(weights), implementation=implementation)
    logits, cache = run(model, weights, "prefill", tokens, lengths, capacity)
    live = jnp.ones(lengths.shape, bool)
    state, logprob, valid = _advance(logits, cache, live, remaining, sampling, stop_ids)
    b = lengths.shape[0]
    nothing = jnp.zeros((config.layers, b), jnp.int32), jnp.zeros(b, jnp.int32)
    return state, Drawn(state.token, logprob, valid, *nothing)


@functools.partial(
    jax.jit,
    static_argnames=("config", "steps", "implementation"),
    donate_argnames=("state",),
)
def decode_chunk(
    weights: Tree,
    policy: SelectionPolicy,
    state: State,
    go_on: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    steps: int,
    implementation: Implementation | None,
) -> tuple[State, Drawn]:
    """A fixed number of decode steps, with no word to the host between them.

    Args:
      weights: bound.
      policy: bound.
      state: donated: the caches are updated in place.
      go_on: bool[b], False for requests that the host has ended (stop strings).
      sampling: settings.
      stop_ids: int32[e].
      config: of the model.
      steps: trip count.
      implementation: of the kernels.

    Returns:
      The new state, and what was drawn, each leaf with a leading axis of `steps`.
    """
    model = Decoder(config, _dtype(weights), policy.score_rows, implementation)

    def step(state: State, _) -> tuple[State, Drawn]:
        live = state.live
        logits, cache, reads = run(
            model, weights, "decode", state.token, state.cache, policy, live
        )
        visible = jnp.where(live, cache.lengths, 0)
        after, logprob, valid = _advance(
            logits, cache, live, state.remaining, sampling, stop_ids
        )
        return after, Drawn(after.token, logprob, valid, reads, visible)

    state = dataclasses.replace(state, live=state.live & go_on)
    return jax.lax.scan(step, state, length=steps)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def all_logits(
    weights: Tree,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Logits of every position, dense, float32[b, t, v]."""
    model = Decoder(config, _dtype(weights), implementation=implementation)
    return run(model, weights, "__call__", tokens)[0]


def _dtype(weights: Tree):
    return weights["embed"]["tokens"].dtype
