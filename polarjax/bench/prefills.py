"""Prompts, read by the compiled programs that an engine reads them with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax import Params
from polarjax.bench.steps import shuffled_pages, with_table
from polarjax.cache import Pieces
from polarjax.engine import places, steps
from polarjax.engine.chunk import Asks, ask, empty_chunk
from polarjax.engine.packed import pack
from polarjax.engine.sampling import Variant
from polarjax.engine.slots import empty_slots
from polarjax.model import make_decoder
from polarjax.planning.memory import PAGE


def make_prefill(
    params: Params,
    prompts: int,
    tokens: int,
    at_once: int,
    implementation: Implementation | None = None,
) -> Callable[[Callable[..., Any]], None]:
    """A function that reads prompts, draws the first token of each, and waits.

    It sends what an engine sends, but for edits of slots. Its argument calls the
    compiled functions in between: it gets one with its own arguments.

    Args:
      params: the model.
      prompts: b.
      tokens: of each.
      at_once: tokens that one program reads, in each part of the batch.
      implementation: of the kernels.
    """
    config, weights = params.config, params.weights
    model = make_decoder(config.architecture, weights, implementation=implementation)
    parts = model.share.dp
    each = prompts // parts
    table = shuffled_pages(prompts, tokens, parts)
    pages = int(table.max()) + 1
    slots = empty_slots(model, prompts, tokens, pages, PAGE, weights)
    slots = with_table(slots, table)
    ids = jax.random.randint(jax.random.key(3), (prompts, tokens), 0, config.vocab_size)
    padding = (0, 0), (0, -each * tokens % at_once)
    ids = np.pad(np.asarray(ids, np.int32).reshape(parts, -1), padding)
    lengths = jnp.full(each, tokens, jnp.int32)
    chunk = empty_chunk(model, at_once, each, weights)
    calls = []
    for first in range(0, ids.shape[1], at_once):
        pieces = Pieces.among(lengths, first, at_once)
        lasts = (pieces.counts > 0) & (pieces.firsts + pieces.counts == tokens)
        pieces, lasts = jax.tree.map(
            lambda x: np.tile(np.asarray(x), parts), (pieces, lasts)
        )
        some = ids[:, first : first + at_once].reshape(-1)
        asks = pack(Asks(some, pieces, lasts), parts)
        calls.append(places.place_rows(asks, model.mesh))

    def read(call: Callable[..., Any]) -> None:
        nonlocal chunk, slots
        told, static = None, {"model": model}
        for packed in calls:
            asks = call(ask, chunk.asks, packed, **static)
            chunk = dataclasses.replace(chunk, asks=asks)
            chunk, slots = call(steps.read_pieces, weights, chunk, slots, **static)
            after = chunk.asks, chunk.logits, chunk.mass
            slots, told = call(
                steps.begin, slots, *after, variant=Variant.GREEDY, **static
            )
        jax.block_until_ready((slots.token, told))

    return read
