"""Models with updates, as recovery makes them, and what numpy makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import polarjax
from polarjax.policies import with_learned
from polarjax.policies.updates import init_updates
from tests.models import LLAMA, OPT, random_params
from tests.policies.reference import Model

GQA = dataclasses.replace(LLAMA, layers=3, vocab_size=61)
BIASED = dataclasses.replace(OPT, layers=3, vocab_size=61)


def text(blocks, length=8, seed=0, words=61):
    return np.random.default_rng(seed).integers(words, size=(blocks, length))


def with_updates(params, rank: int | None = 3, scale=0.05, seed=0):
    """Updates that change every weight of every layer."""
    config, rng = params.config, np.random.default_rng(seed)
    fresh = init_updates(jax.random.key(seed), params.weights, config.layers, rank)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), fresh
    )
    routers = {name: dict(parts) for name, parts in params.routers.items()}
    for name, updates in drawn.items():
        routers.setdefault(name, {})["updates"] = updates
    return with_learned(params, routers=routers)


def budgets_of(config):
    """Few groups in one layer or two."""
    return (4, 2, 1) if config.kv_heads == 4 else (6, 2, 6)


@functools.cache
def model(config, updates=True, budgets=()):
    budgets = budgets or budgets_of(config)
    params = random_params(config, 1, routers=True, budgets=budgets)
    return with_updates(params) if updates else params


def merged(params):
    """The model's weights with its updates, by numpy in float64."""

    def merge(leaf, change):
        if "delta" in change:
            return np.asarray(leaf, float) + change["delta"]
        if "a" in change:
            return np.asarray(leaf, float) + np.asarray(change["b"]) @ change["a"]
        return {name: merge(part, change[name]) for name, part in leaf.items()}

    return params.weights | {
        name: merge(params.weights[name], parts["updates"])
        for name, parts in params.routers.items()
        if "updates" in parts
    }


def in_numpy(params, tokens, start):
    """Logits [t, v] of one sequence: dense up to a position, from there on sparse."""
    config = params.config
    dense = Model(dataclasses.replace(params, policy=polarjax.Dense()))
    sparse = Model(dataclasses.replace(params, weights=merged(params)))
    caches, found = [[] for _ in range(config.layers)], []
    for i, token in enumerate(tokens):
        now = dense if i < start else sparse
        x = now.embed(int(token), i)
        for layer, n in enumerate(params.policy.learned.budgets):
            u = now.layer_input(layer, x)
            heads = now.head_outputs(layer, u, caches[layer])
            if i >= start and n < config.kv_heads:
                dropped = np.argsort(-now.head_scores(layer, u))[n:]
                heads = heads.reshape(config.kv_heads, -1)
                heads[dropped] = 0
            x = now.after_mlp(layer, now.after_attention(layer, x, heads))
        found.append(now.logits(x))
    return np.array(found)
