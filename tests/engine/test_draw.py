"""One draw, in every variant and among mates of every kind; what is told beside it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from polarjax.engine.alternatives import alternatives
from polarjax.engine.checks import settings_of, stop_table, variant_of
from polarjax.engine.rules import History, make_rules
from polarjax.engine.sampling import Variant, draw, noise
from polarjax.engine.settings import Settings
from tests.models import LLAMA, make_sampling

V, ROWS, CONTEXT = 301, 48, 20
CONFIG = dataclasses.replace(LLAMA, vocab_size=V, eos_ids=(3, 4))
# What requests ask for, by the least variant that does it.
KINDS = {
    Variant.GREEDY: [{}],
    Variant.SAMPLED: [{"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 9.0}],
    Variant.FILTERED: [
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    ],
    Variant.FULL: [
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"temperature": 1.0, "logit_bias": {7: 3.5, 300: -2}, "top_p": 0.9},
        {"temperature": 3.0, "allowed_token_ids": [1, 2, 3, 299], "min_tokens": 15},
    ],
}
ORDER = list(KINDS)

# Bits depend on what a compiler makes of a program.
pytestmark = pytest.mark.usefixtures("as_users_do")

jitted = jax.jit(draw, static_argnames="variant")


def settings_for(asked):
    return [settings_of(CONFIG, None, 1, one)[0] for one in asked]


def sampling_of(settings):
    """With rules even where no request has any, as an engine has that takes them."""
    rules = make_rules(CONFIG, settings, stop_table(settings))
    return dataclasses.replace(make_sampling(CONFIG, settings), rules=rules)


def inputs(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, V)) * 3).astype(np.float32)
    mass = np.array(jax.nn.logsumexp(logits, axis=-1))
    prompt = rng.integers(1, 5, rows).astype(np.int32)
    position = (prompt + rng.integers(0, 12, rows)).astype(np.int32)
    tokens = rng.integers(0, V, (rows, CONTEXT)).astype(np.int32)
    return logits, mass, position, History(tokens, prompt)


def run(settings, given, variant=None, rows=None):
    logits, mass, position, history = given
    if rows is not None:
        logits, mass, position = logits[rows], mass[rows], position[rows]
        history = History(history.tokens[rows], history.prompt[rows])
        settings = [settings[i] for i in rows]
    variant = variant or variant_of(settings)
    return tuple(
        np.asarray(x)
        for x in jitted(
            logits, mass, sampling_of(settings), position, history, variant=variant
        )
    )


def mixed(rows, seed=0, kinds=None):
    """Requests of all kinds, and of each the least variant."""
    rng = np.random.default_rng(seed)
    kinds = kinds or [(least, one) for least, many in KINDS.items() for one in many]
    chosen = [kinds[i] for i in rng.integers(len(kinds), size=rows)]
    asked = [{**one, "seed": int(rng.integers(2**32))} for _, one in chosen]
    return settings_for(asked), [least for least, _ in chosen]


def test_a_variant_does_what_its_requests_need():
    for least, many in KINDS.items():
        for one in many:
            assert variant_of(settings_for([one, {}])) is least
    # A filter of a request that draws nothing removes nothing.
    assert variant_of(settings_for([{"top_k": 3, "min_p": 0.5}])) is Variant.GREEDY
    assert variant_of(settings_for([{"logit_bias": {}}])) is Variant.GREEDY
    every, _ = mixed(ROWS)
    assert variant_of(every) is Variant.FULL


@pytest.mark.parametrize("seed", range(4))
def test_no_mate_and_no_variant_changes_a_draw(seed):
    given = inputs(seed=seed)
    settings, least = mixed(ROWS, seed)
    token, logprob = run(settings, given)
    rng = np.random.default_rng(seed)
    for variant in ORDER:
        # Those that this one serves, among each other, in another order.
        able = [i for i in range(ROWS) if ORDER.index(least[i]) <= ORDER.index(variant)]
        rows = rng.choice(able, ROWS)
        other, its = run(settings, given, variant, rows)
        assert other.tolist() == token[rows].tolist()
        assert its.tobytes() == logprob[rows].tobytes()
    # In batches of other sizes.
    for size in (1, 3, 16):
        rows = rng.integers(ROWS, size=size)
        other, its = run(settings, given, Variant.FULL, rows)
        assert other.tolist() == token[rows].tolist()
        assert its.tobytes() == logprob[rows].tobytes()


def test_log_probabilities_are_the_models_own():
    given = inputs()
    settings, _ = mixed(ROWS)
    token, logprob = run(settings, given)
    logits, mass = given[:2]
    expected = logits[np.arange(ROWS), token] - mass
    assert logprob.tobytes() == expected.tobytes()


def test_greedy_requests_follow_their_rules_and_no_filter():
    given = inputs()
    asked = [{"logit_bias": {i: 100}, "top_k": 1, "min_p": 1.0} for i in range(ROWS)]
    token, _ = run(settings_for(asked), given)
    assert token.tolist() == list(range(ROWS))
    [one] = settings_for([{"allowed_token_ids": [3, 4, 250], "min_tokens": 64}])
    assert set(run([one] * ROWS, given)[0]) == {250}


@pytest.mark.parametrize("variant", ORDER)
def test_nan_is_told_and_stays_in_its_row(variant):
    given = inputs()
    asked = [many[i % len(many)] for i in range(ROWS) for many in [KINDS[variant]]]
    settings = settings_for(asked)
    token, logprob = run(settings, given, variant)
    logits, _, position, history = given
    damaged = logits.copy()
    damaged[::5, 17], damaged[1::5] = np.nan, np.nan
    its_mass = np.array(jax.nn.logsumexp(damaged, axis=-1))
    again, its = run(settings, (damaged, its_mass, position, history), variant)
    wrong = np.arange(ROWS) % 5 < 2
    assert np.isnan(its).tolist() == wrong.tolist()
    assert ((again >= 0) & (again < V)).all()
    assert again[~wrong].tolist() == token[~wrong].tolist()
    assert its[~wrong].tobytes() == logprob[~wrong].tobytes()


@pytest.mark.parametrize("scale", [1e-20, 1e4, 1e18])
def test_extreme_logits_and_settings_draw_what_may_be_drawn(scale):
    logits, _, position, history = inputs()
    logits = (logits * scale).astype(np.float32)
    mass = np.array(jax.nn.logsumexp(logits, axis=-1))
    asked = {
        "temperature": [1e-38, 1e6][scale < 1],
        "repetition_penalty": 100.0,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {i: 100.0 for i in range(300)},
        "allowed_token_ids": range(1, 300, 2),
        "top_p": 1e-6,
        "min_p": 1.0,
    }
    token, logprob = run(
        settings_for([asked] * ROWS), (logits, mass, position, history)
    )
    assert (token % 2 == 1).all() and np.isfinite(logprob).all()


def test_of_equal_scores_the_first_is_drawn():
    logits, _, position, history = inputs()
    logits = np.round(logits)
    logits[:, [40, 50, 60]] = 99
    mass = np.array(jax.nn.logsumexp(logits, axis=-1))
    for variant in ORDER:
        one = KINDS[variant][0] | {"temperature": 0.0}
        given = logits, mass, position, History(0 * history.tokens, history.prompt)
        token, _ = run(settings_for([one] * ROWS), given, variant)
        assert set(token) == {40}


def test_the_full_variant_needs_rules_and_a_history():
    logits, mass, position, history = inputs()
    settings = settings_for([{}] * ROWS)
    for sampling, past in (
        (sampling_of(settings), None),
        (make_sampling(CONFIG, settings), history),
    ):
        with pytest.raises(ValueError, match="FULL needs rules and a history"):
            draw(logits, mass, sampling, position, past, variant=Variant.FULL)


def test_samples_of_a_prompt_draw_apart_and_the_first_as_one_alone():
    given = tuple(jax.tree.map(lambda x: np.repeat(x[:1], 512, axis=0), inputs(1)))
    seeds = [{"temperature": 3.0, "seed": i} for i in range(512)]
    alone, _ = run(settings_for(seeds), given)
    [several] = settings_for([{"temperature": 3.0, "n": 5, "sample": 0}])
    samples = several.samples()
    assert [(one.n, one.sample) for one in samples] == [(1, j) for j in range(5)]

    def of_sample(j):
        each = [dataclasses.replace(samples[j], seed=i) for i in range(512)]
        return run(each, given)[0]

    drawn = [of_sample(j) for j in range(5)]
    assert drawn[0].tolist() == alone.tolist()
    p = np.exp(given[0][0] / 3.0)
    chance = ((p / p.sum()) ** 2).sum()
    for i in range(5):
        for j in range(i):
            equal = (drawn[i] == drawn[j]).mean()
            assert equal < chance + 5 * np.sqrt(chance / 512)
    # Sample 3 of a request is what a request of that sample alone draws.
    [one] = settings_for([{"temperature": 3.0, "sample": 3, "seed": 7}])
    assert run([one], given, rows=[0])[0] == drawn[3][7]


# What is told of tokens.

tell = jax.jit(alternatives)


@pytest.mark.parametrize("v", [1, 19, 20, 21, V])
def test_alternatives_are_the_most_probable(v):
    rng = np.random.default_rng(v)
    logits = np.round(rng.normal(size=(ROWS, v)), 1).astype(np.float32)  # with ties
    mass = np.array(jax.nn.logsumexp(logits, axis=-1))
    token = rng.integers(v, size=ROWS).astype(np.int32)
    found = tell(logits, mass, token)
    order = np.argsort(-logits, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.ids, order[:, :20])
    expected = np.take_along_axis(logits, order[:, :20], axis=-1) - mass[:, None]
    np.testing.assert_array_equal(found.logprobs, expected)
    np.testing.assert_array_equal(found.rank, (order == token[:, None]).argmax(axis=1))
    assert (
        np.asarray(found.logprob).tobytes()
        == (logits[np.arange(ROWS), token] - mass).tobytes()
    )


def test_alternatives_agree_with_the_draw_and_are_each_rows_own():
    given = inputs()
    settings, _ = mixed(ROWS)
    token, logprob = run(settings, given)
    logits, mass = given[:2]
    logits[0, 9:] = -np.inf  # fewer than 20 that are possible at all
    found = tell(logits, mass, token)
    assert np.asarray(found.logprob)[1:].tobytes() == logprob[1:].tobytes()
    assert len(set(np.asarray(found.ids[0]).tolist())) == 20
    rows = np.random.default_rng(0).permutation(ROWS)[:7]
    other = jax.jit(alternatives)(logits[rows], mass[rows], token[rows])
    of_rows = jax.tree.map(lambda x: np.asarray(x)[rows], found)
    jax.tree.map(np.testing.assert_array_equal, other, of_rows)


def test_settings_of_samples_keep_the_rest():
    one = Settings(n=3, sample=2, seed=9, logit_bias={1: 2.0}, echo=True)
    for j, each in enumerate(one.samples()):
        assert each == dataclasses.replace(one, n=1, sample=2 + j)


def test_no_variant_rounds_otherwise():
    """Scores that are equal but for rounding are drawn alike by all variants."""
    rows, rng = 4096, np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, vocab_size=8, eos_ids=())
    temperature = rng.uniform(0.3, 3, rows).astype(np.float32)
    asked = {"temperature": temperature, "seed": np.arange(rows)}
    settings = settings_of(config, None, rows, asked)
    sampling = make_sampling(config, settings)
    rules = make_rules(config, settings, stop_table(settings))
    sampling = dataclasses.replace(sampling, rules=rules)
    position = np.full(rows, 9, np.int32)
    history = History(np.zeros((rows, CONTEXT), np.int32), 0 * position)
    show = jax.jit(functools.partial(noise, own=8, share=None))
    chance = np.asarray(show(sampling, position))
    # Logits that make up for the noise.
    logits = ((5 - chance) * temperature[:, None]).astype(np.float32)
    factor = np.float32(1) / temperature[:, None]
    expected = (logits * factor + chance).argmax(axis=1)
    assert len(np.unique(expected)) == 8
    args = logits, np.zeros(rows, np.float32), sampling, position, history
    for variant in ORDER[1:]:
        token, _ = jitted(*args, variant=variant)
        assert token.tolist() == expected.tolist()
