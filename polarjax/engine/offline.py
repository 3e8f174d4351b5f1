"""Continuing more prompts than fit into memory: a window of them goes through."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from polarjax.engine.engine import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.prompt_lines import Line, Reader
from polarjax.engine.request import Request

# Requests that are kept at once: one that is long holds up the results behind it, and
# when all of these are behind it, new ones.
WINDOW = 1024


@dataclasses.dataclass
class Counted:
    """What came of the prompts.

    Attributes:
      prompts: that have been written.
      failed: of them, those that got an error.
      tokens: new ones, of all requests, as they come.
    """

    prompts: int = 0
    failed: int = 0
    tokens: int = 0


def continue_lines(
    engine: Engine,
    lines: Iterable[Line],
    reader: Reader,
    write: Callable[[Sequence[str]], None],
    *,
    logprobs: bool = False,
    window: int = WINDOW,
    tell: Callable[[Counted], None] = lambda counted: None,
) -> Counted:
    """Continue the prompts of lines, each of which may fail alone.

    Args:
      engine: that nobody else uses meanwhile.
      lines: read as there is room for them.
      reader: makes requests of them.
      write: takes results, JSON without a line's end, in the order of the lines.
      logprobs: whether results have the log-probability of each token.
      window: requests that are kept at once.
      tell: of the progress, after each step.

    Returns:
      How many there were.
    """
    counted, source = Counted(), iter(lines)
    kept: deque[tuple[Line, Request | str]] = deque()
    inbox: dict[Request, None] = {}
    seen: dict[Request, int] = {}  # tokens that were counted, of those that go on
    window = min(window, engine.max_waiting)
    more = True
    while more or kept:
        while more and len(kept) < window:
            line = next(source, None)
            if line is None:
                more = False
            else:
                kept.append((line, _begin(engine, line, reader, inbox)))
        results = []
        while kept and _ended(kept[0][1]):
            line, request = kept.popleft()
            result = _result(line, request, logprobs)
            counted.prompts += 1
            counted.failed += "error" in result
            results.append(json.dumps(result, allow_nan=False))
        if results:
            write(results)
            tell(counted)
            continue  # there is room again
        if kept:
            with contextlib.suppress(RequestFailed):  # whose result says why
                engine.step()
            for request in inbox:
                counted.tokens += len(request.tokens) - seen.pop(request, 0)
                if request.going:
                    seen[request] = len(request.tokens)
            inbox.clear()
            tell(counted)
    return counted


def _begin(
    engine: Engine, line: Line, reader: Reader, inbox: dict[Request, None]
) -> Request | str:
    """The request of a line, or why there is none."""
    try:
        ids, settings = reader.encode(line), reader.settings(line)
        request = engine.add(ids, settings, number=line.index)
    except (TypeError, ValueError) as error:
        return str(error)
    request.inbox = inbox
    return request


def _ended(request: Request | str) -> bool:
    return isinstance(request, str) or not request.going


def _result(line: Line, request: Request | str, logprobs: bool) -> dict[str, Any]:
    """What is written of a line's request."""
    error = request if isinstance(request, str) else request.error
    if error or isinstance(request, str):
        return {**line.label, "error": error}
    result = {
        **line.label,
        "text": None if request.tokenizer is None else request.text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
        "prompt_tokens": len(request.prompt),
    }
    if logprobs:  # JSON has no infinity
        known = [x if math.isfinite(x) else None for x in request.logprobs]
        result["logprobs"] = known
    return result
