"""What a policy may be asked, what it is shown, and the policy that reads everything.

A policy answers questions about one layer and computes no layer itself. It is a frozen
pytree and an argument of the compiled step, so that its arithmetic and the layer's
become one program. Any question may be left alone: None is "all of it".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from polarjax.config import LARGEST, NO_CONFIG, POLICY
from polarjax.storage.checked import UNSTORED, Between, read_record
from polarjax.storage.files import FileError, parse_json
from polarjax.storage.quoted import quoted

Tree = dict[str, Any]

Budgets = tuple[Annotated[float, Between(1, LARGEST)], ...]
NeuronBudgets = tuple[
    tuple[
        Annotated[int, Between(1, LARGEST)],
        tuple[Annotated[int, Between(1, LARGEST)], ...],
    ],
    ...,
]
Thresholds = tuple[Annotated[float, Between(-1e30, 1e30)], ...]

_static = {"static": True}


class Groups(NamedTuple):
    """The KV groups that each sequence reads.

    Attributes:
      index: int32[b, n], best first: distinct numbers of groups from 0 to k - 1, which
        no step checks.
      count: int32[b], how many of them are read, at least 1.
    """

    index: jax.Array
    count: jax.Array


class Pages(NamedTuple):
    """The spans of the KV cache that each sequence and KV group reads.

    Attributes:
      index: int32[b, k, p] or int32[b, 1, p] for all groups alike: numbers of spans,
        distinct, in any order.
      count: int32[b, k] or int32[b, 1], how many of them are read.
    """

    index: jax.Array
    count: jax.Array


class Rows(NamedTuple):
    """The MLP neurons that the whole batch reads.

    Attributes:
      index: int32[n], distinct. Numbers of neurons that the device lacks are none.
      count: int32[], how many of them are read; None for all n.
      scale: float32[b, n], what each request multiplies each neuron's activation by;
        None for 1.
    """

    index: jax.Array
    count: jax.Array | None = None
    scale: jax.Array | None = None


class Threshold(NamedTuple):
    """The inputs of a product that count: those with |x_i| scale_i > tau, row by row.

    Attributes:
      tau: float32[].
      scale: float32[inputs]; None for 1.
    """

    tau: jax.Array
    scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Wants:
    """What has to be computed for a policy, known when the step is compiled.

    Attributes:
      scores: by layer, the rows that `Policy.bind` appended to the QKV matrix; () for
        none.
      norms: whether `groups` needs the true norms of the groups' outputs, which cost a
        pass of dense attention.
      summary: how a span of keys is summed up, keys [..., span, d] to [..., u, w];
        None for no summaries.
      span: positions that `Pages` counts in, 16 or 64.
      gate: whether `neurons` needs the gate's values before the other matrices are
        read.
    """

    scores: tuple[int, ...] = ()
    norms: bool = False
    summary: Callable[[jax.Array], jax.Array] | None = None
    span: int = 64
    gate: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of one layer at the moment a policy is asked.

    Fields are filled as the layer goes on and are None until then. What no policy uses
    is not computed.

    Attributes:
      live: bool[b], False for finished rows and padding, which have no say.
      density: float32[b], the fraction of the KV groups that each request asked for; 0
        for the policy's own budgets.
      lengths: int32[b], positions in the cache, the newest included.
      slot: int32[b], number of each row among all rows of the batch; where requests
        come and go, their seeds, which stay theirs.
      u: [b, m], the layer's input as attention reads it.
      scores: float32[b, r], what the rows of `Wants.scores` yield for u.
      q: [b, h, d], queries, rotated.
      summary: [b, spans, k, u, w], of the keys of each whole span.
      norms: float32[b, k], L2 norms of the groups' true outputs.
      z: [b, m], the MLP's input.
      gate: float32[b, f], the activated gate.
      before: the same record of the layer below; None in layer 0.
    """

    live: jax.Array
    density: jax.Array
    lengths: jax.Array
    slot: jax.Array
    u: Any = None
    scores: Any = None
    q: Any = None
    summary: Any = None
    norms: Any = None
    z: Any = None
    gate: Any = None
    before: Seen | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """What a decode step has to do, for plans of what it reads.

    Attributes:
      batch: requests that are decoded together.
      context: positions in the cache of each, a mean.
      density: fraction of the KV groups that requests ask for, a mean; None if they
        ask for none.
    """

    batch: int
    context: int
    density: float | None = None


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a decode step reads: planned by a policy, or counted by steps.

    Attributes:
      groups: by layer, KV groups that a request reads, a mean.
      neurons: by layer, the fraction of the MLP's neurons that the batch reads; () for
        all of them.
    """

    groups: tuple[float, ...]
    neurons: tuple[float, ...] = ()

    @property
    def neuron_density(self) -> tuple[float, ...]:
        """By layer, the fraction of the neurons; 1 where none are named."""
        return self.neurons or (1.0,) * len(self.groups)

    @classmethod
    def everything(cls, config: Any) -> Reads:
        """What the dense model reads, of a `ModelConfig`."""
        layers = config.layers
        return cls((float(config.kv_heads),) * layers, (1.0,) * layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """What training left for a policy: an adapter's arrays and numbers.

    Attributes:
      routers: nested dict of arrays, by layer, such as
        `layers_3/heads/{weight [k, m], bias [k]}`,
        `layers_3/neurons/{down [r, m], up [f, r]}` and `layers_3/updates/...`.
      budgets: KV groups to read in each layer; () for none.
      adaptive: whether the budgets are means over tokens: which token reads how many
        is then decided by the thresholds.
      neuron_budgets: MLP neurons to read in each layer, by batch size:
        ((batch, (n of layer 0, n of layer 1, ...)), ...), batch sizes ascending; ()
        for all neurons.
      thresholds: by layer, the router score from which on a KV group is read; () for
        none.
    """

    routers: Annotated[Tree, UNSTORED] = dataclasses.field(
        default_factory=dict, repr=False
    )
    budgets: Budgets = dataclasses.field(default=(), metadata=_static)
    adaptive: bool = dataclasses.field(default=False, metadata=_static)
    neuron_budgets: NeuronBudgets = dataclasses.field(default=(), metadata=_static)
    thresholds: Thresholds = dataclasses.field(default=(), metadata=_static)

    def __post_init__(self) -> None:
        """Programs are kept by these numbers, for which lists would not do."""
        by_batch = tuple((b, tuple(n)) for b, n in self.neuron_budgets)
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "neuron_budgets", by_batch)
        object.__setattr__(self, "thresholds", tuple(self.thresholds))

    @classmethod
    def from_json(cls, text: str) -> Learned:
        """The numbers that a checkpoint's config.json says, without arrays.

        Args:
          text: JSON that `ModelConfig.from_json` takes.

        Raises:
          ValueError: naming the one that is of another type or range.
        """
        try:
            fields = parse_json(text, "it")
            return read_record(cls, {n: v for n, v in fields.items() if n in POLICY})
        except ValueError as error:
            raise FileError(f"{NO_CONFIG}: {error}") from None

    def numbers(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        return {
            "budgets": list(self.budgets),
            "adaptive": self.adaptive,
            "neuron_budgets": [[b, list(n)] for b, n in self.neuron_budgets],
            "thresholds": list(self.thresholds),
        }


class Policy:
    """Which KV groups, pages, neurons and channels a step reads.

    Attributes:
      wants: what has to be computed for it.
      asks: the questions that it answers and could leave alone: "groups", "neurons".
      flexible: whether it follows `Seen.density`.
      parts: equal ones of groups and neurons, each of which it reads as much of.
      learned: what it took from training; empty if it needs nothing.
    """

    wants: Wants = Wants()
    asks: tuple[str, ...] = ()
    flexible: bool = False
    parts: int = 1
    learned: Learned = Learned()

    def bind(self, params: Any) -> tuple[Tree, Policy]:
        """Prepare weights and policy for an engine's life, outside the step.

        Args:
          params: `polarjax.Params`, the model.

        Returns:
          Weights and policy as the step takes them.

        Raises:
          ValueError: if the policy does not fit the model.
        """
        return params.weights, self

    def of(self, learned: Learned) -> Policy:
        """The policy with a model's own adapter, where it needs one and has none.

        Args:
          learned: of the model's adapter.
        """
        del learned
        return self

    def flexing(self) -> Policy:
        """The policy that follows the densities that requests ask for, if it can."""
        return self

    def sized(self, batch: int) -> Policy:
        """The policy whose choices for the whole batch are made for so many requests.

        Args:
          batch: requests that are decoded together.
        """
        del batch
        return self

    def asking(self, asks: tuple[str, ...]) -> Policy:
        """The policy that answers some of its questions, and leaves the others alone.

        Args:
          asks: of `asks`, those to answer.
        """
        return dataclasses.replace(cast(Any, self), asks=asks)

    def settings(self) -> dict[str, Any]:
        """What a user may set of it, by name, for records of results."""
        fields = dataclasses.fields(cast(Any, self))
        named = [field.name for field in fields if field.metadata.get("setting")]
        return {name: getattr(self, name) for name in named}

    def budgeted(self, budgets: Any, thresholds: Any = ()) -> Policy:
        """A bound policy with other budgets as data: no program is compiled anew.

        Args:
          budgets: KV groups by layer.
          thresholds: by layer, if the budgets are means over tokens.

        Raises:
          ValueError: if the policy has no budgets.
        """
        del budgets, thresholds
        raise ValueError(f"{type(self).__name__} has no budgets to search")

    def groups(self, layer: int, seen: Seen, pick: Any) -> Groups | None:
        """Choose the KV groups that each sequence reads.

        Args:
          layer: from 0.
          seen: up to `q`, `summary` and, if wanted, `norms`.
          pick: `polarjax.model.Pick`, which ranks and counts on the device.
        """

    def pages(self, layer: int, seen: Seen, pick: Any) -> Pages | None:
        """Choose the spans of the KV cache that each sequence and group reads."""

    def neurons(self, layer: int, seen: Seen, pick: Any) -> Rows | None:
        """Choose the MLP neurons that the whole batch reads; `seen` is whole."""

    def channels(
        self, layer: int, matrix: str, x: jax.Array, pick: Any
    ) -> Threshold | None:
        """Choose the inputs of one product that count, row by row.

        Args:
          layer: from 0.
          matrix: "qkv", "out", "up" (and the gate) or "down".
          x: [..., inputs] of the product.
          pick: `polarjax.model.Pick`, which knows the selection kernels.
        """

    def reads(self, config: Any, load: Load) -> Reads | None:
        """What a step will read; None of a policy that only measures.

        Args:
          config: `ModelConfig` of the model.
          load: what the step has to do.
        """
        del load
        return Reads.everything(config)


def check_policy(policy: Any) -> Policy:
    """The policy, if it is one.

    Raises:
      TypeError: naming what it is instead.
    """
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(f"policy must be a policy like Dense(), got {quoted(policy)}")
    fields = dataclasses.is_dataclass(policy)
    if not fields or any(leaf is policy for leaf in jax.tree.leaves(policy)):
        raise TypeError(
            f"policy {type(policy).__name__} must be a dataclass that jax knows: put "
            "@jax.tree_util.register_dataclass and @dataclasses.dataclass(frozen=True) "
            "before its class"
        )
    return policy


def check_groups(chosen: Any, policy: Policy, b: int, k: int) -> None:
    """Raise unless an answer to `Policy.groups` is one, when the step is traced.

    Args:
      chosen: the answer.
      policy: that gave it.
      b: sequences.
      k: KV groups.

    Raises:
      TypeError: if it is neither `Groups` nor None.
      ValueError: if an array has another shape or dtype; it is named.
    """
    if chosen is None:
        return
    name = _check_kind(chosen, Groups, policy, "groups")
    n = jnp.shape(chosen.index)[1] if jnp.ndim(chosen.index) == 2 else 0
    if not 1 <= n <= k:
        raise ValueError(
            f"{name} answered an index of shape {list(jnp.shape(chosen.index))}; it "
            f"must be [{b}, n] with n from 1 to {k}"
        )
    _check_integers(f"{name} answered an index", chosen.index, (b, n))
    _check_integers(f"{name} answered a count", chosen.count, (b,))


def check_pages(chosen: Any, policy: Policy, b: int, k: int) -> None:
    """Raise unless an answer to `Policy.pages` is one, when the step is traced.

    Args:
      chosen: the answer.
      policy: that gave it.
      b: sequences.
      k: KV groups.

    Raises:
      TypeError: if it is neither `Pages` nor None.
      ValueError: if an array has another shape or dtype; it is named.
    """
    if chosen is None:
        return
    name = _check_kind(chosen, Pages, policy, "pages")
    shape = jnp.shape(chosen.index)
    if len(shape) != 3 or shape[:2] not in ((b, k), (b, 1)):
        raise ValueError(
            f"{name} answered an index of shape {list(shape)}; it must be "
            f"[{b}, {k}, p], or [{b}, 1, p] for all groups alike"
        )
    _check_integers(f"{name} answered an index", chosen.index, shape)
    _check_integers(f"{name} answered a count", chosen.count, shape[:2])


def check_channels(chosen: Any, policy: Policy, inputs: int) -> None:
    """Raise unless an answer to `Policy.channels` is one, when the step is traced.

    Args:
      chosen: the answer.
      policy: that gave it.
      inputs: of the product.

    Raises:
      TypeError: if it is neither `Threshold` nor None.
      ValueError: if an array has another shape; it is named.
    """
    if chosen is None:
        return
    name = _check_kind(chosen, Threshold, policy, "channels")
    scale = (inputs,) if chosen.scale is None else jnp.shape(chosen.scale)
    if jnp.shape(chosen.tau) or scale != (inputs,):
        raise ValueError(
            f"{name} answered a tau of shape {list(jnp.shape(chosen.tau))} and a scale "
            f"of shape {list(scale)}; they must be [] and [{inputs}]"
        )


def check_rows(rows: Any, policy: Policy) -> None:
    """Raise unless an answer to `Policy.neurons` is one, when the step is traced.

    Args:
      rows: the answer.
      policy: that gave it.

    Raises:
      TypeError: if it is neither `Rows` nor None.
      ValueError: if the index has another shape or dtype.
    """
    if rows is None:
        return
    name = _check_kind(rows, Rows, policy, "neurons")
    _check_integers(f"{name} answered an index", rows.index, (jnp.size(rows.index),))


def _check_kind(answer: Any, kind: type, policy: Policy, question: str) -> str:
    """The name of a policy's method, whose answer is of the kind."""
    name = f"{type(policy).__name__}.{question}"
    if not isinstance(answer, kind):
        raise TypeError(
            f"{name} answers {kind.__name__} or None, not {type(answer).__name__}"
        )
    return name


def _check_integers(what: str, array: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape or not jnp.issubdtype(
        jnp.result_type(array), jnp.integer
    ):
        raise ValueError(
            f"{what} that is {jnp.result_type(array)}{list(jnp.shape(array))}; it must "
            f"be int32{list(shape)}"
        )


def groups_read(chosen: Groups | None, b: int, k: int) -> jax.Array:
    """Which KV groups an answer of `Policy.groups` stands for, bool[b, k].

    Args:
      chosen: the answer.
      b: sequences.
      k: KV groups.
    """
    if chosen is None:
        return jnp.ones((b, k), bool)
    active = jnp.arange(chosen.index.shape[1]) < chosen.count[:, None]
    read = jax.nn.one_hot(chosen.index, k, dtype=bool) & active[..., None]
    return read.any(axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Every group, page, neuron and channel, with the original weights."""
