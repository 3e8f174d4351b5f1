"""The programs of an engine's iteration: read pieces of prompts, decode, draw.

What the model yields and what is drawn from it are programs of their own. A request so
gets the same logits, bit for bit, whatever its mates need for drawing.

Arguments that are donated and not used are kept: an array that is written anew would
else take the place of another, and so on, and all would wander from step to step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.engine.alternatives import Alternatives, alternatives
from polarjax.engine.chunk import Asks, Chunk, cut_chunk
from polarjax.engine.places import GROUPS, ROWS, logits_cut
from polarjax.engine.programs import Drawn, own_reads
from polarjax.engine.sampling import Variant, draw
from polarjax.engine.scoring import Asked
from polarjax.engine.settings import MOST_ALTERNATIVES
from polarjax.engine.slots import Slots, cut_slots
from polarjax.mesh.cut import field_specs
from polarjax.model import Decoder, Share, extend, last_logits, read
from polarjax.policy import Policy, Tree

Told = tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]
"""What the host is told: tokens int32[n], log-probabilities float32[n] and which count
bool[n]; and who is live after it, bool[n]."""

# Tokens of prompts whose logits are in memory at a time.
_SCORED = 128


@functools.partial(
    jax.jit,
    static_argnames=("model",),
    donate_argnames=("chunk", "slots"),
    keep_unused=True,
)
def read_pieces(
    weights: Tree, chunk: Chunk, slots: Slots, *, model: Decoder
) -> tuple[Chunk, Slots]:
    """Read pieces of prompts, dense.

    Args:
      weights: the original ones.
      chunk: which, donated.
      slots: donated.
      model: without score rows, as the weights.

    Returns:
      The chunk with what came of it, and the slots.
    """
    share = model.share

    def follow(weights, chunk, slots):
        asks = chunk.asks
        found = read(model, weights, asks.tokens, asks.pieces, slots.cache)
        mass = mass_of(found.logits, share)
        chunk = Chunk(asks, found.logits, mass, found.x, found.o)
        return chunk, dataclasses.replace(slots, cache=found.cache)

    kept = cut_chunk(model), cut_slots(model)
    specs = share.weight_specs(weights), *kept
    return share.over(follow, specs, kept)(weights, chunk, slots)


@functools.partial(jax.jit, static_argnames=("model",))
def score(
    weights: Tree, x: jax.Array, o: jax.Array, asked: Asked, *, model: Decoder
) -> Alternatives:
    """What there is to tell of the tokens of prompts that `read_pieces` has read.

    It goes on where that left off, before the rest of the last layer. Who asks so
    changes nothing of what is read; and no position is computed that nobody asks about,
    but for the last of a block.

    Args:
      weights: the original ones.
      x: [n, m], of the `Chunk`.
      o: [n, h, d], likewise.
      asked: which tokens.
      model: that has read, without score rows.

    Returns:
      Of n tokens; what is beyond their count means nothing.
    """
    share = model.share
    cut = share if share.cuts_vocabulary else None

    def follow(weights, x, o, asked):
        n, most = len(asked.rows), min(MOST_ALTERNATIVES, model.config.vocab_size)
        size = min(_SCORED, n)
        blocks = -(-n // size)
        rows, tokens = (
            jnp.pad(each, (0, blocks * size - n)) for each in (asked.rows, asked.tokens)
        )

        def block(i: jax.Array, found: Alternatives) -> Alternatives:
            at, token = (
                jax.lax.dynamic_slice_in_dim(each, i * size, size)
                for each in (rows, tokens)
            )
            logits = last_logits(model, weights, x[at], o[at])
            new = alternatives(logits, mass_of(logits, share), token, cut)

            def put(whole: jax.Array, part: jax.Array) -> jax.Array:
                start = (i * size, *(0 for _ in part.shape[1:]))
                return jax.lax.dynamic_update_slice(whole, part, start)

            return jax.tree.map(put, found, new)

        # Devices that share a block must all compute it.
        needed = (share.largest(asked.count[0]) + size - 1) // size
        numbers = jnp.zeros(blocks * size, jnp.float32)
        several = jnp.zeros((blocks * size, most), jnp.float32)
        ranks, ids = (each.astype(jnp.int32) for each in (numbers, several))
        empty = Alternatives(numbers, ranks, ids, several)
        found = jax.lax.fori_loop(0, needed, block, empty)
        return jax.tree.map(lambda each: each[:n], found)

    rows: Any = ROWS
    specs = share.weight_specs(weights), rows, GROUPS, Asked(rows, rows, rows)
    return share.over(follow, specs, rows)(weights, x, o, asked)


@functools.partial(
    jax.jit,
    static_argnames=("model", "variant"),
    donate_argnames=("slots",),
    keep_unused=True,
)
def begin(
    slots: Slots,
    asks: Asks,
    logits: jax.Array,
    mass: jax.Array,
    *,
    model: Decoder,
    variant: Variant,
) -> tuple[Slots, Told]:
    """Draw the first token of requests whose prompts have been read.

    Args:
      slots: donated; may be bare.
      asks: what has been read.
      logits: float32[r, v], after each piece.
      mass: float32[r], their log-sum-exp.
      model: that the batch is of.
      variant: of drawing, at least what one of them needs.

    Returns:
      The slots, with those requests live; and what was drawn, of r.
    """
    share = model.share

    def follow(slots, asks, logits, mass):
        pieces = asks.pieces

        def mine(array: jax.Array) -> jax.Array:
            return array[pieces.slots]

        b = len(slots.token)
        to = jnp.where(asks.lasts & (pieces.counts > 0), pieces.slots, b)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return whole.at[to].set(part, mode="drop")

        drawn = _draw(
            logits,
            mass,
            jax.tree.map(mine, slots.sampling),
            jax.tree.map(mine, slots.history),
            mine(slots.stop_ids),
            mine(slots.cache.lengths),
            to < b,
            mine(slots.remaining),
            share,
            variant,
        )
        slots = dataclasses.replace(
            slots,
            token=put(slots.token, drawn.token),
            live=put(slots.live, drawn.live),
            remaining=put(slots.remaining, drawn.remaining),
            history=jax.tree.map(put, slots.history, drawn.history),
        )
        return slots, drawn.told

    kept, rows = cut_slots(model), ROWS
    yields = logits_cut(share)
    specs = kept, rows, yields, rows
    return share.over(follow, specs, (kept, rows))(slots, asks, logits, mass)


@functools.partial(
    jax.jit,
    static_argnames=("model", "kind"),
    donate_argnames=("slots",),
    keep_unused=True,
)
def decode(
    weights: Tree,
    policy: Policy,
    slots: Slots,
    *,
    model: Decoder,
    kind: type | None = None,
) -> Slots:
    """One decode step of all live slots, but for what is drawn after it.

    Args:
      weights: bound.
      policy: bound.
      slots: donated.
      model: with the policy's score rows.
      kind: class of the policy. jax 0.10 takes the trees of two dataclasses with equal
        fields for the same, and the program of one policy for the other's.

    Returns:
      The slots, with logits and with what was read.
    """
    share = model.share

    def follow(weights, policy, slots):
        live = slots.live
        logits, cache, made = extend(
            model,
            weights,
            slots.token,
            live,
            slots.cache,
            policy=policy,
            density=slots.density,
            slot=slots.sampling.seed.astype(jnp.int32),
        )
        return dataclasses.replace(
            slots,
            cache=cache,
            logits=logits,
            mass=mass_of(logits, share),
            reads=jnp.stack([one.groups for one in made]),
            visible=jnp.where(live, cache.lengths, 0),
            own=None if share.alone else own_reads(made),
        )

    kept = cut_slots(model)
    specs = share.weight_specs(weights), field_specs(policy), kept
    return share.over(follow, specs, kept)(weights, policy, slots)


@functools.partial(
    jax.jit,
    static_argnames=("model", "variant"),
    donate_argnames=("slots",),
    keep_unused=True,
)
def draw_tokens(
    slots: Slots, *, model: Decoder, variant: Variant
) -> tuple[Slots, tuple[Drawn, jax.Array]]:
    """Draw the next token of each live slot, after `decode`.

    Args:
      slots: donated; may be bare.
      model: that the batch is of.
      variant: of drawing, at least what one of them needs.

    Returns:
      The slots; what the step has brought; and who is live after it, bool[b].
    """
    share = model.share

    def follow(slots):
        drawn = _draw(
            slots.logits,
            slots.mass,
            slots.sampling,
            slots.history,
            slots.stop_ids,
            slots.cache.lengths,
            slots.live,
            slots.remaining,
            share,
            variant,
        )
        told, live = drawn.told
        brought = Drawn(*told, slots.reads, slots.visible, slots.own)
        slots = dataclasses.replace(
            slots,
            token=drawn.token,
            live=live,
            remaining=drawn.remaining,
            history=drawn.history,
        )
        return slots, (brought, live)

    kept, rows = cut_slots(model), ROWS
    brought = Drawn(rows, rows, rows, kept.reads, rows, kept.own)
    return share.over(follow, (kept,), (kept, (brought, rows)))(slots)


@functools.partial(jax.jit, static_argnames=("model",))
def tell(
    logits: jax.Array, mass: jax.Array, token: jax.Array, *, model: Decoder
) -> Alternatives:
    """What there is to tell of tokens that `begin` or `draw_tokens` has drawn.

    Args:
      logits: float32[n, v], that they were drawn from.
      mass: float32[n], their log-sum-exp.
      token: int32[n], as the host is told them.
      model: that the batch is of.

    Returns:
      Of n tokens, those that nobody asked about too.
    """
    share = model.share
    cut = share if share.cuts_vocabulary else None

    def follow(logits, mass, token):
        return alternatives(logits, mass, token, cut)

    yields = logits_cut(share)
    specs = yields, ROWS, ROWS
    return share.over(follow, specs, ROWS)(logits, mass, token)


@dataclasses.dataclass(frozen=True)
class _New:
    """What drawing leads to, for some requests."""

    token: jax.Array
    logprob: jax.Array
    valid: jax.Array
    live: jax.Array
    remaining: jax.Array
    history: Any

    @property
    def told(self) -> Told:
        return (self.token, self.logprob, self.valid), self.live


def _draw(
    logits, mass, sampling, history, stop_ids, position, live, remaining, share, variant
) -> _New:
    cut = share if share.cuts_vocabulary else None
    token, logprob = draw(
        logits, mass, sampling, position, history, cut, variant=variant
    )
    stops = (token[:, None] == stop_ids).any(axis=1)
    # The best of NaN logits is token 0: no stop token, but an error for the host.
    stops &= ~jnp.isnan(logprob)
    valid = live & ~stops
    remaining = remaining - valid.astype(jnp.int32)
    history = history.add(token, position, live)
    return _New(token, logprob, valid, valid & (remaining > 0), remaining, history)


def mass_of(logits: jax.Array, share: Share) -> jax.Array:
    """Log-sum-exp over the whole vocabulary, float32[b], of a device's part of it."""
    own = jax.nn.logsumexp(logits, axis=-1)
    if not share.cuts_vocabulary:
        return own
    return jax.nn.logsumexp(share.gather(own[:, None]), axis=-1)
