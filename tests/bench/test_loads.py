"""The loads are what they are said to be, and the same for every engine."""

import numpy as np
import pytest

from polarjax.bench import loads

VOCAB, LONGEST = 32000, 16384  # tokens: nothing is cut


def lengths(name, requests=4000, **settings):
    load = loads.make_load(name, requests, VOCAB, LONGEST, **settings)
    return np.array([[len(ask.prompt), ask.new_tokens] for ask in load]).T


# Mean, median, 90th and 99th percentile, of prompts and of answers. A mean of 4,000 is
# within 3 % of the load's own, and a 99th percentile within 7 %, by three deviations.
CHAT = (231, 150, 575, 947), (204, 143, 464, 916)
UNIFORM = (562, 562, 931.6, 1014.8), (562, 562, 931.6, 1014.8)
REASONING = (577, 400, 1240, 2850), (2580, 1980, 5280, 9960)
LONG = (5120, 5120, 7577.6, 8130.6), (576, 576, 934.4, 1015)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("chat", CHAT), ("uniform", UNIFORM), ("reasoning", REASONING), ("long", LONG)],
)
def test_lengths_are_distributed_as_published(name, wanted):
    for found, (mean, *points) in zip(lengths(name), wanted, strict=True):
        assert found.mean() == pytest.approx(mean, rel=0.035)
        shown = np.percentile(found, [50, 90, 99])
        np.testing.assert_allclose(shown, points, rtol=0.08)


def test_lengths_keep_within_their_limits():
    prompts, new = lengths("chat")
    assert prompts.min() >= 4 and prompts.max() <= 1024 and new.min() >= 4
    assert (prompts + new).max() <= 2048
    assert abs(np.corrcoef(prompts, new)[0, 1]) < 0.05
    prompts, new = lengths("reasoning")
    assert prompts.max() <= 4096 and new.min() >= 64 and new.max() <= 12000
    for found in lengths("uniform"):
        assert (found.min(), found.max()) == (100, 1024)


def test_a_system_prompt_is_shared():
    load = loads.make_load("shared-prefix", 400, VOCAB, LONGEST)
    heads = {ask.prompt[: loads.PREFIX_TOKENS].tobytes() for ask in load}
    assert len(heads) == loads.PREFIXES
    tails = np.array([len(ask.prompt) - loads.PREFIX_TOKENS for ask in load])
    assert tails.min() >= 4 and tails.mean() == pytest.approx(231, rel=0.15)
    ends = {ask.prompt[loads.PREFIX_TOKENS :].tobytes() for ask in load}
    assert len(ends) == 400


def test_a_load_is_a_function_of_its_arguments():
    def same(a, b):
        pairs = list(zip(a, b, strict=False))
        assert pairs
        return all(
            np.array_equal(x.prompt, y.prompt) and x.new_tokens == y.new_tokens
            for x, y in pairs
        )

    whole = loads.make_load("chat", 64, VOCAB, LONGEST, seed=3)
    assert same(whole, loads.make_load("chat", 64, VOCAB, LONGEST, seed=3))
    assert same(whole, loads.make_load("chat", 20, VOCAB, LONGEST, seed=3))
    assert not same(whole, loads.make_load("chat", 64, VOCAB, LONGEST, seed=4))
    # Shorter answers are asked for after the same prompts.
    short = loads.make_load("chat", 64, VOCAB, LONGEST, seed=3, most_new_tokens=8)
    assert max(ask.new_tokens for ask in short) == 8
    for a, b in zip(whole, short, strict=True):
        assert np.array_equal(a.prompt, b.prompt)
        assert b.new_tokens == min(a.new_tokens, 8)


@pytest.mark.parametrize("name", ["chat", "shared-prefix"])
def test_the_same_lengths_are_drawn_with_other_ids(name):
    first, second = (
        loads.make_load(name, 40, VOCAB, LONGEST, drawing=drawing) for drawing in (0, 1)
    )
    for a, b in zip(first, second, strict=True):
        assert len(a.prompt) == len(b.prompt) and a.new_tokens == b.new_tokens
        assert (a.prompt == b.prompt).mean() < 0.5  # a short one has some by chance
    heads = [{ask.prompt[:16].tobytes() for ask in each} for each in (first, second)]
    assert not heads[0] & heads[1]


def test_ids_are_drawn_from_the_whole_vocabulary_but_special_ones():
    load = loads.make_load("uniform", 40, 50, LONGEST, special=(0, 7, 49))
    found = np.concatenate([ask.prompt for ask in load])
    assert found.dtype == np.int32
    counts = np.bincount(found, minlength=50)
    assert not counts[[0, 7, 49]].any()
    usual = np.delete(counts, [0, 7, 49])
    assert usual.min() > 0.8 * usual.mean() and usual.max() < 1.2 * usual.mean()


@pytest.mark.parametrize("name", loads.NAMES)
@pytest.mark.parametrize("context", [2, 5, 512, 3000])
def test_only_what_the_context_has_no_room_for_is_cut(name, context):
    whole = loads.make_load(name, 50, VOCAB, LONGEST)
    cut = loads.make_load(name, 50, VOCAB, context)
    for asked, got in zip(whole, cut, strict=True):
        size, left = len(asked.prompt) + asked.new_tokens, len(got.prompt)
        assert 1 <= left <= context - got.new_tokens
        assert got.cut == (size > context) and not asked.cut
        if size <= context:
            assert np.array_equal(got.prompt, asked.prompt)
            assert got.new_tokens == asked.new_tokens
            continue
        assert got.new_tokens >= min(asked.new_tokens, context // 2)
        if name == "shared-prefix":  # the system prompt is cut first
            half = (context - got.new_tokens + 1) // 2
            half = min(half, loads.PREFIX_TOKENS)
            assert np.array_equal(got.prompt[:half], asked.prompt[:half])
            own = asked.prompt[loads.PREFIX_TOKENS :][: left - half]
            assert np.array_equal(got.prompt[half:], own)
        else:
            assert left + got.new_tokens == context
            assert np.array_equal(got.prompt, asked.prompt[:left])


def test_sizes_are_counted():
    load = [
        loads.Ask(np.zeros(5, np.int32), 2),
        loads.Ask(np.zeros(3, np.int32), 9, cut=True),
    ]
    assert loads.sizes(load) == loads.Sizes(2, 8, 11, 12, 1)


def test_arrivals_are_a_poisson_process():
    at = np.array(loads.arrivals(4000, 8.0, seed=1))
    gaps = np.diff(at, prepend=0)
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.07)  # as of an exponential
    assert np.percentile(gaps, 50) == pytest.approx(np.log(2) / 8, rel=0.08)
    np.testing.assert_allclose(loads.arrivals(4000, 16.0, seed=1), at / 2)
    assert loads.arrivals(3, float("inf")) == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "chatter"}, "no load 'chatter': there are chat, uniform"),
        ({"requests": 0}, "requests must be a positive integer, got 0"),
        ({"most_new_tokens": 0}, "most_new_tokens must be a positive integer, got 0"),
        ({"context": 1}, "context must be 2 or more, got 1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"special": range(VOCAB)}, "all 32000 token ids are special"),
    ],
)
def test_what_makes_no_load(change, message):
    given = {"name": "chat", "requests": 4, "vocab_size": VOCAB, "context": 512}
    with pytest.raises(ValueError, match=message):
        loads.make_load(**{**given, **change})


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_is_above_0(rate):
    with pytest.raises(ValueError, match="rate must be above 0"):
        loads.arrivals(3, rate)
