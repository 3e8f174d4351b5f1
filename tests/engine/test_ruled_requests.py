"""Requests with biases, bans and penalties, as an engine continues them."""

import jax
import numpy as np
import pytest

import polarjax
from polarjax.engine.sampling import Variant
from tests.engine.rules_by_hand import CONFIG, EVERYTHING, NOTHING, by_hand
from tests.models import GREEDY, random_params
from tests.policies.reference import random_prompts

LENGTHS = (3, 9, 1, 6, 4, 2)
LIMITS = (4, 9, 30, 9, 6, 16)
ASKED = [
    {},
    {"repetition_penalty": 3.0},
    {"presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"logit_bias": {8: 100.0, 9: 99.5}, "frequency_penalty": 0.25},
    {"allowed_token_ids": [3, 4, 5], "min_tokens": 4},
    EVERYTHING,
]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 1)


def continued(params, prompt, asked, new):
    """The greedy tokens of one prompt, one by one from the model's logits."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        room = np.zeros((1, 40), int)
        room[0, : len(tokens)] = tokens
        logits = np.asarray(polarjax.logits(params, room)[0, len(tokens) - 1])
        token = int(by_hand(logits, asked, tokens, len(prompt)).argmax())
        if token in CONFIG.eos_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_requests_with_rules_take_and_leave_rows(params):
    prompts = random_prompts(CONFIG, LENGTHS, 1)
    expected = [
        continued(params, *one) for one in zip(prompts, ASKED, LIMITS, strict=True)
    ]
    plain = polarjax.generate(params, prompts, max_new_tokens=LIMITS).tokens
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) >= 4
    # Two rows for all: each begins while another goes on, in a row that others had.
    with polarjax.Engine(
        params, slots=2, **{**GREEDY, "variants": [Variant.FULL]}
    ) as engine:
        requests = [
            engine.add(prompt, polarjax.Settings(max_new_tokens=limit, **asked))
            for prompt, asked, limit in zip(prompts, ASKED, LIMITS, strict=True)
        ]
        while not engine.idle:
            engine.step()
    assert [one.tokens for one in requests] == expected
    names = dict(NOTHING, **EVERYTHING)
    each = {n: [one.get(n, NOTHING[n]) for one in ASKED] for n in names}
    together = polarjax.generate(params, prompts, max_new_tokens=LIMITS, **each)
    assert together.tokens == expected
    assert len(expected[4]) >= 4 and set(expected[4]) <= {4, 5}


def test_log_probabilities_are_the_models_own(params):
    [prompt] = random_prompts(CONFIG, (5,), 2)
    out = polarjax.generate(params, [prompt], max_new_tokens=12, **EVERYTHING)
    ids = np.array([prompt + out.tokens[0]])
    logprobs = np.asarray(jax.nn.log_softmax(polarjax.logits(params, ids)))[0]
    own = logprobs[np.arange(4, 4 + len(out.tokens[0])), out.tokens[0]]
    np.testing.assert_allclose(out.logprobs[0], own, atol=1e-4)


def test_the_models_own_ends_may_be_ignored(params):
    [prompt] = random_prompts(CONFIG, (5,), 2)
    ends = {"logit_bias": {3: 100}, "max_new_tokens": 6}
    assert polarjax.generate(params, [prompt], **ends).tokens == [[]]
    assert polarjax.generate(params, [prompt], ignore_eos=True, **ends).tokens == [
        [3] * 6
    ]
    given = polarjax.generate(params, [prompt], ignore_eos=True, stop_ids=[3], **ends)
    assert given.tokens == [[]] and given.finish_reasons == ["stop"]
