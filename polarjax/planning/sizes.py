"""Numbers that users set, checked; and whole ones that size a call."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from polarjax.config import ModelConfig
from polarjax.storage.quoted import quoted

# Of what is counted: devices number it in 32 bits.
_MOST = 2**31 - 1
_LARGEST_FLOAT = sys.float_info.max


def positive(name: str, value: Any, most: float = _MOST) -> int:
    """A setting that counts something.

    Args:
      name: of the setting.
      value: as it was set.
      most: that it may be.

    Raises:
      ValueError: if it is not a positive integer, or more.
    """
    if not _whole(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {quoted(value)}")
    return _at_most(name, int(value), most)


def at_least(name: str, value: Any, low: int, most: float = math.inf) -> int:
    """A whole number with a smallest value.

    Args:
      name: of the setting.
      value: as it was set.
      low: the least that it may be.
      most: and the most.

    Raises:
      ValueError: if it is not an integer, or less, or more.
    """
    if not _whole(value) or value < low:
        raise ValueError(
            f"{name} must be an integer of at least {low}, got {quoted(value)}"
        )
    return _at_most(name, int(value), most)


def _at_most(name: str, value: int, most: float) -> int:
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {quoted(value)}")
    return value


def above_zero(name: str, value: Any, most: float = math.inf) -> float:
    """A setting that is a part of something, or a multiple.

    Args:
      name: of the setting.
      value: as it was set.
      most: that it may be.

    Raises:
      ValueError: if it is no finite number above 0, or more.
    """
    if not _finite(value) or not 0 < value <= most:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be a number above 0{limit}, got {quoted(value)}")
    return float(value)


def not_negative(name: str, value: Any) -> float:
    """A setting that may be 0, to do without.

    Raises:
      ValueError: if it is no finite number from 0 on.
    """
    if not _finite(value) or value < 0:
        raise ValueError(f"{name} must be a number from 0 on, got {quoted(value)}")
    return float(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    number = isinstance(value, float | np.floating) or _whole(value)
    return number and bool(abs(value) <= _LARGEST_FLOAT)


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
