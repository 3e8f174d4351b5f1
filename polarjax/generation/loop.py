"""Generation's compiled programs: prefill, first tokens, a chunk of decode steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.generation.blocks import plan_blocks
from polarjax.generation.sampling import Sampling, sample
from polarjax.model import BLOCK_TOKENS, Decoder, run
from polarjax.params import Tree
from polarjax.policy import SelectionPolicy
from polarjax.sharding import cache_sharding


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


@functools.partial(
    jax.jit,
    static_argnames=("config", "most", "implementation"),
    donate_argnames=("cache", "logits"),
)
def prefill(
    weights: Tree,
    tokens: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    cache: KVCache,
    logits: jax.Array,
    *,
    config: ModelConfig,
    most: int,
    implementation: Implementation | None,
) -> tuple[KVCache, jax.Array]:
    """Read some prompts of a batch, dense.

    Args:
      weights: the original ones.
      tokens: int32[r, t].
      lengths: int32[r].
      rows: int32[r], the places of the prompts in the batch; distinct numbers from b
        on for rows that are none.
      cache: donated: it is updated in place.
      logits: float32[b, v], after each prompt's last token; donated.
      config: of the model.
      most: tokens computed at once, attention apart.
      implementation: of the kernels.

    Returns:
      The cache and the logits, the rows filled in.
    """
    model = Decoder(config, _dtype(weights), implementation=implementation)
    last, cache = run(model, weights, "read", tokens, lengths, rows, cache, most)
    return cache, logits.at[rows].set(last, mode="drop", unique_indices=True)


@functools.partial(jax.jit, donate_argnames=("cache",))
def first_token(
    cache: KVCache,
    logits: jax.Array,
    remaining: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
) -> tuple[State, Drawn]:
    """Draw each request's first token.

    Args:
      cache: of the prompts; donated.
      logits: float32[b, v], after each prompt's last token.
      remaining: int32[b], tokens each request may draw, at least 1.
      sampling: settings.
      stop_ids: int32[e], tokens that end a request.
    """
    live = jnp.ones(remaining.shape, bool)
    state, logprob, valid = _advance(logits, cache, live, remaining, sampling, stop_ids)
    reads = jnp.zeros((len(cache.keys), len(remaining)), jnp.int32)
    return state, Drawn(state.token, logprob, valid, reads, jnp.zeros_like(remaining))


def run_plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled program, as `read_prompts` does by itself."""
    return function(*args, **kwargs)


def read_prompts(
    weights: Tree,
    prompts: Sequence[Sequence[int]],
    remaining: Any,
    sampling: Sampling,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    capacity: int,
    implementation: Implementation | None,
    most: int = BLOCK_TOKENS,
    call: Callable[..., Any] = run_plainly,
) -> tuple[State, Drawn]:
    """Read a batch of prompts, dense, and draw each request's first token.

    Args:
      weights: the original ones.
      prompts: token ids of each, at least one, fewer than the context.
      remaining: int[b], tokens each request may draw, at least 1.
      sampling: settings.
      stop_ids: int32[e], tokens that end a request.
      config: the model's architecture.
      capacity: positions of the cache, s, which each prompt must fit in.
      implementation: of the kernels.
      most: tokens that are computed at once, see `plan_blocks`.
      call: runs each compiled program, as call(function, *args, **kwargs).
    """
    b = len(prompts)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    where = cache_sharding(weights, config)
    cache = KVCache.empty(config, b, capacity, _dtype(weights), where)
    logits = jnp.zeros((b, config.vocab_size), jnp.float32)
    for block in plan_blocks(lengths.tolist(), config.context, most):
        tokens = np.zeros((block.rows, block.width), np.int32)
        counts = np.ones(block.rows, np.int32)
        rows = b + np.arange(block.rows, dtype=np.int32)
        for i, prompt in enumerate(block.prompts):
            tokens[i, : lengths[prompt]] = prompts[prompt]
            counts[i], rows[i] = lengths[prompt], prompt
        cache, logits = call(
            *(prefill, weights, tokens, counts, rows, cache, logits),
            **{"config": config, "most": most, "implementation": implementation},
        )
    remaining = jnp.asarray(remaining, jnp.int32)
    return call(first_token, cache, logits, remaining, sampling, stop_ids)


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
