"""What somebody passed, as messages quote it: on one line, and never long."""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any

_MOST = 60  # characters


def quoted(value: Any, most: int = _MOST) -> str:
    """A value as Python writes it, cut to what a message has room for.

    It takes no longer than looking at the first few items, but of objects whose own
    `repr` does.

    Args:
      value: any, whatever its `repr` says or raises.
      most: characters.

    Returns:
      One line.
    """
    text = " ".join(_Short().repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


class _Short(reprlib.Repr):
    """As reprlib, but that it looks at no more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _MOST, _MOST

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 128:  # Python itself refuses to write the longest
            return f"an integer of {x.bit_length()} bits"
        return repr(x)

    def repr_dict(self, x: dict, level: int) -> str:
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)

    def repr_set(self, x: set, level: int) -> str:
        return super().repr_set(set(islice(x, self.maxset + 1)), level)

    def repr_frozenset(self, x: frozenset, level: int) -> str:
        return super().repr_frozenset(frozenset(islice(x, self.maxset + 1)), level)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:_MOST])

    def repr_bytearray(self, x: bytearray, level: int) -> str:
        return repr(x[:_MOST])
