"""What a program of the engine has begun to compute, on its way to the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from polarjax.engine.alternatives import Alternatives
from polarjax.engine.errors import repeats_otherwise, yields_nan
from polarjax.engine.request import Request
from polarjax.engine.scoring import Span
from polarjax.mesh.processes import to_host


@dataclasses.dataclass
class Flight:
    """What a program has begun to draw.

    Attributes:
      token: int32[n], on the devices until they are asked for, as all.
      logprob: float32[n].
      valid: bool[n], whether the token belongs to the output.
      live: bool[n], who goes on after it.
      requests: whose each is; None for nobody's.
      told: what there is to tell of each; None where nobody asks.
      counts: what a decode step read, `Drawn.reads`, `visible` and `own`; None for
        first tokens.
      call: of `generate`, in whose statistics it counts; None for none.
      scored: what there is to tell of tokens of prompts; None where nobody asks.
      spans: whose they are.
      last: whether it is the last that its plan has sent.
    """

    token: Any
    logprob: Any
    valid: Any
    live: Any
    requests: list[Request | None]
    told: Alternatives | None = None
    counts: Any = None
    call: int | None = None
    scored: Alternatives | None = None
    spans: Sequence[Span] = ()
    last: bool = True

    def __post_init__(self) -> None:
        """They begin to come home as soon as they are there."""
        for leaf in jax.tree.leaves(self._drawn):
            leaf.copy_to_host_async()

    @property
    def _drawn(self) -> tuple:
        drawn = self.token, self.logprob, self.valid, self.live
        return *drawn, self.told, self.counts, self.scored

    def has(self, requests: Sequence[Request]) -> bool:
        """Whether it brings something for one of some requests."""
        return any(one is not None and one in requests for one in self.requests)

    def home(self) -> Landed:
        """The same as arrays of the host; may take a while."""
        return Landed(*to_host(self._drawn))


@dataclasses.dataclass
class Landed:
    """What a flight has brought, as arrays of the host; attributes as of `Flight`.

    Attributes:
      token: int32[n].
      logprob: float32[n].
      valid: bool[n].
      live: bool[n].
      told: of n, or None.
      counts: or None.
      scored: of tokens of prompts, or None.
    """

    token: np.ndarray
    logprob: np.ndarray
    valid: np.ndarray
    live: np.ndarray
    told: Alternatives | None
    counts: Any
    scored: Alternatives | None

    def hand_on(
        self, requests: Sequence[Request | None], spans: Sequence[Span]
    ) -> list[Request]:
        """Give requests what is theirs.

        Args:
          requests: of the flight.
          spans: likewise.

        Returns:
          Those that got tokens or ended.
        """
        news = [span.request for span in spans if not self._score(span)]
        # As lists: to ask an array for each number takes longer than all the rest.
        tokens, logprobs = self.token.tolist(), self.logprob.tolist()
        valid, live = self.valid.tolist(), self.live.tolist()
        for i, request in enumerate(requests):
            if request is None or not request.going:
                continue
            if request.repeats:
                if self._repeats(request, i):
                    continue
                request.fail(repeats_otherwise(request.number))
            news.append(request)
            if not request.going:
                continue
            if not valid[i]:
                request.add([], [], ended=not live[i])
                continue
            if math.isnan(logprobs[i]):
                request.fail(yields_nan(request.number))
                continue
            tops, most = [], request.settings.logprobs
            if most is not None:
                assert self.told is not None, "nothing is told of a token"
                tops = [self.told.top(i, most)]
            request.add([tokens[i]], [logprobs[i]], not live[i], tops)
        return news

    def _repeats(self, request: Request, i: int) -> bool:
        """Whether a request that began anew draws what it did the first time."""
        known = request.tokens[len(request.tokens) - request.repeats]
        request.repeats -= 1
        return bool(self.valid[i] and self.live[i]) and known == self.token[i]

    def _score(self, span: Span) -> bool:
        """Tell a request of its prompt; returns whether it goes on, or had ended."""
        request = span.request
        if not request.going:
            return True
        assert self.scored is not None, "nothing is told of a prompt"
        rows = range(span.start, span.start + span.count)
        logprobs = [float(self.scored.logprob[row]) for row in rows]
        if np.isnan(logprobs).any():
            request.fail(yields_nan(request.number))
            return False
        most = request.settings.told_of_prompt
        tops = [self.scored.top(row, most) for row in rows]
        request.add_prompt(span.first, logprobs, tops)
        return True
