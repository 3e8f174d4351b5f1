"""Text that the dense model writes itself, for users who have none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polarjax.engine.checks import Settings
from polarjax.engine.engine import Engine
from polarjax.engine.sampling import Variant
from polarjax.params import Params
from polarjax.policy import Dense


def write_blocks(
    params: Params,
    start: int,
    length: int,
    blocks: int,
    *,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sample texts from the dense model at temperature 1.

    Each begins with the token that starts a text, and goes on behind tokens that end
    one, as the model saw texts follow each other.

    Args:
      params: the model.
      start: the token.
      length: tokens per block, t; at most the model's context.
      blocks: how many.
      batch: sampled together.
      seed: of the draws; block i depends on it, i and the model alone.
      progress: called as progress(blocks done, blocks in all).

    Returns:
      int32[blocks, t].

    Raises:
      ValueError: if the length is not from 2 to the context, or a count is not
        positive.
    """
    config = params.config
    if blocks < 1 or batch < 1:
        raise ValueError(f"blocks and batch must be at least 1, got {blocks}, {batch}")
    if not 2 <= length <= config.context:
        raise ValueError(
            f"blocks of {length} tokens: the model writes from 2 to {config.context}"
        )
    engine = Engine(
        params,
        policy=Dense(),
        slots=min(batch, blocks),
        context=length,
        densities=False,
        variants=(Variant.SAMPLED,),
        logprobs=False,
        prompt_logprobs=False,
        max_waiting=blocks,
    )
    with engine:
        requests = [
            engine.add(
                [start],
                Settings(
                    max_new_tokens=length - 1,
                    temperature=1.0,
                    seed=(seed * 1_000_003 + i) % 2**32,
                    stop_ids=(),
                ),
            )
            for i in range(blocks)
        ]
        done = 0
        while not engine.idle:
            engine.step()
            before, done = done, sum(not request.going for request in requests)
            if progress and done > before:
                progress(done, blocks)
    found = [[start, *request.tokens] for request in requests]
    return np.array(found, np.int32)
