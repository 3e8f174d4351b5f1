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


def repeats_otherwise(number: int) -> str:
    """What is said of a request that had to begin anew and then drew other tokens.

    Args:
      number: of its prompt.
    """
    return (
        f"prompt {number} gave way where swap_bytes left no room for what it had, and "
        "drew other tokens when it was computed again, as its policy lets them depend "
        "on other requests: make the engine with more swap_bytes, more pages, or fewer "
        "slots"
    )
