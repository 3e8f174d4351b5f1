"""Values that users pass, for all requests or one for each, checked one by one."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def listed(name: str, value: Any) -> Any:
    """What an array holds, as Python has it; anything else as it is.

    Raises:
      TypeError: if the array is being traced.
    """
    if isinstance(value, list | tuple):
        return [listed(name, x) if isinstance(x, jax.Array) else x for x in value]
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} is being traced: generate looks at its values, so it cannot be "
            "called inside jax.jit"
        )
    return value.tolist() if isinstance(value, np.ndarray | jax.Array) else value


def each(name: str, value: Any, batch: int) -> list[Any]:
    """A list of one value per request, of one for all or of as many.

    Raises:
      ValueError: if there are several, but not one per request.
    """
    value = listed(name, value)
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values: list[Any] = list(value) if many else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} values for {batch} prompts")
    return values


def _is_number(x: Any, whole: bool) -> bool:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    return isinstance(x, kinds) and not isinstance(x, bool)


def per_request(
    name: str,
    value: Any,
    batch: int,
    low: float,
    high: float,
    whole: bool = False,
    optional: bool = False,
) -> list:
    """A setting for each request, from one number or one per request.

    Args:
      name: for messages.
      value: a number or a sequence of b numbers.
      batch: b.
      low: smallest value allowed.
      high: largest.
      whole: whether only integers will do.
      optional: whether None will do too.

    Raises:
      ValueError: naming the setting, the value and the range.
    """
    values = each(name, value, batch)
    what = "an integer" if whole else "a number"
    for x in values:
        if optional and x is None:
            continue
        if not _is_number(x, whole) or not low <= x <= high:
            none = "None or " if optional else ""
            raise ValueError(
                f"{name} must be {none}{what} from {low} to {high}, "
                f"got {reprlib.repr(x)}"
            )
    return values


def flags(name: str, value: Any, batch: int) -> list[bool]:
    """Whether each request wants something, from one bool or one per request.

    Raises:
      ValueError: naming the setting and the value.
    """
    values = each(name, value, batch)
    for x in values:
        if not isinstance(x, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {reprlib.repr(x)}")
    return [bool(x) for x in values]


def biases(
    name: str, value: Any, batch: int, vocabulary: int, most: int
) -> list[dict[int, float] | None]:
    """What each request adds to which logits, from one mapping or one per request.

    Args:
      name: for messages.
      value: a mapping from token ids to numbers from -100 to 100, or None, or a
        sequence of b of them.
      batch: b.
      vocabulary: ids that there are.
      most: ids that one may name.

    Raises:
      ValueError: naming the setting, what is wrong, and what would be right.
    """
    given = each(name, value, batch)
    found: list[dict[int, float] | None] = []
    for one in given:
        if one is None:
            found.append(None)
            continue
        if not isinstance(one, Mapping):
            raise ValueError(
                f"{name} must be None or a dict from token ids to numbers, got "
                f"{reprlib.repr(one)}"
            )
        if len(one) > most:
            raise ValueError(f"{name} must name {most} tokens at most, got {len(one)}")
        for token, bias in one.items():
            _check_token(name, token, vocabulary)
            if not _is_number(bias, whole=False) or not -100 <= bias <= 100:
                raise ValueError(
                    f"{name} of token {token} must be a number from -100 to 100, got "
                    f"{reprlib.repr(bias)}"
                )
        found.append({int(token): float(bias) for token, bias in one.items()})
    return found


def token_sets(
    name: str, value: Any, batch: int, vocabulary: int
) -> list[tuple[int, ...] | None]:
    """Token ids of each request, from one list or one per request.

    Args:
      name: for messages.
      value: a list, array or set of ids, or None; or a sequence of b of them.
      batch: b.
      vocabulary: ids that there are.

    Returns:
      Of each request different ids in their order, or None.

    Raises:
      ValueError: naming the setting, what is wrong, and what would be right.
    """
    value = listed(name, value)
    several = isinstance(value, list | tuple) and any(
        x is None or isinstance(x, list | tuple | set | frozenset | range | np.ndarray)
        for x in value
    )
    return [
        _token_set(name, one, vocabulary)
        for one in each(name, value if several else [value] * batch, batch)
    ]


def _token_set(name: str, value: Any, vocabulary: int) -> tuple[int, ...] | None:
    ids = listed(name, value)
    if ids is None:
        return None
    if not isinstance(ids, list | tuple | set | frozenset | range) or not ids:
        raise ValueError(
            f"{name} must be None or a list of token ids, at least one, got "
            f"{reprlib.repr(ids)}"
        )
    for token in ids:
        _check_token(name, token, vocabulary)
    return tuple(sorted({int(token) for token in ids}))


def _check_token(name: str, token: Any, vocabulary: int) -> None:
    if not _is_number(token, whole=True) or not 0 <= token < vocabulary:
        raise ValueError(
            f"{name} must name token ids from 0 to {vocabulary - 1}, got "
            f"{reprlib.repr(token)}"
        )
