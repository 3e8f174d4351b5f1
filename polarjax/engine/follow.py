"""Following requests of an engine until they have ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from polarjax.engine.errors import RequestFailed
from polarjax.engine.progress import Progress
from polarjax.engine.request import Request


def finish(
    requests: Sequence[Request],
    step: Callable[[], Any],
    stream: Callable[[int, str, list[int]], None] | None,
    tell: Progress,
    keep: bool,
) -> None:
    """Go on until some requests have ended, and stream them.

    The work of a step goes with what it brought, not with how many requests there are.

    Args:
      requests: of one engine.
      step: of the engine.
      stream: called as stream(place, text, tokens) with what is new of a request, and
        which of them it is; it may call `step` itself.
      tell: of the progress.
      keep: whether the others go on when one of them fails.

    Raises:
      RequestFailed: if one of them fails, and they shall not.
    """
    inbox: dict[Request, None] = {}
    places = {request: i for i, request in enumerate(requests)}
    left = {request for request in requests if request.going}
    for request in left:
        request.inbox = inbox
    counted: dict[Request, int] = {}  # tokens of those that go on
    tokens = 0
    tell(len(requests) - len(left), len(requests), tokens)
    while left:
        if not inbox:
            with contextlib.suppress(RequestFailed):  # each of them says so itself
                step()
        news = sorted(inbox, key=lambda request: places[request])
        inbox.clear()
        failed = [request for request in news if request.finish_reason == "error"]
        if failed and not keep:
            raise RequestFailed(failed)
        for request in news:
            if request not in left:  # it ended while the last news were streamed
                continue
            ended = not request.going
            tokens += len(request.tokens) - counted.pop(request, 0)
            if not ended:
                counted[request] = len(request.tokens)
            if stream:
                text, new = request.news()
                if text or new:
                    stream(places[request], text, new)
            if ended:
                left.discard(request)
        if news:
            tell(len(requests) - len(left), len(requests), tokens)
