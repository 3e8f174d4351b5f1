"""The programs of an engine's iteration: read pieces of prompts, decode, draw.

What the model yields and what is drawn from it are programs of their own. A request so
gets the same logits, bit for bit, whatever its mates need for drawing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polarjax.cache import Pieces
from polarjax.engine.alternatives import Alternatives, alternatives
from polarjax.engine.places import GROUPS, ROWS
from polarjax.engine.programs import own_reads
from polarjax.engine.sampling import Variant, draw
from polarjax.engine.scoring import Asked
from polarjax.engine.settings import MOST_ALTERNATIVES
from polarjax.engine.slots import Slots, cut_slots
from polarjax.mesh.cut import DP, TP, field_specs
from polarjax.model import Decoder, Share, extend, last_logits, read
from polarjax.policy import Policy, Tree

Told = tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]
"""What the host is told: tokens int32[1, n], log-probabilities float32[1, n] and which
count bool[1, n], of one step; and who is live after it, bool[n]."""

_TOLD: Any = (P(None, DP), ROWS)

# Tokens of prompts whose logits are in memory at a time.
_SCORED = 128


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def read_pieces(
    weights: Tree, tokens: jax.Array, pieces: Pieces, slots: Slots, *, model: Decoder
) -> tuple[Slots, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Read pieces of prompts, dense.

    Args:
      weights: the original ones.
      tokens: int32[n], those of all pieces; of a mesh each part of the batch has its
        own share, and slots and starts are counted in it.
      pieces: whose they are.
      slots: donated.
      model: without score rows, as the weights.

    Returns:
      The slots; logits after each piece, float32[r, v], and their log-sum-exp; x and o
      of the `Reading`, for `score`.
    """
    share = model.share

    def follow(weights, tokens, pieces, slots):
        found = read(model, weights, tokens, pieces, slots.cache)
        after = found.logits, mass_of(found.logits, share)
        return dataclasses.replace(slots, cache=found.cache), after, (found.x, found.o)

    kept, rows = cut_slots(model), ROWS
    specs = share.weight_specs(weights), rows, Pieces(rows, rows, rows, rows), kept
    yields = GROUPS if share.cuts_vocabulary else ROWS
    args = weights, tokens, pieces, slots
    found = kept, (yields, rows), (rows, GROUPS)
    return share.over(follow, specs, found)(*args)


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
      x: [n, m], of the `Reading`.
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
    jax.jit, static_argnames=("model", "variant"), donate_argnames=("slots",)
)
def begin(
    slots: Slots,
    logits: jax.Array,
    mass: jax.Array,
    pieces: Pieces,
    lasts: jax.Array,
    *,
    model: Decoder,
    variant: Variant,
) -> tuple[Slots, Told]:
    """Draw the first token of requests whose prompts have been read.

    Args:
      slots: donated; may be bare.
      logits: float32[r, v], after each piece.
      mass: float32[r], their log-sum-exp.
      pieces: whose they are.
      lasts: bool[r], whether a piece ends its prompt.
      model: that the batch is of.
      variant: of drawing, at least what one of them needs.

    Returns:
      The slots, with those requests live; and what was drawn, of r.
    """
    share = model.share

    def follow(slots, logits, mass, pieces, lasts):
        def mine(array: jax.Array) -> jax.Array:
            return array[pieces.slots]

        b = len(slots.token)
        to = jnp.where(lasts & (pieces.counts > 0), pieces.slots, b)

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
        return slots, _told(drawn)

    kept, rows = cut_slots(model), ROWS
    yields = GROUPS if share.cuts_vocabulary else ROWS
    specs = kept, yields, rows, Pieces(rows, rows, rows, rows), rows
    args = slots, logits, mass, pieces, lasts
    return share.over(follow, specs, (kept, _TOLD))(*args)


@functools.partial(
    jax.jit, static_argnames=("model", "kind"), donate_argnames=("slots",)
)
def decode(
    weights: Tree,
    policy: Policy,
    slots: Slots,
    *,
    model: Decoder,
    kind: type | None = None,
) -> tuple[Slots, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """One decode step of all live slots, but for what is drawn after it.

    Args:
      weights: bound.
      policy: bound.
      slots: donated.
      model: with the policy's score rows.
      kind: class of the policy. jax 0.10 takes the trees of two dataclasses with equal
        fields for the same, and the program of one policy for the other's.

    Returns:
      The slots, with logits; and what was read: `Drawn.reads`, `visible` and `own`.
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
        reads = jnp.stack([one.groups for one in made])
        visible = jnp.where(live, cache.lengths, 0)
        own = None if share.alone else own_reads(made)[None]
        slots = dataclasses.replace(
            slots, cache=cache, logits=logits, mass=mass_of(logits, share)
        )
        return slots, (reads[None], visible[None], own)

    kept, later = cut_slots(model), P(None, DP)
    counts = P(None, None, DP), later, P(None, None, DP, TP)
    specs = share.weight_specs(weights), field_specs(policy), kept
    return share.over(follow, specs, (kept, counts))(weights, policy, slots)


@functools.partial(
    jax.jit, static_argnames=("model", "variant"), donate_argnames=("slots",)
)
def draw_tokens(
    slots: Slots, *, model: Decoder, variant: Variant
) -> tuple[Slots, Told]:
    """Draw the next token of each live slot, after `decode`.

    Args:
      slots: donated; may be bare.
      model: that the batch is of.
      variant: of drawing, at least what one of them needs.

    Returns:
      The slots, and what was drawn, of b.
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
        slots = dataclasses.replace(
            slots,
            token=drawn.token,
            live=drawn.live,
            remaining=drawn.remaining,
            history=drawn.history,
        )
        return slots, _told(drawn)

    kept = cut_slots(model)
    return share.over(follow, (kept,), (kept, _TOLD))(slots)


@functools.partial(jax.jit, static_argnames=("model",))
def tell(
    logits: jax.Array, mass: jax.Array, token: jax.Array, *, model: Decoder
) -> Alternatives:
    """What there is to tell of tokens that `begin` or `draw_tokens` has drawn.

    Args:
      logits: float32[n, v], that they were drawn from.
      mass: float32[n], their log-sum-exp.
      token: int32[1, n], as the host is told them.
      model: that the batch is of.

    Returns:
      Of n tokens, those that nobody asked about too.
    """
    share = model.share
    cut = share if share.cuts_vocabulary else None

    def follow(logits, mass, token):
        return alternatives(logits, mass, token[0], cut)

    yields = GROUPS if share.cuts_vocabulary else ROWS
    specs = yields, ROWS, P(None, DP)
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


def _told(drawn: _New) -> Told:
    found = drawn.token, drawn.logprob, drawn.valid
    return jax.tree.map(lambda x: x[None], found), drawn.live


def mass_of(logits: jax.Array, share: Share) -> jax.Array:
    """Log-sum-exp over the whole vocabulary, float32[b], of a device's part of it."""
    own = jax.nn.logsumexp(logits, axis=-1)
    if not share.cuts_vocabulary:
        return own
    return jax.nn.logsumexp(share.gather(own[:, None]), axis=-1)
