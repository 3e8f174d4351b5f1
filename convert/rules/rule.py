"""The vocabulary that the families' tables are written in."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from convert.source import ConversionError


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one weight comes from.

    `{i}` stands for the layer in both names. A rule whose target the model does not
    have (a bias, an untied head) does not apply.

    Attributes:
      target: path in the tree of `polarjax.model.weight_shapes`.
      sources: Hugging Face's names; several are stacked along the rows.
      transpose: whether the source is stored the other way round.
      heads: for stacked sources, the field of `ModelConfig` that counts the heads of
        each; a source has that many times `head_dim` rows.
      fill: instead of sources, one number for every entry.
    """

    target: str
    sources: tuple[str, ...] = ()
    transpose: bool = False
    heads: tuple[str, ...] = ()
    fill: float | None = None


# Sizes beyond this are damage, and arithmetic on them may take forever.
_LARGEST = 2**24
LARGEST_DEPTH = 2**12  # layers


def size(
    config: dict[str, Any],
    name: str,
    default: int | None = None,
    largest: int = _LARGEST,
) -> int:
    """A positive integer of config.json.

    Args:
      config: what the file holds.
      name: of the field.
      default: for a file without it, or with null; None if there must be one.
      largest: that is taken for more than damage.

    Raises:
      ConversionError: if it is missing or is no such number.
    """
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConversionError(f"the configuration has no {name}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConversionError(
            f"configuration: {name} must be an integer, not {value!r}"
        )
    if not 1 <= value <= largest:
        raise ConversionError(
            f"configuration: {name} must be between 1 and {largest}, not {value}"
        )
    return value


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """A positive finite number of config.json; arguments as those of `size`."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConversionError(f"the configuration has no {name}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConversionError(f"configuration: {name} must be a number, not {value!r}")
    if not 0 < value <= sys.float_info.max:  # an integer may be larger
        raise ConversionError(
            f"configuration: {name} must be positive and finite, not {value}"
        )
    return float(value)


def flag(config: dict[str, Any], name: str, default: bool) -> bool:
    """A boolean of config.json; arguments as those of `size`."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConversionError(
            f"configuration: {name} must be true or false, not {value!r}"
        )
    return value


def one_of(
    config: dict[str, Any], name: str, supported: tuple[str, ...], default: str
) -> str:
    """A word of config.json out of those supported."""
    value = config.get(name)
    if value is None:
        value = default
    if value not in supported:
        raise ConversionError(
            f"configuration: {name} {value!r} is not supported; "
            f"supported: {', '.join(supported)}"
        )
    return value
