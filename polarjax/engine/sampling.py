"""From logits to the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from polarjax.mesh.share import Share
from polarjax.settings import draw_key

# Below this temperature nothing changes: float32 logits that differ at all differ by
# more, so that the best is drawn. But over a lower one they may be infinite, and no
# longer say which is the best.
_COLDEST = 1e-20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each request draws its tokens.

    Attributes:
      temperature: float32[b], 0 for greedy.
      top_k: int32[b], candidates to keep; the vocabulary's size for all.
      top_p: float32[b], probability mass to keep, in (0, 1].
      seed: uint32[b].
      greedy: whether every request is greedy: the step then only takes the maximum.
      filtered: whether any request uses top_k or top_p: only then it sorts, and
        devices that share a vocabulary send each other their logits.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})


def sample(
    logits: jax.Array,
    sampling: Sampling,
    position: jax.Array,
    share: Share | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per request.

    A draw depends on the request's own logits, seed and position only, never on its
    batch-mates. Filters apply as in `transformers`: temperature, then top-k, then
    top-p (the token that crosses the mass is kept).

    Args:
      logits: float32[b, v].
      sampling: settings.
      position: int32[b], tokens before the drawn one.
      share: of one device of several whose logits are of its part of the vocabulary;
        None where they are of all of it.

    Returns:
      Tokens int32[b], and their log-probabilities under the model itself (temperature
      1, no filter), float32[b].
    """
    if sampling.filtered and share:  # what passes is known of all logits alone
        logits, share = share.gather(logits), None
    scores = logits
    if not sampling.greedy:
        drawn = _scores(logits, sampling, position, share)
        scores = jnp.where(sampling.temperature[:, None] > 0, drawn, logits)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    best, chosen = (
        jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0] for x in (scores, logits)
    )
    mass = jax.nn.logsumexp(logits, axis=-1)
    if share is not None:
        token += share.number() * logits.shape[-1]
        token, chosen, mass = _best_of_all(token, best, chosen, mass, share)
    return token, chosen - mass


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


def _scores(
    logits: jax.Array, sampling: Sampling, position: jax.Array, share: Share | None
) -> jax.Array:
    """What is largest for the token that is drawn, [b, v]."""
    warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    scaled = logits / jnp.maximum(warm, _COLDEST)[:, None]
    if sampling.filtered:
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(ranked.shape[-1])
        ranked = jnp.where(rank < sampling.top_k[:, None], ranked, -jnp.inf)
        mass = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        # The sum of all may round to 1 before the last of them.
        whole = sampling.top_p[:, None] >= 1
        keep = (before < sampling.top_p[:, None]) | (rank == 0) | whole
        kept = jnp.where(keep, ranked, -jnp.inf)
        # Back to vocabulary order: the noise belongs to the token, so that a filter
        # which removes nothing changes no draw.
        inverse = jnp.argsort(order, axis=-1)
        scaled = jnp.take_along_axis(kept, inverse, axis=-1)

    def noise(seed: jax.Array, at: jax.Array) -> jax.Array:
        key, own = jax.random.fold_in(draw_key(seed), at), scaled.shape[-1]
        # That of the whole vocabulary, so that a draw does not depend on the mesh.
        parts, part = (share.tp, share.number()) if share else (1, 0)
        whole = jax.random.gumbel(key, (own * parts,), jnp.float32)
        return whole.reshape(-1, own)[part]

    return scaled + jax.vmap(noise)(sampling.seed, position)
