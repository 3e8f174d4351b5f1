"""Log-probabilities to tell: of a token, and of those that are more probable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from polarjax.engine.filters import ordered
from polarjax.engine.settings import MOST_ALTERNATIVES
from polarjax.mesh.share import Share


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """What is told beside one token of a text.

    Attributes:
      rank: of the token that stands there: how many are more probable, or are before it
        and as probable. That of the best is 0.
      ids: of the most probable tokens, as many as were asked for, the best first; of
        equal ones the lowest id.
      logprobs: natural log-probability of each.
    """

    rank: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alternatives:
    """What is told of some tokens, each row of its own place in a text.

    All is of the model itself: of its logits as they are, at temperature 1.

    Attributes:
      logprob: float32[n], of each token.
      rank: int32[n], the number of tokens that are more probable, and of those before
        it that are as probable.
      ids: int32[n, m], the most probable tokens, the best first; of equal ones the
        lowest id.
      logprobs: float32[n, m], of each of them.
    """

    logprob: jax.Array
    rank: jax.Array
    ids: jax.Array
    logprobs: jax.Array

    def top(self, row: int, most: int) -> TopTokens:
        """What is told of one row, once the arrays are the host's.

        Args:
          row: number of it.
          most: tokens to name.
        """
        return TopTokens(
            rank=int(self.rank[row]),
            ids=tuple(self.ids[row, :most].tolist()),
            logprobs=tuple(self.logprobs[row, :most].tolist()),
        )


def alternatives(
    logits: jax.Array,
    mass: jax.Array,
    token: jax.Array,
    share: Share | None = None,
) -> Alternatives:
    """What to tell of tokens that were drawn, or of a prompt's.

    The row of a token of the prompt is the logits after the token before it.

    Args:
      logits: float32[n, v].
      mass: float32[n], their log-sum-exp over the whole vocabulary.
      token: int32[n].
      share: of one device of several whose logits are of its part of the vocabulary;
        None where they are of all of it.

    Returns:
      Of 20 tokens, or of as many as there are.
    """
    logits = share.gather(logits) if share else logits
    n, v = logits.shape
    most = min(MOST_ALTERNATIVES, v)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    order, own = ordered(logits), ordered(chosen)
    earlier = jnp.arange(v) < token[:, None]
    better = (order > own) | ((order == own) & earlier)

    # The best, time and again, without those that were found: a sort of all of the
    # vocabulary takes longer. As integers, below any of which there is one more.
    def find(i: jax.Array, carry: tuple) -> tuple:
        left, ids = carry
        best = jnp.argmax(left, axis=-1).astype(jnp.int32)
        left = left.at[jnp.arange(n), best].set(0)
        return left, ids.at[:, i].set(best)

    ids = jnp.zeros((n, most), jnp.int32)
    _, ids = lax.fori_loop(0, most, find, (order, ids))
    return Alternatives(
        logprob=chosen[:, 0] - mass,
        rank=better.sum(axis=-1, dtype=jnp.int32),
        ids=ids,
        logprobs=jnp.take_along_axis(logits, ids, axis=-1) - mass[:, None],
    )
