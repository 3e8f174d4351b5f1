"""Distil the dense model into its sparse self: small updates of its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from polarjax.config import ModelConfig
from polarjax.mesh.cut import (
    DP,
    mesh_of,
    model_shapes,
    order_updates,
    place_routers,
    whole_routers,
)
from polarjax.model import Decoder, Gates, Observe, make_decoder
from polarjax.model.attention import head_norms
from polarjax.params import Params, Tree, taught
from polarjax.planning.sizes import at_least
from polarjax.policies import of_learned
from polarjax.policies.updates import init_updates, ranks_of
from polarjax.policy import Learned
from polarjax.settings import default_numbers, draw_key
from polarjax.training.distance import distance
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
from polarjax.training.losses import HeadLoss, head_loss, router_scores

State = tuple[Tree, optax.OptState]
Routers = Literal[HeadLoss, "slopes", "nothing"]


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Settings of a recovery.

    Attributes:
      steps: optimiser steps, one batch of text each; None for one pass.
      batch: blocks of text per step.
      rank: of the updates of each layer's matrices; None for updates at full rank.
      prompts: share of the sequences that begin with a prompt of random length, which
        the dense model reads, as decoding has it. The others are sparse throughout.
      learning_rate: peak of the updates', see `optimizer`; 5 % warm-up, then a cosine
        to 0. At full rank a tenth of the default is right.
      routers: what they learn meanwhile: to find the heads of the largest norm, as
        before, by either loss of `RouterTraining`; "slopes", what the divergence says
        of their choice, straight through it; or "nothing".
      router_learning_rate: of the routers.
      remat: whether to compute each layer again in the backward pass and so to keep
        a layer's input alone in memory.
      seed: of the first updates, the shuffling and the prompts.
    """

    steps: int | None = None
    batch: int = 16
    rank: int | None = 8
    prompts: float = 0.5
    learning_rate: float = 1e-3
    routers: Routers = "bce"
    router_learning_rate: float = 1e-3
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps(self.steps, self.batch)
        if not 0 <= self.prompts <= 1:
            raise ValueError(f"prompts must be from 0 to 1, got {self.prompts}")
        if self.routers not in get_args(Routers):
            names = ", ".join(get_args(Routers))
            raise ValueError(f"routers cannot learn {self.routers!r}: it is {names}")
        at_least("seed", self.seed, 0)
        check_rates(self)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam, gradients clipped to norm 1.

        Of a low-rank update b a, which begins at b = 0, b learns 16 times faster than a
        (LoRA+, arXiv 2402.12354): a rate that moves b makes a, and so the whole, blow
        up. Vectors learn as a does.
        """

        def adam(peak: float) -> optax.GradientTransformation:
            assert self.steps
            rate = warmup_cosine(peak, self.steps)
            clip = optax.clip_by_global_norm(1.0)  # each kind by its own norm
            return optax.chain(clip, optax.adam(rate, b2=0.95))

        def kind(path: Any, _: jax.Array) -> str:
            names = [key.key for key in path]
            if names[1] != "updates":
                return names[1]
            fast = names[-1] == "b" or self.rank is None
            return "fast" if fast else "slow"

        rates: dict[Any, Any] = {
            "fast": adam(self.learning_rate),
            "slow": adam(self.learning_rate / 16),
            "heads": adam(self.router_learning_rate)
            if self.routers != "nothing"
            else optax.set_to_zero(),
            # Which neurons the batch shares has no gradient.
            "neurons": optax.set_to_zero(),
        }
        kinds = functools.partial(jax.tree_util.tree_map_with_path, kind)
        return optax.multi_transform(rates, kinds)


@default_numbers
def train_updates(
    params: Params,
    blocks: np.ndarray,
    recovery: Recovery,
    *,
    resume: Resume | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[Params, int], bool] | None = None,
) -> Params:
    """Train updates, and routers along, to give the dense model's next-token odds.

    The loss is the KL divergence from the dense model's distribution to that of the
    sparse one, with the heads masked as they will be. What `Dense()` reads stays as it
    is: the updates are the sparse policy's, float32, and merged as `bind` merges them.

    Args:
      params: the model with routers and budgets, on one device or cut over a mesh,
        whose axis "dp" then cuts each batch. What is learned is the same.
      blocks: int32[n, t] token ids.
      recovery: settings.
      resume: where the state is kept, and found after an interruption, on whichever
        mesh.
      progress: called after each step, with the "kl" in nats and the routers' "loss".
      stop: called as stop(model so far, step from 1) after each; True ends it.

    Returns:
      The model, where it was, with updates and routers.

    Raises:
      ValueError: if it has no routers, the text is none of its tokens, or a setting is
        out of range.
    """
    config = params.config
    check_model(params, recovery)
    check_blocks(blocks, config)
    recovery = with_steps(recovery, len(blocks))
    mesh = mesh_of(params.weights)
    trained = _first_updates(params, recovery)
    # Neurons are all read meanwhile: which ones a batch shares depends on its size.
    gradients = functools.partial(
        _gradients,
        params.weights,
        model=make_decoder(config.architecture, params.weights),
        budgets=params.policy.learned.budgets,
        prompts=recovery.prompts,
        routers=recovery.routers,
        remat=recovery.remat,
    )

    # Two programs: settings of the optimiser do not compile the model again.
    def step(state: State, tokens: jax.Array, number: int):
        key = jax.random.fold_in(draw_key(recovery.seed), number)
        metrics, grads = gradients(state[0], tokens, key)
        return _update(state, grads, recovery=recovery), metrics

    def model(trained: Tree) -> Params:
        return taught(params, place_routers(trained, config, mesh))

    state = fit(
        step,
        (trained, recovery.optimizer().init(trained)),
        blocks,
        steps=recovery.steps or 1,
        batch=recovery.batch,
        seed=recovery.seed,
        mesh=mesh,
        resume=resume,
        progress=progress,
        stop=None if stop is None else lambda state, done: stop(model(state[0]), done),
    )
    return model(state[0])


def _first_updates(params: Params, recovery: Recovery) -> Tree:
    """What a recovery begins with: routers, and updates that change nothing yet."""
    config = params.config
    # What is trained is in the model's own order, whole on each device.
    trained = {name: dict(parts) for name, parts in whole_routers(params).items()}
    key, shapes = draw_key(recovery.seed), model_shapes(params.weights, config)
    fresh = init_updates(key, shapes, config.layers, recovery.rank)
    for name, updates in fresh.items():
        trained.setdefault(name, {}).setdefault("updates", updates)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    return trained


@functools.partial(
    jax.jit,
    static_argnames=("model", "budgets", "prompts", "routers", "remat"),
)
def _gradients(
    weights: Tree,
    trained: Tree,
    tokens: jax.Array,
    key: jax.Array,
    *,
    model: Decoder,
    budgets: tuple[float, ...],
    prompts: float,
    routers: Routers,
    remat: bool,
) -> tuple[dict[str, jax.Array], Tree]:
    b, t = tokens.shape
    chosen, place = jax.random.split(key)
    prompted = jax.random.uniform(chosen, (b,), jnp.float32) < prompts
    # A sequence of prompt alone would teach nothing.
    starts = jax.random.randint(place, (b,), 1, max(2, t - t // 8), jnp.int32)
    starts = jnp.where(prompted, starts, 0)

    config, share = model.config, model.share

    def lose(weights: Tree, trained: Tree, tokens: jax.Array, starts: jax.Array):
        gates = None
        if routers == "slopes":
            gates = straight_through(trained, config, budgets)
        observe = None
        if routers == "bce" or routers == "ranking":
            observe = router_losses(model, trained, budgets, starts, routers)
        policy = of_learned(Learned(trained, budgets))
        params = Params(weights, policy, config)
        kl, losses = distance(model, params, tokens, starts, gates, observe, remat)
        # Routers alone feel their loss, and nothing but them: no weight is needed.
        total = sum(losses, start=jnp.zeros(()))
        return kl + total, {"kl": kl, "loss": total / config.layers}

    def loss(trained: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        ordered = order_updates(trained, config, model.mesh)
        cut = share.weight_specs(weights), share.router_specs(ordered)
        specs = *cut, P(DP), P(DP)
        return share.over(lose, specs, P())(weights, ordered, tokens, starts)

    grads, metrics = jax.grad(loss, has_aux=True)(trained)
    return metrics, grads


@functools.partial(jax.jit, static_argnames=("recovery",), donate_argnames=("state",))
def _update(state: State, grads: Tree, *, recovery: Recovery) -> State:
    trained, moments = state
    updates, moments = recovery.optimizer().update(grads, moments, trained)
    return optax.apply_updates(trained, updates), moments  # type: ignore


def check_model(params: Params, recovery: Recovery) -> None:
    """Raise unless there is something to recover from, and routers to do it by.

    Args:
      params: the model.
      recovery: settings, whose rank must be that of updates that are there already.

    Raises:
      ValueError: saying what to do.
    """
    config, learned = params.config, params.policy.learned
    if not params.routers or not learned.budgets:
        raise ValueError(
            "recovery needs routers: train them first, or load the model with adapter="
        )
    if learned.adaptive:
        raise ValueError(
            f"the adapter's budgets {learned.budgets} are means over tokens: recovery "
            "needs whole ones, pass a density (--density)"
        )
    if min(learned.budgets) == config.kv_heads:
        raise ValueError(
            "the budgets keep every KV group: there is nothing to recover from"
        )
    if recovery.rank is not None and recovery.rank > config.dim:
        raise ValueError(
            f"rank is {recovery.rank}: it may be from 1 to {config.dim}, the model's "
            "width, or full"
        )
    ranks = ranks_of(params.routers)
    if ranks - {recovery.rank}:
        theirs, mine = (
            " and ".join("full" if rank is None else str(rank) for rank in found)
            for found in (ranks, [recovery.rank])
        )
        raise ValueError(
            f"the adapter has updates of rank {theirs} already, and recovery goes on "
            f"with them: pass that rank (--rank), not {mine}, or take an adapter "
            "without updates"
        )


def trained_shapes(params: Params, recovery: Recovery) -> list[Tree]:
    """Shapes of the routers that a recovery begins with, and of updates.

    Args:
      params: the model with routers.
      recovery: settings.

    Raises:
      ValueError: if the rank is not positive.
    """
    shapes = model_shapes(params.weights, params.config)
    fresh = jax.eval_shape(
        lambda: init_updates(
            jax.random.key(0), shapes, params.config.layers, recovery.rank
        )
    )
    return [params.routers, fresh]


def router_losses(
    model: Decoder,
    trained: Tree,
    budgets: Sequence[float],
    starts: jax.Array,
    loss: HeadLoss,
) -> Observe:
    """The loss of the routers' own training, on the states that the sparse model has.

    Args:
      model: whose states they are.
      trained: `Params.routers`, which feel it; the model does not.
      budgets: KV groups by layer.
      starts: int32[b], tokens of each prompt, which are not counted: no decode step has
        such states.
      loss: its name.
    """
    config, share = model.config, model.share

    def observe(layer: int, u: jax.Array, o: jax.Array, _: jax.Array) -> jax.Array:
        k, n = config.kv_heads, int(budgets[layer])
        if n == k:
            return jnp.zeros(())
        norms = share.add_up_groups(head_norms(o, share.own.kv_heads))
        u, norms = jax.lax.stop_gradient((u, norms))
        scores = router_scores(
            trained[f"layers_{layer}"]["heads"],
            u.astype(jnp.float32).reshape(-1, config.dim),
        )
        counted = (jnp.arange(u.shape[1]) >= starts[:, None]).reshape(-1)
        return head_loss(
            loss, scores, norms.reshape(-1, k), n, counted, share.batch_mean
        )

    return observe


def straight_through(
    trained: Tree, config: ModelConfig, budgets: Sequence[float]
) -> Gates:
    """Gates of 1 and 0, as chosen, with the slope of a sigmoid (Bengio et al. 2013).

    The sigmoid is that of a score's distance from the middle between the last group
    chosen and the first that is not: what the loss says of a group's output, be it
    read or not, moves its router. It does not move the router's input: a model that
    bends its states to a choice it cannot feel falls apart.

    Args:
      trained: `Params.routers`, which feel it.
      config: what the model is.
      budgets: KV groups by layer.
    """

    def gates(layer: int, u: jax.Array, read: jax.Array) -> jax.Array:
        hard, k = read.astype(jnp.float32), read.shape[-1]
        n = int(budgets[layer])
        if n == k:
            return hard
        inputs = jax.lax.stop_gradient(u).astype(jnp.float32)
        router = trained[f"layers_{layer}"]["heads"]
        scores = router_scores(router, inputs.reshape(-1, config.dim))
        scores = scores.reshape(*read.shape)
        order = jax.lax.stop_gradient(jnp.sort(scores, axis=-1))
        middle = (order[..., k - n] + order[..., k - n - 1]) / 2
        soft = jax.nn.sigmoid(scores - middle[..., None])
        return hard + (soft - jax.lax.stop_gradient(soft))  # exactly 1 or 0

    return gates


def parameters(updates_of: Any) -> int:
    """How many numbers the updates of a model's routers hold.

    Args:
      updates_of: `Params.routers`.
    """
    return sum(
        leaf.size
        for parts in updates_of.values()
        for leaf in jax.tree.leaves(parts.get("updates", {}))
    )
