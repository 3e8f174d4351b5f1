"""Whole numbers that size a call: counts as users set them, and powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from polarjax.config import ModelConfig


def positive(name: str, value: Any) -> int:
    """A setting that counts something.

    Raises:
      ValueError: if it is not a positive integer.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def up_to_context(
    name: str, tokens: int | None, default: int, config: ModelConfig
) -> int:
    """A setting that counts tokens which the model is to read together.

    Args:
      name: of the setting.
      tokens: as it was set; None for the default.
      default: that, or the model's context if it is less.
      config: of the model.

    Raises:
      ValueError: if it is not a positive integer, or more than the context.
    """
    if tokens is None:
        return min(default, config.context)
    if positive(name, tokens) > config.context:
        raise ValueError(
            f"{name} is {tokens}, beyond the model's context of {config.context}"
        )
    return int(tokens)


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two: one program serves all lengths up to it."""
    return max(smallest, 1 << (length - 1).bit_length())
