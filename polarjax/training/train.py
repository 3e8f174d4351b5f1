"""Train every layer's head router in one pass over a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polarjax.config import ModelConfig
from polarjax.params import Params, Tree
from polarjax.sparsity.select import check_density, count
from polarjax.training.collect import observe_heads, top_labels
from polarjax.training.losses import recall, router_scores, weighted_bce


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """Settings of a training pass.

    Attributes:
      density: fraction of KV groups that the routers shall pick from layer 1 on.
      steps: optimiser steps, one batch of text each.
      learning_rate: its peak; it warms up over 5 % of the steps and decays to 0 by a
        cosine. The paper's 1e-4 is for 20 passes in batches of 64 tokens; on
        SmolLM2, one pass in batches of 512 was best near this.
      weight_decay: of AdamW.
    """

    density: float
    steps: int
    learning_rate: float = 2e-2
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, as the paper."""
        schedule = optax.warmup_cosine_decay_schedule(
            *(0.0, self.learning_rate, max(1, self.steps // 20), self.steps + 1)
        )
        return optax.adamw(schedule, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Progress:
    """After one step: its number from 1, and means over layers.

    Attributes:
      step: from 1.
      loss: of this batch, before the update.
      recall: of this batch at the budget, before the update.
    """

    step: int
    loss: float
    recall: float


def train_routers(
    params: Params,
    batches: Iterable[np.ndarray],
    training: RouterTraining,
    progress: Callable[[Progress], None] | None = None,
) -> Params:
    """Train head routers on text, all layers at once, one online pass.

    Labels are the budget's KV groups with the largest output norms of each token
    (paper section 4.2). Each batch is one dense forward pass, in which every layer
    takes its router's gradient and lets its activations go, and one AdamW step of
    all layers' routers, stacked.

    Args:
      params: the model; its own routers are left out of account.
      batches: int32[b, t] token ids, all of one shape; `training.steps` of them.
      training: settings.
      progress: called after each step.

    Returns:
      The model with the trained routers and uniform budgets.

    Raises:
      ValueError: if the density leaves nothing to choose, or the text ends early.
    """
    config = params.config
    n = count(training.density, config.kv_heads)
    if n == config.kv_heads or config.layers < 2:
        raise ValueError(
            f"density {training.density} keeps all {config.kv_heads} KV groups of each "
            "layer: there is nothing for a router to choose"
        )
    shape = (config.layers - 1, config.kv_heads)
    routers = {
        "weight": jnp.zeros((*shape, config.dim)),
        "bias": jnp.zeros(shape),
    }
    state = training.optimizer().init(routers)
    done = 0
    for tokens in _take(batches, training.steps):
        routers, state, loss, found = _train_step(
            *(routers, state, params.weights, jnp.asarray(tokens, jnp.int32)),
            config=config.architecture,
            training=training,
            n=n,
        )
        done += 1
        if progress:
            progress(Progress(done, float(loss.mean()), float(found.mean())))
    if done < training.steps:
        raise ValueError(f"the text ended after {done} of {training.steps} batches")
    tree = {
        f"layers_{i + 1}": {"heads": jax.tree.map(lambda x, i=i: x[i], routers)}
        for i in range(config.layers - 1)
    }
    budgets = (config.kv_heads, *(n,) * (config.layers - 1))
    return Params(params.weights, tree, dataclasses.replace(config, budgets=budgets))


def _take(batches: Iterable[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    for _, batch in zip(range(limit), batches, strict=False):
        yield batch


@functools.partial(
    jax.jit, static_argnames=("config", "training", "n"), donate_argnums=(0, 1)
)
def _train_step(
    routers: Tree,
    state: optax.OptState,
    weights: Tree,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    training: RouterTraining,
    n: int,
) -> tuple[Tree, optax.OptState, jax.Array, jax.Array]:
    def learn(layer: int, inputs: jax.Array, norms: jax.Array):
        labels = top_labels(norms, n)

        def loss(router: Tree) -> tuple[jax.Array, jax.Array]:
            scores = router_scores(router, inputs)
            return weighted_bce(scores, labels), recall(scores, labels, n)

        router = jax.tree.map(lambda x: x[layer - 1], routers)
        return jax.value_and_grad(loss, has_aux=True)(router)

    found = observe_heads(weights, tokens, learn, config=config)
    values, grads = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
    updates, state = training.optimizer().update(grads, state, routers)
    return optax.apply_updates(routers, updates), state, *values  # type: ignore
