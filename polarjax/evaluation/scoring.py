"""Log-likelihoods of given continuations, through the decode step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from polarjax.config import ModelConfig
from polarjax.model import Decoder, run
from polarjax.params import Tree
from polarjax.policy import SelectionPolicy


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def score_continuations(
    weights: Tree,
    policy: SelectionPolicy,
    prompts: jax.Array,
    lengths: jax.Array,
    continuations: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Score continuations token by token, as `generate` would have computed them.

    The prompt but its last token is prefilled dense; that token, the first of
    `continuations`, and all that follow go through the decode step, so that every
    scored token is sparse.

    Args:
      weights: bound.
      policy: bound.
      prompts: int32[b, t], without their last tokens, padded at the end.
      lengths: int32[b], of the prompts, at least 1.
      continuations: int32[b, n + 1]: the prompt's last token, then the n to score.
      counts: int32[b], how many of the n count.
      config: of the model.
      implementation: of the kernels; None chooses by device.

    Returns:
      Negative log-likelihoods float32[b, n], 0 beyond the counts; whether each token
      was the most probable, bool[b, n], True beyond them; and the fraction of KV
      groups read, float32[].
    """
    dtype = weights["embed"]["tokens"].dtype
    model = Decoder(config, dtype, policy.score_rows, implementation)
    steps = continuations.shape[1] - 1
    capacity = prompts.shape[1] + steps
    _, cache = run(model, weights, "prefill", prompts, lengths, capacity)

    def step(cache, inputs):
        token, target, index = inputs
        live = index < counts
        logits, cache, reads = run(model, weights, "decode", token, cache, policy, live)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        best = jnp.argmax(logits, axis=-1) == target
        return cache, (jnp.where(live, nll, 0), best | ~live, reads.sum())

    inputs = continuations[:, :-1].T, continuations[:, 1:].T, jnp.arange(steps)
    _, (nll, best, reads) = jax.lax.scan(step, cache, inputs)
    density = reads.sum() / (counts.sum() * config.kv_heads * config.layers)
    return nll.T, best.T, density
