"""What a request asks for that changes its scores: biases, bans and penalties."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.config import ModelConfig
from polarjax.engine.rounding import rounded
from polarjax.engine.settings import MOST_BIASES, Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How the scores of each request are changed before anything is drawn.

    Attributes:
      bias_ids: int32[b, 300], tokens whose logits get something added; -1 for none.
      bias: float32[b, 300], what they get.
      allowed: uint32[b, ceil(v / 32)], one bit for each token, the lowest first: 1
        where it may be drawn.
      min_tokens: int32[b], tokens before which none of `ends` may be drawn.
      ends: int32[b, e], tokens that end each request; -1 for none.
      repetition: float32[b], what the logits of tokens of prompt and output are divided
        by where they are positive, and multiplied by where not; 1 for nothing.
      presence: float32[b], what is taken from the logits of tokens of the output.
      frequency: float32[b], as much once more for each time they occur there.
    """

    bias_ids: jax.Array
    bias: jax.Array
    allowed: jax.Array
    min_tokens: jax.Array
    ends: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array

    @classmethod
    def nothing(cls) -> Any:
        """One number for each array, of requests that ask for nothing."""
        everything: Any = np.uint32(2**32 - 1)
        none: Any = -1
        return cls(none, 0.0, everything, 0, none, 1.0, 0.0, 0.0)  # type: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What each request has read and written.

    Attributes:
      tokens: int32[b, context], of the prompt and of the output behind it; what lies
        behind those that there are is not looked at.
      prompt: int32[b], how many are of the prompt.
    """

    tokens: jax.Array
    prompt: jax.Array

    @classmethod
    def empty(cls, batch: int, context: int) -> Any:
        """Of requests that have read nothing, as arrays of the host.

        Args:
          batch: requests, b.
          context: tokens that there is room for.
        """
        tokens, prompt = np.zeros((batch, context), np.int32), np.zeros(batch, np.int32)
        return cls(tokens, prompt)  # type: ignore[arg-type]

    def add(self, token: jax.Array, position: jax.Array, live: jax.Array) -> History:
        """With one more token of each live request.

        Args:
          token: int32[b].
          position: int32[b], tokens before it; where there is no room, none is added.
          live: bool[b].
        """
        to = jnp.where(live, position, self.tokens.shape[1])
        tokens = self.tokens.at[jnp.arange(len(to)), to].set(token, mode="drop")
        return dataclasses.replace(self, tokens=tokens)


def ruled(
    logits: jax.Array, rules: Rules, history: History, position: jax.Array
) -> jax.Array:
    """Logits as the rules change them.

    First biases, then bans (tokens that are not allowed, and ends before their time),
    then the penalties: of repetition, of frequency, of presence.

    Args:
      logits: float32[b, v].
      rules: of each request.
      history: of each request.
      position: int32[b], tokens before the one to be drawn.

    Returns:
      float32[b, v], -inf for what must not be drawn; bit for bit the logits where a
      request asks for nothing: all is exact of factors of 1 and of nothing to add.
    """
    b, v = logits.shape
    rows = jnp.arange(b)[:, None]
    # Those that are none go out of range, each to a place of its own.
    width = jnp.arange(rules.bias_ids.shape[1])
    ids = jnp.where(rules.bias_ids < 0, v + width, rules.bias_ids)
    biased = jnp.take_along_axis(logits, jnp.minimum(ids, v - 1), axis=1) + rules.bias
    scores = logits.at[rows, ids].set(biased, mode="drop", unique_indices=True)

    bits = rules.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    scores = jnp.where(bits.reshape(b, -1)[:, :v] > 0, scores, -jnp.inf)
    early = (position - history.prompt < rules.min_tokens)[:, None]
    ends = jnp.where(early & (rules.ends >= 0), rules.ends, v)
    scores = scores.at[rows, ends].set(-jnp.inf, mode="drop")

    place = jnp.arange(history.tokens.shape[1])
    own = place < history.prompt[:, None]
    there = place < position[:, None]
    seen = jnp.zeros((b, v), bool)
    seen = seen.at[rows, jnp.where(there, history.tokens, v)].set(True, mode="drop")
    # Integers, so that the order in which they are counted is all the same.
    counts = jnp.zeros((b, v), jnp.int32)
    written = jnp.where(there & ~own, history.tokens, v)
    counts = counts.at[rows, written].add(1, mode="drop")

    factor = jnp.where(seen, rules.repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / factor, scores * factor)
    scores = rounded(scores, position)
    times = counts.astype(jnp.float32)
    scores -= rounded(rules.frequency[:, None] * times, position)
    return scores - jnp.where(counts > 0, rules.presence[:, None], 0.0)


def make_rules(
    config: ModelConfig, requests: Sequence[Settings], ends: np.ndarray
) -> Rules:
    """The rules of some requests, as arrays of the host.

    Args:
      config: what the model is.
      requests: settings of each, checked.
      ends: int32[b, e], tokens that end each, filled up with -1.
    """
    b, v = len(requests), config.vocab_size
    bias_ids = np.full((b, MOST_BIASES), -1, np.int32)
    bias = np.zeros((b, MOST_BIASES), np.float32)
    allowed = np.full((b, -(-v // 32)), 2**32 - 1, np.uint32)
    for i, one in enumerate(requests):
        for j, (token, value) in enumerate((one.logit_bias or {}).items()):
            bias_ids[i, j], bias[i, j] = token, value
        if one.allowed_token_ids is not None:
            chosen = np.zeros(32 * allowed.shape[1], bool)
            chosen[list(one.allowed_token_ids)] = True
            # Bytes, and the bits in them, from the lowest: words of "<u4" then.
            packed = np.packbits(chosen, bitorder="little")
            allowed[i] = packed.view("<u4")

    def numbers(name: str, dtype: type) -> Any:
        return np.array([getattr(one, name) for one in requests], dtype)

    given: Any = bias_ids, bias, allowed
    return Rules(
        *given,
        min_tokens=numbers("min_tokens", np.int32),
        ends=ends,  # type: ignore[arg-type]
        repetition=numbers("repetition_penalty", np.float32),
        presence=numbers("presence_penalty", np.float32),
        frequency=numbers("frequency_penalty", np.float32),
    )
