"""What a program reads of prompts, and what comes of it, on the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from polarjax.cache import Pieces, zeros
from polarjax.engine.packed import Packed, unpack
from polarjax.engine.places import GROUPS, ROWS, logits_cut
from polarjax.engine.plans import Piece
from polarjax.engine.programs import device_of
from polarjax.engine.request import Request
from polarjax.model import Decoder
from polarjax.params import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asks:
    """Pieces of prompts to be read; of a mesh each part has its own share.

    Attributes:
      tokens: int32[n], those of all pieces.
      pieces: r, whose they are; slots and starts are counted in the part.
      lasts: bool[r], whether a piece ends its prompt.
    """

    tokens: Any
    pieces: Pieces
    lasts: Any

    @classmethod
    def none(cls, tokens: int, pieces: int) -> Asks:
        """Nothing to read, as arrays of the host.

        Args:
          tokens: that there is room for, n.
          pieces: likewise, r.
        """
        none: Any = np.zeros((4, pieces), np.int32)
        return cls(np.zeros(tokens, np.int32), Pieces(*none), np.zeros(pieces, bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one program after the other reads; donated like `Slots`, and for its reason.

    Attributes:
      asks: what the next one reads, or the newest has read.
      logits: float32[r, v], after each piece.
      mass: float32[r], their log-sum-exp.
      x: [n, m], of the `Reading`.
      o: [n, h, d], likewise.
    """

    asks: Asks
    logits: jax.Array
    mass: jax.Array
    x: jax.Array
    o: jax.Array


def cut_chunk(model: Decoder) -> Any:
    """How a chunk lies on a model's mesh, a prefix of its tree."""
    rows: Any = ROWS
    return Chunk(rows, logits_cut(model.share), rows, rows, GROUPS)


def empty_chunk(model: Decoder, tokens: int, pieces: int, weights: Tree) -> Chunk:
    """One that has nothing to read.

    Args:
      model: that will read.
      tokens: that one program reads in each part of the batch, n.
      pieces: likewise, r.
      weights: the original ones, where the chunk shall be.
    """
    mesh, share, config = model.mesh, model.share, model.config
    n, r = share.dp * tokens, share.dp * pieces
    heads = share.tp * share.own.heads

    def place(spec: Any) -> Any:
        return None if mesh is None else NamedSharding(mesh, spec)

    cut: Any = cut_chunk(model)
    with jax.default_device(None if mesh else device_of(weights)):
        return Chunk(
            jax.device_put(Asks.none(n, r), place(ROWS)),
            zeros((r, config.vocab_size), jnp.float32, place(cut.logits)),
            zeros((r,), jnp.float32, place(ROWS)),
            zeros((n, config.dim), model.dtype, place(ROWS)),
            zeros((n, heads, config.head_dim), model.dtype, place(GROUPS)),
        )


@functools.partial(
    jax.jit, static_argnames=("model",), donate_argnames=("asks",), keep_unused=True
)
def ask(asks: Asks, packed: Packed, *, model: Decoder) -> Asks:
    """Say what is read next.

    Args:
      asks: of before, donated.
      packed: an `Asks` with a row of words for each part of the batch.
      model: that the batch is of.
    """

    def follow(asks: Asks, packed: Packed) -> Asks:
        return unpack(packed)

    return model.share.over(follow, (ROWS, ROWS), ROWS)(asks, packed)


def asks_of(
    reads: Sequence[Piece],
    requests: Mapping[int, Request],
    parts: int,
    each: int,
    tokens: int,
    pieces: int,
) -> tuple[Asks, list[Request | None]]:
    """What is read next, as arrays of the host.

    Args:
      reads: the pieces, of a plan.
      requests: whose each slot is.
      parts: of the batch.
      each: slots of each part.
      tokens: that one program reads in each part, n.
      pieces: likewise, r.

    Returns:
      The pieces, and whose first token is drawn after each; None for nobody's.
    """
    asks = Asks.none(parts * tokens, parts * pieces)
    here: Any = asks.pieces
    owners: list[Request | None] = [None] * (parts * pieces)
    used = [(0, 0)] * parts
    for piece in reads:
        part, own = divmod(piece.slot, each)
        i, start = used[part]
        used[part] = i + 1, start + piece.count
        at, request = part * pieces + i, requests[piece.slot]
        here.slots[at], here.starts[at] = own, start
        here.counts[at], here.firsts[at] = piece.count, piece.first
        asks.lasts[at] = piece.last
        new = request.prompt[piece.first : piece.first + piece.count]
        start += part * tokens
        asks.tokens[start : start + piece.count] = new
        if piece.last:
            owners[at] = request
    return asks, owners
