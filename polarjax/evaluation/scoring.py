"""Log-likelihoods of given continuations under several policies, in one of three modes.

`decode` (what `generate` does): a context but its last token is prefilled dense, that
token and all that follow go one by one through the sparse decode step. `kernel`: so do
all tokens, from the first. `mask`: the literature's masked dense model, which computes
everything at once and sets to zero what is not selected; equal to `kernel`, no kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from polarjax.cache import KVCache
from polarjax.config import ModelConfig
from polarjax.evaluation.batches import Batch, Continuation, Mode, make_batches
from polarjax.generation.requests import positive
from polarjax.model import Decoder, run
from polarjax.params import Params, Tree
from polarjax.policy import SelectionPolicy, groups_read
from polarjax.sharding import check_whole

# Positions of which the logits are in memory at once.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one batch yielded under one policy.

    Attributes:
      nll: per row, float32[scored], negative log-likelihoods in nats.
      greedy: per row, bool[scored], whether the token was the most probable one.
      use: int64[layers, k], how often each KV group was read.
      positions: tokens that were computed sparsely, over all rows.
      seconds: that it took, compilation apart.
    """

    nll: list[np.ndarray]
    greedy: list[np.ndarray]
    use: np.ndarray
    positions: int
    seconds: float


class Scorer:
    """Scores batches under several policies with one compiled step for each.

    All policies see the same batches, and share the dense prefill.

    Args:
      params: the model.
      policies: by label, not yet bound.
      mode: see the module.
      batch: rows computed together; a batch that lacks rows is filled up with rows
        that are finished.
      implementation: of the kernels; None chooses by device.

    Raises:
      ValueError: if the mode is unknown, or a policy does not fit the model.
    """

    def __init__(
        self,
        params: Params,
        policies: Mapping[str, SelectionPolicy],
        *,
        mode: Mode = "decode",
        batch: int = 16,
        implementation: Implementation | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            names = ", ".join(get_args(Mode))
            raise ValueError(f"no mode {mode!r}: there are {names}")
        check_whole(params)
        self.params = params
        self.mode: Mode = mode
        self.batch = positive("batch", batch)
        self._bound = {
            label: policy.bind(params, self.batch) for label, policy in policies.items()
        }
        self._common = {
            "config": params.config.architecture,
            "implementation": implementation,
        }
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def labels(self) -> list[str]:
        """Of the policies."""
        return list(self._bound)

    def neuron_density(self, label: str) -> float:
        """MLP neurons that a policy reads / neurons there, mean over layers."""
        total = self.params.config.neurons
        budget = getattr(self._bound[label][1], "neuron_budget", ()) or (0,)
        return float(np.mean([(n or total) / total for n in budget]))

    def plan(self, items: Sequence[Continuation]) -> list[Batch]:
        """Cut work into batches, which depend on the items, mode and batch size alone.

        Raises:
          ValueError: if an item is longer than the model's context.
        """
        return make_batches(items, self.batch, self.params.config.context, self.mode)

    def cost(self, batch: Batch) -> int:
        """About how long a batch takes, in tokens computed."""
        steps = batch.steps
        if self.mode != "mask":  # decoding ends with the longest row
            steps = max(row.steps for row in batch.rows)
        dense = batch.contexts * batch.prefix
        return dense + len(self._bound) * self.batch * steps

    def compile(
        self,
        batches: Sequence[Batch],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compile what the batches need, several programs at a time.

        Args:
          batches: from `plan`.
          progress: called as progress(done, total).
        """
        jobs: dict[Any, Callable[[], Any]] = {}
        distinct = {self._keys(batch): batch for batch in batches}.values()
        for batch in distinct:
            contexts, arrays = batch.arrays(self.batch)
            first, *others = self._keys(batch)
            if batch.prefix and first not in self._programs:
                jobs[first] = functools.partial(
                    *(prefill.lower, self.params.weights, *contexts[:2]),
                    **self._common,
                )
            function = _mask
            if self.mode != "mask":
                cache = jax.eval_shape(functools.partial(self._empty, batch))
                function, arrays = _decode, (cache, *arrays)
            for key, bound in zip(others, self._bound.values(), strict=True):
                if key not in self._programs:
                    jobs[key] = functools.partial(
                        function.lower, *bound, *arrays, **self._common
                    )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = pool.map(lambda lower: lower().compile(), jobs.values())
            for done, (key, program) in enumerate(zip(jobs, built, strict=True), 1):
                self._programs[key] = program
                if progress:
                    progress(done, len(jobs))
        for batch in distinct if jobs else ():
            if self.mode != "mask":  # once untimed: the first run loads programs
                self.score(dataclasses.replace(batch, rows=()))

    def score(self, batch: Batch) -> dict[str, Scores]:
        """Score one batch under every policy.

        Args:
          batch: from `plan`, compiled.
        """
        contexts, arrays = batch.arrays(self.batch)
        first, *others = self._keys(batch)
        if batch.prefix:
            *read, rows = contexts
            cache = self._programs[first](self.params.weights, *read)
            cache = spread(cache, rows, batch.capacity)
            arrays = jax.block_until_ready(cache), *arrays
        elif self.mode != "mask":
            arrays = self._empty(batch), *arrays
        found = {}
        for key, (label, bound) in zip(others, self._bound.items(), strict=True):
            begin = time.perf_counter()
            nll, greedy, use = jax.device_get(self._programs[key](*bound, *arrays))
            seconds = time.perf_counter() - begin
            scored = [
                (i, slice(row.steps - row.scored, row.steps))
                for i, row in enumerate(batch.rows)
            ]
            found[label] = Scores(
                [nll[at] for at in scored],
                [greedy[at] for at in scored],
                use.astype(np.int64),
                sum(row.steps for row in batch.rows),
                seconds,
            )
        return found

    def _keys(self, batch: Batch) -> tuple:
        """Of a batch's programs: what reads its contexts, then each policy's."""
        room = batch.steps, batch.capacity
        first = batch.contexts, batch.prefix
        return first, *((label, *room) for label in self._bound)

    def _empty(self, batch: Batch) -> KVCache:
        dtype = self.params.dtype
        return KVCache.empty(self.params.config, self.batch, batch.capacity, dtype)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def prefill(
    weights: Tree,
    contexts: jax.Array,
    lengths: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None,
) -> KVCache:
    """Read contexts, dense.

    Args:
      weights: the original ones.
      contexts: int32[c, t], padded at the end.
      lengths: int32[c]; 0 for none.
      config: of the model.
      implementation: of the kernels.
    """
    model = Decoder(config, _dtype(weights), implementation=implementation)
    return run(model, weights, "prefill", contexts, lengths, contexts.shape[1])[1]


@functools.partial(jax.jit, static_argnames=("capacity",))
def spread(cache: KVCache, rows: jax.Array, capacity: int) -> KVCache:
    """Give each row a copy of its context's cache.

    Args:
      cache: of the contexts, [c, k, t, d].
      rows: int32[b], the context of each row.
      capacity: positions of the new cache.
    """
    room = ((0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0))

    def take(part: jax.Array) -> jax.Array:
        return jnp.pad(part[rows], room)

    keys, values = (tuple(map(take, parts)) for parts in (cache.keys, cache.values))
    return KVCache(keys, values, cache.lengths[rows])


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _decode(
    weights: Tree,
    policy: SelectionPolicy,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Teacher-forced decoding: token i is read, then token i + 1 is scored.

    Args:
      weights: bound.
      policy: bound.
      cache: of what comes before.
      tokens: int32[b, n + 1].
      counts: int32[b], how many of the n each row scores.
      config: of the model.
      implementation: of the kernels.

    Returns:
      Negative log-likelihoods float32[b, n]; whether each token was the most probable,
      bool[b, n]; int32[layers, k], how often each KV group was read.
    """
    model = Decoder(config, _dtype(weights), policy.score_rows, implementation)
    b, n = tokens.shape[0], tokens.shape[1] - 1

    def step(i: jax.Array, carry: tuple) -> tuple:
        cache, nll, greedy, use = carry
        live = i < counts
        logits, cache, read = decode_step(
            model, weights, policy, tokens[:, i], cache, live
        )
        found, best = score(logits, tokens[:, i + 1])
        nll = nll.at[:, i].set(jnp.where(live, found, 0))
        return cache, nll, greedy.at[:, i].set(best), use + read

    use = jnp.zeros((config.layers, config.kv_heads), jnp.int32)
    first = cache, jnp.zeros((b, n)), jnp.zeros((b, n), bool), use
    # As many steps as the longest row needs, not as many as the arrays have room for.
    return jax.lax.fori_loop(0, counts.max(), step, first)[1:]


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _mask(
    weights: Tree,
    policy: SelectionPolicy,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_decode` from an empty cache, by a masked dense model."""
    model = Decoder(config, _dtype(weights), policy.score_rows, implementation)
    b, n = tokens.shape[0], tokens.shape[1] - 1
    x, read, _ = run(model, weights, "masked", tokens[:, :-1], counts, policy)
    live = jnp.arange(n) < counts[:, None]
    use = (read & live[None, ..., None]).sum(axis=(1, 2), dtype=jnp.int32)

    def chunks(array: jax.Array) -> jax.Array:  # [b, n, ...] -> [n / 128, b, 128, ...]
        size = min(n, _CHUNK)
        rest = ((0, 0), (0, -n % size), *((0, 0),) * (array.ndim - 2))
        cut = jnp.pad(array, rest).reshape(b, -1, size, *array.shape[2:])
        return cut.swapaxes(0, 1)

    def part(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return score(run(model, weights, "logits", args[0]), args[1])

    nll, greedy = (
        out.swapaxes(0, 1).reshape(b, -1)[:, :n]
        for out in jax.lax.map(part, (chunks(x), chunks(tokens[:, 1:])))
    )
    return jnp.where(live, nll, 0), greedy, use


def decode_step(
    model: Decoder,
    weights: Tree,
    policy: SelectionPolicy,
    token: jax.Array,
    cache: KVCache,
    live: jax.Array,
) -> tuple[jax.Array, KVCache, jax.Array]:
    """One decode step that also counts what it reads.

    Args:
      model: built with the policy's score rows.
      weights: bound.
      policy: bound.
      token: int32[b].
      cache: what came before.
      live: bool[b].

    Returns:
      Logits float32[b, v], the cache, and int32[layers, k], how many live rows read
      each KV group.
    """
    watched = _Watched(policy, token.shape[0], model.config.kv_heads)
    logits, cache, _ = run(model, weights, "decode", token, cache, watched, live)
    read = jnp.stack(watched.read) & live[:, None]
    return logits, cache, read.sum(axis=1, dtype=jnp.int32)


class _Watched:
    """A policy that notes, for the trace it is made in, what another one chooses."""

    def __init__(self, policy: SelectionPolicy, b: int, k: int) -> None:
        self.policy, self.shape = policy, (b, k)
        self.wants_norms, self.score_rows = policy.wants_norms, policy.score_rows
        self.neurons, self.bind = policy.neurons, policy.bind
        self.read: list[jax.Array] = []

    def heads(self, layer, scores, norms, implementation=None):
        chosen = self.policy.heads(layer, scores, norms, implementation)
        self.read.append(groups_read(chosen, *self.shape))
        return chosen


def score(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods float32[...] of targets int32[...], and if each is best.

    Args:
      logits: float32[..., v].
      targets: int32[...].
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return nll, jnp.argmax(logits, axis=-1) == targets


def _dtype(weights: Tree):
    return weights["embed"]["tokens"].dtype
