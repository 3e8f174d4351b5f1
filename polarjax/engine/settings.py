"""`polarjax.Settings`: how one request is continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

# What OpenAI's interface takes of each.
MOST_BIASES = 300
MOST_ALTERNATIVES = 20
MOST_SAMPLES = 128
# More than anybody has use for: each new token is looked at for all of them. OpenAI's
# interface takes 4 strings.
MOST_STOPS = 64
MOST_STOP_STRINGS, LONGEST_STOP = 64, 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one request is continued; see `polarjax.generate`.

    Each is one value: a list of one per request is `generate`'s alone. They are checked
    when a request is made of them.

    What changes the scores of tokens does so in this order: `logit_bias`, then
    `allowed_token_ids` and `min_tokens`, then the penalties (repetition, frequency,
    presence), of greedy requests too; then `temperature`, `min_p`, `top_k`, `top_p`,
    where tokens are drawn at all. This is vLLM's order; `transformers` filters by
    min-p last. Of equal scores the lower ids count as better, so that `top_k` tokens
    are never more.

    Attributes:
      max_new_tokens: most tokens to add.
      density: fraction of the KV groups to read; None for the policy's own budgets.
      temperature: 0 for greedy.
      top_k: most probable tokens to draw from; 0 for all.
      top_p: probability mass to draw from.
      seed: of the draws.
      stop: strings that end the text, 64 at most, of at most 256 characters.
      stop_ids: token ids that end it, 64 at most; None for the model's own.
      min_p: how probable a token must be, as a part of what the best is, in [0, 1].
      repetition_penalty: what logits of tokens of prompt and output are divided by
        where they are positive, and multiplied by where not; from 0.01 to 100.
      presence_penalty: what is taken from logits of tokens of the output, from -2 to 2.
      frequency_penalty: as much for each time that they occur there, from -2 to 2.
      logit_bias: what is added to the logits of some token ids, 300 at most, from -100
        to 100 each.
      allowed_token_ids: the only tokens that may be drawn; None for all.
      min_tokens: tokens before which none of the `stop_ids` is drawn, at most
        `max_new_tokens`. A stop string ends a text at any length.
      ignore_eos: whether the model's own end tokens are as any others. `stop_ids` that
        are given end the text all the same.
      n: samples of one prompt, at most 128. Sample 0 is what a request of one gets.
      sample: number of the first sample: a request of one that has 3 here is sample 3
        of a request of more.
      logprobs: how many of the most probable tokens to tell at each step, at most 20;
        None for none. All log-probabilities, these and those of drawn tokens, are the
        model's own: of its logits as they are, at temperature 1.
      prompt_logprobs: as many at each token of the prompt.
      echo: whether the text begins with the prompt. Where `logprobs` are told, those
        of the prompt's tokens are too, as if `prompt_logprobs` were as many.
    """

    max_new_tokens: int = 64
    density: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    # What may be a list or a dict is compared, but not hashed.
    stop: tuple[str, ...] = dataclasses.field(default=(), hash=False)
    stop_ids: tuple[int, ...] | None = dataclasses.field(default=None, hash=False)
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = dataclasses.field(
        default=None, hash=False
    )
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    sample: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False

    @property
    def has_rules(self) -> bool:
        """Whether scores are changed even where nothing is drawn by chance."""
        return bool(
            self.logit_bias
            or self.allowed_token_ids is not None
            or self.min_tokens
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are too improbable to be drawn."""
        return bool(self.temperature and (self.top_k or self.top_p < 1 or self.min_p))

    @property
    def told_of_prompt(self) -> int | None:
        """How many tokens to tell at each token of the prompt; None to tell nothing."""
        if self.prompt_logprobs is None and self.echo:
            return self.logprobs
        return self.prompt_logprobs

    def samples(self) -> list[Self]:
        """Of each sample alone, in their order."""
        numbers = range(self.sample, self.sample + self.n)
        return [dataclasses.replace(self, n=1, sample=j) for j in numbers]
