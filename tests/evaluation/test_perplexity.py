import gzip
import math

import numpy as np
import pytest

import polarjax
from polarjax.evaluation import (
    Perplexity,
    perplexity,
    rolling_items,
    strided_items,
    window_items,
)
from tests.models import LLAMA, OPT, random_params


def text(config, n, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=n)


def dense(params, items, **options):
    return perplexity(params, items, {"Dense": polarjax.Dense()}, **options)["Dense"]


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_dense_windows(config):
    params = random_params(config)
    tokens = text(config, 24 * 5 + 7)
    windows = tokens[: 24 * 5].reshape(5, 24)
    logits = np.asarray(polarjax.logits(params, windows), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp[:, :-1], windows[:, 1:, None], axis=-1)[..., 0]
    found = dense(params, window_items(tokens, 24, 8), batch=4)
    np.testing.assert_allclose(found.nll, nll[:, 7:].sum(1), rtol=1e-5)
    assert found.scored.tolist() == [16] * 5 and found.density == 1
    whole = dense(params, window_items(tokens, 24), batch=2, mode="mask")
    np.testing.assert_allclose(whole.nll, nll.sum(1), rtol=1e-5)
    np.testing.assert_allclose(whole.value, math.exp(nll.mean()), rtol=1e-5)


def test_a_policy_is_measured_at_its_density():
    params = random_params(LLAMA, routers=True)
    windows = window_items(text(LLAMA, 96), 24, 8)
    found = perplexity(params, windows, {"Polar": polarjax.Polar(0.5)})["Polar"]
    assert found.density == pytest.approx((1 + 3 * 0.5) / 4)
    assert found.value != pytest.approx(dense(params, windows).value, rel=1e-3)


def test_strided_windows_score_every_token_once():
    tokens = np.arange(100)
    items = strided_items(tokens, window=24, stride=10, prefix=4)
    scored = [item.tokens[-item.scored :] for item in items]
    assert np.concatenate(scored).tolist() == list(range(4, 100))
    assert [item.scored for item in items[1:-1]] == [10] * (len(items) - 2)
    assert all(len(item.tokens) == 24 for item in items)
    # All but the first window's tokens have at least window - stride before them.
    assert all(len(item.tokens) - item.scored >= 14 for item in items[1:])
    [short] = strided_items(tokens[:9], window=24, stride=10)
    assert short.tokens == tuple(range(9)) and short.scored == 8


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
def test_rolling_windows_are_lm_evals(count):
    tokens = list(range(100, 100 + count))
    items = rolling_items(tokens, 8, 5)
    scored = [token for item in items for token in item.tokens[-item.scored :]]
    assert scored == tokens
    assert items[0].tokens[0] == 5
    utils = pytest.importorskip("lm_eval.utils", reason="needs it: pip install lm-eval")
    windows = utils.get_rolling_token_windows(
        tokens, prefix_token=5, max_seq_len=8, context_len=1
    )
    pairs = map(utils.make_disjoint_window, windows)
    expected = [((*context, *new), len(new)) for context, new in pairs]
    assert [(item.tokens, item.scored) for item in items] == expected


def test_ratio_and_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(300, 20, size=40)
    scored = np.full(40, 100)
    worse = Perplexity(base + rng.normal(10, 3, size=40), scored)
    ratio, low, high = worse.ratio(Perplexity(base, scored))
    difference = (worse.nll - base) / 100
    assert ratio == pytest.approx(math.exp(difference.mean()))
    # The windows differ by 20, their pairs by 3: the interval is that of the pairs.
    error = difference.std() / math.sqrt(40)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert low < ratio < high
    value, low, high = worse.interval()
    assert value == pytest.approx(worse.value) and low < value < high
    # A window of twice the tokens counts twice.
    uneven = Perplexity(np.array([100.0, 400.0]), np.array([100, 200]))
    assert uneven.value == pytest.approx(math.exp(500 / 300))
    assert uneven.interval().value == pytest.approx(uneven.value)


def test_errors():
    params, tokens = random_params(LLAMA), text(LLAMA, 400)
    with pytest.raises(ValueError, match="400 tokens are less than one window of 500"):
        window_items(tokens, 500)
    for prefix in (0, 16):
        with pytest.raises(ValueError, match="prefix must be from 1 to 15"):
            window_items(tokens, 16, prefix)
    for cut in (window_items, lambda *given: strided_items(*given, 1)):
        with pytest.raises(ValueError, match="window must be an integer of at"):
            cut(tokens, 1)
    with pytest.raises(ValueError, match="stride must be from 1 to 15, got 16"):
        strided_items(tokens, 16, 16)
    with pytest.raises(ValueError, match="8 tokens, after 8, leave none to score"):
        strided_items(tokens[:8], 16, 4, 8)
    with pytest.raises(ValueError, match="the text is empty"):
        rolling_items([], 8, 0)
    with pytest.raises(ValueError, match="window at token 0 has 130 tokens, the mod"):
        dense(params, window_items(tokens, 130))


@pytest.mark.parametrize(
    ("smollm2_pair", "count", "width"),
    [(6, 2048, 1024), pytest.param(30, 20480, 2048, marks=pytest.mark.slow)],
    indirect=["smollm2_pair"],
)
def test_smollm2_perplexity_equals_transformers(
    smollm2_pair, shared_data, count, width
):
    smollm2, smollm2_torch = smollm2_pair
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    path = shared_data / "text" / "wikitext2_raw_test.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        words = file.read(8 * count)
    tokenizer = polarjax.engine.Tokenizer.load(smollm2.config)
    tokens = np.array(tokenizer.encode(words)[:count])
    assert len(tokens) == count
    windows = window_items(tokens, width)
    ours = dense(smollm2, windows, mode="mask", batch=1)
    nll = []
    with torch.no_grad():
        for window in tokens.reshape(-1, width):
            ids = torch.tensor(window[None])
            nll.append(smollm2_torch(ids, labels=ids).loss.item())
    expected = math.exp(np.mean(nll))
    assert abs(ours.value / expected - 1) < 1e-3
    if smollm2.config.layers == 30:
        assert 5 < ours.value < 60
