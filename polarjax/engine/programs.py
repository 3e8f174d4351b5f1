"""What an engine compiles besides prefill: first tokens, a chunk of decode steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from polarjax.cache import PagedCache, zeros
from polarjax.engine.places import CACHE, ROWS, empty_cache
from polarjax.engine.rules import History
from polarjax.engine.sampling import Sampling, Variant, draw
from polarjax.mesh.cut import DP, TP, field_specs
from polarjax.model import Decoder, Read, Share, extend, whole
from polarjax.model import logits as logits_of
from polarjax.policy import Policy, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch stands between steps.

    Attributes:
      cache: everything before `token`.
      token: int32[b], drawn and not yet read.
      live: bool[b], whether the request goes on.
      remaining: int32[b], tokens it may still draw.
      history: what each request has read and written; None where no rule needs it.
    """

    cache: PagedCache
    token: jax.Array
    live: jax.Array
    remaining: jax.Array
    history: History | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotData:
    """What the requests of a batch asked for: data, that compiles nothing.

    Attributes:
      density: float32[b], as in `polarjax.policy.Seen`.
      sampling: how each request draws.
      stop_ids: int32[b, e], tokens that end each request.
      variant: of `polarjax.engine.checks.variant_of`.
      kind: class of the policy that they are for. jax 0.10 takes the trees of two
        dataclasses with equal fields for the same, and the program of one policy for
        the other's.
    """

    density: jax.Array
    sampling: Sampling
    stop_ids: jax.Array
    variant: Variant = dataclasses.field(metadata={"static": True})
    kind: type | None = dataclasses.field(default=None, metadata={"static": True})


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
    state: State,
    slots: SlotData,
    share: Share | None = None,
) -> tuple[State, jax.Array, jax.Array]:
    live, position, history = state.live, state.cache.lengths, state.history
    token, logprob = draw(
        logits, None, slots.sampling, position, history, share, variant=slots.variant
    )
    stops = (token[:, None] == slots.stop_ids).any(axis=1)
    # The best of NaN logits is token 0: no stop token, but an error for the host.
    stops &= ~jnp.isnan(logprob)
    valid = live & ~stops
    remaining = state.remaining - valid.astype(jnp.int32)
    if history is not None:
        history = history.add(token, position, live)
    after = State(state.cache, token, valid & (remaining > 0), remaining, history)
    return after, logprob, valid


@functools.partial(jax.jit, donate_argnames=("state",))
def first_token(
    state: State,
    logits: jax.Array,
    admitted: jax.Array,
    remaining: jax.Array,
    slots: SlotData,
) -> tuple[State, Drawn]:
    """Draw the first token of requests whose prompts have been read.

    Args:
      state: of the batch, with the prompts in its cache; donated.
      logits: float32[b, v], after each prompt's last token.
      admitted: bool[b], the requests that begin; the others stay as they are.
      remaining: int32[b], tokens each of them may draw, at least 1.
      slots: what each request asked for.

    Returns:
      The new state, and what was drawn, with a leading axis of one step.
    """
    begun = dataclasses.replace(state, live=admitted, remaining=remaining)
    new, logprob, valid = _advance(logits, begun, slots)

    def mine(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(admitted, new, old)

    reads = jnp.zeros((state.cache.layers, len(remaining)), jnp.int32)
    drawn = Drawn(new.token, logprob, valid, reads, jnp.zeros_like(remaining))
    after = State(
        state.cache,
        mine(new.token, state.token),
        mine(new.live, state.live),
        mine(new.remaining, state.remaining),
        new.history,
    )
    return after, jax.tree.map(lambda x: x[None], drawn)


def empty_state(
    model: Decoder, slots: int, context: int, weights: Tree
) -> tuple[State, jax.Array]:
    """A batch of no requests, and room for the logits after prompts, float32[b, v].

    Args:
      model: that will run.
      slots: requests that there is room for, b.
      context: positions that each has room for.
      weights: the original ones, where the batch shall be.
    """
    mesh = model.mesh
    with jax.default_device(None if mesh else device_of(weights)):
        cache = empty_cache(model, slots, context)
        where = None if mesh is None else NamedSharding(mesh, ROWS)
        state = State(
            cache,
            token=zeros((slots,), jnp.int32, where),
            live=zeros((slots,), bool, where),
            remaining=zeros((slots,), jnp.int32, where),
        )
        return state, zeros((slots, model.config.vocab_size), jnp.float32, where)


def device_of(weights: Tree) -> Any:
    """The first device that the model is on."""
    return next(iter(weights["embed"]["tokens"].devices()))


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps"),
    donate_argnames=("state",),
)
def decode_chunk(
    weights: Tree,
    policy: Policy,
    state: State,
    go_on: jax.Array,
    slots: SlotData,
    count: Any = None,
    *,
    model: Decoder,
    steps: int,
) -> tuple[State, Drawn]:
    """Some decode steps, with no word to the host between them.

    Args:
      weights: bound.
      policy: bound.
      state: donated: the caches are updated in place.
      go_on: bool[b], False for requests that the host has ended (stop strings).
      slots: what each request asked for.
      count: int32[], the steps to take, at most `steps`; None for all of them.
      model: with the policy's score rows.
      steps: most steps, for which there is room in what is returned.

    Returns:
      The new state, and what was drawn, each leaf with a leading axis of `steps`; 0 in
      those that were not taken.
    """
    share = model.share
    cut = share if share.cuts_vocabulary else None

    def follow(weights, policy, state, go_on, slots, count):
        def step(state: State) -> tuple[State, Drawn]:
            live = state.live
            logits, cache, read = extend(
                model,
                weights,
                state.token[:, None],
                live.astype(jnp.int32),
                state.cache,
                policy=policy,
                density=slots.density,
            )
            reads = jnp.stack([one.groups for one in read])
            visible = jnp.where(live, cache.lengths, 0)
            read_on = dataclasses.replace(state, cache=cache)
            after, logprob, valid = _advance(logits, read_on, slots, cut)
            own = None if share.alone else own_reads(read)
            return after, Drawn(after.token, logprob, valid, reads, visible, own)

        def take(i: jax.Array, carry: tuple[State, Drawn]) -> tuple[State, Drawn]:
            state, new = step(carry[0])
            return state, jax.tree.map(lambda all, x: all.at[i].set(x), carry[1], new)

        state = dataclasses.replace(state, live=state.live & go_on)
        if count is None:
            return jax.lax.scan(lambda state, _: step(state), state, length=steps)
        room = _room(model, steps, len(state.token))
        return jax.lax.fori_loop(0, count, take, (state, room))

    args = weights, policy, state, go_on, slots, count
    later: Any = P(None, DP)
    reads: Any = P(None, None, DP)
    history = None if state.history is None else ROWS
    kept = State(CACHE, ROWS, ROWS, ROWS, history)
    own: Any = P(None, None, DP, TP)
    drawn = Drawn(later, later, later, reads, later, own)
    given = kept, ROWS, ROWS, P()
    specs = share.weight_specs(weights), field_specs(policy), *given
    return share.over(follow, specs, (kept, drawn))(*args)


def takes_whole_chunks(weights: Tree) -> bool:
    """Whether `decode_chunk` is faster without a count.

    Between steps whose number is data a GPU waits for the host: a smallest model's
    take a sixth longer then, and those of 8B a thirtieth.

    Args:
      weights: of the model, on their devices.
    """
    return device_of(weights).platform == "gpu"


def _room(model: Decoder, steps: int, batch: int) -> Drawn:
    """For what so many steps bring, of one device's part of the batch."""
    layers = model.config.layers
    whole = jnp.zeros((steps, batch), jnp.int32)
    return Drawn(
        token=whole,
        logprob=jnp.zeros(whole.shape, jnp.float32),
        valid=jnp.zeros(whole.shape, bool),
        reads=jnp.zeros((steps, layers, batch), jnp.int32),
        visible=whole,
        own=None if model.mesh is None else jnp.zeros((steps, layers, 1, 1), jnp.int32),
    )


def own_reads(read: tuple[Read, ...]) -> jax.Array:
    """What each layer's attention read on this device, int32[layers, 1, 1]."""
    return jnp.stack([one.here for one in read])[:, None, None]


@functools.partial(jax.jit, static_argnames=("model",))
def all_logits(weights: Tree, tokens: jax.Array, *, model: Decoder) -> jax.Array:
    """Logits of every position, dense, float32[b, t, v]."""

    def read(weights: Tree, tokens: jax.Array) -> jax.Array:
        return logits_of(model, weights, whole(model, weights, tokens).x)

    specs = model.share.weight_specs(weights), P()
    return model.share.over(read, specs, P())(weights, tokens)
