"""The KV cache of one batch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from polarjax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each layer a buffer of its own.

    A selected KV group is one contiguous stream of s rows. Positions at and beyond a
    sequence's length hold garbage that nothing reads.

    Attributes:
      keys: per layer, [b, k, s, d].
      values: per layer, [b, k, s, d].
      lengths: int32[b], valid positions of each sequence, in tokens.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """Positions that the buffers hold, s."""
        return self.keys[0].shape[2]

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype,
        sharding: jax.sharding.Sharding | None = None,
    ) -> KVCache:
        """A cache of no tokens.

        Args:
          config: of the model.
          batch: sequences, b.
          capacity: positions, s.
          dtype: of keys and values.
          sharding: of each layer's; None for the default device.
        """
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        zeros = functools.partial(jnp.zeros, shape, dtype, device=sharding)
        return cls(
            keys=tuple(zeros() for _ in range(config.layers)),
            values=tuple(zeros() for _ in range(config.layers)),
            lengths=jnp.zeros(batch, jnp.int32),
        )
