"""The running batch on the devices: what each slot has, and how the host edits it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pallas_kernels import put
from polarjax.cache import PagedCache, zeros
from polarjax.config import ModelConfig
from polarjax.engine.checks import plain_sampling_of, sampling_of, stop_table
from polarjax.engine.packed import Packed, unpack
from polarjax.engine.places import (
    COLUMNS,
    GROUPS,
    OWN,
    PAGE_GROUPS,
    PAGES,
    ROWS,
    logits_cut,
)
from polarjax.engine.programs import device_of
from polarjax.engine.rules import History, Rules, make_rules
from polarjax.engine.sampling import Sampling
from polarjax.engine.settings import MOST_STOPS, Settings
from polarjax.model import Decoder
from polarjax.params import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All that a batch is between two programs, each of which takes it and gives it on.

    Its arrays are donated: they stay where they are. XLA replays the kernels of a large
    program as a graph on a GPU, and edits all of it first where a single array has
    moved, which takes the host a millisecond or more. So what the large programs yield
    is here, and small ones tell it to the host.

    Attributes:
      cache: everything before `token`.
      token: int32[b], drawn and not yet read.
      live: bool[b], whether the request takes decode steps.
      remaining: int32[b], tokens it may still draw.
      density: float32[b], as in `polarjax.policy.Seen`.
      sampling: how each request draws, with rules.
      stop_ids: int32[b, e], tokens that end each request; -1 for none.
      history: what each request has read and written.
      logits: float32[b, v], of the newest decode step.
      mass: float32[b], their log-sum-exp.
      reads: int32[layers, b], KV groups that it has read.
      visible: int32[b], tokens in the cache of each live request, its newest included.
      own: int32[layers, dp, tp], KV groups that each device of a mesh has read of all
        its live requests; None on one device.
    """

    cache: PagedCache
    token: jax.Array
    live: jax.Array
    remaining: jax.Array
    density: jax.Array
    sampling: Sampling
    stop_ids: jax.Array
    history: History
    logits: jax.Array
    mass: jax.Array
    reads: jax.Array
    visible: jax.Array
    own: jax.Array | None = None

    @property
    def bare(self) -> Slots:
        """The same without keys and values, for programs that leave those alone."""
        return dataclasses.replace(self, cache=self.cache.bare)

    def over(self, cache: PagedCache) -> Slots:
        """Bare ones with keys and values again.

        Args:
          cache: that has them.
        """
        return dataclasses.replace(self, cache=self.cache.over(cache))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """What a slot begins with, or goes on with; arrays have an axis of slots first.

    Attributes:
      length: int32, positions in the cache.
      token: int32, drawn and not yet read.
      live: bool, whether it takes decode steps at once.
      remaining: int32, tokens it may still draw.
      density: float32.
      sampling: how it draws, but for rules.
      stop_ids: int32[e].
      prompt: int32, tokens of its prompt.
    """

    length: Any
    token: Any
    live: Any
    remaining: Any
    density: Any
    sampling: Sampling
    stop_ids: Any
    prompt: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """What the host changes before a program; of a mesh each part has its own share.

    They take effect in this order.

    Attributes:
      frees: bool[b], slots that are dead from here on.
      slots: int32[n], which of the part's slots begin with the rows; numbers from its b
        on for none.
      rows: n of `Row`, with a row of words for each.
      entries: int32[e, 3], of page tables: slot, index in its row, page; slots from
        the part's b on for none.
    """

    frees: Any
    slots: Any
    rows: Packed
    entries: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ruled:
    """What a slot needs besides, whose request has rules; arrays [1, ...].

    It is large, and most requests have none.

    Attributes:
      slot: int32, of the part of the batch; its b for none.
      rules: of the request.
      tokens: int32[context], of its prompt, and what it has drawn behind them.
    """

    slot: Any
    rules: Rules
    tokens: Any


@functools.partial(
    jax.jit, static_argnames=("model",), donate_argnames=("slots",), keep_unused=True
)
def edit(slots: Slots, packed: Packed, *, model: Decoder) -> Slots:
    """The slots with what the host has changed; those that begin have no rules.

    Args:
      slots: donated; may be bare.
      packed: an `Edit` with a row of words for each part of the batch.
      model: that the batch is of.
    """

    def apply(slots: Slots, packed: Packed) -> Slots:
        change: Edit = unpack(packed)
        rows: Row = unpack(change.rows)

        def put(whole: jax.Array, part: Any) -> jax.Array:
            return whole.at[change.slots].set(part, mode="drop")

        cache, dead = slots.cache, change.frees
        slot, index, page = change.entries.T
        assert cache.table is not None
        cache = dataclasses.replace(
            cache,
            lengths=put(jnp.where(dead, 0, cache.lengths), rows.length),
            table=cache.table.at[slot, index].set(page, mode="drop"),
        )
        new = dataclasses.replace(rows.sampling, rules=Rules.nothing())
        history = slots.history
        return dataclasses.replace(
            slots,
            cache=cache,
            token=put(slots.token, rows.token),
            live=put(slots.live & ~dead, rows.live),
            remaining=put(slots.remaining, rows.remaining),
            density=put(slots.density, rows.density),
            sampling=jax.tree.map(put, slots.sampling, new),
            stop_ids=put(slots.stop_ids, rows.stop_ids),
            # What another has left of tokens changes nothing where there are no rules.
            history=dataclasses.replace(
                history, prompt=put(history.prompt, rows.prompt)
            ),
        )

    kept = cut_slots(model)
    return model.share.over(apply, (kept, ROWS), kept)(slots, packed)


@functools.partial(
    jax.jit, static_argnames=("model",), donate_argnames=("slots",), keep_unused=True
)
def set_rules(slots: Slots, packed: Packed, *, model: Decoder) -> Slots:
    """The slots with the rules of one, after the `edit` in which it begins.

    Args:
      slots: donated; may be bare.
      packed: a `Ruled` with a row of words for each part of the batch.
      model: that the batch is of.
    """

    def apply(slots: Slots, packed: Packed) -> Slots:
        one: Ruled = unpack(packed)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return whole.at[one.slot].set(part, mode="drop")

        sampling, history = slots.sampling, slots.history
        rules = jax.tree.map(put, sampling.rules, one.rules)
        return dataclasses.replace(
            slots,
            sampling=dataclasses.replace(sampling, rules=rules),
            history=dataclasses.replace(
                history, tokens=put(history.tokens, one.tokens)
            ),
        )

    kept = cut_slots(model)
    return model.share.over(apply, (kept, ROWS), kept)(slots, packed)


@functools.partial(jax.jit, static_argnames=("model",))
def take_pages(slots: Slots, pages: jax.Array, *, model: Decoder) -> jax.Array:
    """What some pages hold, [2 layers, n, k, page, d]: of each layer keys, then values.

    Args:
      slots: of the batch.
      pages: int32[n], their numbers; of a mesh each part's share.
      model: that the batch is of.
    """

    def take(slots: Slots, pages: jax.Array) -> jax.Array:
        return jnp.stack(
            [whole[pages] for whole in jax.tree.leaves(slots.cache.apart())]
        )

    specs = cut_slots(model), ROWS
    return model.share.over(take, specs, PAGE_GROUPS)(slots, pages)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def put_pages(
    slots: Slots, data: jax.Array, pages: jax.Array, *, model: Decoder
) -> Slots:
    """Fill some pages with what `take_pages` took.

    Args:
      slots: donated.
      data: as `take_pages` returns it.
      pages: int32[n], where they go; 0, the trash page, for nowhere.
      model: that the batch is of.
    """

    def fill(slots: Slots, data: jax.Array, pages: jax.Array) -> Slots:
        cache = slots.cache
        arrays, tree = jax.tree.flatten(cache.apart())
        layers = jax.tree.unflatten(
            tree, [put(x, (pages,), new) for x, new in zip(arrays, data, strict=True)]
        )
        cache = PagedCache.of_layers(layers, cache.lengths, cache.table)
        return dataclasses.replace(slots, cache=cache)

    kept = cut_slots(model)
    return model.share.over(fill, (kept, PAGE_GROUPS, ROWS), kept)(slots, data, pages)


def cut_slots(model: Decoder) -> Any:
    """How the slots lie on a model's mesh, a prefix of their tree."""
    rows: Any = ROWS
    return Slots(
        PAGES,
        *(rows,) * 7,
        logits=logits_cut(model.share),
        mass=rows,
        reads=COLUMNS,
        visible=rows,
        own=OWN,
    )


def no_rows(config: ModelConfig, count: int) -> Row:
    """Rows of nothing, as arrays of the host.

    Args:
      config: what the model is.
      count: of rows, n.
    """
    numbers: Any = np.zeros(count, np.int32)
    idle = [Settings(stop_ids=())] * count
    return Row(
        length=numbers,
        token=numbers.copy(),
        live=np.zeros(count, bool),
        remaining=numbers.copy(),
        density=np.zeros(count, np.float32),
        sampling=plain_sampling_of(config, idle),
        stop_ids=stop_table(idle, MOST_STOPS),
        prompt=numbers.copy(),
    )


def no_rules(config: ModelConfig, count: int) -> Rules:
    """Rules of requests that have none, as arrays of the host.

    Args:
      config: what the model is.
      count: of requests, n.
    """
    idle = [Settings(stop_ids=())] * count
    return make_rules(config, idle, stop_table(idle, MOST_STOPS))


def empty_slots(
    model: Decoder, count: int, context: int, pages: int, page: int, weights: Tree
) -> Slots:
    """A batch of no requests.

    Args:
      model: that will run.
      count: slots, b, of all parts of the batch.
      context: positions that a request may have.
      pages: of the cache of each part, the trash page among them.
      page: positions of each.
      weights: the original ones, where the batch shall be.
    """
    mesh, share = model.mesh, model.share
    config, parts = model.config, share.dp
    if mesh is not None:
        groups = share.tp * share.own.kv_heads
        config = dataclasses.replace(config, heads=groups, kv_heads=groups)

    def place(spec: Any) -> Any:
        return None if mesh is None else NamedSharding(mesh, spec)

    with jax.default_device(None if mesh else device_of(weights)):
        cache = PagedCache.pool(
            config, count, context, parts * pages, page, model.dtype, place(GROUPS)
        )
        rows = no_rows(model.config, count)
        idle = [Settings(stop_ids=())] * count
        sampling = sampling_of(model.config, idle, rows.stop_ids)
        # In turn, not at once: beside a cache that fills the device there is no room.
        put = functools.partial(jax.device_put, device=place(ROWS))
        shape = (count, model.config.vocab_size)
        layers = model.config.layers
        devices = (layers, share.dp, share.tp)
        return Slots(
            cache=dataclasses.replace(
                cache, lengths=put(rows.length), table=put(np.asarray(cache.table))
            ),
            token=put(rows.token),
            live=put(rows.live),
            remaining=put(rows.remaining),
            density=put(rows.density),
            sampling=jax.tree.map(put, sampling),
            stop_ids=put(rows.stop_ids),
            history=jax.tree.map(put, History.empty(count, context)),
            logits=zeros(shape, jnp.float32, place(logits_cut(share))),
            mass=zeros((count,), jnp.float32, place(ROWS)),
            reads=zeros((layers, count), jnp.int32, place(COLUMNS)),
            visible=zeros((count,), jnp.int32, place(ROWS)),
            own=None if share.alone else zeros(devices, jnp.int32, place(OWN)),
        )
