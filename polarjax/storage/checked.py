"""Records out of files: types and ranges, by a dataclass's own annotations.

An annotation is bool, int, float, str, a Literal of words, a tuple, a dict or list of
anything, another such dataclass, or one of these or None; `Annotated` adds bounds and
whether files have the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import sys
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds of a number, or of the length of a text, both included."""

    low: float
    high: float


LATER = "not in older files"
"""Of a field in `Annotated`: where a file lacks it, the default is what it means."""

UNSTORED = "in no file"
"""Of a field in `Annotated`: a file must not have it."""


def check_record(record: Any, skip: Collection[str] = ()) -> None:
    """Raise unless a dataclass's fields are what its annotations say.

    Args:
      record: the dataclass.
      skip: fields that something else checks.

    Raises:
      ValueError: naming the field, what would be right, and what it is.
    """
    for name, hint in _hints(type(record)).items():
        if name not in skip:
            check(name, getattr(record, name), hint)


def read_record(cls: type[T], found: dict[str, Any], partial: bool = False) -> T:
    """A dataclass from a JSON object, where tuples became lists.

    Args:
      cls: the dataclass.
      found: what `json` read.
      partial: whether every field with a default may be missing, not only those that
        are marked `LATER`.

    Raises:
      ValueError: naming a key that is missing, unknown, or of another type or range
        than its annotation says.
    """
    hints, extra = _hints(cls), _extra(cls)
    known = [name for name in hints if UNSTORED not in extra[name]]
    missing = dataclasses.MISSING
    required = [
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if field.default is missing and field.default_factory is missing
    ]
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {reprlib.repr(key)}{hint}")
    values = {}
    for name in known:
        if name in found:
            values[name] = _from_json(name, found[name], hints[name])
            check(name, values[name], hints[name])
        elif not (partial or LATER in extra[name]) or name in required:
            raise ValueError(f"it has no {name}")
    return cls(**values)


def check(name: str, value: Any, hint: Any) -> None:
    """Raise unless a value is what an annotation says.

    Args:
      name: of the value, for the message.
      value: any.
      hint: the annotation, as the module says.

    Raises:
      ValueError: with the name, what would be right, and what it is.
    """
    inner, optional, bounds = _parts(hint)
    if optional and value is None:
        return
    if typing.get_origin(inner) is tuple and isinstance(value, tuple):
        kinds = typing.get_args(inner)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            for i, (item, kind) in enumerate(zip(value, kinds, strict=True)):
                check(f"{name}[{i}]", item, kind)
            return
    if right := _right(value, inner, bounds):
        right += " or null" if optional else ""
        raise ValueError(f"{name} must be {right}, got {reprlib.repr(value)}")


def _right(value: Any, hint: Any, bounds: Between | None) -> str:
    """What would be right; empty if it is."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return ""
    if kind in (int, float):
        return _right_number(value, kind, bounds)
    if kind is Literal:
        known = isinstance(value, str) and value in args
        return "" if known else f"one of {', '.join(map(repr, args))}"
    if kind is tuple:
        size = "" if args[-1] is Ellipsis else f" of {len(args)}"
        return f"a list{size} (in Python a tuple)"
    if not isinstance(value, kind):
        words = {bool: "true or false", str: "text", list: "a list"}
        return words.get(kind, "a record")
    if bounds and not bounds.low <= len(value) <= bounds.high:
        return f"text of {bounds.low} to {bounds.high} characters"
    return ""


def _right_number(value: Any, kind: type, bounds: Between | None) -> str:
    number = isinstance(value, int if kind is int else int | float)
    number = number and not isinstance(value, bool)
    if bounds and bounds.low == 1 and kind is int and not (number and value >= 1):
        return "a positive integer"
    if not number:
        return "an integer" if kind is int else "a number"
    # Compared, not converted: an integer may have more digits than a float takes.
    if bounds:
        inside = bounds.low <= value <= bounds.high
        return "" if inside else f"between {bounds.low:,} and {bounds.high:,}"
    largest = sys.float_info.max
    return "" if kind is int or -largest <= value <= largest else "finite"


def _from_json(name: str, value: Any, hint: Any) -> Any:
    """Lists as tuples and objects as dataclasses, where the annotation says so."""
    inner, _, _ = _parts(hint)
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
        try:
            return read_record(typing.cast(type, inner), value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if typing.get_origin(inner) is tuple and isinstance(value, list):
        kinds = typing.get_args(inner)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(_from_json(name, item, kind) for item, kind in pairs)
    return value


def _parts(hint: Any) -> tuple[Any, bool, Between | None]:
    """An annotation without `Annotated` and None, if it may be None, and its bounds."""
    bounds, optional = None, False
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extra = typing.get_args(hint)
            bounds = next((x for x in extra if isinstance(x, Between)), bounds)
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (x for x in typing.get_args(hint) if x is not types.NoneType)
            optional = True
        else:
            return hint, optional, bounds


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def _extra(cls: type) -> dict[str, tuple[Any, ...]]:
    return {
        name: getattr(hint, "__metadata__", ()) for name, hint in _hints(cls).items()
    }
