"""Prefill: prompts, read into rows of a batch's cache by calls of few shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.cache import PagedCache
from polarjax.config import ModelConfig
from polarjax.engine.places import CACHE, ROWS, insert_all
from polarjax.engine.programs import device_of, empty_state
from polarjax.model import BLOCK_TOKENS, Decoder, extend
from polarjax.planning.blocks import plan_blocks, rows_of
from polarjax.planning.sizes import bucket
from polarjax.policy import Tree
from polarjax.settings import default_numbers


@functools.partial(
    jax.jit,
    static_argnames=("model", "prefill_tokens"),
    donate_argnames=("cache", "logits"),
    # A GPU's libraries are as fast for products of so many tokens as what XLA would
    # write itself, and to try all of that takes half of the time to compile.
    compiler_options={"xla_gpu_enable_triton_gemm": False},
)
def prefill(
    weights: Tree,
    tokens: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    cache: PagedCache,
    logits: jax.Array,
    *,
    model: Decoder,
    prefill_tokens: int,
) -> tuple[PagedCache, jax.Array]:
    """Read some prompts of a batch, dense.

    Args:
      weights: the original ones.
      tokens: int32[r, t].
      lengths: int32[r].
      rows: int32[r], the places of the prompts in the batch; distinct numbers from b
        on for rows that are none. On a mesh rows and places are each of a device's
        part of the batch, one part behind the other.
      cache: donated: it is updated in place.
      logits: float32[b, v], after each prompt's last token; donated.
      model: without score rows, as the weights.
      prefill_tokens: tokens computed at once, attention apart.

    Returns:
      The cache and the logits, the rows filled in.
    """
    share = model.share

    def read(weights: Tree, tokens, lengths, rows, cache: PagedCache, logits):
        view = cache.of_rows(rows)
        last, view, _ = extend(
            model,
            weights,
            tokens,
            lengths,
            view,
            prefill_tokens=prefill_tokens,
            fresh=True,
        )
        last = share.gather_logits(last)
        logits = logits.at[rows].set(last, mode="drop", unique_indices=True)
        return view.back_in(cache), logits

    args = weights, tokens, lengths, rows, cache, logits
    each = ROWS, ROWS, ROWS, CACHE, ROWS
    specs = share.weight_specs(weights), *each
    return share.over(read, specs, (CACHE, ROWS))(*args)


def prefill_shapes(
    slots: int, longest: int, config: ModelConfig, prefill_tokens: int, dp: int = 1
) -> list[tuple[int, int]]:
    """Rows and width of every call of `prefill` that an engine may need.

    Args:
      slots: requests that there is room for.
      longest: most tokens of a prompt.
      config: what the model is.
      prefill_tokens: tokens that are computed at once.
      dp: parts of the batch.
    """
    widths, width = [], bucket(1)
    while not widths or widths[-1] < min(longest, config.context):
        widths.append(min(width, config.context))
        width *= 2
    return [(dp * rows_of(slots // dp, each, prefill_tokens), each) for each in widths]


def compile_shapes(
    shapes: Sequence[tuple[int, int]],
    weights: Tree,
    cache: PagedCache,
    logits: jax.Array,
    **options: Any,
) -> None:
    """Compile `prefill` for several shapes, all at a time.

    Args:
      shapes: rows and width of each call, of `prefill_shapes`.
      weights: the original ones.
      cache: of the batch.
      logits: float32[b, v].
      **options: the static arguments of `prefill`.
    """

    @default_numbers
    def compile_one(shape: tuple[int, int]) -> None:
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        rows = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        lowered = prefill.lower(weights, tokens, rows, rows, cache, logits, **options)
        lowered.compile()

    with ThreadPoolExecutor(len(shapes)) as pool:
        list(pool.map(compile_one, shapes))


def run_plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled program, as `read_prompts` does by itself."""
    return function(*args, **kwargs)


def read_prompts(
    weights: Tree,
    prompts: Mapping[int, Sequence[int]],
    cache: PagedCache,
    logits: jax.Array,
    *,
    model: Decoder,
    prefill_tokens: int = BLOCK_TOKENS,
    call: Callable[..., Any] = run_plainly,
) -> tuple[PagedCache, jax.Array]:
    """Read prompts into rows of a cache, dense.

    Args:
      weights: the original ones.
      prompts: token ids by row, at least one each, fewer than the cache has room for.
      cache: of the batch; donated.
      logits: float32[b, v], after each row's prompt; donated.
      model: without score rows, as the weights.
      prefill_tokens: tokens that are computed at once, see `plan_blocks`.
      call: runs each compiled program, as call(function, *args, **kwargs).

    Returns:
      The cache and the logits, the rows filled in.
    """
    slots, dp = len(logits), model.share.dp
    each, places = slots // dp, sorted(prompts)
    lengths = [len(prompts[row]) for row in places]
    parts = [row // each for row in places]
    for block in plan_blocks(
        lengths, each, model.config.context, prefill_tokens, dp, parts
    ):
        tokens = np.zeros((dp, block.rows, block.width), np.int32)
        counts = np.ones((dp, block.rows), np.int32)
        rows = np.empty((dp, block.rows), np.int32)
        rows[:] = each + np.arange(block.rows, dtype=np.int32)
        filled = [0] * dp
        for number in block.prompts:
            part, place = divmod(places[number], each)
            i, ids = filled[part], prompts[places[number]]
            filled[part] += 1
            rows[part, i] = place
            tokens[part, i, : len(ids)] = ids
            counts[part, i] = len(ids)
        count, to = dp * block.rows, rows.reshape(-1)
        read = functools.partial(
            call,
            prefill,
            weights,
            tokens.reshape(count, -1),
            counts.reshape(-1),
            model=model,
            prefill_tokens=prefill_tokens,
        )
        if device_of(weights).platform == "gpu":
            cache, logits = read(to, cache, logits)
            continue
        # Into a cache of its own size, so that neither the batch nor its capacity is a
        # part of the large program. A GPU would wait for the copy, measurably.
        own = np.tile(np.arange(block.rows, dtype=np.int32), dp)
        state, room = empty_state(model, count, block.width, weights)
        part, last = read(own, state.cache, room)
        cache, logits = insert_all(model, cache, logits, part, last, to, call)
    return cache, logits
