"""What generation returns."""

from __future__ import annotations

import dataclasses

from polarjax.engine.stats import Stats


@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` returns; lists have one entry per prompt.

    Attributes:
      tokens: new token ids, the stop token excluded.
      texts: their text, cut before a stop string; None without a tokenizer.
      logprobs: natural log-probability of each token under the model.
      finish_reasons: "stop" (stop token or string), "length", "cancelled" or "error".
      stats: times, bytes and densities.
      errors: why a request failed, None for those that did not; see `errors` of
        `generate`.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    logprobs: list[list[float]]
    finish_reasons: list[str]
    stats: Stats
    errors: list[str | None] = dataclasses.field(default_factory=list)
