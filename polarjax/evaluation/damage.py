"""What sparsity does to the text that a model writes, beside its own dense text.

Multiple choice hides damage that shows here: how far greedy continuations stay the
same, and how far the next-token distributions move along the dense one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels import Implementation
from polarjax.cache import PagedCache
from polarjax.engine.generate import generate
from polarjax.engine.places import PAGES, ROWS, place_rows
from polarjax.evaluation.measure import Journal, Progress
from polarjax.evaluation.programs import decode_step, fork, prefill
from polarjax.mesh.cut import field_specs
from polarjax.mesh.processes import to_host
from polarjax.model import Decoder, make_decoder
from polarjax.params import Params
from polarjax.planning.sizes import bucket
from polarjax.policy import Dense, Policy, Tree


@dataclasses.dataclass(frozen=True)
class Damage:
    """How one policy's text differs from the dense model's.

    The first new token comes from dense prefill for every policy: it is always the
    same, and counted.

    Attributes:
      same: int[prompts], new tokens before the first that differs; all of them where
        the continuations are identical.
      kl: float64[prompts, new tokens - 1], Kullback-Leibler divergence of the policy's
        next-token distribution from the dense one, in nats, along the dense text; from
        the second new token on.
      agree: bool[prompts, new tokens - 1], whether both have the same best token there.
      density: KV groups read / KV groups there, mean over layers, along the dense text.
    """

    same: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    density: float


def measure_damage(
    params: Params,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    *,
    new_tokens: int = 64,
    batch: int = 16,
    implementation: Implementation | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, Damage]:
    """Continue prompts greedily, densely and under policies, and compare.

    Everything runs through `generate` and its decode step. Continuations go on where
    the model would stop, so that all have the same length.

    Args:
      params: the model, on one device or on the mesh that it was loaded on.
      prompts: token ids of each.
      policies: by label, sparse ones, not yet bound.
      new_tokens: to add to each prompt, at least 2.
      batch: prompts continued together.
      implementation: of the kernels; None chooses by device.
      journal: batches found there are not measured again; others are added to it.
      progress: called after each batch.

    Raises:
      ValueError: if there is no prompt, or the context is too short for one.
    """
    check_lengths(
        [len(prompt) for prompt in prompts], new_tokens, params.config.context
    )
    journal = {} if journal is None else journal
    starts = range(0, len(prompts), batch)
    options = {"new_tokens": new_tokens, "implementation": implementation}
    for done, at in enumerate(starts):
        if progress:
            progress("generating", done, len(starts))
        if f"generation/{at}" not in journal:
            part = prompts[at : at + batch]
            journal[f"generation/{at}"] = _compare(params, part, policies, **options)
    if progress:
        progress("generating", len(starts), len(starts))
    parts = [journal[f"generation/{at}"] for at in starts]
    results = {}
    for label in policies:
        mine = [part[label] for part in parts]
        same, kl, agree = (
            np.concatenate([np.asarray(part[name]) for part in mine])
            for name in ("same", "kl", "agree")
        )
        read, there = (sum(part[name] for part in mine) for name in ("read", "there"))
        results[label] = Damage(same, kl, agree, read / there)
    return results


def check_lengths(prompts: Sequence[int], new_tokens: int, context: int) -> None:
    """Raise unless prompts of these lengths can be continued.

    Args:
      prompts: tokens of each.
      new_tokens: to add.
      context: of the model, in tokens.

    Raises:
      ValueError: if there is none, it is too long, or there is nothing to compare.
    """
    if not prompts or new_tokens < 2:
        raise ValueError("generation needs a prompt and at least 2 new tokens")
    if max(prompts) + new_tokens > context:
        raise ValueError(
            f"a prompt of {max(prompts)} tokens with {new_tokens} new ones is beyond "
            f"the model's context of {context}"
        )


def _compare(
    params: Params,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    *,
    new_tokens: int,
    implementation: Implementation | None,
) -> dict[str, dict]:
    """One batch, as JSON values."""

    def write(policy: Policy) -> np.ndarray:
        out = generate(
            params,
            [list(prompt) for prompt in prompts],
            max_new_tokens=new_tokens,
            policy=policy,
            stop_ids=[],
            implementation=implementation,
        )
        return np.array(out.tokens)

    dense = write(Dense())
    config = params.config
    model = make_decoder(
        config.architecture, params.weights, implementation=implementation
    )
    b = len(prompts) + -len(prompts) % model.share.dp
    lengths = np.zeros(b, np.int32)
    longest = max(map(len, prompts))
    contexts = np.zeros((b, min(bucket(longest), config.context)), np.int32)
    for i, prompt in enumerate(prompts):
        contexts[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    tokens = np.pad(dense, ((0, b - len(prompts)), (0, 0)))
    rows = np.arange(b, dtype=np.int32) % (b // model.share.dp)
    read = place_rows((contexts, lengths, rows, tokens.astype(np.int32)), model.mesh)
    cache = prefill(params.weights, *read[:2], model=model)
    cache = fork(cache, read[2], room=new_tokens, model=model)
    found = {}
    for label, policy in policies.items():
        differs = write(policy) != dense
        same = np.where(differs.any(axis=1), differs.argmax(axis=1), new_tokens)
        weights, bound = (
            policy.of(params.policy.learned).sized(len(prompts)).bind(params)
        )
        args = params.weights, weights, bound, cache, lengths > 0, read[3]
        sparse = model.clone(score_rows=bound.wants.scores)
        kl, agree, groups = to_host(
            _divergences(*args, model=sparse, kind=type(policy))
        )
        kl, agree = kl[: len(prompts)], agree[: len(prompts)]
        if not np.isfinite(kl).all():
            raise ValueError(f"{label} or the dense model yields logits that are NaN")
        found[label] = {
            "same": same.tolist(),
            "kl": kl.astype(float).tolist(),
            "agree": agree.tolist(),
            "read": int(groups),
            "there": len(prompts) * (new_tokens - 1) * config.layers * config.kv_heads,
        }
    return found


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def _divergences(
    dense_weights: Tree,
    weights: Tree,
    policy: Policy,
    cache: PagedCache,
    live: jax.Array,
    tokens: jax.Array,
    *,
    model: Decoder,
    kind: type,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decode the dense text int32[b, n] of live rows twice, side by side.

    Returns float32[b, n - 1], KL divergences of what follows token i; bool[b, n - 1],
    whether the best token is the same; and int32[], KV groups that the policy read.
    """
    del kind  # see `polarjax.engine.steps.decode`
    dense_model, share = model.clone(score_rows=()), model.share

    def follow(dense_weights, weights, policy, cache, live, tokens):
        def step(caches: tuple[PagedCache, PagedCache], token: jax.Array):
            expected, dense, _ = decode_step(
                dense_model, dense_weights, Dense(), token, caches[0], live
            )
            logits, sparse, read = decode_step(
                model, weights, policy, token, caches[1], live
            )
            p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
            kl = (jnp.exp(p) * (p - q)).sum(axis=-1)
            same = expected.argmax(axis=-1) == logits.argmax(axis=-1)
            return (dense, sparse), (kl, same, read.sum())

        _, (kl, same, read) = jax.lax.scan(step, (cache, cache), tokens[:, :-1].T)
        return kl.T, same.T, read.sum()

    args = dense_weights, weights, policy, cache, live, tokens
    cut = (share.weight_specs(x) for x in (dense_weights, weights))
    specs = *cut, field_specs(policy), PAGES, ROWS, ROWS
    return share.over(follow, specs, (ROWS, ROWS, P()))(*args)
