"""What clients saw of a load that was served: latencies, throughput, goodput.

The terms are those of vLLM's benchmark (`vllm bench serve`), so that figures can be
held against others'. All is computed from when tokens came; nothing is estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

LIMITED = ("ttft", "tpot", "e2el")  # what goodput may set limits for


@dataclasses.dataclass(frozen=True)
class Trace:
    """What the client saw of one request; times in seconds since the load began.

    Attributes:
      prompt_tokens: that it sent.
      sent: when. A request that arrives while the server is busy has been sent; one
        that the client holds back, as others are open, has not.
      chunks: when tokens came, and how many at once, in order; at least one chunk.
    """

    prompt_tokens: int
    sent: float
    chunks: tuple[tuple[float, int], ...]

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(count for _, count in self.chunks)

    @property
    def ended(self) -> float:
        """When the last token came."""
        return self.chunks[-1][0]

    @property
    def ttft(self) -> float:
        """Time to the first token: from sending to the first chunk, in seconds."""
        return self.chunks[0][0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending to the last token, in seconds."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds; None for one token."""
        tokens = self.new_tokens
        return (self.e2el - self.ttft) / (tokens - 1) if tokens > 1 else None

    @property
    def gaps(self) -> tuple[tuple[float, int], ...]:
        """Between a chunk and the one before: seconds, and tokens that came then."""
        return tuple(
            (at - before, count)
            for (before, _), (at, count) in zip(
                self.chunks, self.chunks[1:], strict=False
            )
        )


@dataclasses.dataclass(frozen=True)
class Spread:
    """A distribution in short, of milliseconds.

    Attributes:
      mean: of all.
      p50: the median.
      p90: what nine of ten are below, interpolated between neighbours.
      p99: what 99 of 100 are below.
    """

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> Spread | None:
        """Of some times; None of none."""
        if not len(seconds):
            return None
        ms = np.asarray(seconds, np.float64) * 1e3
        return cls(float(ms.mean()), *map(float, np.percentile(ms, [50, 90, 99])))


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Requests that were served as fast as wanted.

    Attributes:
      limits_ms: most milliseconds, by name of `LIMITED`.
      requests: that kept within all of them. One of a single token has no TPOT, and
        exceeds none.
      requests_per_second: of those.
    """

    limits_ms: Mapping[str, float]
    requests: int
    requests_per_second: float


@dataclasses.dataclass(frozen=True)
class Served:
    """How a load was served.

    Attributes:
      requests: of the load; all ended.
      prompt_tokens: of all requests.
      new_tokens: of all requests.
      seconds: from the beginning of the load to the last token.
      requests_per_second: over `seconds`.
      tokens_per_second: new tokens over `seconds`.
      queued_seconds: from the beginning of the load until every request has its first
        token, so that none waits any more.
      queued_tokens_per_second: new tokens that came by then, over `queued_seconds`: the
        rate of a batch that is full, where all was sent at once.
      total_tokens_per_second: prompt tokens and new ones over `seconds`.
      ttft_ms: time to the first token, over requests.
      tpot_ms: time per output token after the first, over requests of two or more.
      itl_ms: gaps between a request's chunks, over chunks.
      itl_token_ms: the same as its tokens could be shown evenly: a gap over the tokens
        that came after it, counted for each of them.
      e2el_ms: latency to the last token, over requests.
      tokens_per_chunk: mean tokens of a request's chunk.
      most_open: most requests that were sent and had not ended, at any time.
      goodput: of limits, if any were set.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    queued_seconds: float
    queued_tokens_per_second: float
    total_tokens_per_second: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    itl_token_ms: Spread | None
    e2el_ms: Spread | None
    tokens_per_chunk: float
    most_open: int
    goodput: Goodput | None = None


def summarise(
    traces: Sequence[Trace], limits_ms: Mapping[str, float] | None = None
) -> Served:
    """Latencies and throughput of a load of at least one request.

    Args:
      traces: of all its requests, in any order.
      limits_ms: most milliseconds for a good request, by name of `LIMITED`; None or
        empty for no goodput.

    Raises:
      ValueError: if a limit has another name.
    """
    if unknown := set(limits_ms or ()) - set(LIMITED):
        raise ValueError(
            f"no limit {min(unknown)!r}: there are {', '.join(LIMITED)} (milliseconds)"
        )
    seconds = max(trace.ended for trace in traces)
    prompts = sum(trace.prompt_tokens for trace in traces)
    new = sum(trace.new_tokens for trace in traces)
    queued = max(trace.chunks[0][0] for trace in traces)
    by_then = sum(n for trace in traces for at, n in trace.chunks if at <= queued)
    gaps = np.array([gap for trace in traces for gap in trace.gaps]).reshape(-1, 2)
    counts = gaps[:, 1].astype(int)
    goodput = None
    if limits_ms:
        good = sum(_is_good(trace, limits_ms) for trace in traces)
        goodput = Goodput(dict(limits_ms), good, good / seconds)
    return Served(
        requests=len(traces),
        prompt_tokens=prompts,
        new_tokens=new,
        seconds=seconds,
        requests_per_second=len(traces) / seconds,
        tokens_per_second=new / seconds,
        queued_seconds=queued,
        queued_tokens_per_second=by_then / queued,
        total_tokens_per_second=(prompts + new) / seconds,
        ttft_ms=Spread.of([trace.ttft for trace in traces]),
        tpot_ms=Spread.of([t for trace in traces if (t := trace.tpot) is not None]),
        itl_ms=Spread.of(gaps[:, 0]),
        itl_token_ms=Spread.of(np.repeat(gaps[:, 0] / gaps[:, 1], counts)),
        e2el_ms=Spread.of([trace.e2el for trace in traces]),
        tokens_per_chunk=new / sum(len(trace.chunks) for trace in traces),
        most_open=_most_open(traces),
        goodput=goodput,
    )


def _is_good(trace: Trace, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request kept within the limits."""
    found = {"ttft": trace.ttft, "tpot": trace.tpot or 0.0, "e2el": trace.e2el}
    return all(found[name] * 1e3 <= most for name, most in limits_ms.items())


def _most_open(traces: Sequence[Trace]) -> int:
    """Most requests between their sending and their end; an end goes before a start."""
    changes = [(trace.sent, 1) for trace in traces]
    changes += [(trace.ended, -1) for trace in traces]
    open_now, most = 0, 0
    for _, change in sorted(changes):
        open_now += change
        most = max(most, open_now)
    return most
