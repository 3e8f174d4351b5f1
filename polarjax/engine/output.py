"""What generation returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from polarjax.engine.alternatives import TopTokens
from polarjax.engine.request import Request
from polarjax.engine.stats import Stats


@dataclasses.dataclass(frozen=True)
class Output:
    """What `generate` returns; lists have one entry per prompt.

    Of prompts with several samples, `n`, each sample has an entry: those of a prompt
    stand behind one another.

    Attributes:
      tokens: new token ids, the stop token excluded.
      texts: their text, cut before a stop string; None without a tokenizer.
      logprobs: natural log-probability of each token under the model.
      finish_reasons: "stop" (stop token or string), "length", "cancelled" or "error".
      stats: times, bytes and densities.
      errors: why a request failed, None for those that did not; see `errors` of
        `generate`.
      prompts: number of the prompt that each entry continues.
      samples: number of the sample that each entry is.
      alternatives: what is told beside each token; None for entries whose `logprobs`
        does not ask for it.
      prompt_logprobs: natural log-probability of each token of the prompt, None of the
        first; None for entries whose settings do not ask for it.
      prompt_alternatives: what is told beside each of them, likewise.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    logprobs: list[list[float]]
    finish_reasons: list[str]
    stats: Stats
    errors: list[str | None] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)
    samples: list[int] = dataclasses.field(default_factory=list)
    alternatives: list[list[TopTokens] | None] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[list[float | None] | None] = dataclasses.field(
        default_factory=list
    )
    prompt_alternatives: list[list[TopTokens | None] | None] = dataclasses.field(
        default_factory=list
    )


def make_output(requests: Sequence[Request], stats: Stats, *, texts: bool) -> Output:
    """What there is of requests that have ended.

    Args:
      requests: one for each entry.
      stats: of the call.
      texts: whether there is a tokenizer.
    """
    told = [one.settings.logprobs is not None for one in requests]
    of_prompts = [one.settings.told_of_prompt is not None for one in requests]
    return Output(
        tokens=[one.tokens for one in requests],
        texts=[one.text for one in requests] if texts else None,
        logprobs=[one.logprobs for one in requests],
        finish_reasons=[one.finish_reason for one in requests],
        stats=stats,
        errors=[one.error or None for one in requests],
        prompts=[one.number for one in requests],
        samples=[one.settings.sample for one in requests],
        alternatives=[
            one.alternatives if asked else None
            for one, asked in zip(requests, told, strict=True)
        ],
        prompt_logprobs=[
            one.prompt_logprobs if asked else None
            for one, asked in zip(requests, of_prompts, strict=True)
        ],
        prompt_alternatives=[
            one.prompt_alternatives if asked else None
            for one, asked in zip(requests, of_prompts, strict=True)
        ],
    )
