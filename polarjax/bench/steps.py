"""Compiled decode steps, and the bytes that they must read.

Of the benchmark, this module and `prefills` alone know the cache and what is compiled.

A whole model runs the programs of an engine's step, over pages in no order. Layers
alone are the layers 1 to n of a model with nothing before or after them: what they put
out, normalised, is what they read in the next step. Layer 0, the one whose attention
is always dense, is not among them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pallas_kernels import Implementation
from polarjax import ModelConfig, Params
from polarjax.bench.meshes import Devices, drawn_apart, of_one
from polarjax.bench.shapes import Sparsity
from polarjax.cache import PagedCache
from polarjax.engine import places
from polarjax.engine import steps as engine
from polarjax.engine.programs import Drawn
from polarjax.engine.sampling import Variant
from polarjax.engine.slots import Slots, empty_slots
from polarjax.engine.stats import kv_rows, seen_tokens
from polarjax.mesh.cut import TP, axis_size, local_config, mesh_of
from polarjax.model import Decoder, make_decoder
from polarjax.model.layer import Layer
from polarjax.planning.cost import kv_row_bytes, step_weight_bytes
from polarjax.planning.crossover import settle
from polarjax.planning.memory import PAGE
from polarjax.planning.per_device import step_sent_bytes
from polarjax.policies import named
from polarjax.policy import Dense, Load, Policy, Seen

STEPS = 64  # timed at once, each sent to the device before the one before has ended
MANY = 10**8  # tokens that a request may draw: none of them ends


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


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def layers_step(
    weights: Any, policy: Policy, state: Stream, *, model: Decoder
) -> tuple[Stream, tuple[jax.Array, jax.Array]]:
    """A step of layers 1 to n alone: the next state; groups read, and tokens seen."""
    config, share = model.config, model.share
    rows = model.score_rows or (0,) * config.layers
    b = state.x.shape[0]
    live, zeros = jnp.ones(b, bool), jnp.zeros(b, jnp.int32)
    x, cache, parts = state.x, state.cache, None
    slot = jnp.arange(b, dtype=jnp.int32)
    seen = Seen(live, jnp.zeros(b), cache.lengths + 1, slot)
    reads = [zeros]  # layer 0 reads nothing: it is not here
    for i in range(1, config.layers):
        layer = Layer(config, i, x.dtype, share, rows[i], model.implementation)
        variables = {"params": weights[f"layers_{i}"]}
        found: Any = layer.apply(
            variables, x, parts, seen, cache, policy, method=Layer.step
        )
        x, parts, _, cache, read = found
        reads.append(read.groups)
    wide = x.astype(jnp.float32)
    wide = wide if parts is None else wide + parts.sum(axis=0)
    norm = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5)
    cache = cache.grown(jnp.ones_like(zeros))
    after = Stream(cache, (wide * norm).astype(x.dtype))
    return after, (jnp.stack(reads), cache.lengths)


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step of a bound policy, which takes a state and gives it on.

    Attributes:
      weights: bound.
      policy: bound.
      model: with the policy's score rows.
    """

    weights: Any
    policy: Policy
    model: Decoder

    def lower(self, state: Any) -> list[Any]:
        """Its programs for such a state, traced and lowered; what reads is the first.

        Args:
          state: of `make_state`.
        """
        args = self.weights, self.policy, state
        if isinstance(state, Stream):
            return [layers_step.lower(*args, model=self.model)]
        drawing = engine.draw_tokens.lower(state, **self._drawing)
        return [engine.decode.lower(*args, **self._decoding), drawing]

    def __call__(self, state: Any) -> tuple[Any, Drawn]:
        """The next state, and what the step brought; the old one is donated."""
        args = self.weights, self.policy, state
        if isinstance(state, Stream):
            state, (reads, visible) = layers_step(*args, model=self.model)
            none = jnp.zeros(visible.shape, jnp.int32)
            return state, Drawn(none, none, none, reads, visible)
        state = engine.decode(*args, **self._decoding)
        state, (drawn, _) = engine.draw_tokens(state, **self._drawing)
        return state, drawn

    @property
    def _decoding(self) -> dict[str, Any]:
        return {"model": self.model, "kind": type(self.policy)}

    @property
    def _drawing(self) -> dict[str, Any]:
        """Static arguments of what draws, for which a policy is nothing."""
        return {"model": self.model.clone(score_rows=()), "variant": Variant.GREEDY}


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


def make_step(
    params: Params,
    weights: Any,
    policy: Policy,
    implementation: Implementation | None = None,
) -> Step:
    """The step of a bound policy, greedy.

    Args:
      params: the model.
      weights: bound.
      policy: bound.
      implementation: of the kernels.
    """
    model = make_decoder(
        params.config.architecture, params.weights, policy.wants.scores, implementation
    )
    return Step(weights, policy, model)


def make_state(params: Params, batch: int, context: int, alone: bool = False) -> Any:
    """A cache full of noise, and what else a step goes on from, where the model is.

    Args:
      params: the model.
      batch: b.
      context: positions of each sequence.
      alone: whether the model is layers alone.
    """
    config, mesh = params.config, mesh_of(params.weights)
    model = make_decoder(config.architecture, params.weights)
    groups = local_config(config, axis_size(mesh, TP)).kv_heads
    shape = groups, PAGE, config.head_dim
    table = shuffled_pages(batch, context, model.share.dp)
    count, row = int(table.max()) + 1, table.shape[1]

    # Some pages after the other: drawing takes several times the bytes of what is
    # drawn, and beside a cache that fills the device there is no such room.
    @jax.jit
    def noise(key: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape, params.dtype)

        return jax.lax.map(draw, jax.random.split(key, count), batch_size=row)

    if mesh is not None:
        noise = jax.jit(drawn_apart(noise, NamedSharding(mesh, places.GROUPS)))
    layers = config.layers - 1 if alone else config.layers
    keys = jax.random.split(jax.random.key(2), 2 * layers)
    drawn = [(noise(k), noise(v)) for k, v in zip(keys[::2], keys[1::2], strict=True)]
    if alone:  # there is no layer 0, but layers have its number
        nothing = jnp.zeros((1, *shape), params.dtype)
        drawn = [(nothing, jnp.zeros_like(nothing)), *drawn]
        lengths = jnp.zeros(batch, jnp.int32)
        cache = PagedCache.of_layers(drawn, lengths, jnp.asarray(table))
        x = jax.random.normal(keys[0], (batch, config.dim), params.dtype)
        return Stream(cache, x)
    state = with_table(
        empty_slots(model, batch, context, 1, PAGE, params.weights), table
    )
    cache = PagedCache.of_layers(drawn, state.cache.lengths, state.cache.table)
    # Tokens that differ: equal ones would let every sequence choose the same heads.
    token = jax.random.randint(keys[0], (batch,), 0, config.vocab_size, jnp.int32)
    token = jax.device_put(token, state.token.sharding)
    live = jnp.ones(batch, bool, device=state.live.sharding)
    return dataclasses.replace(state, cache=cache, token=token, live=live)


def shuffled_pages(batch: int, context: int, parts: int = 1) -> np.ndarray:
    """A table of pages in no order, int32[b, m], as after many requests.

    Args:
      batch: sequences, b.
      context: positions of each.
      parts: of the batch, each of which has pages of its own, from 1 on.
    """
    rng = np.random.default_rng(1)
    each, row = batch // parts, -(-context // PAGE)
    pages = [1 + rng.permutation(each * row) for _ in range(parts)]
    return np.concatenate(pages).reshape(batch, row).astype(np.int32)


def with_table(slots: Slots, table: np.ndarray) -> Slots:
    """Slots that have pages, and may draw as many tokens as they want.

    Args:
      slots: that have none.
      table: int32[b, m].
    """
    old = slots.cache.table
    assert old is not None
    cache = dataclasses.replace(slots.cache, table=jax.device_put(table, old.sharding))
    where = slots.remaining.sharding
    remaining = jnp.full(len(table), MANY, jnp.int32, device=where)
    return dataclasses.replace(slots, cache=cache, remaining=remaining)


def steps_in(context: int) -> int:
    """How many steps are timed at once: as many as fit, at most `STEPS`."""
    return min(STEPS, context - 1)


def rewind(state: Any, context: int) -> Any:
    """The state from which the steps end with a full context."""
    begin = context - steps_in(context)
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
      drawn: what each step brought.
    """
    config = params.config
    rows = sum(
        kv_rows(each, config)[0] if each.own is None else busiest_rows(each, config)
        for each in drawn
    )
    kv = rows / len(drawn) * kv_row_bytes(config, params.dtype)
    reads = policy.reads(config, Load(len(drawn[0].visible), config.context))
    weights, policy = of_one((weights, policy))
    return step_weight_bytes(weights, config, policy, reads), kv


def busiest_rows(drawn: Drawn, config: ModelConfig) -> int:
    """Keys (and as many values) that the busiest devices read in some steps.

    In each layer those of the busiest that share the model, which the others wait for;
    of the copies of the model that with most.

    Args:
      drawn: what a step brought, over a mesh, of sequences that are equally long.
      config: of the model.
    """
    assert drawn.own is not None
    most = np.asarray(drawn.own, np.int64).max(axis=2)  # [layers, dp]
    seen = seen_tokens(drawn, config)[:, :1]
    return int((most * seen).sum(axis=0).max())


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
