"""From logits to the next token."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jax import lax

from polarjax.engine.filters import filtered
from polarjax.engine.rounding import rounded
from polarjax.engine.rules import History, Rules, ruled
from polarjax.mesh.share import Share
from polarjax.settings import draw_key

# Below this temperature nothing changes: float32 logits that differ at all differ by
# more, so that the best is drawn. But over a lower one they may be infinite, and no
# longer say which is the best.
_COLDEST = 1e-20

# Sample j > 0 of a prompt has a key of its own, as a position would that none has.
_SAMPLES = 2**31


class Variant(enum.Enum):
    """What `draw` does for all of a batch, as some request in it needs it.

    Each does all that the ones before it do. A request gets the same, bit for bit, of
    each that does what it needs.

    Attributes:
      GREEDY: the best token, and no more.
      SAMPLED: drawing by chance, at a temperature.
      FILTERED: top-k, top-p and min-p, for which devices that share a vocabulary send
        each other their logits.
      FULL: the rules.
    """

    GREEDY = "greedy"
    SAMPLED = "sampled"
    FILTERED = "filtered"
    FULL = "full"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each request draws its tokens.

    Attributes:
      temperature: float32[b], 0 for greedy.
      top_k: int32[b], candidates to keep; the vocabulary's size for all.
      top_p: float32[b], probability mass to keep, in (0, 1].
      min_p: float32[b], part of the best token's probability that a token must have,
        in [0, 1].
      seed: uint32[b].
      sample: uint32[b], number of the sample among those of one prompt and seed.
      rules: what else changes the scores; None where no request has any.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    sample: jax.Array
    rules: Rules | None = None


def draw(
    logits: jax.Array,
    mass: jax.Array | None,
    sampling: Sampling,
    position: jax.Array,
    history: History | None = None,
    share: Share | None = None,
    *,
    variant: Variant,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per request.

    A draw depends on the request's own logits, settings, history and position only,
    never on its batch-mates, nor on the variant that they make necessary.

    Args:
      logits: float32[b, v].
      mass: float32[b], their log-sum-exp over the whole vocabulary; None computes it.
      sampling: settings.
      position: int32[b], tokens before the drawn one.
      history: what has been read and written, for the rules.
      share: of one device of several whose logits are of its part of the vocabulary;
        None where they are of all of it.
      variant: the least of `polarjax.engine.checks.variant_of`, or more.

    Returns:
      Tokens int32[b], and their log-probabilities under the model itself (temperature
      1, no filter, no rule), float32[b]: `logits[token] - mass`.

    Raises:
      ValueError: if the rules are to be followed, and there are none, or no history.
    """
    filters = variant in (Variant.FILTERED, Variant.FULL)
    if filters and share:  # what passes is known of all logits alone
        logits, share = share.gather(logits), None
    scores = logits
    if variant is Variant.FULL:
        if sampling.rules is None or history is None:
            raise ValueError("the variant FULL needs rules and a history")
        scores = ruled(logits, sampling.rules, history, position)
    if variant is not Variant.GREEDY:
        warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        # As XLA divides a row by one number, but always.
        factor = 1 / jnp.maximum(warm, _COLDEST)
        drawn = rounded(scores * factor[:, None], position)
        if filters:
            drawn = filtered(drawn, sampling.top_k, sampling.top_p, sampling.min_p)
        # The noise belongs to the token: a filter that removes nothing changes no draw.
        drawn += noise(sampling, position, logits.shape[-1], share)
        scores = jnp.where(sampling.temperature[:, None] > 0, drawn, scores)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    best, chosen = (
        jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0] for x in (scores, logits)
    )
    own = jax.nn.logsumexp(logits, axis=-1) if mass is None else mass
    if share is not None:
        token += share.number() * logits.shape[-1]
        token, chosen, whole = _best_of_all(token, best, chosen, own, share)
        own = whole if mass is None else mass
    return token, chosen - own


def _best_of_all(
    token: jax.Array,
    best: jax.Array,
    chosen: jax.Array,
    mass: jax.Array,
    share: Share,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The token of the best score, its logit, and log-sum-exp, from each device's.

    Of equal scores, and of NaN, the first is the best, as on one device.
    """
    bits = (lax.bitcast_convert_type(x, jnp.int32) for x in (best, chosen, mass))
    said = share.gather(jnp.stack([token, *bits], axis=-1))  # one collective for all
    token, *bits = jnp.moveaxis(said.reshape(len(token), share.tp, -1), -1, 0)
    best, chosen, mass = (lax.bitcast_convert_type(x, jnp.float32) for x in bits)
    winner = jnp.argmax(best, axis=-1)[:, None]
    token, chosen = (
        jnp.take_along_axis(x, winner, axis=-1)[:, 0] for x in (token, chosen)
    )
    return token, chosen, jax.nn.logsumexp(mass, axis=-1)


def noise(
    sampling: Sampling, position: jax.Array, own: int, share: Share | None
) -> jax.Array:
    """What log-probabilities need added so that the best is one drawn by chance.

    Args:
      sampling: of each request.
      position: int32[b], tokens before the drawn one.
      own: tokens that the logits are of.
      share: of one device of several whose logits are of its part of the vocabulary.

    Returns:
      float32[b, own], by the Gumbel distribution.
    """

    def one(seed: jax.Array, sample: jax.Array, at: jax.Array) -> jax.Array:
        first = draw_key(seed)
        later = jax.random.fold_in(first, sample + jnp.uint32(_SAMPLES))
        key = jax.random.fold_in(jnp.where(sample > 0, later, first), at)
        # That of the whole vocabulary, so that a draw does not depend on the mesh.
        parts, part = (share.tp, share.number()) if share else (1, 0)
        whole = jax.random.gumbel(key, (own * parts,), jnp.float32)
        return whole.reshape(-1, own)[part]

    return jax.vmap(one)(sampling.seed, sampling.sample, position)
