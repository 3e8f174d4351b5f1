"""The families' tables of rules, written out for one model, for both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax.traverse_util import flatten_dict

from convert.rules.rule import Rule
from convert.source import ConversionError
from polarjax.config import ModelConfig
from polarjax.model import weight_shapes


@dataclasses.dataclass(frozen=True)
class Place:
    """What a tensor of Hugging Face's is in our weights.

    Attributes:
      target: the weight, a path joined by "/".
      rows: of the weight.
      transpose: whether the tensor is stored the other way round.
      shape: of the tensor.
    """

    target: str
    rows: slice
    transpose: bool
    shape: tuple[int, ...]


def find_places(
    config: ModelConfig, rules: Iterable[Rule]
) -> tuple[dict[str, Place], dict[str, float], dict[str, tuple[int, ...]]]:
    """Where each tensor goes, or comes from.

    Args:
      config: of the model.
      rules: of its family.

    Returns:
      The places by Hugging Face's name, what fills the weights that have none, and the
      shapes of all weights.

    Raises:
      ConversionError: if there is no rule for a weight.
    """
    leaves: dict[str, Any] = flatten_dict(weight_shapes(config), sep="/")
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    found: dict[str, Place] = {}
    fills: dict[str, float] = {}
    for rule in rules:
        for i in range(config.layers) if "{i}" in rule.target else (0,):
            target = rule.target.replace("{i}", str(i))
            if target not in shapes:
                continue
            if rule.fill is not None:
                fills[target] = rule.fill
                continue
            counts = [getattr(config, name) * config.head_dim for name in rule.heads]
            counts = counts or shapes[target][:1]
            begin = 0
            for name, rows in zip(rule.sources, counts, strict=True):
                shape = (rows, *shapes[target][1:])
                found[name.replace("{i}", str(i))] = Place(
                    target,
                    slice(begin, begin + rows),
                    rule.transpose,
                    shape[::-1] if rule.transpose else shape,
                )
                begin += rows
    unset = shapes.keys() - {place.target for place in found.values()} - fills.keys()
    if unset:
        raise ConversionError(f"no rule sets {', '.join(sorted(unset))}")
    return found, fills, shapes
