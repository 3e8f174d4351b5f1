"""Text that the dense model writes itself, for users who have none."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from polarjax.engine import programs
from polarjax.engine.checks import make_sampling
from polarjax.mesh.cut import DP, axis_size, mesh_of
from polarjax.mesh.processes import to_host
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
    mesh = mesh_of(params.weights)
    batch = min(batch, blocks)
    batch += -batch % axis_size(mesh, DP)
    common = {"config": config.architecture, "implementation": None}
    ones = jnp.ones(batch, jnp.int32)
    weights, dense = Dense().bind(params, batch)
    never = jnp.array([-1], jnp.int32)
    found = []
    for at in range(0, blocks, batch):
        seeds = [(seed * 1_000_003 + at + i) % 2**32 for i in range(batch)]
        sampling = make_sampling(config, batch, 1.0, 0, 1.0, seeds)
        state, first = programs.read_prompts(
            *(weights, [[start]] * batch, ones * length, sampling, never),
            capacity=-(-length // 128) * 128,
            **common,
        )
        rows = [np.full(batch, start), to_host(first.token)]
        if length > 2:
            state, drawn = programs.decode_chunk(
                *(weights, dense, state, ones > 0, sampling, never),
                steps=length - 2,
                mesh=mesh,
                **common,
            )
            rows += [*to_host(drawn.token)]
        found.append(np.stack(rows, axis=1))
        if progress:
            progress(min(blocks, at + batch), blocks)
    return np.concatenate(found)[:blocks].astype(np.int32)
