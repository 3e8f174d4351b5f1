"""What decides a result, as JSON values: whether two works are the same."""

from __future__ import annotations

from typing import Any


def difference(mine: Any, theirs: Any) -> str:
    """How the facts of one work differ from those of another; empty if they do not.

    Args:
      mine: of the work that is to be done.
      theirs: of the work that was found.

    Returns:
      A clause that names the first fact that differs.
    """
    mine, theirs = _flat(mine), _flat(theirs)
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} here"
    return ""


def _flat(facts: Any, name: str = "") -> dict[str, Any]:
    """Nested facts by path, so that a message can name the one that differs."""
    if not isinstance(facts, dict):
        return {name: facts}
    flat = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{name}.{key}" if name else key)
    return flat
