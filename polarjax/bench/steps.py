"""Compiled chunks of decode steps, and prefill, and the bytes that they must read.

Of the benchmark, this module alone knows policies, the cache and compiled programs.

A whole model runs the chunk that `polarjax.generate` compiles. Layers alone are the
layers 1 to n of a model with nothing before or after them: what they put out,
normalised, is what they read in the next step. Layer 0, the one whose attention is
always dense, is not among them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Implementation
from polarjax import ModelConfig, Params
from polarjax.bench.meshes import Devices, drawn_apart, of_one
from polarjax.bench.shapes import Sparsity
from polarjax.cache import PagedCache
from polarjax.engine import places, prefill, programs
from polarjax.engine.checks import Settings, make_sampling, stop_table, variant_of
from polarjax.engine.programs import Drawn, State
from polarjax.engine.stats import kv_rows, seen_tokens
from polarjax.mesh.cut import DP, TP, axis_size, local_config, mesh_of
from polarjax.model import Decoder, make_decoder
from polarjax.model.layer import Layer
from polarjax.planning.cost import kv_row_bytes, step_weight_bytes
from polarjax.planning.crossover import settle
from polarjax.planning.per_device import step_sent_bytes
from polarjax.policies import named
from polarjax.policy import Dense, Load, Policy, Seen

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

    cache: PagedCache
    x: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps"),
    donate_argnames=("state",),
)
def layers_chunk(
    weights: Any,
    policy: Policy,
    state: Stream,
    *,
    model: Decoder,
    steps: int,
) -> tuple[Stream, Drawn]:
    """As `decode_chunk`, of layers 1 to n alone."""
    config, share = model.config, model.share
    rows = model.score_rows or (0,) * config.layers
    b = state.x.shape[0]
    live, zeros = jnp.ones(b, bool), jnp.zeros(b, jnp.int32)
    seen = Seen(live, jnp.zeros(b), zeros, jnp.arange(b, dtype=jnp.int32))

    def step(state: Stream, _) -> tuple[Stream, Drawn]:
        x, cache, parts = state.x, state.cache, None
        reads = [zeros]  # layer 0 reads nothing: it is not here
        first = dataclasses.replace(seen, lengths=cache.lengths + 1)
        for i in range(1, config.layers):
            layer = Layer(config, i, x.dtype, share, rows[i], model.implementation)
            variables = {"params": weights[f"layers_{i}"]}
            found: Any = layer.apply(
                variables, x, parts, first, cache, policy, method=Layer.step
            )
            x, parts, _, cache, read = found
            reads.append(read.groups)
        wide = x.astype(jnp.float32)
        wide = wide if parts is None else wide + parts.sum(axis=0)
        norm = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5)
        cache = cache.grown(jnp.ones_like(zeros))
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


def make_policy(sparse: Sparsity | None, tp: int) -> tuple[Policy, bool]:
    """A policy, and whether it is done as it is, or only where it pays.

    Args:
      sparse: what is read; None for dense.
      tp: devices that share the model.
    """
    if sparse is None:
        return Dense(), True
    parts = tp if sparse.balanced else 1
    policy = named("polar", sparse.heads, sparse.neurons, parts)
    return policy, bool(sparse.heads or sparse.neurons)


def bind(
    params: Params,
    policy: Policy,
    batch: int,
    context: int,
    *,
    asked: bool = True,
    alone: bool = False,
) -> tuple[Any, Policy, Sequence[str]]:
    """The weights that a policy reads, the policy bound, and what is to be said of it.

    Args:
      params: the model.
      policy: not bound.
      batch: b.
      context: positions of the cache.
      asked: whether it is done as it is, or only where it pays.
      alone: whether the model is layers alone, where there is no layer 0 to be costed.
    """
    notes: Sequence[str] = ()
    if not alone:
        load = Load(batch, context)
        policy, notes = settle(params, policy if asked else None, load, False)
    return *policy.of(params.policy.learned).sized(batch).bind(params), notes


def make_chunk(
    params: Params,
    weights: Any,
    policy: Policy,
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
    model = make_decoder(
        params.config.architecture, params.weights, policy.wants.scores, implementation
    )
    options = {"model": model, "steps": STEPS}
    if alone:
        return Chunk(layers_chunk, (weights, policy), (), options)
    requests = [Settings()] * batch
    after = (
        jnp.ones(batch, bool),
        programs.SlotData(
            jnp.zeros(batch),
            make_sampling(params.config, requests),
            jnp.asarray(stop_table(requests)),
            variant_of(requests),
        ),
    )
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
        noise = jax.jit(drawn_apart(noise, NamedSharding(mesh, places.GROUPS)))
        rows = NamedSharding(mesh, P(DP))
    keys = jax.random.split(jax.random.key(2), 2 * count)
    layers = [(noise(k), noise(v)) for k, v in zip(keys[::2], keys[1::2], strict=True)]
    if alone:  # there is no layer 0, but layers have its number
        nothing = (batch, config.kv_heads, 1, config.head_dim)
        first = jnp.zeros(nothing, params.dtype), jnp.zeros(nothing, params.dtype)
        layers = [first, *layers]
    lengths = jnp.zeros(batch, jnp.int32, device=rows)
    cache = PagedCache.of_layers(layers, lengths)
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


def step_bytes(
    params: Params, weights: Any, policy: Policy, drawn: Sequence[Drawn]
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
    reads = policy.reads(config, Load(drawn[0].visible.shape[1], config.context))
    weights, policy = of_one((weights, policy))
    return step_weight_bytes(weights, config, policy, reads), kv


def busiest_rows(drawn: Drawn, config: ModelConfig) -> int:
    """Keys (and as many values) that the busiest devices read in a chunk of steps.

    In each layer those of the busiest that share the model, which the others wait for;
    of the copies of the model that with most.

    Args:
      drawn: what the steps brought, over a mesh, of sequences that are equally long.
      config: of the model.
    """
    assert drawn.own is not None
    most = np.asarray(drawn.own, np.int64).max(axis=3)  # [steps, layers, dp]
    seen = seen_tokens(drawn, config)[:, :, :1]
    return int((most * seen).sum(axis=(0, 1)).max())


def sent_bytes(params: Params, policy: Policy, batch: int, where: Devices) -> int:
    """Bytes that each device must send in a step; see `step_sent_bytes`.

    Args:
      params: the model.
      policy: bound.
      batch: b, of all devices.
      where: the devices.
    """
    config, layers = params.config, params.config.layers
    reads = policy.reads(config, Load(batch, config.context))
    return step_sent_bytes(
        params.config,
        where.tp,
        where.dp,
        batch // where.dp,
        params.dtype,
        score_rows=policy.wants.scores or (0,) * layers,
        picks_neurons=[n < 1 for n in reads.neurons] if reads else (False,) * layers,
        balanced=policy.parts > 1,
    )


def make_prefill(
    params: Params,
    prompts: int,
    tokens: int,
    implementation: Implementation | None = None,
) -> Callable[[Callable[..., Any]], None]:
    """A function that reads prompts, draws the first token of each, and waits.

    Its argument calls the compiled functions in between: it gets one with its own
    arguments, and `prefill.run_plainly` does no more than that.

    Args:
      params: the model.
      prompts: b.
      tokens: of each.
      implementation: of the kernels.
    """
    config = params.config
    model = make_decoder(
        config.architecture, params.weights, implementation=implementation
    )
    ids = jax.random.randint(jax.random.key(3), (prompts, tokens), 0, config.vocab_size)
    given = dict(enumerate(np.asarray(ids).tolist()))
    requests = [Settings()] * prompts
    slots = programs.SlotData(
        jnp.zeros(prompts),
        make_sampling(config, requests),
        jnp.asarray(stop_table(requests)),
        variant_of(requests),
    )
    every, remaining = jnp.ones(prompts, bool), jnp.full(prompts, 10**8, jnp.int32)

    def read(call: Callable[..., Any]) -> None:
        state, logits = programs.empty_state(model, prompts, tokens, params.weights)
        cache, logits = prefill.read_prompts(
            params.weights,
            given,
            state.cache,
            logits,
            model=model,
            call=call,
        )
        state = dataclasses.replace(state, cache=cache)
        drawn = call(programs.first_token, state, logits, every, remaining, slots)
        jax.block_until_ready(drawn)

    return read
