"""What rules do to the logits of one request, step by step."""

import dataclasses

import numpy as np

import polarjax
from tests.models import LLAMA

CONFIG = dataclasses.replace(LLAMA, layers=2, vocab_size=75, context=64, eos_ids=(3,))
EVERYTHING = {
    "logit_bias": {0: 1.5, 7: -100, 74: 2.25, 11: 100},
    "allowed_token_ids": [*range(0, 40), 70, 74],
    "min_tokens": 12,
    "repetition_penalty": 1.7,
    "presence_penalty": 0.75,
    "frequency_penalty": -0.4,
}
NOTHING = {name: getattr(polarjax.Settings(), name) for name in EVERYTHING}


def by_hand(logits, asked, tokens, prompt):
    """What one row's logits become, step by step."""
    one = {**NOTHING, "stop_ids": CONFIG.eos_ids, **asked}
    scores, written = logits.copy(), list(tokens[prompt:])
    for token, bias in (one["logit_bias"] or {}).items():
        scores[token] += np.float32(bias)
    if one["allowed_token_ids"] is not None:
        scores[np.setdiff1d(np.arange(len(scores)), one["allowed_token_ids"])] = -np.inf
    if len(written) < one["min_tokens"]:
        scores[list(one["stop_ids"])] = -np.inf
    factor = np.float32(one["repetition_penalty"])
    for token in set(tokens):
        x = scores[token]
        scores[token] = x / factor if x > 0 else x * factor
    for token in set(written):
        times = np.float32(written.count(token))
        scores[token] -= np.float32(one["frequency_penalty"]) * times
        scores[token] -= np.float32(one["presence_penalty"])
    return scores
