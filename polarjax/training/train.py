"""Train every layer's routers at once, in passes over blocks of text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from polarjax.config import ModelConfig
from polarjax.mesh.cut import DP, mesh_of, place_routers
from polarjax.model import Decoder, Prefix, make_decoder
from polarjax.params import Params, Tree
from polarjax.planning.sizes import at_least, not_negative
from polarjax.policies import of_learned
from polarjax.policies.budgets import check_density, count
from polarjax.policies.routers import check_routers
from polarjax.policy import Dense, Learned
from polarjax.settings import default_numbers, draw_key
from polarjax.training.collect import observe_layers, top_labels
from polarjax.training.loop import (
    Progress,
    Resume,
    check_blocks,
    check_rates,
    check_steps,
    fit,
    warmup_cosine,
    with_steps,
)
from polarjax.training.losses import (
    HeadLoss,
    head_loss,
    kept_norm,
    recall,
    router_scores,
)
from polarjax.training.neurons import (
    active_neurons,
    init_low_rank,
    neuron_loss,
)


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """Settings of a training.

    Attributes:
      density: fraction of KV groups that the head routers shall pick from layer 1 on.
      steps: optimiser steps, one batch of text each; None for one pass.
      batch: blocks of text per step.
      loss: of the head routers: "bce", the paper's, or "ranking", which looks at the
        order across the budget alone, and at the norm that is lost. It keeps more of
        the norm; adaptive budgets need the scores of "bce".
      sparse: share of the sequences that are read as decoding reads them: dense up to
        a random position, from there on with the heads that the routers pick so far.
        The others are read dense.
      head_rank: of the head routers' quadratic form; 0 for linear ones, as the paper's.
      neuron_rank: of neuron routers, for ReLU models; 0 for none.
      learning_rate: its peak; it warms up over 5 % of the steps and decays to 0 by a
        cosine. The paper's 1e-4 is for 20 passes in batches of 64 tokens; on
        SmolLM2, one pass in batches of 512 was best near this.
      quadratic_learning_rate: of the head routers' quadratic form, likewise.
      neuron_learning_rate: of the neuron routers, likewise.
      weight_decay: of AdamW.
      seed: of the shuffling, the first neuron routers and the positions.
    """

    density: float
    steps: int | None = None
    batch: int = 1
    loss: HeadLoss = "bce"
    sparse: float = 0.0
    head_rank: int = 0
    neuron_rank: int = 0
    learning_rate: float = 2e-2
    quadratic_learning_rate: float = 8e-3
    neuron_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_steps(self.steps, self.batch)
        if self.loss not in get_args(HeadLoss):
            names = " and ".join(get_args(HeadLoss))
            raise ValueError(f"no loss {self.loss!r}: there are {names}")
        if not 0 <= self.sparse <= 1:
            raise ValueError(f"sparse must be from 0 to 1, got {self.sparse}")
        for name in ("head_rank", "neuron_rank", "seed"):
            at_least(name, getattr(self, name), 0)
        check_rates(self)
        not_negative("weight_decay", self.weight_decay)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, as the paper; with a learning rate for each kind of router."""

        def adamw(peak: float) -> optax.GradientTransformation:
            assert self.steps
            rate = warmup_cosine(peak, self.steps)
            return optax.adamw(rate, weight_decay=self.weight_decay)

        rates = {
            "heads": self.learning_rate,
            "quadratic": self.quadratic_learning_rate,
            "neurons": self.neuron_learning_rate,
        }

        def kind(path: Any, _: Any) -> str:
            quadratic = path[0].key == "heads" and path[1].key in ("down", "up")
            return "quadratic" if quadratic else path[0].key

        parts: dict[Any, Any] = {name: adamw(rate) for name, rate in rates.items()}
        return optax.multi_transform(
            parts, lambda tree: jax.tree_util.tree_map_with_path(kind, tree)
        )


@default_numbers
def train_routers(
    params: Params,
    blocks: np.ndarray,
    training: RouterTraining,
    *,
    resume: Resume | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[Params, int], bool] | None = None,
) -> Params:
    """Train routers on text, all layers at once, nothing stored.

    Labels are the budget's KV groups with the largest output norms of each token
    (paper section 4.2), and the neurons that its ReLU lets through (4.1). Each batch
    is one forward pass, in which every layer takes its routers' gradients and lets
    its activations go, and one AdamW step of all layers' routers, stacked.

    Args:
      params: the model, on one device or cut over a mesh, whose axis "dp" then cuts
        each batch; what is learned is the same. Its own routers are left out of
        account.
      blocks: int32[n, t] token ids.
      training: settings.
      resume: where the state is kept, and found after an interruption, on whichever
        mesh.
      progress: called after each step, with means over layers: "loss", "recall" at
        the budget, "kept" (share of the heads' norm), "neuron_loss".
      stop: called as stop(model so far, step from 1) after each; True ends it.

    Returns:
      The model, where it was, with the trained routers and uniform budgets.

    Raises:
      ValueError: if the density leaves nothing to choose, a setting does not fit the
        model, or the text is none of its tokens.
    """
    config, n = params.config, check_training(params.config, training)
    check_blocks(blocks, config)
    training = with_steps(training, len(blocks))
    budgets = (config.kv_heads, *(n,) * (config.layers - 1))
    # Nothing of other routers that the checkpoint may hold.
    params = dataclasses.replace(params, policy=Dense())
    mesh = mesh_of(params.weights)

    def model(routers: Tree) -> Params:
        placed = place_routers(unstack(routers, config.layers), config, mesh)
        policy = of_learned(Learned(placed, budgets))
        return dataclasses.replace(params, policy=policy)

    compiled = functools.partial(
        _train_step,
        params.weights,
        model=make_decoder(config.architecture, params.weights),
        kept=n,
        training=training,
    )
    routers = _first_routers(config, training)
    state = fit(
        lambda state, tokens, number: compiled(state, tokens, np.int32(number)),
        (routers, training.optimizer().init(routers)),
        blocks,
        steps=training.steps or 1,
        batch=training.batch,
        seed=training.seed,
        mesh=mesh,
        resume=resume,
        progress=progress,
        stop=None if stop is None else lambda state, done: stop(model(state[0]), done),
    )
    return model(state[0])


def check_training(config: ModelConfig, training: RouterTraining) -> int:
    """KV groups that the routers learn to choose.

    Args:
      config: of the model.
      training: settings.

    Raises:
      ValueError: if there is no choice, or the model takes no such routers.
    """
    n = count(training.density, config.kv_heads)
    if config.layers < 2 or (n == config.kv_heads and not training.neuron_rank):
        raise ValueError(
            f"density {training.density} keeps all {config.kv_heads} KV groups of each "
            "layer: there is nothing for a router to choose"
        )
    if training.neuron_rank and config.activation != "relu":
        raise ValueError(
            f"neuron routers are for ReLU MLPs, the model's is {config.activation}"
        )
    check_routers(router_shapes(config, training), {}, config)
    return n


def unstack(routers: Tree, layers: int) -> Tree:
    """Leaves [layers - 1, ...] to one tree for each layer from 1."""
    return {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i - 1], routers)
        for i in range(1, layers)
    }


def router_shapes(config: ModelConfig, training: RouterTraining) -> Tree:
    """Shapes of what a training makes, by layer.

    Args:
      config: of the model.
      training: settings.
    """
    return jax.eval_shape(
        lambda: unstack(_first_routers(config, training), config.layers)
    )


def _first_routers(config: ModelConfig, training: RouterTraining) -> Tree:
    shape = (config.layers - 1, config.kv_heads)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    routers: Tree = {
        "heads": {"weight": zeros((*shape, config.dim)), "bias": zeros(shape)}
    }
    keys = jax.random.split(draw_key(training.seed), config.layers - 1)

    def low_rank(rank: int, outputs: int) -> Tree:
        return jax.vmap(lambda key: init_low_rank(key, rank, config.dim, outputs))(keys)

    if training.head_rank:
        routers["heads"] |= low_rank(training.head_rank, config.kv_heads)
    if training.neuron_rank:
        routers["neurons"] = low_rank(training.neuron_rank, config.neurons)
    return routers


@functools.partial(
    jax.jit, static_argnames=("model", "kept", "training"), donate_argnums=(1,)
)
def _train_step(
    weights: Tree,
    state: tuple[Tree, optax.OptState],
    tokens: jax.Array,
    number: jax.Array,
    *,
    model: Decoder,
    kept: int,
    training: RouterTraining,
) -> tuple[tuple[Tree, optax.OptState], Mapping[str, jax.Array]]:
    routers, moments = state
    b, t = tokens.shape
    starts = None
    if training.sparse:
        key = jax.random.fold_in(draw_key(training.seed), number)
        chosen, place = jax.random.split(key)
        sparse = jax.random.uniform(chosen, (b,), jnp.float32) < training.sparse
        begun = jax.random.randint(place, (b,), 0, t, jnp.int32)
        starts = jnp.where(sparse, begun, t)
    gradients = functools.partial(_gradients, model=model, kept=kept, training=training)
    specs = model.share.weight_specs(weights), P(), P(DP), P(DP)
    grads, metrics = model.share.over(gradients, specs, P())(
        weights, routers, tokens, starts
    )
    updates, moments = training.optimizer().update(grads, moments, routers)
    return (optax.apply_updates(routers, updates), moments), metrics  # type: ignore


def _gradients(
    weights: Tree,
    routers: Tree,
    tokens: jax.Array,
    starts: jax.Array | None,
    *,
    model: Decoder,
    kept: int,
    training: RouterTraining,
) -> tuple[Tree, Mapping[str, jax.Array]]:
    """Of all layers' routers, stacked, and metrics; by one device, of the whole batch.

    Devices that share a model know the same of it, and learn the same.
    """
    n, config, share = kept, model.config, model.share
    mean = share.batch_mean

    def learn(layer: int, inputs: jax.Array, norms: jax.Array, after: jax.Array):
        labels = top_labels(norms, n)

        def loss(router: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
            scores = router_scores(router["heads"], inputs)
            total = head_loss(training.loss, scores, norms, n, mean=mean)
            found = {
                "loss": total,
                "recall": recall(scores, labels, n, mean),
                "kept": kept_norm(scores, norms, n, mean),
            }
            if training.neuron_rank:
                mlp = weights[f"layers_{layer}"]["mlp"]
                active = share.gather(active_neurons(mlp, after))
                found["neuron_loss"] = neuron_loss(
                    router["neurons"], inputs, active, mean
                )
                total = total + found["neuron_loss"]
            return total, found

        router = jax.tree.map(lambda x: x[layer - 1], routers)
        grads, found = jax.grad(loss, has_aux=True)(router)
        return grads, found

    budgets = (config.kv_heads, *(n,) * (config.layers - 1))
    learned = Learned(unstack(routers, config.layers), budgets)
    params = Params(weights, of_learned(learned), config)
    prefix = None if starts is None else Prefix(starts)
    found = observe_layers(model, params, tokens, learn, params.policy, prefix)
    grads, values = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
    return share.mean_of_parts(grads), jax.tree.map(jnp.mean, values)
