"""Compiled chunks of decode steps, and prefill, run again and again on the same state.

A whole model runs the chunk that `polarjax.generate` compiles. Layers alone are the
layers 1 to n of a model with nothing before or after them: what they put out,
normalised, is what they read in the next step. Layer 0, the one whose attention is
always dense, is not among them.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.meshes import busiest_rows, drawn_apart, of_one
from pallas_kernels import Implementation
from polarjax import ModelConfig, Params, SelectionPolicy
from polarjax.cache import KVCache
from polarjax.engine import places, programs
from polarjax.engine.checks import make_sampling
from polarjax.engine.programs import Drawn, State
from polarjax.engine.stats import kv_rows
from polarjax.mesh.cut import DP, TP, axis_size, local_config, mesh_of
from polarjax.model.layer import Layer
from polarjax.planning.cost import kv_row_bytes, step_weight_bytes

STEPS = 16  # a chunk, as in generate
CHUNKS = 4  # timed at once, each sent to the device before the one before has ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Where layers alone stand between steps.

    Attributes:
      cache: of layers 1 to n.
      x: [b, m], the residual stream that enters the next step.
    """

    cache: KVCache
    x: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("config", "steps", "implementation"),
    donate_argnames=("state",),
)
def layers_chunk(
    weights: Any,
    policy: SelectionPolicy,
    state: Stream,
    *,
    config: ModelConfig,
    steps: int,
    implementation: Implementation | None,
) -> tuple[Stream, Drawn]:
    """As `decode_chunk`, of layers 1 to n alone."""
    rows = policy.score_rows or (0,) * config.layers
    b = state.x.shape[0]
    live, zeros = jnp.ones(b, bool), jnp.zeros(b, jnp.int32)

    def step(state: Stream, _) -> tuple[Stream, Drawn]:
        x, cache = state.x, state.cache
        keys, values, parts = [], [], None
        reads = [zeros]  # layer 0 reads nothing: it is not here
        for i in range(1, config.layers):
            layer = Layer(config, i, x.dtype, rows[i], implementation)
            found: Any = layer.apply(
                {"params": weights[f"layers_{i}"]},
                x,
                parts,
                cache.keys[i - 1],
                cache.values[i - 1],
                cache.lengths,
                live,
                policy,
                method="decode",
            )
            x, parts, k, v, read = found
            keys.append(k)
            values.append(v)
            reads.append(read)
        wide = x.astype(jnp.float32)
        wide = wide if parts is None else wide + parts.sum(axis=0)
        norm = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5)
        cache = KVCache(tuple(keys), tuple(values), cache.lengths + 1)
        drawn = Drawn(zeros, jnp.zeros(b), live, jnp.stack(reads), cache.lengths)
        return Stream(cache, (wide * norm).astype(x.dtype)), drawn

    return jax.lax.scan(step, state, length=steps)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A compiled function of a state, its other arguments given."""

    function: Any
    before: tuple
    after: tuple
    options: dict[str, Any]

    def lower(self, state: Any) -> Any:
        """Traced and lowered for such a state."""
        return self.function.lower(*self.before, state, *self.after, **self.options)

    def __call__(self, state: Any) -> tuple[Any, Drawn]:
        """The next state, and what the steps brought; the old one is donated."""
        return self.function(*self.before, state, *self.after, **self.options)


def make_chunk(
    params: Params,
    weights: Any,
    policy: SelectionPolicy,
    batch: int,
    *,
    alone: bool = False,
    implementation: Implementation | None = None,
) -> Chunk:
    """The chunk of a bound policy, greedy, no token of which ends a request.

    Args:
      params: the model.
      weights: bound.
      policy: bound.
      batch: b.
      alone: whether the model is layers alone.
      implementation: of the kernels.
    """
    options = {
        "config": params.config.architecture,
        "steps": STEPS,
        "implementation": implementation,
    }
    if alone:
        return Chunk(layers_chunk, (weights, policy), (), options)
    after = (
        jnp.ones(batch, bool),
        make_sampling(params.config, batch, 0.0, 0, 1.0, 0),
        jnp.array([-1]),
    )
    options["mesh"] = mesh_of(params.weights)
    return Chunk(programs.decode_chunk, (weights, policy), after, options)


def make_state(params: Params, batch: int, context: int, alone: bool = False) -> Any:
    """A cache full of noise, and what else a chunk goes on from, where the model is.

    Args:
      params: the model.
      batch: b.
      context: positions of the cache.
      alone: whether the model is layers alone.
    """
    config, mesh = params.config, mesh_of(params.weights)
    count = config.layers - 1 if alone else config.layers
    groups = local_config(config, axis_size(mesh, TP)).kv_heads
    shape, each = (groups, context, config.head_dim), batch // axis_size(mesh, DP)

    # One sequence after the other: drawing takes several times the bytes of what is
    # drawn, and beside a cache that fills the device there is no such room.
    @jax.jit
    def noise(key: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape, params.dtype)

        return jax.lax.map(draw, jax.random.split(key, each))

    rows = None
    if mesh is not None:
        noise = jax.jit(drawn_apart(noise, NamedSharding(mesh, places.CACHE.keys)))
        rows = NamedSharding(mesh, P(DP))
    keys = jax.random.split(jax.random.key(2), 2 * count)
    cache = KVCache(
        keys=tuple(map(noise, keys[::2])),
        values=tuple(map(noise, keys[1::2])),
        lengths=jnp.zeros(batch, jnp.int32, device=rows),
    )
    if alone:
        x = jax.random.normal(keys[0], (batch, config.dim), params.dtype)
        return Stream(cache, x)
    # Tokens that differ: equal ones would let every sequence choose the same heads.
    token = jax.random.randint(keys[0], (batch,), 0, config.vocab_size, jnp.int32)
    token = token if rows is None else jax.device_put(token, rows)
    live = jnp.ones(batch, bool, device=rows)
    remaining = jnp.full(batch, 10**8, jnp.int32, device=rows)
    return State(cache, token, live, remaining)


def chunks_in(context: int) -> int:
    """How many chunks are timed at once: as many as fit, at most `CHUNKS`."""
    return max(1, min(CHUNKS, (context - 1) // STEPS))


def rewind(state: Any, context: int) -> Any:
    """The state from which the chunks end with a full context."""
    begin = context - STEPS * chunks_in(context)
    old = state.cache.lengths
    lengths = jnp.full(old.shape, begin, jnp.int32, device=old.sharding)
    cache = dataclasses.replace(state.cache, lengths=lengths)
    return dataclasses.replace(state, cache=cache)


def follow(chunk: Chunk, state: Any, context: int) -> tuple[Any, list[Drawn]]:
    """Chunks after one another, as `generate` has them, up to a full context.

    Returns:
      The state, and what each chunk brought, when all are done.
    """
    drawn = []
    for _ in range(chunks_in(context)):
        state, found = chunk(state)
        drawn.append(found)
    return jax.block_until_ready((state, drawn))


def times(
    chunks: Sequence[Chunk], state: Any, context: int, repeats: int
) -> tuple[Any, list[list[float]], list[list[Drawn]]]:
    """Seconds of a step, for each of several warm rounds over the same tokens.

    What is compared is timed in turn, within seconds of each other and in an order
    that alternates: a machine whose speed changes meanwhile changes for all.

    Args:
      chunks: to time, of one model and batch.
      state: that they go on from, donated.
      context: positions of its cache.
      repeats: rounds.

    Returns:
      The state; of each chunk, the seconds of every round, and what its chunks of the
      last round brought.
    """
    count = chunks_in(context)
    drawn: list[list[Drawn]] = [[] for _ in chunks]
    seconds: list[list[float]] = [[] for _ in chunks]
    for turn in range(repeats + 1):  # the first is to warm up
        order = list(enumerate(chunks))
        for i, chunk in order if turn % 2 else reversed(order):
            state = jax.block_until_ready(rewind(state, context))
            begin = time.perf_counter()
            state, drawn[i] = follow(chunk, state, context)
            seconds[i].append((time.perf_counter() - begin) / STEPS / count)
    return state, [each[1:] for each in seconds], drawn


def step_bytes(
    params: Params, weights: Any, policy: SelectionPolicy, drawn: Sequence[Drawn]
) -> tuple[int, float]:
    """Bytes of weights, and of keys and values, that a step must read, the mean.

    Of several devices the busiest, layer by layer; neurons that are chosen of all are
    taken to lie evenly on them.

    Args:
      params: the model.
      weights: bound.
      policy: bound.
      drawn: what each chunk brought.
    """
    config = params.config
    rows = sum(
        kv_rows(each, config)[0] if each.own is None else busiest_rows(each, config)
        for each in drawn
    )
    kv = rows / STEPS / len(drawn) * kv_row_bytes(config, params.dtype)
    weights, policy = of_one((weights, policy))
    return step_weight_bytes(weights, config, policy), kv


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and range in milliseconds, as rows hold them."""
    return {
        "ms": statistics.median(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
        "repeats": len(seconds),
    }


def timed_compile(lower: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A compiled program, and the seconds that tracing and compiling it took."""
    begin = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()  # kept: the call finds it
    return compiled, {
        "trace_s": traced - begin,
        "compile_s": time.perf_counter() - traced,
    }


def prefill_times(
    params: Params,
    prompts: int,
    tokens: int,
    repeats: int,
    implementation: Implementation | None = None,
) -> tuple[list[float], dict[str, float]]:
    """Seconds of reading prompts, first token of each drawn, and those of compiling.

    Args:
      params: the model.
      prompts: b.
      tokens: of each.
      repeats: warm calls.
      implementation: of the kernels.
    """
    config = params.config
    key = jax.random.key(3)
    ids = jax.random.randint(key, (prompts, tokens), 0, config.vocab_size)
    known = {"trace_s": 0.0, "compile_s": 0.0}

    def compiled(function: Any, *args: Any, **kwargs: Any) -> Any:
        _, found = timed_compile(lambda: function.lower(*args, **kwargs))
        for name, each in found.items():
            known[name] += each
        return function(*args, **kwargs)

    def read(call: Callable[..., Any] = programs.run_plainly) -> None:
        drawn = programs.read_prompts(
            params.weights,
            prompts_read,
            jnp.full(prompts, 10**8, jnp.int32),
            make_sampling(config, prompts, 0.0, 0, 1.0, 0),
            jnp.array([-1]),
            config=config.architecture,
            capacity=tokens,
            implementation=implementation,
            call=call,
        )
        jax.block_until_ready(drawn)

    prompts_read = np.asarray(ids).tolist()
    read(compiled)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begin)
    return seconds, known


def prefill_flops(config: ModelConfig, prompts: int, tokens: int) -> int:
    """2 x parameters x tokens, and what causal attention needs beside.

    Parameters are the matrices of the layers, which every token meets, but for those
    of the last layer behind its keys and values, and the head, which the last token of
    each prompt meets. Attention is 2 products of 2 d t (t + 1) / 2 for each query head
    and layer.
    """
    m, d, f = config.dim, config.head_dim, config.neurons
    attention = (config.heads + 2 * config.kv_heads) * d * m + config.heads * d * m
    layer = attention + (3 if config.gated_mlp else 2) * f * m
    behind = layer - (config.heads + 2 * config.kv_heads) * d * m
    products = 2 * layer * config.layers * tokens + 2 * config.vocab_size * m
    products -= 2 * behind * (tokens - 1)
    causal = 2 * d * tokens * (tokens + 1) * config.heads * config.layers
    return prompts * (products + causal)
