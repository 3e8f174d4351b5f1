"""From logits to the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


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
      filtered: whether any request uses top_k or top_p: only then it sorts.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})


def sample(
    logits: jax.Array, sampling: Sampling, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per request.

    A draw depends on the request's own logits, seed and position only, never on its
    batch-mates. Filters apply as in `transformers`: temperature, then top-k, then
    top-p (the token that crosses the mass is kept).

    Args:
      logits: float32[b, v].
      sampling: settings.
      position: int32[b], tokens before the drawn one.

    Returns:
      Tokens int32[b], and their log-probabilities under the model itself (temperature
      1, no filter), float32[b].
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = best
    if not sampling.greedy:
        drawn = _draw(logits, sampling, position)
        token = jnp.where(sampling.temperature > 0, drawn, best)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    scaled = logits / warm[:, None]
    if sampling.filtered:
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(ranked.shape[-1])
        ranked = jnp.where(rank < sampling.top_k[:, None], ranked, -jnp.inf)
        mass = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        keep = (before < sampling.top_p[:, None]) | (rank == 0)
        kept = jnp.where(keep, ranked, -jnp.inf)
        # Back to vocabulary order: the noise belongs to the token, so that a filter
        # which removes nothing changes no draw.
        inverse = jnp.argsort(order, axis=-1)
        scaled = jnp.take_along_axis(kept, inverse, axis=-1)

    def noise(seed: jax.Array, at: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), at)
        return jax.random.gumbel(key, scaled.shape[-1:])

    return jnp.argmax(
        scaled + jax.vmap(noise)(sampling.seed, position), axis=-1
    ).astype(jnp.int32)
