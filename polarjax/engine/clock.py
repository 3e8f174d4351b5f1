"""Where an engine's time goes."""

from __future__ import annotations

import time


class Clock:
    """Wall time by kind of work, compilation apart.

    Attributes:
      seconds: spent on "compile", "prefill" and "decode".
    """

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._since = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Since the last one, or the start, it was this kind of work."""
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now
