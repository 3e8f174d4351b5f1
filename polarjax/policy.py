"""What a step asks of contextual sparsity, and the policy that answers "all of it".

A policy answers two questions for each layer and computes no layer itself. It is a
frozen pytree and an argument of the jitted step, so that its arithmetic and the
layer's compile into one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from polarjax.params import Params, Tree


class SelectionPolicy(Protocol):
    """Which KV groups each sequence reads, and which neurons the batch reads."""

    @property
    def wants_norms(self) -> bool:
        """Whether `heads` needs the true head-output norms (they cost a dense pass)."""
        ...

    @property
    def score_rows(self) -> tuple[int, ...]:
        """Per layer, the rows that `bind` appended to the QKV matrix; () for none."""
        ...

    def bind(self, params: Params, batch: int) -> tuple[Tree, SelectionPolicy]:
        """Prepare weights and policy for a batch, once, outside the step.

        Args:
          params: the model.
          batch: number of requests, b.

        Returns:
          The weights with router rows appended to each QKV matrix, and the policy that
          the step takes with them.

        Raises:
          ValueError: if the policy does not fit the model or the batch.
        """
        ...

    def heads(
        self,
        layer: int,
        scores: jax.Array | None,
        norms: jax.Array | None,
        implementation: Implementation | None = None,
    ) -> tuple[jax.Array, jax.Array] | None:
        """Choose the KV groups that each sequence's attention reads.

        Args:
          layer: from 0.
          scores: float32[b, r], what the router rows yield for this layer's input.
          norms: float32[b, k], L2 norms of the groups' true outputs, if wanted.
          implementation: of the selection kernel; None is the default backend's own.

        Returns:
          (indices int32[b, n], n_active int32[b]): sequence i reads the groups
          indices[i, :n_active[i]]. None means every group.
        """
        ...

    def neurons(
        self,
        layer: int,
        scores: jax.Array | None,
        live: jax.Array,
        implementation: Implementation | None = None,
        share: Any = None,
    ) -> jax.Array | None:
        """Choose the MLP neurons that the whole batch reads.

        Args:
          layer: from 0.
          scores: as in `heads`.
          live: bool[b], False for finished rows and padding: they have no say.
          implementation: as in `heads`.
          share: `polarjax.model.Share` of one device of several; `live` is then of its
            part of the batch.

        Returns:
          int32[n], distinct. None means every neuron. Of a share, numbers among its
          own neurons; those beyond are none.
        """
        ...


def groups_read(
    chosen: tuple[jax.Array, jax.Array] | None, b: int, k: int
) -> jax.Array:
    """Which KV groups an answer of `SelectionPolicy.heads` stands for.

    Args:
      chosen: the answer.
      b: sequences.
      k: KV groups.

    Returns:
      bool[b, k].
    """
    if chosen is None:
        return jnp.ones((b, k), bool)
    indices, n_active = chosen
    active = jnp.arange(indices.shape[1]) < n_active[:, None]
    return (jax.nn.one_hot(indices, k, dtype=bool) & active[..., None]).any(axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Every head, every neuron, the original weights."""

    wants_norms = False
    score_rows = ()

    def bind(self, params: Params, batch: int) -> tuple[Tree, Dense]:
        """Nothing to prepare."""
        del batch
        return params.weights, self

    def heads(self, layer, scores, norms, implementation=None) -> None:
        """Every KV group."""
        del layer, scores, norms, implementation

    def neurons(self, layer, scores, live, implementation=None, share=None) -> None:
        """Every neuron."""
        del layer, scores, live, implementation, share
