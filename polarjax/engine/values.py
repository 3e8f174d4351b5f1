"""Values that users pass, for all requests or one for each, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from polarjax.storage.quoted import quoted


def listed(name: str, value: Any) -> Any:
    """What an array holds, as Python has it; anything else as it is.

    Raises:
      TypeError: if the array is being traced.
    """
    if isinstance(value, list | tuple):
        arrays = np.ndarray | jax.Array
        return [listed(name, x) if isinstance(x, arrays) else x for x in value]
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
    count = length(value) if is_row(value) or is_sequence(value) else None
    if count not in (None, batch):  # before anything is done with each
        raise ValueError(f"{name} has {quoted(count)} values for {batch} prompts")
    found = listed(name, value)
    return [found] * batch if count is None else list(found)


def is_array(value: Any) -> bool:
    """Whether something is an array, of the host or of a device."""
    return isinstance(value, np.ndarray | jax.Array)


def is_row(value: Any) -> bool:
    """Whether something is an array of several values, be it of one."""
    return is_array(value) and bool(np.ndim(value))


def is_sequence(value: Any) -> bool:
    """Whether something is a sequence of values, which texts and bytes are not."""
    one = isinstance(value, str | bytes | bytearray | memoryview)
    return isinstance(value, Sequence) and not one


def length(value: Any) -> int:
    """Items of a collection, or of an array's first axis, however many they are."""
    if isinstance(value, range):  # whose length may be more than Python's `len` says
        steps = value.stop - value.start
        return max(0, -(-steps // value.step))
    if is_array(value):
        return np.shape(value)[0] if np.ndim(value) else 1
    return len(value)


def check_count(name: str, value: Any, most: int, what: str) -> None:
    """Raise if a client sends more than is worth a look at each.

    Args:
      name: of the setting.
      value: a collection, or an array.
      most: items that it may have.
      what: they are.

    Raises:
      ValueError: naming the setting and both numbers.
    """
    if (count := length(value)) > most:
        raise ValueError(f"{name} must be {most} {what} at most, got {quoted(count)}")


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
                f"{name} must be {none}{what} from {low} to {high}, got {quoted(x)}"
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
            raise ValueError(f"{name} must be True or False, got {quoted(x)}")
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
    if value is None or isinstance(value, Mapping):
        return [_biases(name, value, vocabulary, most)] * batch
    given = each(name, value, batch)
    return [_biases(name, one, vocabulary, most) for one in given]


def _biases(
    name: str, value: Any, vocabulary: int, most: int
) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be None or a dict from token ids to numbers, got "
            f"{quoted(value)}"
        )
    if len(value) > most:
        raise ValueError(f"{name} must name {most} tokens at most, got {len(value)}")
    for token, bias in value.items():
        _check_token(name, token, vocabulary)
        if not _is_number(bias, whole=False) or not -100 <= bias <= 100:
            raise ValueError(
                f"{name} of token {token} must be a number from -100 to 100, got "
                f"{quoted(bias)}"
            )
    return {int(token): float(bias) for token, bias in value.items()}


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
    if isinstance(value, list | tuple) or is_array(value):
        check_count(name, value, max(vocabulary, batch), "token ids")
        value = listed(name, value)
    several = isinstance(value, list | tuple) and any(
        x is None or isinstance(x, list | tuple | set | frozenset | range)
        for x in value
    )
    if not several:
        return [_token_set(name, value, vocabulary)] * batch
    return [_token_set(name, one, vocabulary) for one in each(name, value, batch)]


def _token_set(name: str, ids: Any, vocabulary: int) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if not isinstance(ids, list | tuple | set | frozenset | range) or not ids:
        raise ValueError(
            f"{name} must be None or a list of token ids, at least one, got "
            f"{quoted(ids)}"
        )
    check_count(name, ids, vocabulary, "token ids")
    plain = set(map(type, ids)) == {int}  # nearly all are, and each look takes long
    for token in (min(ids), max(ids)) if plain else ids:
        _check_token(name, token, vocabulary)
    return tuple(sorted({int(token) for token in ids}))


def _check_token(name: str, token: Any, vocabulary: int) -> None:
    if not _is_number(token, whole=True) or not 0 <= token < vocabulary:
        raise ValueError(
            f"{name} must name token ids from 0 to {vocabulary - 1}, got "
            f"{quoted(token)}"
        )
