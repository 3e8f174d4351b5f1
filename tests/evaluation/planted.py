"""Models of which some KV groups do nothing, and text that the models wrote."""

import jax.numpy as jnp
import numpy as np

import polarjax
from polarjax.evaluation import Continuation
from polarjax.policies import of_learned, with_learned
from polarjax.policy import Learned
from tests.models import LLAMA, random_params

IDLE = {1: 2, 3: 0}
"""Layer -> the one group of it that contributes nothing."""


def planted(seed=0):
    """A random model whose routers rank the idle groups last, others by chance."""
    params = random_params(LLAMA, seed=seed, routers=True, scale=0.25)
    c, weights, routers = LLAMA, dict(params.weights), dict(params.routers)
    for layer in range(1, c.layers):
        bias = np.arange(c.kv_heads) * 1e-3
        if layer in IDLE:
            group, name = IDLE[layer], f"layers_{layer}"
            attention = dict(weights[name]["attention"])
            first = (c.heads + c.kv_heads + group) * c.head_dim
            rows = slice(first, first + c.head_dim)
            attention["qkv"] = attention["qkv"].at[rows].set(0)  # its values
            weights[name] = {**weights[name], "attention": attention}
            bias[group] = -5.0
        heads = {
            "weight": jnp.zeros((c.kv_heads, c.dim)),
            "bias": jnp.asarray(bias, jnp.float32),
        }
        routers[f"layers_{layer}"] = {"heads": heads}
    return polarjax.Params(weights, of_learned(Learned(routers)), c)


def sabotaged(params):
    """The same with routers that rank the other way round."""
    turned = {
        name: {"heads": {k: -v for k, v in parts["heads"].items()}}
        for name, parts in params.routers.items()
    }
    return with_learned(params, routers=turned)


def own_text(params, windows, tokens=24, prefix=4, seed=0):
    """Windows drawn from the dense model: no other model predicts them better."""
    out = polarjax.generate(
        *(params, [[i + 1] for i in range(windows)]),
        max_new_tokens=tokens - 1,
        policy=polarjax.Dense(),
        temperature=1.0,
        seed=[1000 * seed + i for i in range(windows)],
    )
    return [
        Continuation((i + 1, *new), tokens - prefix) for i, new in enumerate(out.tokens)
    ]
