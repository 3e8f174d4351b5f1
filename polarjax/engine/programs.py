"""Generation's compiled programs: prefill, first tokens, a chunk of decode steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Implementation
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.engine.places import (
    CACHE,
    ROWS,
    empty_cache,
    insert_all,
    policy_specs,
)
from polarjax.engine.sampling import Sampling, sample
from polarjax.mesh.cut import (
    DP,
    TP,
    axis_size,
    mesh_of,
    over_mesh,
    weight_specs,
)
from polarjax.model import BLOCK_TOKENS, Share, make_decoder, run
from polarjax.params import Tree
from polarjax.planning.blocks import plan_blocks
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
      own: int32[layers, dp, tp], KV groups that each device of a mesh read of all its
        live requests; None on one device, and of what prefill draws.
    """

    token: jax.Array
    logprob: jax.Array
    valid: jax.Array
    reads: jax.Array
    visible: jax.Array
    own: jax.Array | None = None


def _advance(
    logits: jax.Array,
    cache: KVCache,
    live: jax.Array,
    remaining: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    share: Share | None = None,
) -> tuple[State, jax.Array, jax.Array]:
    token, logprob = sample(logits, sampling, cache.lengths, share)
    stops = (token[:, None] == stop_ids[None, :]).any(axis=1)
    # The best of NaN logits is token 0: no stop token, but an error for the host.
    stops &= ~jnp.isnan(logprob)
    valid = live & ~stops
    remaining = remaining - valid.astype(jnp.int32)
    state = State(cache, token, valid & (remaining > 0), remaining)
    return state, logprob, valid


@functools.partial(
    jax.jit,
    static_argnames=("config", "most", "implementation", "mesh"),
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
    mesh: Mesh | None = None,
) -> tuple[KVCache, jax.Array]:
    """Read some prompts of a batch, dense.

    Args:
      weights: the original ones.
      tokens: int32[r, t].
      lengths: int32[r].
      rows: int32[r], the places of the prompts in the batch; distinct numbers from b
        on for rows that are none. On a mesh rows and places are each of a device's
        part of the batch, one part behind the other.
      cache: donated: it is updated in place.
      logits: float32[b, v], after each prompt's last token; donated.
      config: of the model.
      most: tokens computed at once, attention apart.
      implementation: of the kernels.
      mesh: that the model is cut over; None for one device.

    Returns:
      The cache and the logits, the rows filled in.
    """
    model = make_decoder(config, weights, (), implementation, mesh)

    def read(weights: Tree, tokens, lengths, rows, cache: KVCache, logits):
        last, cache = run(model, weights, "read", tokens, lengths, rows, cache, most)
        put = {"mode": "drop", "unique_indices": True}
        return cache, logits.at[rows].set(last, **put)

    args = weights, tokens, lengths, rows, cache, logits
    each = ROWS, ROWS, ROWS, CACHE, ROWS
    specs = weight_specs(weights, mesh), *each
    return over_mesh(read, mesh, specs, (CACHE, ROWS))(*args)


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
    stop_ids: Any,
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
    b, mesh = len(prompts), mesh_of(weights)
    dp = axis_size(mesh, DP)
    if b % dp:
        raise ValueError(f"dp {dp} does not divide the batch of {b}")
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    dtype = weights["embed"]["tokens"].dtype
    here = next(iter(weights["embed"]["tokens"].devices()))

    def room(rows: int, positions: int) -> tuple[KVCache, jax.Array]:
        with jax.default_device(None if mesh else here):  # where the model is
            cache = empty_cache(config, rows, positions, dtype, mesh)
            return cache, _zeros((rows, config.vocab_size), mesh)

    cache, logits = room(b, capacity)
    each = b // dp
    for block in plan_blocks(lengths.tolist(), config.context, most, dp):
        tokens = np.zeros((dp, block.rows, block.width), np.int32)
        counts = np.ones((dp, block.rows), np.int32)
        rows = np.empty((dp, block.rows), np.int32)
        rows[:] = each + np.arange(block.rows, dtype=np.int32)
        filled = [0] * dp
        for prompt in block.prompts:
            part, place = divmod(prompt, each)
            i = filled[part]
            filled[part] += 1
            rows[part, i] = place
            tokens[part, i, : lengths[prompt]] = prompts[prompt]
            counts[part, i] = lengths[prompt]
        count, places = dp * block.rows, rows.reshape(-1)
        read = functools.partial(
            call,
            prefill,
            weights,
            tokens.reshape(count, -1),
            counts.reshape(-1),
            config=config,
            most=most,
            implementation=implementation,
            mesh=mesh,
        )
        if here.platform == "gpu":
            cache, logits = read(places, cache, logits)
            continue
        # Into a cache of its own size, so that neither the batch nor its capacity is a
        # part of the large program. A GPU would wait for the copy, measurably.
        own = np.tile(np.arange(block.rows, dtype=np.int32), dp)
        part, last = read(own, *room(count, block.width))
        cache, logits = insert_all(cache, logits, part, last, places, mesh, call)
    remaining = np.asarray(remaining, np.int32)
    return call(first_token, cache, logits, remaining, sampling, stop_ids)


def _zeros(shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    where = None if mesh is None else NamedSharding(mesh, ROWS)
    return jnp.zeros(shape, jnp.float32, device=where)


@functools.partial(
    jax.jit,
    static_argnames=("config", "steps", "implementation", "mesh"),
    donate_argnames=("state",),
)
def decode_chunk(
    weights: Tree,
    policy: SelectionPolicy,
    state: State,
    go_on: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    count: Any = None,
    *,
    config: ModelConfig,
    steps: int,
    implementation: Implementation | None,
    mesh: Mesh | None = None,
) -> tuple[State, Drawn]:
    """Some decode steps, with no word to the host between them.

    Args:
      weights: bound.
      policy: bound.
      state: donated: the caches are updated in place.
      go_on: bool[b], False for requests that the host has ended (stop strings).
      sampling: settings.
      stop_ids: int32[e].
      count: int32[], the steps to take, at most `steps`; None for all of them.
      config: of the model.
      steps: most steps, for which there is room in what is returned.
      implementation: of the kernels.
      mesh: that the model is cut over; None for one device.

    Returns:
      The new state, and what was drawn, each leaf with a leading axis of `steps`; 0 in
      those that were not taken.
    """
    model = make_decoder(config, weights, policy.score_rows, implementation, mesh)
    cut = model.share if model.share and model.share.cuts_vocabulary else None

    def follow(weights, policy, state, go_on, sampling, stop_ids, count):
        def step(state: State) -> tuple[State, Drawn]:
            live = state.live
            (logits, cache, reads), shares = model.apply(
                {"params": weights},
                *(state.token, state.cache, policy, live),
                method="decode",
                mutable="shares",
            )
            visible = jnp.where(live, cache.lengths, 0)
            after, logprob, valid = _advance(
                logits, cache, live, state.remaining, sampling, stop_ids, cut
            )
            own = None if mesh is None else _own_reads(shares["shares"])
            return after, Drawn(after.token, logprob, valid, reads, visible, own)

        def take(i: jax.Array, carry: tuple[State, Drawn]) -> tuple[State, Drawn]:
            state, new = step(carry[0])
            return state, jax.tree.map(lambda all, x: all.at[i].set(x), carry[1], new)

        state = dataclasses.replace(state, live=state.live & go_on)
        if count is None:
            return jax.lax.scan(lambda state, _: step(state), state, length=steps)
        room = _room(steps, config.layers, len(state.token), mesh)
        return jax.lax.fori_loop(0, count, take, (state, room))

    args = weights, policy, state, go_on, sampling, stop_ids, count
    later: Any = P(None, DP)
    reads: Any = P(None, None, DP)
    kept = State(CACHE, ROWS, ROWS, ROWS)
    own: Any = P(None, None, DP, TP)
    drawn = Drawn(later, later, later, reads, later, own)
    given = kept, ROWS, ROWS, P(), P()
    specs = weight_specs(weights, mesh), policy_specs(policy), *given
    return over_mesh(follow, mesh, specs, (kept, drawn))(*args)


def takes_whole_chunks(weights: Tree) -> bool:
    """Whether `decode_chunk` is faster without a count.

    Between steps whose number is data a GPU waits for the host: a smallest model's
    take a sixth longer then, and those of 8B a thirtieth.

    Args:
      weights: of the model, on their devices.
    """
    return next(iter(weights["embed"]["tokens"].devices())).platform == "gpu"


def _room(steps: int, layers: int, batch: int, mesh: Mesh | None) -> Drawn:
    """For what so many steps bring, of one device's part of the batch."""
    whole = jnp.zeros((steps, batch), jnp.int32)
    return Drawn(
        token=whole,
        logprob=jnp.zeros(whole.shape, jnp.float32),
        valid=jnp.zeros(whole.shape, bool),
        reads=jnp.zeros((steps, layers, batch), jnp.int32),
        visible=whole,
        own=None if mesh is None else jnp.zeros((steps, layers, 1, 1), jnp.int32),
    )


def _own_reads(shares: Any) -> jax.Array:
    """What each layer's attention said of this device, int32[layers, 1, 1]."""
    layers = (shares[f"layers_{i}"]["attention"]["reads"] for i in range(len(shares)))
    return jnp.stack([reads for (reads,) in layers])[:, None, None]


@functools.partial(jax.jit, static_argnames=("config", "implementation", "mesh"))
def all_logits(
    weights: Tree,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Logits of every position, dense, float32[b, t, v]."""
    model = make_decoder(config, weights, (), implementation, mesh)

    def read(weights: Tree, tokens: jax.Array) -> jax.Array:
        return run(model, weights, "__call__", tokens)[0]

    specs = weight_specs(weights, mesh), P()
    return over_mesh(read, mesh, specs, P())(weights, tokens)
