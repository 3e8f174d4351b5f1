"""What a program of the engine has begun to compute, on its way to the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from polarjax.engine.alternatives import Alternatives
from polarjax.engine.errors import yields_nan
from polarjax.engine.request import Request
from polarjax.mesh.processes import to_host


@dataclasses.dataclass
class Flight:
    """What a program has begun to draw.

    Attributes:
      token: int32[1, n], on the devices until they are asked for, as all.
      logprob: float32[1, n].
      valid: bool[1, n], whether the token belongs to the output.
      live: bool[n], who goes on after it.
      requests: whose each is; None for nobody's.
      told: what there is to tell of each; None where nobody asks.
      counts: what a decode step read, `Drawn.reads`, `visible` and `own`; None for
        first tokens.
      call: of `generate`, in whose statistics it counts; None for none.
    """

    token: Any
    logprob: Any
    valid: Any
    live: Any
    requests: list[Request | None]
    told: Alternatives | None = None
    counts: Any = None
    call: int | None = None

    def __post_init__(self) -> None:
        """They begin to come home as soon as they are there."""
        for leaf in jax.tree.leaves(self._drawn):
            leaf.copy_to_host_async()

    @property
    def _drawn(self) -> tuple:
        return self.token, self.logprob, self.valid, self.live, self.told

    def home(self) -> Landed:
        """The same as arrays of the host; may take a while."""
        token, logprob, valid, live, told = to_host(self._drawn)
        return Landed(token[0], logprob[0], valid[0], live, told, to_host(self.counts))


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
    """

    token: np.ndarray
    logprob: np.ndarray
    valid: np.ndarray
    live: np.ndarray
    told: Alternatives | None
    counts: Any

    def hand_on(self, requests: list[Request | None]) -> list[Request]:
        """Give requests what is theirs.

        Args:
          requests: of the flight.

        Returns:
          Those that got tokens or ended.
        """
        news: list[Request] = []
        for i, request in enumerate(requests):
            if request is None or not request.going:
                continue
            news.append(request)
            valid, most = bool(self.valid[i]), request.settings.logprobs
            logprobs = [float(self.logprob[i])] if valid else []
            if np.isnan(logprobs).any():
                request.fail(yields_nan(request.number))
                continue
            tops = []
            if valid and most is not None:
                assert self.told is not None, "nothing is told of a token"
                tops = [self.told.top(i, most)]
            new = [int(self.token[i])] if valid else []
            request.add(new, logprobs, ended=not self.live[i], alternatives=tops)
        return news
