"""How many neurons a batch must read to hold nearly all that any of its rows needs.

Algorithm 2 of Polar Sparsity (arXiv 2505.14884) without its cap: for each batch size
and layer, the smallest number of neurons of which the router's choice holds 99 % of the
neurons that are truly active in some row. Instead of trying one number after another,
every batch is ranked once, which gives the recall at all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.model import Decoder, make_decoder, whole
from polarjax.params import Params, Tree
from polarjax.policies.budgets import NEURON_STEP
from polarjax.policies.updates import merge_updates
from polarjax.policy import NeuronBudgets
from polarjax.training.neurons import active_neurons, neuron_scores, union_curve
from polarjax.training.unions import UnionRecall, union_rankings

# Sequences in one dense forward pass, at most.
_ROWS = 8


def neuron_budgets(
    params: Params,
    blocks: np.ndarray,
    batches: Sequence[int] = (1, 8, 64),
    recall: float = 0.99,
    *,
    held_out: np.ndarray,
    confidence: float = 0.999,
    samples: int = 8,
    seed: int = 0,
) -> tuple[NeuronBudgets, UnionRecall]:
    """Find the budgets on one text, measure them on another.

    Args:
      params: a ReLU model with neuron routers.
      blocks: int32[n, t] token ids; n at least twice the largest batch size.
      batches: batch sizes, ascending.
      recall: of the true union, mean over batches, in each layer.
      held_out: as `blocks`, of other text.
      confidence: with which one more part of the text reaches it.
      samples: positions drawn from each sequence; never its first, which no decode step
        reads.
      seed: of positions and batches.

    Returns:
      The budgets, for `polarjax.policy.Learned`, and what was measured on the
      held-out text: its `reached(budgets)` is their recall, its `union` the densities.

    Raises:
      ValueError: as `measure_unions` and `UnionRecall.budgets` do.
    """
    measure = functools.partial(
        measure_unions, params, batches=batches, samples=samples
    )
    budgets = measure(blocks, seed=seed).budgets(recall, confidence)
    return budgets, measure(held_out, seed=seed + 1)


def measure_unions(
    params: Params,
    blocks: np.ndarray,
    batches: Sequence[int] = (1, 8, 64),
    *,
    rules: Sequence[str] = ("noisy_or",),
    samples: int = 8,
    step: int = NEURON_STEP,
    seed: int = 0,
) -> UnionRecall:
    """Rank neurons for random batches of decode steps; see where the active ones lie.

    A batch is b tokens at random positions of b different sequences, each in the state
    that the dense model (with recovery's updates, if any) has there. The text is read
    once, in parts of as many sequences as the largest batch has. In memory at a time,
    besides one dense pass over up to 8 sequences: both inputs of every layer at the
    positions drawn from one part, 2 * layers * part * samples * m numbers, and one
    layer's scores of them, part * samples * f, a few times over.

    Args:
      params: a ReLU model with neuron routers.
      blocks: int32[n, t] token ids, t at least 2; n at least twice the largest batch
        size. What remains after the last whole part is left out.
      batches: batch sizes, ascending.
      rules: that rank neurons, see `union_rankings`.
      samples: positions drawn from each sequence; never its first, which no decode step
        reads.
      step: between the numbers of neurons that recall is kept for.
      seed: of positions and batches.

    Returns:
      The recalls; the same at the same arguments.

    Raises:
      ValueError: if the model has no ReLU MLP, no layer or no neuron router to measure,
        or an argument is out of range.
    """
    config = params.config
    _check(params, blocks, batches, rules, samples, step)
    params = merge_updates(params)
    part = batches[-1]
    rng = np.random.default_rng(seed)
    counts = np.append(np.arange(step, config.neurons, step), config.neurons)
    curves = functools.partial(
        _curves,
        batches=tuple(batches),
        rules=tuple(rules),
        counts=tuple(counts.tolist()),
    )
    found = []
    for first in range(0, len(blocks) - part + 1, part):
        tokens = np.asarray(blocks[first : first + part], np.int32)
        positions = rng.integers(1, tokens.shape[1], (part, samples), np.int32)
        # The sequences of a batch are drawn anew for each sample.
        order = rng.permuted(np.tile(np.arange(part), (samples, 1)), axis=1)
        layers = []
        for layer, states in enumerate(_part_states(params, tokens, positions), 1):
            name = f"layers_{layer}"
            router = params.routers[name]["neurons"]
            layers.append(curves(router, params.weights[name]["mlp"], *states, order))
        found.append(jax.tree.map(lambda *x: np.stack(x), *jax.device_get(layers)))
    # [parts, layers - 1, rules, batches, c] and [parts, layers - 1, batches]
    recall, sizes = (np.stack(x).astype(np.float64) for x in zip(*found, strict=True))
    return UnionRecall(
        batches=tuple(batches),
        counts=counts,
        recall={rule: recall[:, :, i].swapaxes(1, 2) for i, rule in enumerate(rules)},
        union=sizes.mean(axis=0).T,
    )


def _part_states(
    params: Params, tokens: np.ndarray, positions: np.ndarray
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """By layer from 1: attention's and MLP's inputs [part, samples, m]."""
    rows = math.gcd(len(tokens), _ROWS)
    model = make_decoder(params.config.architecture, params.weights)
    passes = [
        _states(
            params.weights,
            tokens[i : i + rows],
            positions[i : i + rows],
            model=model,
        )
        for i in range(0, len(tokens), rows)
    ]
    for layer in zip(*passes, strict=True):
        u, v = (jnp.concatenate(x) for x in zip(*layer, strict=True))
        yield u, v


def _check(
    params: Params,
    blocks: np.ndarray,
    batches: Sequence[int],
    rules: Sequence[str],
    samples: int,
    step: int,
) -> None:
    config = params.config
    if config.activation != "relu":
        raise ValueError(
            f"neuron budgets need a ReLU MLP, the model's is {config.activation}"
        )
    if config.layers < 2:
        raise ValueError("the model has one layer, which is dense: nothing to measure")
    for layer in range(1, config.layers):
        if "neurons" not in params.routers.get(f"layers_{layer}", {}):
            raise ValueError(f"the model has no neuron router for layer {layer}")
    if not batches or batches[0] < 1 or list(batches) != sorted(set(batches)):
        raise ValueError(f"batch sizes must be ascending, from 1: got {batches}")
    if unknown := set(rules) - set(union_rankings()):
        raise ValueError(f"no rules {unknown}: there are {sorted(union_rankings())}")
    if samples < 1 or step < 1:
        raise ValueError(f"samples ({samples}) and step ({step}) must be at least 1")
    if blocks.ndim != 2 or len(blocks) < 2 * batches[-1] or blocks.shape[1] < 2:
        raise ValueError(
            f"blocks of shape {blocks.shape}: batches of {batches[-1]} need at least "
            f"{2 * batches[-1]} sequences of 2 or more tokens"
        )


@functools.partial(jax.jit, static_argnames=("model",))
def _states(
    weights: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    model: Decoder,
) -> list[tuple[jax.Array, ...]]:
    """Inputs of attention and MLP at some positions, from layer 1.

    Each is [rows, samples, m]; positions are int32[rows, samples].
    """

    def read(weights: Tree, tokens: jax.Array, positions: jax.Array):
        def observe(layer: int, u: jax.Array, o: jax.Array, z: jax.Array):
            del layer, o
            at = positions[..., None]
            return tuple(jnp.take_along_axis(x, at, axis=1) for x in (u, z))

        return whole(model, weights, tokens, observe=observe).observed[1:]

    share, rows = model.share, model.share.batch_spec(len(tokens))
    specs = share.weight_specs(weights), rows, rows
    return share.over(read, specs, rows)(weights, tokens, positions)


@functools.partial(jax.jit, static_argnames=("batches", "rules", "counts"))
def _curves(
    router: Tree,
    mlp: Tree,
    u: jax.Array,
    v: jax.Array,
    order: jax.Array,
    *,
    batches: tuple[int, ...],
    rules: tuple[str, ...],
    counts: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """One layer: recall float32[rules, batches, c], and union sizes float32[batches].

    u and v are [part, samples, m], order is int32[samples, part].
    """
    part, samples, dim = u.shape
    # As the decode step has it: the router in the weights' dtype.
    router = jax.tree.map(lambda x: x.astype(u.dtype), router)
    tokens = (x.swapaxes(0, 1).reshape(-1, dim) for x in (u, v))
    scores = neuron_scores(router, next(tokens))
    active = active_neurons(mlp, next(tokens))
    scores, active = (
        jnp.take_along_axis(x.reshape(samples, part, -1), order[..., None], axis=1)
        for x in (scores, active)
    )
    curves, sizes = [], []
    for b in batches:
        whole = part // b * b
        z, a = (x[:, :whole].reshape(-1, b, x.shape[-1]) for x in (scores, active))
        union = a.any(axis=1)
        sizes.append(union.sum(axis=1).mean())
        at = jnp.array(counts) - 1
        curves.append(
            [
                union_curve(union_rankings()[rule](z), union)[:, at].mean(axis=0)
                for rule in rules
            ]
        )
    curve = jnp.stack([jnp.stack(row) for row in curves], axis=1)
    return curve, jnp.stack(sizes)
