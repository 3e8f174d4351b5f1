"""Continuing more prompts than fit into memory: a window of them goes through."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from polarjax.engine.alternatives import TopTokens
from polarjax.engine.engine import Engine
from polarjax.engine.errors import RequestFailed
from polarjax.engine.prompt_lines import Line, Reader
from polarjax.engine.request import Request
from polarjax.engine.settings import MOST_SAMPLES

# Requests that are kept at once: one that is long holds up the results behind it, and
# when all of these are behind it, new ones. The samples of a line begin together.
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
      logprobs: whether results have the log-probability of each token, of lines too
        that do not ask for it.
      window: requests that are kept at once, before a line of several samples.
      tell: of the progress, after each step.

    Returns:
      How many there were.
    """
    counted, source = Counted(), iter(lines)
    kept: deque[tuple[Line, list[Request] | str]] = deque()
    size = 0  # requests that are kept; a line that was refused counts for one
    inbox: dict[Request, None] = {}
    seen: dict[Request, int] = {}  # tokens that were counted, of those that go on
    window = max(1, min(window, engine.max_waiting - MOST_SAMPLES + 1))
    more = True
    while more or kept:
        while more and size < window:
            line = next(source, None)
            if line is None:
                more = False
            else:
                kept.append((line, _begin(engine, line, reader, inbox)))
                size += _size(kept[-1][1])
        results = []
        while kept and _ended(kept[0][1]):
            line, requests = kept.popleft()
            size -= _size(requests)
            result = _result(line, requests, logprobs)
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
) -> list[Request] | str:
    """The requests of a line, one for each sample, or why there are none."""
    try:
        ids, settings = reader.encode(line), reader.settings(line)
        samples = settings.samples()
        requests = [engine.add(ids, one, number=line.index) for one in samples]
    except (TypeError, ValueError) as error:
        return str(error)
    for request in requests:
        request.inbox = inbox
    return requests


def _size(requests: list[Request] | str) -> int:
    return 1 if isinstance(requests, str) else len(requests)


def _ended(requests: list[Request] | str) -> bool:
    return isinstance(requests, str) or not any(one.going for one in requests)


def _result(line: Line, requests: list[Request] | str, logprobs: bool) -> dict:
    """What is written of a line's requests."""
    if isinstance(requests, str):
        return {**line.label, "error": requests}
    if failed := [one.error for one in requests if one.error]:
        return {**line.label, "error": failed[0]}
    answers, first = [_answer(one, logprobs) for one in requests], requests[0]
    # By what the line says, not by how many there are: the reader of a file whose
    # lines ask for one or more finds them in one place.
    answer = {"choices": answers} if "n" in line.settings else answers[0]
    result = {**line.label, **answer, "prompt_tokens": len(first.prompt)}
    if first.settings.told_of_prompt is not None:
        result["prompt_logprobs"] = _finite(first.prompt_logprobs)
        result["prompt_alternatives"] = _told(first.prompt_alternatives)
    return result


def _answer(request: Request, logprobs: bool) -> dict[str, Any]:
    """What is written of one sample."""
    answer = {
        "text": None if request.tokenizer is None else request.text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
    }
    asked = request.settings.logprobs is not None
    if logprobs or asked:
        answer["logprobs"] = _finite(request.logprobs)
    if asked:
        answer["alternatives"] = _told(request.alternatives)
    return answer


def _finite(logprobs: Iterable[float | None]) -> list[float | None]:
    """Log-probabilities as JSON has them, which has no infinity."""
    return [x if x is not None and math.isfinite(x) else None for x in logprobs]


def _told(places: Iterable[TopTokens | None]) -> list[dict[str, Any] | None]:
    """What is told beside each token of a text."""
    return [
        one
        and {
            "rank": one.rank,
            "ids": list(one.ids),
            "logprobs": _finite(one.logprobs),
        }
        for one in places
    ]
