"""Sampling: the distribution, and what a draw may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from polarjax.engine.checks import settings_of, variant_of
from polarjax.engine.sampling import draw as draw_tokens
from tests.models import LLAMA, make_sampling, random_params
from tests.policies.reference import random_prompts

CONFIG = dataclasses.replace(LLAMA, layers=3)
VOCABULARY = 12
DRAWS = 4096
LENGTHS = (3, 11, 1, 7)
NEW = 18

jitted_draw = jax.jit(draw_tokens, static_argnames="variant")


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=VOCABULARY).astype(np.float32) * 2


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, position=5, seed=0):
    """The tokens of many requests of equal logits, one seed each."""
    config = dataclasses.replace(CONFIG, vocab_size=VOCABULARY)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = settings_of(config, None, DRAWS, asked)
    sampling, variant = make_sampling(config, settings), variant_of(settings)
    rows = jnp.broadcast_to(logits, (DRAWS, VOCABULARY))
    positions = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (DRAWS,))
    token, logprob = jitted_draw(rows, None, sampling, positions, variant=variant)
    return np.asarray(token), np.asarray(logprob)


def distribution(logits, temperature, top_k, top_p):
    """What the tokens should follow: temperature, then top-k, then top-p."""
    scaled = np.float64(logits) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    # The smallest set of the most probable tokens whose mass reaches top_p.
    mass, kept = 0.0, []
    for token in order:
        if p[token] == 0 or mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    p[np.setdiff1d(order, kept)] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        *((1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0)),
        *((1.0, 4, 1.0), (2.0, 1, 1.0), (1.0, VOCABULARY, 1.0), (1.0, 99, 1.0)),
        *((1.0, 0, 0.8), (2.0, 0, 0.5), (1.0, 0, 1e-6), (1.0, 0, 0.999)),
        *((1.5, 6, 0.9), (2.0, 3, 0.6)),
    ],
)
def test_draws_follow_the_filtered_distribution(logits, temperature, top_k, top_p):
    expected = distribution(logits, temperature, top_k, top_p)
    tokens, _ = draw(logits, temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    likely = expected * DRAWS > 5
    assert (counts[likely] > 0).all()
    # Chi-square; 11 degrees of freedom exceed 40 in 4 of 100,000 cases.
    error = (counts - expected * DRAWS)[likely] ** 2 / (expected * DRAWS)[likely]
    assert error.sum() < 40


def test_the_token_that_crosses_the_mass_is_kept():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05] + [1e-9] * 8, np.float32))
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.79, {0, 1}), (0.9, {0, 1, 2})):
        tokens, _ = draw(logits, top_p=top_p)
        assert set(tokens.tolist()) == kept


def test_logprobs_are_the_models_own(logits):
    tokens, logprobs = draw(logits, temperature=2.0, top_k=3, top_p=0.9)
    expected = np.asarray(jax.nn.log_softmax(logits))[tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_a_filter_that_removes_nothing_changes_no_draw(logits):
    plain, _ = draw(logits)
    for filters in ({"top_k": VOCABULARY}, {"top_p": 0.9999999, "top_k": 0}):
        tokens, _ = draw(logits, **filters)
        np.testing.assert_array_equal(tokens, plain)


def test_seed_and_position_alone_decide_a_draw(logits):
    one, _ = draw(logits, position=5)
    same, _ = draw(logits, position=5)
    np.testing.assert_array_equal(one, same)
    # Request i has seed s + i.
    shifted, _ = draw(logits, position=5, seed=1)
    np.testing.assert_array_equal(shifted[:-1], one[1:])
    listed, _ = draw(logits, position=5, seed=list(range(7, 7 + DRAWS)))
    np.testing.assert_array_equal(listed[:-7], one[7:])
    # Positions draw independently: equal as often as chance has it.
    other, _ = draw(logits, position=6)
    p = distribution(logits, 1.0, 0, 1.0)
    equal, chance = (one == other).mean(), (p**2).sum()
    assert abs(equal - chance) < 5 * np.sqrt(chance / DRAWS)


def test_seeds_wrap_around(logits):
    top = 2**32 - 1
    tokens, _ = draw(logits, seed=top)
    from_0, _ = draw(logits, seed=0)
    np.testing.assert_array_equal(tokens[1:], from_0[:-1])


# Through `generate`.


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS, 3)


@pytest.fixture(scope="module")
def greedy(params, prompts):
    return polarjax.generate(params, prompts, max_new_tokens=NEW)


def generate(params, prompts, **settings):
    settings = {"temperature": 1.0, "top_k": 50, "seed": [11, 12, 13, 14], **settings}
    return polarjax.generate(params, prompts, max_new_tokens=NEW, **settings)


def test_a_request_is_reproducible_whatever_its_batch_mates(params, prompts):
    out = generate(params, prompts)
    assert generate(params, prompts).tokens == out.tokens
    assert len({tuple(tokens) for tokens in out.tokens}) == 4
    # Other mates, another row, prompts in other pieces.
    order = [3, 1, 0, 2]
    moved = generate(
        params,
        [prompts[i] for i in order],
        seed=[11 + i for i in order],
        prefill_tokens=5,
    )
    assert moved.tokens == [out.tokens[i] for i in order]
    for i, mine in zip(order, moved.logprobs, strict=True):
        np.testing.assert_allclose(mine, out.logprobs[i], atol=1e-4)
    # Counted from one number.
    assert generate(params, prompts, seed=11).tokens == out.tokens
    other = generate(params, prompts, seed=[11, 99, 13, 14])
    changed = [a != b for a, b in zip(other.tokens, out.tokens, strict=True)]
    assert changed == [False, True, False, False]
    # The same prompt and seed twice in one batch.
    twins = generate(params, [prompts[1]] * 4, seed=[5, 5, 6, 5])
    assert twins.tokens[0] == twins.tokens[1] == twins.tokens[3] != twins.tokens[2]


def test_greedy_and_sampled_requests_share_a_batch(params, prompts, greedy):
    mixed = generate(params, prompts, temperature=[0.0, 1.0, 0, 1])
    sampled = generate(params, prompts)
    assert mixed.tokens[0::2] == greedy.tokens[0::2]
    assert mixed.tokens[1::2] == sampled.tokens[1::2]
    assert sampled.tokens[1] != greedy.tokens[1]


def test_one_candidate_is_greedy(params, prompts, greedy):
    assert generate(params, prompts, top_k=1).tokens == greedy.tokens
    assert generate(params, prompts, top_p=1e-6).tokens == greedy.tokens
    one_each = generate(params, prompts, top_k=[1, 50, 1, 50], top_p=[1, 1e-6, 1, 1])
    assert one_each.tokens[:3] == greedy.tokens[:3]


def test_sampled_logprobs_are_those_of_logits(params, prompts):
    out = generate(params, prompts, temperature=2.0, top_p=0.9)
    sequences = [p + t for p, t in zip(prompts, out.tokens, strict=True)]
    tokens = np.zeros((4, max(map(len, sequences))), int)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    logprobs = np.asarray(jax.nn.log_softmax(polarjax.logits(params, tokens)))
    for i, prompt in enumerate(prompts):
        at = np.arange(len(prompt) - 1, len(sequences[i]) - 1)
        theirs = logprobs[i, at, out.tokens[i]]
        np.testing.assert_allclose(out.logprobs[i], theirs, atol=1e-4)


def draw_with(monkeypatch, logits, noise, top_p):
    """The tokens of requests of equal logits, whose noise is given."""
    monkeypatch.setattr(jax.random, "gumbel", lambda *_: jnp.asarray(noise))
    batch = len(top_p)
    config = dataclasses.replace(CONFIG, vocab_size=len(logits))
    asked = {"temperature": 1.0, "top_p": top_p}
    settings = settings_of(config, None, batch, asked)
    sampling, variant = make_sampling(config, settings), variant_of(settings)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (batch, len(logits)))
    position = jnp.zeros(batch, jnp.int32)
    token, _ = draw_tokens(rows, None, sampling, position, variant=variant)
    return token.tolist()


def test_top_p_of_1_keeps_every_token_beside_a_mate_that_filters(monkeypatch):
    # The last ones have less mass than a float32 sum of all before them shows.
    logits = [0.0, -1.0, -2.0, *[-20.0] * 4]
    for rare in (3, 6):
        noise = np.zeros(7, np.float32)
        noise[rare] = 99.0
        drawn = draw_with(monkeypatch, logits, noise, top_p=[1.0, 0.999, 1.0])
        assert drawn == [rare, 0, rare]


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize(
    "temperature", [1.2e-38, 2e-38, 5e-38, 1e-37, 1e-36, 1e-30, 1e-20, 1e-12]
)
def test_a_temperature_next_to_0_draws_the_best(temperature, top_k):
    for logits in ([20, 30, 25, 10], [-30, -20, -10, -20.5], [1e4, 1e4 + 1, 3, 1e4]):
        tokens, _ = draw(
            np.float32(np.pad(logits, (0, 8), constant_values=-1e5)),
            temperature=temperature,
            top_k=top_k,
        )
        assert set(tokens.tolist()) == {int(np.argmax(logits))}
