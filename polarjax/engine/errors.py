"""Errors of an engine that its callers tell from others."""

from __future__ import annotations

from collections.abc import Sequence

from polarjax.engine.request import Request


class QueueFull(RuntimeError):
    """As many requests wait as the engine lets wait: try again when some have ended."""


class RequestFailed(ValueError):
    """Requests that an engine had to end; each says why in `error`, the others go on.

    Args:
      requests: those that failed, at least one.

    Attributes:
      requests: as above.
    """

    def __init__(self, requests: Sequence[Request]):
        super().__init__(requests[0].error)
        self.requests = tuple(requests)


def yields_nan(number: int) -> str:
    """What is said of a request for which the model's numbers mean nothing.

    Args:
      number: of its prompt.
    """
    return f"the model yields NaN for prompt {number}: its weights are damaged"
