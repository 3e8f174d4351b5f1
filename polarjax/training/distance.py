"""How far a sparse model's next-token odds are from those of the dense model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from polarjax.model import (
    Decoder,
    Gates,
    Observe,
    Prefix,
    logits,
    make_decoder,
    whole,
)
from polarjax.params import Params, Tree
from polarjax.policies import of_learned
from polarjax.policy import Learned

# Positions of which the logits are in memory at once, each 8 bytes a word.
_POSITIONS = 4096


def divergence(params: Params, blocks: np.ndarray, batch: int = 4) -> float:
    """Mean KL divergence of the sparse model from the dense one, nats a token.

    Every position is sparse, as in mode "mask"; MLP neurons are all read.

    Args:
      params: the model with routers and budgets.
      blocks: int32[n, t] token ids; what does not fill a batch is left out.
      batch: blocks computed together.

    Raises:
      ValueError: if there is not one batch.
    """
    batch = min(batch, len(blocks))
    if not batch:
        raise ValueError("there is no text to measure the divergence on")
    model = make_decoder(params.config.architecture, params.weights)
    found = [
        float(
            _divergence(
                params.weights,
                params.routers,
                jnp.asarray(blocks[i : i + batch]),
                model=model,
                budgets=params.policy.learned.budgets,
            )
        )
        for i in range(0, len(blocks) - batch + 1, batch)
    ]
    return float(np.mean(found))


@functools.partial(jax.jit, static_argnames=("model", "budgets"))
def _divergence(
    weights: Tree,
    routers: Tree,
    tokens: jax.Array,
    *,
    model: Decoder,
    budgets: tuple[float, ...],
) -> jax.Array:
    def measure(weights: Tree, routers: Tree, tokens: jax.Array) -> jax.Array:
        starts = jnp.zeros(len(tokens), jnp.int32)
        policy = of_learned(Learned(routers, budgets))
        params = Params(weights, policy, model.config)
        return distance(model, params, tokens, starts)[0]

    share = model.share
    cut = share.weight_specs(weights), share.router_specs(routers)
    specs = *cut, share.batch_spec(len(tokens))
    return share.over(measure, specs, P())(weights, routers, tokens)


def distance(
    model: Decoder,
    params: Params,
    tokens: jax.Array,
    starts: jax.Array,
    gates: Gates | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> tuple[jax.Array, list[Any]]:
    """Mean KL divergence of the sparse model from the dense one, float32[], nats.

    Args:
      model: without score rows.
      params: the model's, with routers and budgets; differentiable in its routers. On a
        mesh, in `Share.over`, its weights and their updates as one device has them.
      tokens: int32[b, t].
      starts: int32[b], tokens that the dense model reads as a prompt; what it leaves
        in the KV cache is what the sparse one sees. They are not counted.
      gates: what each group's output counts; None for 1 where it is read, else 0.
      observe: called in each layer of the sparse model, with head outputs before they
        are masked.
      remat: whether to compute each layer again in the backward pass.

    Returns:
      The divergence, and what `observe` returned, by layer.
    """
    b, t = tokens.shape
    right = jax.lax.stop_gradient(whole(model, params.weights, tokens))
    weights, policy = params.policy.asking(("groups",)).bind(params)
    made = whole(
        model.learning(policy.wants.scores),
        weights,
        tokens,
        policy=policy,
        prefix=Prefix(starts, right.keys, right.values),
        gates=gates,
        observe=observe,
        remat=remat,
    )
    teacher, student, seen = right.x, made.x, made.observed
    size = max(1, min(t, _POSITIONS // b))
    while t % size:
        size -= 1

    def chunks(x: jax.Array) -> jax.Array:  # [b, t, ...] -> [t / size, b, size, ...]
        return x.reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def part(states: tuple[jax.Array, ...]) -> jax.Array:
        right, found, counted = states
        # Both heads are the same: recovery leaves embedding and last norm alone.
        p, q = (
            jax.nn.log_softmax(logits(model, params.weights, x)) for x in (right, found)
        )
        return ((jnp.exp(p) * (p - q)).sum(axis=-1) * counted).sum()

    counted = (jnp.arange(t) >= starts[:, None]).astype(jnp.float32)
    total = jax.lax.map(part, tuple(map(chunks, (teacher, student, counted)))).sum()
    total, count = map(model.share.add_up_batch, (total, counted.sum()))
    return total / count, seen
