"""Where an engine's time goes."""

from __future__ import annotations

import time
from typing import Any

import jax

# Kept at once of each of the engine's functions, one for each shape: some 10 MB each.
# Beyond that all are dropped: to compile anew now and then is better than memory that
# grows with every kind of call.
MOST_PROGRAMS = 64

# By function, what it was called with since its programs were last dropped, by any
# engine: a program that is there is no reason to drop any.
_known: dict[Any, set[Any]] = {}


class Clock:
    """Wall time by kind of work, compilation apart."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._since = time.perf_counter()

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a jitted function; the first time for such arguments, compile it."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        key = tree, shapes, tuple(kwargs.items())
        known, kept = _known.setdefault(function, set()), function._cache_size()
        if not kept:
            known.clear()
        if key not in known:
            start = time.perf_counter()
            if kept >= MOST_PROGRAMS:
                function.clear_cache()  # what is running stays until it ends
                known.clear()
            function.lower(*args, **kwargs).compile()  # kept: the call finds it
            known.add(key)
            taken = time.perf_counter() - start
            self.seconds["compile"] += taken
            self._since += taken
        return function(*args, **kwargs)

    def lap(self, kind: str) -> None:
        """Since the last one, or the start, it was this kind of work."""
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now
