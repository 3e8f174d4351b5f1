"""That the engine stays as fast as it was, and loses nothing, for minutes."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.promises.common import (
    DENSITIES,
    Bench,
    drop,
    pages_lost,
    settings,
)
from benchmarks.promises.sizes import Wanted
from polarjax.engine.request import Request

SOAK = (
    Wanted("pages_lost", most=0, timed=False),
    Wanted("books_wrong", most=0, timed=False),
    Wanted("last_over_second", least=0.98),
)
CANCELLED = 0.1  # of the requests
WINDOWS = 6  # at least, where there are fewer minutes


@dataclasses.dataclass
class _Open:
    """A request that goes on: the tokens that came, and when it is cancelled."""

    request: Request
    tokens: int = 0
    cancelled_at: int = -1  # step; -1 for never


def soak(bench: Bench) -> dict[str, Any]:
    """Keep the engine busy with chats, and cancel a tenth of them at random moments.

    As many requests wait as have slots. A minute is a sixth of the time, if that is
    less.

    Returns:
      Tokens a second by minute; the last minute's over the second one's; the pages
      that are neither free nor cached when all requests have ended; what was played;
      and by how many bytes the process grew after the first minute.
    """
    engine, sizes = bench.engine, bench.sizes
    rng, chat = bench.rng(6), bench.chat(3)
    window = min(60.0, 60 * sizes.minutes / WINDOWS)
    windows = round(60 * sizes.minutes / window)
    going: dict[Request, _Open] = {}
    tokens, asked, cancelled, memory = np.zeros(windows, int), 0, 0, []
    steps, start = 0, time.perf_counter()
    while (now := time.perf_counter() - start) < windows * window:
        if len(memory) <= now // window:
            memory.append(resident_bytes())
        while len(going) < 2 * sizes.slots:
            ask, density = next(chat), DENSITIES[asked % len(DENSITIES)]
            one = settings(ask.new_tokens, density)
            new = _Open(engine.add(ask.prompt.tolist(), one))
            if rng.random() < CANCELLED:  # it has as many steps to go, at least
                new.cancelled_at = steps + int(rng.integers(ask.new_tokens))
            going[new.request] = new
            asked += 1
        for one in [one for one in going.values() if one.cancelled_at == steps]:
            engine.cancel(one.request)
            cancelled += 1
            del going[one.request]
        news = engine.step()
        steps += 1
        at = min(int((time.perf_counter() - start) / window), windows - 1)
        tokens[at] += _take(news, going)
    memory.append(resident_bytes())
    drop(engine, going)
    return {
        **pages_lost(engine),
        "last_over_second": float(tokens[-1] / tokens[1]) if tokens[1] else None,
        "tokens_per_second": (tokens / window).tolist(),
        "minute_seconds": window,
        "requests": asked,
        "cancelled": cancelled,
        "steps": steps,
        "grown_bytes": memory[-1] - memory[min(1, len(memory) - 1)],
    }


def _take(news: list[Request], going: dict[Request, _Open]) -> int:
    """Count the tokens that came, and let go who has ended."""
    count = 0
    for request in news:
        one = going[request]
        count += len(request.tokens) - one.tokens
        one.tokens = len(request.tokens)
        if not request.going:
            del going[request]
    return count


def resident_bytes() -> int:
    """Memory of this process, as Linux tells it; 0 elsewhere."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return 0
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
