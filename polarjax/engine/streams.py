"""What a request gets, piece by piece, for the thread that drives the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from polarjax.engine.errors import RequestFailed
from polarjax.engine.request import Piece, Request


class TokenStream:
    """An iterator of what a request gets, which drives its engine where it must.

    The last piece has a `finish_reason`. Nothing is kept but what the request has: at
    most its own `max_new_tokens`, however late they are asked for.

    Args:
      request: of an engine.
      step: of that engine.

    Attributes:
      request: as above.
    """

    def __init__(self, request: Request, step: Callable[[], Any]):
        self.request, self._step = request, step
        self._ended = False

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
          RequestFailed: if the model yields NaN for the request.
          RuntimeError: if the engine was closed.
        """
        if self._ended:
            raise StopIteration
        while (piece := next_piece(self.request)) is None:
            # Another request's failure is told to those who read that one.
            with contextlib.suppress(RequestFailed):
                self._step()
        self._ended = bool(piece.finish_reason)
        return piece

    def close(self) -> None:
        """Cancel the request, if it goes on: its slot is free at the next step."""
        self._ended = True
        self.request.cancel()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.request.cancel()


def next_piece(request: Request) -> Piece | None:
    """What is new of a request, None if nothing is.

    Raises:
      RequestFailed: if it failed.
      RuntimeError: if its engine ended it for another reason.
    """
    if request.finish_reason == "error":
        raise RequestFailed([request])
    if request.error:
        raise RuntimeError(request.error)
    return request.piece()
