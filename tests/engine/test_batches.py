"""Greedy batches: each request gets what it would get alone, to its own end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from tests.models import GREEDY, LLAMA, random_params
from tests.policies.reference import assert_same, decode, random_prompts

CONFIG = dataclasses.replace(LLAMA, layers=3)
LENGTHS = (3, 11, 1, 7)
NEW = 18
SEED = 3


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, SEED)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS, SEED)


@pytest.fixture(scope="module")
def expected(params, prompts):
    return decode(params, prompts, [NEW] * 4)


@pytest.fixture(scope="module")
def out(params, prompts):
    return polarjax.generate(params, prompts, max_new_tokens=NEW)


def assert_close(one, other):
    assert one.tokens == other.tokens
    assert one.finish_reasons == other.finish_reasons
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_ragged_batch_equals_plain_numpy(out, expected):
    assert_same(out, expected, CONFIG)
    assert out.finish_reasons == ["length"] * 4
    assert out.texts is None
    for tokens in out.tokens:
        assert all(type(token) is int for token in tokens)


def test_each_prompt_alone_equals_the_batch(params, prompts, out):
    for i, prompt in enumerate(prompts):
        alone = polarjax.generate(params, [prompt], max_new_tokens=NEW)
        assert alone.tokens[0] == out.tokens[i]
        np.testing.assert_allclose(alone.logprobs[0], out.logprobs[i], atol=1e-4)


def test_what_padding_holds_does_not_matter(params, prompts, out):
    # `generate` pads with token 0: make that token's embedding huge.
    weights = jax.tree.map(lambda x: x, params.weights)
    table = weights["embed"]["tokens"]
    used = {token for ids in (*prompts, *out.tokens) for token in ids}
    assert 0 not in used
    weights["embed"]["tokens"] = table.at[0].set(-1e3 * jnp.sign(table[1]))
    poisoned = dataclasses.replace(params, weights=weights)
    expected = decode(poisoned, prompts, [NEW] * 4)
    got = polarjax.generate(poisoned, prompts, max_new_tokens=NEW)
    assert_same(got, expected, CONFIG)


def test_how_prompts_are_cut_into_pieces_changes_nothing(params, prompts, out):
    other = polarjax.generate(params, prompts, max_new_tokens=NEW, prefill_tokens=5)
    assert_close(other, out)
    assert other.stats.kv_bytes == out.stats.kv_bytes


@pytest.mark.parametrize("most", [1, 2, 9, 16])
def test_max_new_tokens_is_kept(params, most):
    # Long enough a prompt that all limits share a program.
    prompts = random_prompts(CONFIG, (16, 3, 1, 7), SEED)
    expected = decode(params, prompts, [most] * 4)
    out = polarjax.generate(params, prompts, max_new_tokens=most)
    assert_same(out, expected, CONFIG)
    assert [len(tokens) for tokens in out.tokens] == [most] * 4
    assert out.finish_reasons == ["length"] * 4
    # The first token comes with the prompt.
    assert out.stats.steps == most - 1
    assert out.stats.new_tokens == 4 * most


def test_max_new_tokens_may_be_any_number(params, prompts):
    for most in (NEW, np.int64(NEW)):
        out = polarjax.generate(params, prompts, max_new_tokens=most)
        assert [len(tokens) for tokens in out.tokens] == [NEW] * 4


@pytest.mark.parametrize("most", [18, 10**12])
def test_the_context_ends_each_request_at_its_own_place(params, prompts, most):
    config = dataclasses.replace(CONFIG, context=20)
    short = dataclasses.replace(params, config=config)
    limits = [min(most, 20 - n) for n in LENGTHS]
    expected = decode(short, prompts, limits)
    out = polarjax.generate(short, prompts, max_new_tokens=most)
    assert_same(out, expected, config)
    assert [len(tokens) for tokens in out.tokens] == limits
    assert out.finish_reasons == ["length"] * 4


def test_the_longest_prompt_leaves_room_for_one_token(params):
    config = dataclasses.replace(CONFIG, context=20)
    short = dataclasses.replace(params, config=config)
    prompts = random_prompts(config, (19, 18, 1, 1), SEED)
    out = polarjax.generate(short, prompts, max_new_tokens=18)
    assert [len(tokens) for tokens in out.tokens] == [1, 2, 18, 18]


def test_each_of_several_stop_ids_ends_a_request(params, prompts, expected):
    # One that ends request 0 in its middle, one that ends request 3 at once.
    stops = (expected.tokens[0][7], expected.tokens[3][0])
    config = dataclasses.replace(CONFIG, eos_ids=stops)
    stopped = dataclasses.replace(params, config=config)
    reference = decode(params, prompts, [NEW] * 4, stop_ids=stops)
    assert len(reference.tokens[0]) <= 7 and reference.tokens[3] == []
    own = polarjax.generate(stopped, prompts, max_new_tokens=NEW)
    assert_same(own, reference, CONFIG)
    ended = [len(tokens) < NEW for tokens in reference.tokens]
    assert own.finish_reasons == ["stop" if e else "length" for e in ended]
    assert own.finish_reasons[0] == own.finish_reasons[3] == "stop"
    assert own.logprobs[3] == []
    # Given by the caller, in any container.
    for given in (list(stops), set(stops), np.array(stops)):
        assert_close(
            polarjax.generate(params, prompts, max_new_tokens=NEW, stop_ids=given), own
        )
    # None at all, against the model's own.
    free = polarjax.generate(stopped, prompts, max_new_tokens=NEW, stop_ids=())
    assert free.tokens == expected.tokens
    assert free.finish_reasons == ["length"] * 4


def test_a_batch_that_ends_at_once_decodes_nothing(params, prompts, expected):
    first = [tokens[0] for tokens in expected.tokens]
    out = polarjax.generate(params, prompts, max_new_tokens=NEW, stop_ids=first)
    assert out.tokens == [[]] * 4 and out.finish_reasons == ["stop"] * 4
    # The first step is sent before the host looks at what was drawn.
    assert out.stats.steps <= 2 and out.stats.kv_bytes == 0
    assert out.stats.tokens_per_second == 0 and str(out.stats)


def test_logprobs_are_those_of_logits(params, prompts, out):
    sequences = [p + t for p, t in zip(prompts, out.tokens, strict=True)]
    longest = max(map(len, sequences))
    tokens = np.zeros((4, longest), int)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = [len(sequence) for sequence in sequences]
    logits = polarjax.logits(params, tokens, lengths)
    assert logits.shape == (4, longest, CONFIG.vocab_size)
    assert logits.dtype == jnp.float32
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, prompt in enumerate(prompts):
        at = np.arange(len(prompt) - 1, lengths[i] - 1)
        assert logprobs[i, at].argmax(-1).tolist() == out.tokens[i]
        theirs = logprobs[i, at, out.tokens[i]]
        np.testing.assert_allclose(out.logprobs[i], theirs, atol=1e-4)
    # Padding is never seen.
    tokens[0, lengths[0] :] = 5
    again = polarjax.logits(params, tokens)
    np.testing.assert_array_equal(again[0, : lengths[0]], logits[0, : lengths[0]])


@pytest.mark.parametrize("stop_ids", [(), (0,)])
@pytest.mark.parametrize("where", ["embed", "final_norm"])
def test_nan_in_weights_raises(params, prompts, where, stop_ids):
    # Also where token 0, the best of NaN logits, is a stop token.
    weights = {
        **params.weights,
        where: jax.tree.map(lambda x: x * np.nan, params.weights[where]),
    }
    damaged = dataclasses.replace(params, weights=weights)
    with pytest.raises(ValueError, match="yields NaN for prompt 0: its weights are"):
        polarjax.generate(damaged, prompts, max_new_tokens=NEW, stop_ids=stop_ids)


def test_nan_that_one_prompt_meets_names_it(params, prompts, expected):
    table = params.weights["embed"]["tokens"]
    token = expected.tokens[2][3]
    assert not any(token in ids for ids in prompts)
    untied = dataclasses.replace(CONFIG, tied_embeddings=False)
    embed = {"tokens": table.at[token].set(np.nan), "head": table}
    damaged = polarjax.Params(
        {**params.weights, "embed": embed}, polarjax.Dense(), untied
    )
    with pytest.raises(ValueError, match="yields NaN for prompt"):
        polarjax.generate(damaged, prompts, max_new_tokens=NEW)


def test_stats_are_consistent(out, prompts):
    stats = out.stats
    assert stats.policy == "Dense" and stats.notes == ()
    assert stats.prompt_tokens == sum(LENGTHS) and stats.new_tokens == 4 * NEW
    assert stats.steps == NEW - 1
    assert stats.decode_seconds > 0 and stats.bandwidth > 0
    per_second = 4 * (NEW - 1) / stats.decode_seconds
    np.testing.assert_allclose(stats.tokens_per_second, per_second)
    read = stats.steps * stats.weight_bytes + stats.kv_bytes
    np.testing.assert_allclose(stats.floor_seconds, read / stats.bandwidth)
    np.testing.assert_allclose(
        stats.floor_fraction, stats.floor_seconds / stats.decode_seconds
    )
    assert "tokens/s" in str(stats) and "density 1.000" in str(stats)


def test_in_16_bit_too_a_request_is_the_request_alone():
    config = dataclasses.replace(CONFIG, context=512)
    params = random_params(config, SEED, routers=True)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights)
    params = dataclasses.replace(params, weights=weights)
    [prompt] = random_prompts(config, (40,), SEED)
    engine = polarjax.Engine(
        params, slots=4, prefill_tokens=64, prefix_cache=False, **GREEDY
    )

    def first(*mates, new=NEW):
        prompts = [prompt, *random_prompts(config, mates, 4)]
        out = engine.generate(prompts, max_new_tokens=new, density=0.5)
        return out.tokens[0][:NEW], out.logprobs[0][:NEW]

    alone = first()
    assert first(3, 1, 30, 9) == alone
    assert first(100, 170, 200, 9, 40) == alone
    assert first(3, 1, 7, 9, new=100) == alone
